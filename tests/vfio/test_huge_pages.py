"""Huge pages behind guest RAM: which IOMMU pages they allow, from the guest's window to the host's table."""

from __future__ import annotations

import errno
import mmap
import os
import sys
from collections.abc import Sequence

import pytest

from tests.acceleration import accelerate, kvm, locked_in_kernel
from tests.vfio.direct_chain import DEVICE, GROUP, HVA, LIOBN1, MIB, FaultyPort, TooHard
from vfio_model.host.host import Host
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.tce_table import TceTable
from vfio_model.host.topology import DEFAULT_PGSIZES, DeviceSpec, GroupSpec, HostTopology
from vfio_model.iommu.spapr.acceleration import ACCELERATED
from vfio_model.iommu.spapr.ddw import DmaOptions
from vfio_model.iommu.spapr.quirks import PGSZ_AS_GIVEN
from vfio_model.iommu.spapr.regs import DEFAULT_PGSZ, HCall, HReturn, RtasToken, phb_buid
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U32_MAX, Hva
from vfio_model.trace import ListTrace
from vfio_model.uapi.vfio import Ioctl, IommuType
from vfio_model.vfio.connect import VFIOContainer, connect_container
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import BatchError, SpaprContainer

pytestmark = pytest.mark.machine

KIB64, MIB2, MIB16, GIB = 1 << 16, 2 << 20, 16 << 20, 1 << 30
DMA64 = 1 << 59
MAP = Ioctl.VFIO_IOMMU_MAP_DMA
PE = (0, phb_buid(0) >> 32, phb_buid(0) & U32_MAX)


def sparse(size: int) -> mmap.mmap:
    """Memory of which nothing is there before it is touched."""
    fd = os.memfd_create("ram")
    try:
        os.ftruncate(fd, size)
        return mmap.mmap(fd, size)
    finally:
        os.close(fd)


class Guest:
    """A machine whose ``blocks`` (size, backing page) lie one after another, connected to a host of its own."""

    def __init__(
        self,
        blocks: Sequence[tuple[int, int]],
        *,
        host_pgsizes: int = DEFAULT_PGSIZES,
        levels: int = 5,
        pgsz: int = DEFAULT_PGSZ,
        quirks: frozenset[str] = frozenset(),
    ) -> None:
        self.blocks: list[RAMBlock] = []
        hva = HVA
        for number, (size, page) in enumerate(blocks):
            self.blocks.append(RAMBlock(f"ram{number}", sparse(size), page_size=page, hva=Hva(hva)))
            hva = Hva(hva + (1 << 40))
        dma = DmaOptions(dma_win_size=4 * MIB, pgsz=pgsz, quirks=quirks)
        self.trace = ListTrace()
        self.machine = PseriesMachine(self.blocks, PseriesOptions(dma=dma), trace=self.trace)
        spec = GroupSpec(26, (DeviceSpec(DEVICE, "edu"),), pgsizes=host_pgsizes, levels=levels)
        self.host = Host(HostTopology((spec,)))
        direct = DirectPort(self.host, self.host.create_mm(None, "guest"))
        self.segments, self.mm, self.port = direct.segments, direct.mm, FaultyPort(direct)
        for block in self.blocks:
            direct.declare_memory(block)
        self.kvm = accelerate(self.machine, self.port, trace=self.trace) if kvm() else None
        self.container = self.connect()

    def connect(self) -> VFIOContainer:
        return connect_container(
            self.port,
            GROUP,
            self.machine.system,
            self.machine.phb().address_space,
            host_page_size=KIB64,
            trace=self.trace,
            kvm=self.kvm,
        )

    @property
    def locked(self) -> int:
        """Locked pages, without those of tables in the kernel."""
        return self.mm.locked_vm - locked_in_kernel(self.machine)

    @property
    def driver(self) -> SpaprTceContainer:
        container = self.host.groups[26].container
        assert container is not None and isinstance(container.driver, SpaprTceContainer)
        return container.driver

    def rtas(self, token: RtasToken, *args: int, nret: int) -> list[int]:
        return self.machine.rtas(token, args, nret)

    def open(self, page_shift: int, window_shift: int) -> int:
        """The page shift of the host's window for a guest's window at 1 << 59."""
        rets = self.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, *PE, page_shift, window_shift, nret=4)
        assert rets == [0, LIOBN1, DMA64 >> 32, 0]
        return self.window.page_shift

    @property
    def window(self) -> TceTable:
        table = self.driver.tables[1]
        assert table is not None
        return table

    def put(self, ioba: int, gpa: int) -> int:
        return self.machine.hcall(HCall.H_PUT_TCE, LIOBN1, ioba, gpa | 3)[0]

    def indirect(self, ioba: int, tces: list[int]) -> int:
        self.machine.write_memory(0, b"".join(tce.to_bytes(8, "big") for tce in tces))
        return self.machine.hcall(HCall.H_PUT_TCE_INDIRECT, LIOBN1, ioba, 0, len(tces))[0]

    def mapped(self) -> dict[int, int]:
        """Offset into the window → guest-physical address, for each entry of the host."""
        bases, base = {}, 0
        for block in self.blocks:
            bases[id(block.view.obj)], base = base, base + block.size
        seen = {}
        for index, tce in self.window.mapped():
            found = self.segments.find(tce & ~3)
            assert found is not None, "the host maps declared memory only"
            seen[index << self.window.page_shift] = bases[id(found[1].obj)] + found[2]
        return seen

    def query_mask(self) -> int:
        return self.rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, *PE, nret=5)[3]


