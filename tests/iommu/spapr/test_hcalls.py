"""The TCE hypercalls: results, errors and their order, notifications and undo."""

from __future__ import annotations

import errno

import pytest

from tests.acceleration import kvm
from tests.machine.boards import LIOBN, LIST, Follower, pseries, put_list, tce
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, HReturn
from vfio_model.ranges import U64_MAX
from vfio_model.trace import ListTrace

pytestmark = pytest.mark.machine

SUCCESS, PARAMETER = HReturn.H_SUCCESS, HReturn.H_PARAMETER
PUT, GET, STUFF, INDIRECT = HCall.H_PUT_TCE, HCall.H_GET_TCE, HCall.H_STUFF_TCE, HCall.H_PUT_TCE_INDIRECT
LAST_PAGE = (1 << 30) - 4096


def test_put_then_get_gives_the_tce_and_rounds_the_address_down() -> None:
    machine = pseries()
    if kvm():  # the kernel refuses an address that is not a page's
        assert machine.hcall(PUT, LIOBN, 0x1FFF, 0x5678_9ABF) == (PARAMETER, [])
    assert machine.hcall(PUT, LIOBN, 0x1000 if kvm() else 0x1FFF, 0x5678_9ABF) == (SUCCESS, [])
    assert machine.hcall(GET, LIOBN, 0x1001) == (SUCCESS, [0x5678_9ABF])
    assert machine.translate(LIOBN, 0x1234) == (0x5678_9000, 3, 0xFFF)


@pytest.mark.parametrize(
    ("liobn", "ioba"),
    [(LIOBN + 1, 0), (0x1_8000_0000, 0), (LIOBN, 1 << 30), (LIOBN, U64_MAX)],
    ids=["disabled table", "high bits in the liobn", "behind the window", "far behind"],
)
def test_put_and_get_outside_a_window_are_h_parameter(liobn: int, ioba: int) -> None:
    machine = pseries()
    assert machine.hcall(PUT, liobn, ioba, 3) == (PARAMETER, [])
    assert machine.hcall(GET, liobn, ioba) == (PARAMETER, [])


def test_an_address_below_the_window_wraps_to_h_parameter() -> None:
    machine = pseries(dma=DmaOptions(dma_win_addr=0x8000_0000))
    assert machine.hcall(PUT, LIOBN, 0x7FFF_F000, 0x1003) == (PARAMETER, [])
    assert machine.hcall(PUT, LIOBN, 0x8000_0000, 0x1003) == (SUCCESS, [])
    assert machine.translate(LIOBN, 0x8000_0123) == (0x1000, 3, 0xFFF)


def test_stuff_stops_at_the_windows_end_and_keeps_what_it_did() -> None:
    machine = pseries()
    assert machine.hcall(STUFF, LIOBN, LAST_PAGE - 4096, 0x7000, 3) == (PARAMETER, [])
    kept = 0 if kvm() else 0x7000  # the kernel stores nothing of what leaves the window
    assert tce(machine, LAST_PAGE - 4096) == tce(machine, LAST_PAGE) == kept


@pytest.mark.parametrize("npages", [0, (1 << 18) + 1, U64_MAX])
def test_stuff_of_nothing_or_of_more_than_the_table_is_h_parameter(npages: int) -> None:
    machine = pseries()
    assert machine.hcall(STUFF, LIOBN, 0, 0x7003, npages) == (PARAMETER, [])
    assert tce(machine, 0) == 0


def test_stuff_takes_more_than_512_pages() -> None:
    machine = pseries()
    value = 0x7000 if kvm() else 0x7003  # the kernel stuffs no permission
    assert machine.hcall(STUFF, LIOBN, 0, 0x7003, 513) == (PARAMETER if kvm() else SUCCESS, [])
    assert machine.hcall(STUFF, LIOBN, 0, value, 513) == (SUCCESS, [])
    assert tce(machine, 512 * 4096) == value and tce(machine, 513 * 4096) == 0
    assert machine.hcall(STUFF, LIOBN, 0, 0, 1 << 18) == (SUCCESS, [])
    assert tce(machine, 512 * 4096) == 0


def test_indirect_reads_a_big_endian_list() -> None:
    machine = pseries()
    tces = [0x1_2345_6000 + i * 4096 | i % 4 for i in range(512)]
    put_list(machine, tces)
    assert machine.hcall(INDIRECT, LIOBN, 0x3000, LIST, 512) == (SUCCESS, [])
    assert [tce(machine, 0x3000 + i * 4096) for i in range(512)] == tces
    assert tce(machine, 0x3000 + 512 * 4096) == 0


@pytest.mark.parametrize(
    ("gpa", "npages"), [(LIST, 0), (LIST, 513), (LIST + 8, 1), (LIST + 3, 1)], ids=["none", "513", "+8", "+3"]
)
def test_indirect_refuses_a_bad_list(gpa: int, npages: int) -> None:
    machine = pseries()
    put_list(machine, [0x1003] * 2)
    assert machine.hcall(INDIRECT, LIOBN, 0, gpa, npages) == (PARAMETER, [])
    assert tce(machine, 0) == 0


def test_indirect_past_the_end_keeps_what_it_did_and_says_so_in_the_trace() -> None:
    machine = pseries()
    put_list(machine, [0x1003, 0x2003, 0x3003])
    assert machine.hcall(INDIRECT, LIOBN, LAST_PAGE, LIST, 3) == (PARAMETER, [])
    if kvm():  # the kernel stores nothing of what leaves the window, and QEMU hears nothing of it
        assert tce(machine, LAST_PAGE) == 0
        return
    assert tce(machine, LAST_PAGE) == 0x1003
    assert isinstance(machine.trace, ListTrace)
    line = machine.trace.named("spapr_iommu_pci_indirect")[-1]
    assert (line["iobaN"], line["tceN"], line["ret"]) == (0, 0x2003, -4)


