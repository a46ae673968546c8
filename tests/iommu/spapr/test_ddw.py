"""Dynamic DMA windows by RTAS: arguments, placement, refusals, restore rules."""

from __future__ import annotations

import errno

import pytest

from tests.machine.boards import LIOBN, LIOBN64, PE, Follower, pseries, tce
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, RtasToken
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.trace import ListTrace

pytestmark = pytest.mark.machine

QUERY, CREATE = RtasToken.IBM_QUERY_PE_DMA_WINDOW, RtasToken.IBM_CREATE_PE_DMA_WINDOW
REMOVE, RESET = RtasToken.IBM_REMOVE_PE_DMA_WINDOW, RtasToken.IBM_RESET_PE_DMA_WINDOW
HW_ERROR, PARAM_ERROR = [-1 & 0xFFFFFFFF], [-3 & 0xFFFFFFFF]
HIGH = 1 << 59


def create(machine: PseriesMachine, page_shift: int = 16, window_shift: int = 34) -> list[int]:
    return machine.rtas(CREATE, [*PE, page_shift, window_shift], 4)


def windows(machine: PseriesMachine) -> list[tuple[int, int, int]]:
    """(liobn, start, page shift) of every open window."""
    return [(t.liobn, t.bus_offset, t.page_shift) for t in machine.phb().dma.tables if t.enabled]


DEFAULT = (LIOBN, 0, 12)


def test_query_has_five_or_six_outputs() -> None:
    machine = pseries()
    assert machine.rtas(QUERY, PE, 5) == [0, 1, 0x8000_0000, 0x107, 0]
    assert machine.rtas(QUERY, PE, 6) == [0, 1, 0x20, 0, 0x107, 0]


@pytest.mark.parametrize(
    ("pgsz", "mask"), [(1 << 12 | 1 << 16, 0x3), (1 << 12 | 1 << 16 | 1 << 21 | 1 << 24, 0x107), (1 << 12, 0x1)]
)
def test_the_page_mask_is_in_the_platforms_order(pgsz: int, mask: int) -> None:
    assert pseries(dma=DmaOptions(pgsz=pgsz)).rtas(QUERY, PE, 5)[3] == mask
    assert regs.pgsz_of_mask(mask) == pgsz


def test_create_gives_the_64_bit_window_and_a_third_is_refused() -> None:
    machine = pseries()
    assert create(machine) == [0, LIOBN64, 0x0800_0000, 0]
    assert machine.tables[LIOBN64].nb_table == 1 << 18
    assert machine.rtas(QUERY, PE, 5)[1] == 0
    assert create(machine) == HW_ERROR
    assert machine.hcall(HCall.H_PUT_TCE, LIOBN64, HIGH + 0x12_0000, 0x55_0003)[0] == 0
    assert machine.translate(LIOBN64, HIGH + 0x12_0042) == (0x55_0000, 3, 0xFFFF)


@pytest.mark.parametrize(
    ("token", "args", "nret"),
    [
        (QUERY, PE, 4),
        (QUERY, PE, 7),
        (QUERY, PE[:2], 5),
        (QUERY, [0, 1, 2], 5),
        (CREATE, [*PE, 16, 34], 3),
        (CREATE, [*PE, 16], 4),
        (CREATE, [0, 1, 2, 16, 34], 4),
        (CREATE, [*PE, 13, 34], 4),
        (CREATE, [*PE, 16, 15], 4),
        (CREATE, [*PE, 77, 78], 4),
        (REMOVE, [LIOBN], 2),
        (REMOVE, [], 1),
        (REMOVE, [LIOBN64], 1),
        (REMOVE, [0x7100_0000], 1),
        (RESET, PE, 2),
        (RESET, [0, 1, 2], 1),
        (0x2001, [], 1),
    ],
)
def test_bad_calls_are_param_errors_and_write_the_status_alone(token: int, args: list[int], nret: int) -> None:
    machine = pseries()
    assert machine.rtas(token, args, nret) == PARAM_ERROR
    assert windows(machine) == [DEFAULT]


def test_without_ddw_every_call_is_a_param_error() -> None:
    machine = pseries(dma=DmaOptions(ddw=False))
    calls = ((QUERY, PE, 5), (CREATE, [*PE, 16, 34], 4), (REMOVE, [LIOBN], 1), (RESET, PE, 1))
    assert [machine.rtas(*call) for call in calls] == [PARAM_ERROR] * 4