@pytest.mark.parametrize(
    ("backing", "guest", "host"),
    [
        (KIB64, 12, 12),
        (KIB64, 16, 16),
        (KIB64, 24, 16),
        (MIB2, 21, 21),
        (MIB2, 24, 21),
        (MIB16, 12, 12),
        (MIB16, 16, 16),
        (MIB16, 21, 21),
        (MIB16, 24, 24),
        (GIB, 24, 24),
    ],
)
def test_the_hosts_page_is_as_large_as_guest_and_backing_allow(backing: int, guest: int, host: int) -> None:
    machine = Guest([(GIB, backing)])
    assert machine.open(guest, 30) == host
    assert machine.put(DMA64 + (3 << guest), 5 << guest) == 0
    wanted = {(3 << guest) + at: (5 << guest) + at for at in range(0, 1 << guest, 1 << host)}
    assert machine.mapped() == wanted
    assert machine.machine.hcall(HCall.H_PUT_TCE, LIOBN1, DMA64 + (3 << guest), 0)[0] == 0
    assert machine.mapped() == {}


def test_a_gigabyte_is_one_entry_where_the_host_has_such_pages() -> None:
    sizes = DEFAULT_PGSIZES | GIB
    guest = Guest([(32 * GIB, GIB)], host_pgsizes=sizes, pgsz=DEFAULT_PGSZ | 1 << 34)
    assert guest.open(34, 35) == 30
    assert guest.put(DMA64 + 16 * GIB, 0) == 0
    assert guest.mapped() == {(16 + n) * GIB: n * GIB for n in range(16)}
    region = next(iter(guest.driver.registered.values()))
    assert (region.page_shift, region.mapped) == (30, 16)


def test_without_gigabyte_pages_the_host_maps_the_same_by_smaller_ones() -> None:
    guest = Guest([(32 * GIB, GIB)], pgsz=DEFAULT_PGSZ | 1 << 34)
    assert guest.open(34, 35) == 24
    assert guest.put(DMA64, 16 * GIB) == 0
    assert guest.mapped() == {n * MIB16: 16 * GIB + n * MIB16 for n in range(1024)}


