"""Hypercalls at one end, the host's tables at the other, everything in one process."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from tests.acceleration import kvm
from tests.vfio.direct_chain import DEVICE, GROUP, LIOBN0, LIOBN1, MIB, Chain, TooHard, host_gone
from vfio_model.host.host import Host
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.iommu.spapr.acceleration import ACCELERATED
from vfio_model.iommu.spapr.regs import HReturn, RtasStatus
from vfio_model.uapi.vfio import Ioctl
from vfio_model.vfio.ioctl import BatchError

pytestmark = pytest.mark.machine

DMA64 = 1 << 59
MAP, UNMAP, CREATE = Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA, Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE
REGISTER = Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY


def failing(cmd: int, number: int) -> Callable[[int], None]:
    """Makes ``cmd`` fail with errno ``number``, as a batch does, having done nothing; the host answers no hypercall in
    its place.
    """

    def fail(asked: int) -> None:
        if asked in ACCELERATED:
            raise TooHard
        if asked == cmd:
            raise BatchError(number, "injected", 0)

    return fail


def test_setting_up_preregisters_all_ram_and_replaces_the_default_window() -> None:
    chain = Chain(window=4 * MIB)
    assert chain.host_windows() == [(0, 4 * MIB - 1, 12)]
    assert chain.mm == (32 * MIB >> 16) + 2  # RAM, and one 64 KiB page of table in hardware and one in user space
    cmds = [cmd for cmd, _ in chain.port.calls]
    assert cmds.index(REGISTER) < cmds.index(Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO) < cmds.index(CREATE)


def test_closing_gives_everything_back() -> None:
    chain = Chain()
    chain.put(0, 0x3)
    assert chain.container is not None
    chain.container.close()
    assert chain.mm == 0
    again = chain.connect()  # neither the group nor the memory is taken
    assert chain.host_view() == chain.guest_view() != {}
    again.close()
    assert chain.mm == 0


def test_put_stuff_and_indirect_reach_the_host_in_one_message_each() -> None:
    chain = Chain()
    chain.port.calls.clear()
    assert chain.put(0x1000, 0x5003) == 0
    assert chain.indirect(0x10000, [0x9000 + (page << 12) | 1 + page % 3 for page in range(512)]) == 0
    assert chain.host_view() == chain.guest_view()
    assert chain.stuff(0x10000, 0, 512) == 0
    assert chain.host_view() == chain.guest_view() == {0x1000: (0x5000, 3)}
    if chain.kvm is not None:  # the host is asked the hypercall itself
        assert chain.port.calls == [] and [ret for _, ret in chain.port.hcalls] == [0, 0, 0]
        return
    assert [cmd for cmd, _ in chain.port.calls].count(UNMAP) == 1
    assert len(chain.port.calls) <= 5


def test_a_tce_that_points_outside_ram_is_stored_and_not_mapped() -> None:
    chain = Chain()
    assert chain.put(0x1000, 0x4000_0000_0003) == 0
    assert chain.host_view() == {}
    assert chain.trace.named("vfio_error")


def test_a_window_in_large_pages_is_mapped_in_the_hosts_smaller_ones() -> None:
    chain = Chain(page_size=1 << 16)  # RAM backed by 64 KiB pages: the host can map no larger ones
    assert chain.create_window(24, 25) == [0, LIOBN1, DMA64 >> 32, 0]
    assert chain.host_windows()[1] == (DMA64, DMA64 + 32 * MIB - 1, 16)
    assert chain.put(DMA64 + 16 * MIB, 3, LIOBN1) == 0
    assert chain.host_view(16) == chain.guest_view(16)
    assert len(chain.host_view(16)) == 256


def test_a_window_in_large_pages_keeps_them_where_ram_is_backed_so() -> None:
    chain = Chain(page_size=16 * MIB)
    chain.create_window(24, 25)
    assert chain.host_windows()[1][2] == 24
    assert chain.put(DMA64, 16 * MIB | 3, LIOBN1) == 0
    assert chain.host_view(16) == chain.guest_view(16)


def test_removing_and_creating_windows_follows_into_the_host() -> None:
    chain = Chain()
    chain.put(0, 0x7003)
    assert chain.create_window(16, 24)[0] == 0
    assert chain.remove_window(LIOBN0) == 0
    assert chain.host_windows() == [(DMA64, DMA64 + 16 * MIB - 1, 16)]
    assert chain.reset_windows() == 0
    assert chain.host_windows() == [(0, 4 * MIB - 1, 12)]
    assert chain.host_view() == chain.guest_view() == {}


def test_a_window_that_the_host_cannot_give_is_undone_and_answered_with_hw_error() -> None:
    chain = Chain(group=GroupSpec(26, (DeviceSpec(DEVICE),), max_windows=1))
    before = chain.host_windows()
    rets = chain.create_window(16, 24)
    assert rets[0] == RtasStatus.HW_ERROR
    assert not chain.machine.tables[LIOBN1].enabled
    assert chain.host_windows() == before
    assert chain.put(0x2000, 0x3003) == 0  # the window that is there goes on
    assert chain.host_view() == chain.guest_view()


def test_a_window_whose_table_exceeds_the_memlock_limit_is_refused_and_costs_nothing() -> None:
    in_kernel = 2 if kvm() else 0  # the default window's table in the kernel: a page, and a page of pointers
    chain = Chain(memlock=32 * MIB + (3 + in_kernel) * (1 << 16))
    before = chain.mm
    assert chain.create_window(12, 24)[0] == RtasStatus.HW_ERROR
    assert chain.mm == before


def test_a_map_that_the_host_refuses_is_undone_and_the_hypercall_fails() -> None:
    chain = Chain()
    chain.put(0x1000, 0x5003)
    chain.port.fail = failing(MAP, errno.EIO)
    assert chain.put(0x2000, 0x6003) == HReturn.H_HARDWARE
    chain.port.fail = lambda _cmd: None
    assert chain.guest_view() == chain.host_view() == {0x1000: (0x5000, 3)}


def test_a_refused_batch_leaves_the_entries_that_were_there() -> None:
    chain = Chain()
    old = [0x10_0000 + (page << 12) | 3 for page in range(64)]
    assert chain.indirect(0, old) == 0
    before = chain.host_view()
    refused = iter([True])

    def fail(cmd: int) -> None:
        if cmd in ACCELERATED:
            raise TooHard
        if cmd == MAP and next(refused, False):
            raise BatchError(errno.ENOMEM, "injected", 0)

    chain.port.fail = fail
    assert chain.indirect(0, [0x20_0000 + (page << 12) | 1 for page in range(64)]) == HReturn.H_RESOURCE
    assert chain.guest_view() == chain.host_view() == before


def test_a_lost_host_lets_hypercalls_succeed_and_a_new_container_replays_everything() -> None:
    chain = Chain()
    chain.put(0x1000, 0x5003)
    chain.create_window(16, 24)
    chain.port.fail = host_gone
    assert chain.put(0x2000, 0x6003) == 0
    assert chain.put(DMA64, 0x10001, LIOBN1) == 0
    assert chain.stuff(0x1000, 0, 1) == 0
    assert chain.container is not None and chain.container.lost
    assert chain.remove_window(LIOBN1) == 0  # windows come and go without a host
    assert chain.create_window(12, 22)[0] == 0
    assert chain.put(DMA64 + 0x3000, 0x9001, LIOBN1) == 0

    chain.come_back(Host(HostTopology((GroupSpec(26, (DeviceSpec(DEVICE),)),), domain_bytes=16 * MIB)))
    assert chain.host_view() == chain.guest_view() == {0x2000: (0x6000, 3), DMA64 + 0x3000: (0x9000, 1)}


def test_a_host_that_is_lost_while_a_window_is_created_leaves_the_guest_its_window() -> None:
    chain = Chain()
    chain.port.fail = host_gone
    assert chain.create_window(16, 24)[0] == 0
    assert chain.container is not None and chain.container.lost


def test_connecting_without_enough_memlock_fails_and_leaves_nothing_open() -> None:
    chain = Chain(memlock=16 * MIB, connect=False)
    with pytest.raises(OSError, match=r"memlock|limit") as caught:
        chain.connect()
    assert caught.value.errno == errno.ENOMEM
    assert chain.mm == 0
    assert chain.port.open(GROUP)  # not busy


def test_a_window_that_stayed_alone_at_its_address_is_replayed_there() -> None:
    chain = Chain()
    assert chain.create_window(16, 24)[0] == 0
    assert chain.put((1 << 59) + 0x10000, 0x10003, LIOBN1) == 0
    assert chain.remove_window(LIOBN0) == 0
    before, locked = chain.host_view(), chain.mm
    assert chain.container is not None
    chain.container.close()
    assert chain.mm == 0
    chain.container = chain.connect()
    assert chain.host_view() == before
    assert [(window.min_iova, window.max_iova) for window in chain.container.backend.windows] == [
        (1 << 59, (1 << 59) + (1 << 24) - 1)
    ]
    assert chain.mm == locked