@pytest.mark.parametrize(("page_shift", "window_shift"), [(12, 44), (12, 76), (16, 63), (24, 0xFFFF_FFFF)])
def test_a_window_whose_count_does_not_fit_is_a_hw_error(page_shift: int, window_shift: int) -> None:
    machine = pseries()
    assert create(machine, page_shift, window_shift) == HW_ERROR
    assert windows(machine) == [DEFAULT]


def test_the_first_window_after_the_default_went_takes_its_liobn_and_address() -> None:
    machine = pseries()
    assert machine.rtas(REMOVE, [LIOBN], 1) == [0]
    assert windows(machine) == [], "removing the default window restores nothing"
    assert create(machine) == [0, LIOBN, 0, 0]


def test_a_window_that_would_lie_on_the_other_is_refused() -> None:
    machine = pseries()
    create(machine)
    machine.rtas(REMOVE, [LIOBN], 1)
    assert create(machine) == HW_ERROR
    assert windows(machine) == [(LIOBN64, HIGH, 16)]


def test_the_default_window_comes_back_when_the_last_dynamic_one_goes() -> None:
    machine = pseries()
    create(machine)
    machine.rtas(REMOVE, [LIOBN], 1)
    assert machine.rtas(REMOVE, [LIOBN64], 1) == [0]
    assert windows(machine) == [DEFAULT]
    assert isinstance(machine.trace, ListTrace)
    assert machine.trace.records[-1] == ("spapr_iommu_ddw_reset", {"buid": regs.BUID_BASE, "cfgaddr": 0})


def test_a_recreated_window_0_still_counts_as_the_default_one() -> None:
    machine = pseries()
    machine.rtas(REMOVE, [LIOBN], 1)
    create(machine)
    assert machine.rtas(REMOVE, [LIOBN], 1) == [0]
    assert windows(machine) == []


def test_reset_leaves_the_empty_default_window_alone() -> None:
    machine = pseries()
    create(machine)
    machine.hcall(HCall.H_PUT_TCE, LIOBN, 0, 0x1003)
    assert machine.rtas(RESET, PE, 1) == [0]
    assert windows(machine) == [DEFAULT]
    assert tce(machine, 0) == 0


class _Host(MemoryListener):
    """Follows the PHB's windows, and refuses those above 4 GiB in the way asked for."""

    def __init__(self, machine: PseriesMachine, refuse: str) -> None:
        self.machine, self.refuse = machine, refuse
        self.sections: list[int] = []

    def region_add(self, section: MemoryRegionSection) -> None:
        if not isinstance(section.mr, IOMMUMemoryRegion):
            return
        self.sections.append(section.range.start)
        if section.range.start >= 1 << 32 and self.refuse:
            if self.refuse == "raise":
                raise OSError(errno.EINVAL, "the host has no such window")
            error = OSError(errno.ENOSPC, "the host has no such window")
            flags = IOMMUNotifierFlag.IOTLB_EVENTS
            section.mr.register_notifier(
                IOMMUNotifier(lambda n, e: None, flags, 0, section.size - 1, flush=lambda: error)
            )

    def region_del(self, section: MemoryRegionSection) -> None:
        if isinstance(section.mr, IOMMUMemoryRegion):
            self.sections.remove(section.range.start)


@pytest.mark.parametrize("refuse", ["raise", "flush"])
def test_a_window_that_the_host_refuses_is_undone(refuse: str) -> None:
    machine = pseries()
    host = _Host(machine, refuse)
    machine.phb().address_space.register_listener(host)
    assert create(machine) == HW_ERROR
    assert windows(machine) == [DEFAULT]
    assert host.sections == [0]
    host.refuse = ""
    assert create(machine)[0] == 0, "the next attempt starts clean"


def test_each_phb_has_its_own_windows_and_liobns() -> None:
    machine = pseries(phbs=4)
    buid = regs.phb_buid(3)
    assert buid == 0x0800_0000_2000_0003
    rets = machine.rtas(CREATE, [0, buid >> 32, buid & 0xFFFF_FFFF, 16, 30], 4)
    assert rets[:2] == [0, 0x8000_0301]
    assert machine.tables[0x8000_0300].enabled
    assert windows(machine) == [DEFAULT]


def test_followers_of_the_default_window_do_not_hear_of_the_other() -> None:
    machine = pseries()
    follower = Follower(machine.tables[LIOBN])
    create(machine)
    machine.hcall(HCall.H_PUT_TCE, LIOBN64, HIGH, 0x1_0003)
    assert (follower.calls, follower.flushes) == (0, 0)