def test_the_trace_of_a_stuff_gives_the_address_behind_it() -> None:
    machine = pseries()
    machine.hcall(STUFF, LIOBN, 0x5000, 0, 16)
    assert isinstance(machine.trace, ListTrace)
    if kvm():  # what the host answers is another event
        answered = {"nr": STUFF, "liobn": LIOBN, "ioba": 0x5000, "ret": 0}
        assert machine.trace.named("kvm_hcall") == [answered] and not machine.trace.named("spapr_iommu_pci_stuff")
        return
    assert machine.trace.named("spapr_iommu_pci_stuff")[-1] == {
        "liobn": LIOBN,
        "ioba": 0x15000,
        "tcevalue": 0,
        "npages": 16,
        "ret": 0,
    }


def test_without_multi_tce_only_get_and_put_exist() -> None:
    machine = pseries(multi_tce=False)
    assert machine.hcall(STUFF, LIOBN, 0, 0, 1)[0] == HReturn.H_FUNCTION
    assert machine.hcall(INDIRECT, LIOBN, 0, LIST, 1)[0] == HReturn.H_FUNCTION
    assert machine.hcall(PUT, LIOBN, 0, 0x1003)[0] == SUCCESS


def test_an_unknown_hypercall_is_h_function() -> None:
    assert pseries().hcall(0x9999) == (HReturn.H_FUNCTION, [])


@pytest.mark.parametrize("by_run", [True, False])
def test_a_hypercall_tells_its_followers_once_and_flushes_once(by_run: bool) -> None:
    machine = pseries()
    follower = Follower(machine.tables[LIOBN], by_run=by_run)
    put_list(machine, [0x40000 + i * 4096 | i % 4 for i in range(300)])
    machine.hcall(INDIRECT, LIOBN, 0x9000, LIST, 300)
    assert follower.shadow == follower.expected()
    assert follower.flushes == 1
    machine.hcall(STUFF, LIOBN, 0xA000, 0, 100)
    assert follower.shadow == follower.expected()
    assert follower.flushes == 2
    if by_run:
        assert follower.calls <= 2
    machine.hcall(PUT, LIOBN, 0xA000, 0x1001)
    assert follower.shadow == follower.expected()
    assert follower.flushes == 3


def test_a_failing_call_beyond_the_table_still_flushes_what_it_did() -> None:
    machine = pseries()
    follower = Follower(machine.tables[LIOBN])
    assert machine.hcall(STUFF, LIOBN, LAST_PAGE, 0x1003, 9)[0] == PARAMETER
    assert follower.shadow == {LAST_PAGE: (0x1000, 3)}
    assert follower.flushes == 1
    assert machine.hcall(PUT, LIOBN, 1 << 30, 0x1003)[0] == PARAMETER
    assert follower.flushes == 1


@pytest.mark.parametrize(
    ("code", "ret"),
    [
        (errno.EIO, HReturn.H_HARDWARE),
        (errno.EINVAL, HReturn.H_HARDWARE),
        (errno.ENOMEM, HReturn.H_RESOURCE),
        (errno.ENOSPC, HReturn.H_RESOURCE),
    ],
)
def test_a_refused_change_is_undone_everywhere(code: int, ret: int) -> None:
    machine = pseries()
    follower = Follower(machine.tables[LIOBN])
    put_list(machine, [0x80000 + i * 4096 | 3 for i in range(40)])
    machine.hcall(INDIRECT, LIOBN, 0, LIST, 40)
    before = bytes(machine.tables[LIOBN].entries[:64])
    calls = (
        (PUT, LIOBN, 0x3000, 0xAAAA_A003),
        (STUFF, LIOBN, 0x1E000, 0, 30),
        (STUFF, LIOBN, 0x1E000, 0xBBBB_B001, 30),
        (INDIRECT, LIOBN, 0x5000, LIST, 40),
    )
    for nr, *args in calls:
        follower.fail = [OSError(code, "the host cannot")]
        assert machine.hcall(nr, *args) == (ret, [])
        assert bytes(machine.tables[LIOBN].entries[:64]) == before
        assert follower.shadow == follower.expected()


def test_undo_tells_followers_only_of_entries_that_changed() -> None:
    machine = pseries()
    put_list(machine, [0x1003] * 32)
    machine.hcall(INDIRECT, LIOBN, 0, LIST, 32)
    machine.hcall(PUT, LIOBN, 0x4000, 0x9003)
    follower = Follower(machine.tables[LIOBN])
    seen: list[int] = []
    follower._one = lambda notifier, entry: seen.append(entry.iova)  # type: ignore[method-assign]
    follower.notifier.fn, follower.notifier.fn_run = follower._one, None
    follower.fail = [OSError(errno.EIO, "no")]
    machine.hcall(STUFF, LIOBN, 0, 0x1003, 32)
    assert seen[32:] == [0x4000]


def test_an_undo_that_is_refused_too_keeps_the_first_error() -> None:
    machine = pseries()
    follower = Follower(machine.tables[LIOBN])
    follower.fail = [OSError(errno.ENOMEM, "first"), OSError(errno.EIO, "second")]
    assert machine.hcall(PUT, LIOBN, 0, 0x1003)[0] == HReturn.H_RESOURCE
    assert tce(machine, 0) == 0