@pytest.mark.parametrize(("first", "second", "host"), [(MIB16, KIB64, 16), (MIB2, MIB16, 21), (GIB, MIB16, 24)])
def test_of_several_blocks_the_smallest_backing_caps(first: int, second: int, host: int) -> None:
    guest = Guest([(GIB, first), (GIB, second)])
    assert guest.open(24, 31) == host
    assert guest.put(DMA64, MIB16) == guest.put(DMA64 + GIB, GIB + MIB16) == 0
    step = 1 << host
    one = {at: MIB16 + at for at in range(0, MIB16, step)}
    assert guest.mapped() == one | {GIB + at: GIB + MIB16 + at for at in range(0, MIB16, step)}


def registered(size: int, backing: int, *, vaddr: int = HVA) -> tuple[SpaprContainer, Host]:
    """A container with a window of 16 MiB pages, and ``size`` bytes registered at ``vaddr``."""
    host = Host(HostTopology((GroupSpec(26, (DeviceSpec(DEVICE, "edu"),)),)))
    port = DirectPort(host)
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    group = port.open(GROUP)
    port.ioctl(group, Ioctl.VFIO_GROUP_SET_CONTAINER, container.handle.to_bytes(8, sys.byteorder))
    container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
    block = RAMBlock("ram", sparse(1 << 30), page_size=backing, hva=Hva(HVA))
    port.declare_memory(block)
    container.register_memory(vaddr, size)
    container.tce_remove(0)
    container.tce_create(24, GIB)
    return container, host


@pytest.mark.parametrize(
    ("size", "backing", "vaddr"),
    [
        (64 * MIB, KIB64, HVA),
        (64 * MIB, MIB2, HVA),
        (MIB16 + MIB2, MIB16, HVA),
        (2 * MIB16, MIB16, HVA + 8 * MIB),
        (2 * MIB16, GIB, HVA + KIB64),
    ],
    ids=["64K backing", "2M backing", "odd size", "odd address by 8M", "odd address by 64K"],
)
def test_a_page_larger_than_backing_or_natural_alignment_is_refused(size: int, backing: int, vaddr: int) -> None:
    container, host = registered(size, backing, vaddr=vaddr)
    start = -(-vaddr // MIB16) * MIB16
    with pytest.raises(OSError) as caught:
        container.map_dma(0, start, MIB16)
    assert caught.value.errno == errno.EINVAL
    table = host.groups[26].container.driver.tables[0]  # type: ignore[union-attr]
    assert list(table.mapped()) == []


@pytest.mark.parametrize("backing", [MIB16, GIB])
def test_a_page_as_large_as_its_backing_is_mapped(backing: int) -> None:
    container, host = registered(64 * MIB, backing)
    container.map_dma(0, HVA + MIB16, 3 * MIB16)
    table = host.groups[26].container.driver.tables[0]  # type: ignore[union-attr]
    assert [index for index, _ in table.mapped()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("backing", "pgsz", "mask"),
    [
        ((KIB64,), 1 << 12 | 1 << 16, 0x3),
        ((MIB16,), 1 << 12 | 1 << 16, 0x7),
        ((GIB,), 1 << 12, 0x5),
        ((MIB16, MIB2), 1 << 12 | 1 << 16, 0x3),
        ((KIB64,), DEFAULT_PGSZ, 0x107),
    ],
)
def test_ram_on_huge_pages_is_offered_windows_of_16m(backing: tuple[int, ...], pgsz: int, mask: int) -> None:
    assert Guest([(GIB, page) for page in backing], pgsz=pgsz).query_mask() == mask


def test_the_page_sizes_can_be_taken_as_given() -> None:
    guest = Guest([(GIB, MIB16)], pgsz=1 << 12 | 1 << 16, quirks=frozenset({PGSZ_AS_GIVEN}))
    assert guest.query_mask() == 0x3


@pytest.mark.parametrize(("page_shift", "levels", "pages"), [(16, 1, 4096), (24, 1, 16), (16, 5, 4098), (24, 5, 16)])
def test_the_table_memory_of_a_terabyte(page_shift: int, levels: int, pages: int) -> None:
    guest = Guest([(1 << 40, MIB16)], levels=levels)
    before = guest.locked
    assert before - 2 == 1 << 24, "16.7 million pages of 64 KiB, and a small table"
    guest.open(page_shift, 40)
    assert guest.locked - before == pages
    guest.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, LIOBN1, nret=1)
    assert guest.locked == before


def linear(count: int, page: int) -> list[int]:
    return [n * page | 3 for n in range(count)]


LISTS = {
    "in order": (linear(512, KIB64), [1]),
    "in order from a page on": ([(n + 7) * KIB64 | 1 for n in range(300)], [1]),
    "backwards": (linear(512, KIB64)[::-1], [512]),
    "two exchanged": ([*linear(100, KIB64)[:50], 51 * KIB64 | 3, 50 * KIB64 | 3, *linear(100, KIB64)[52:]], [100]),
    "every other page": (linear(200, 2 * KIB64), [200]),
    "the same page": ([KIB64 | 3] * 64, [64]),
}


@pytest.mark.parametrize("case", LISTS)
def test_pages_in_order_are_one_mapping(case: str) -> None:
    tces, structs = LISTS[case]
    guest = Guest([(GIB, MIB16)])
    guest.open(16, 30)
    guest.port.calls.clear()
    assert guest.indirect(DMA64, tces) == 0
    if guest.kvm is None:  # else the host is asked the hypercall itself
        assert [count for cmd, count in guest.port.calls if cmd == MAP] == structs
    assert guest.mapped() == {n * KIB64: tce & ~3 for n, tce in enumerate(tces)}
    assert {guest.window.read(n) & 3 for n in range(len(tces))} == {tces[0] & 3}
    assert guest.put(DMA64 + 20 * KIB64, 30 * KIB64) == 0
    assert guest.machine.hcall(HCall.H_STUFF_TCE, LIOBN1, DMA64 + 5 * KIB64, 0, 10)[0] == 0
    assert guest.mapped() == {
        n * KIB64: 30 * KIB64 if n == 20 else tce & ~3 for n, tce in enumerate(tces) if not 5 <= n < 15
    }
    region = next(iter(guest.driver.registered.values()))
    assert region.mapped == len(tces) - 10


def test_a_run_that_the_host_refuses_is_undone_as_a_whole() -> None:
    guest = Guest([(GIB, MIB16)])
    guest.open(16, 30)
    assert guest.indirect(DMA64 + 8 * KIB64, linear(8, KIB64)) == 0
    before = guest.mapped()

    def refuse(cmd: int) -> None:
        if cmd in ACCELERATED:
            raise TooHard
        if cmd == MAP:
            guest.port.fail = lambda _cmd: None
            raise BatchError(errno.ENOMEM, "injected", 0)

    guest.port.fail = refuse
    assert guest.indirect(DMA64, linear(512, KIB64)) == HReturn.H_RESOURCE
    assert guest.mapped() == before
    assert guest.indirect(DMA64, linear(512, KIB64)) == 0


def test_a_container_that_comes_later_is_told_of_a_terabyte_at_once() -> None:
    guest = Guest([(1 << 40, MIB16)])
    guest.open(24, 40)
    for first in range(0, 1 << 16, 512):
        assert guest.indirect(DMA64 + first * MIB16, [first * MIB16 + tce for tce in linear(512, MIB16)]) == 0
    guest.container.close()
    assert guest.locked == 0
    guest.port.calls.clear()
    guest.connect()
    assert [count for cmd, count in guest.port.calls if cmd == MAP] == [1]
    table = guest.window
    assert all(table.read(n) & 3 == 3 for n in (0, 1, 12345, 65535))
    assert next(iter(guest.driver.registered.values())).mapped == 1 << 16
