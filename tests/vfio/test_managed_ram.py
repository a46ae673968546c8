"""RAM with absent parts, and a section of 2**64 bytes, as the host sees them: a port with a dict of pages behind it."""

from __future__ import annotations

import errno
from typing import Any, cast

import pytest

from tests.memory.fakes import DictIOMMU
from tests.vfio.direct_chain import HVA, MIB, Chain
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.discard import RamDiscardManager
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl
from vfio_model.vfio.container import DMA_MAX_MAPPINGS, MappingQueue
from vfio_model.vfio.host_window import HostWindows, VFIOHostDMAWindow
from vfio_model.vfio.ioctl import BatchError, VfioPort
from vfio_model.vfio.listener import VFIOListener

pytestmark = pytest.mark.machine

PAGE = 0x1000
GRANULE = 4 * PAGE
SIZE = 16 * GRANULE
BASE = 0x10_0000


class PagePort:
    """MAP_DMA and UNMAP_DMA on a dict: IOVA of a page → (host-virtual address, size of its mapping, flags)."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int, int, int]] = {}
        self.unmaps: list[tuple[int, int]] = []
        self.refuse: int | None = None
        """The IOVA whose mapping is refused."""

    def ioctl_many(self, handle: int, cmd: int, args: bytes, count: int) -> int:
        shape = DmaMap.FORMAT if cmd == Ioctl.VFIO_IOMMU_MAP_DMA else DmaUnmap.FORMAT
        for done, fields in enumerate(shape.iter_unpack(bytes(args))):
            if cmd == Ioctl.VFIO_IOMMU_MAP_DMA:
                _, flags, vaddr, iova, size = fields
                if iova == self.refuse:
                    raise BatchError(errno.ENOSPC, "refused", done)
                for at in range(0, size, PAGE):
                    assert iova + at not in self.pages, "type 1 refuses a mapping over another"
                    self.pages[iova + at] = (vaddr + at, size, flags)
            else:
                _, _, iova, size = fields
                self.unmaps.append((iova, size))
                for page in [page for page in self.pages if iova <= page < iova + size]:
                    del self.pages[page]
        return count


class Backend:
    """Like a type 1 container: one window from the start, nothing to do for a section."""

    def __init__(self, port: PagePort, *, window: bool = True, page: int = PAGE) -> None:
        self.windows = HostWindows()
        self.queue = MappingQueue(cast(VfioPort, port), 1)
        self.dma_max_mappings = DMA_MAX_MAPPINGS
        self.coalesces, self.whole_windows = True, False
        if window:
            self.windows.add(VFIOHostDMAWindow(0, U64_MAX, page))

    def add_window(self, section: MemoryRegionSection) -> None:
        pass

    def del_window(self, section: MemoryRegionSection) -> None:
        pass


class Setup:
    """``SIZE`` bytes of RAM at ``BASE``, from ``skip`` on, followed by a listener on its own address space."""

    def __init__(self, *, granule: int = GRANULE, skip: int = 0, size: int = SIZE, **backend: Any) -> None:
        block = RAMBlock("ram", bytearray(SIZE), page_size=PAGE, hva=HVA)
        self.region, self.manager = RAMRegion("ram", block), RamDiscardManager(SIZE, granule)
        self.region.set_discard_manager(self.manager)
        self.root = MemoryRegion("bus", 1 << 64)
        shown = MemoryRegion("shown", size)
        shown.add_subregion(-skip, self.region)
        self.root.add_subregion(BASE, shown)
        self.space = AddressSpace("device", self.root)
        self.port = PagePort()
        self.backend = Backend(self.port, **backend)
        self.listener = VFIOListener(self.backend, self.space, host_page_size=PAGE)
        self.skip = skip

    def mapped(self) -> set[int]:
        """Offsets into the RAM of the pages that the host maps; each at its place."""
        assert all(vaddr - HVA - self.skip == iova - BASE for iova, (vaddr, _, _) in self.port.pages.items())
        return {vaddr - HVA for vaddr, _, _ in self.port.pages.values()}


def pages(*parts: tuple[int, int]) -> set[int]:
    return {at for offset, size in parts for at in range(offset, offset + size, PAGE)}


def test_only_what_is_populated_is_mapped_in_granules() -> None:
    setup = Setup()
    setup.manager.populate(2 * GRANULE, 3 * GRANULE)
    setup.space.register_listener(setup.listener)
    assert setup.listener.error is None
    assert setup.mapped() == pages((2 * GRANULE, 3 * GRANULE))
    assert {size for _, size, _ in setup.port.pages.values()} == {GRANULE}
    setup.manager.populate(8 * GRANULE, GRANULE)
    setup.manager.discard(3 * GRANULE, GRANULE)
    assert setup.mapped() == pages((2 * GRANULE, GRANULE), (4 * GRANULE, GRANULE), (8 * GRANULE, GRANULE))


def test_a_section_that_cuts_granules_maps_its_share_of_them() -> None:
    setup = Setup(skip=PAGE, size=3 * GRANULE)
    setup.manager.populate(0, SIZE)
    setup.space.register_listener(setup.listener)
    assert setup.mapped() == pages((PAGE, 3 * GRANULE))
    assert setup.port.pages[BASE][1] == GRANULE - PAGE
    setup.manager.discard(0, GRANULE)
    assert setup.mapped() == pages((GRANULE, 2 * GRANULE + PAGE))


def test_a_part_that_fails_is_rolled_back_with_one_unmap() -> None:
    setup = Setup()
    setup.space.register_listener(setup.listener)
    setup.port.refuse = BASE + 2 * GRANULE
    with pytest.raises(OSError, match="refused"):
        setup.manager.populate(0, 4 * GRANULE)
    assert setup.mapped() == set() and setup.port.unmaps == [(BASE, 4 * GRANULE)]
    setup.port.refuse = None
    setup.manager.populate(0, 4 * GRANULE)
    assert setup.mapped() == pages((0, 4 * GRANULE))


def test_a_section_that_cannot_be_followed_fails_the_start() -> None:
    setup = Setup()
    setup.manager.populate(0, GRANULE)
    setup.port.refuse = BASE
    setup.space.register_listener(setup.listener)
    assert setup.listener.error is not None and setup.listener.error.errno == errno.ENOSPC
    setup.port.refuse = None
    setup.manager.populate(GRANULE, GRANULE)  # nobody listens
    assert setup.mapped() == set()


def test_a_section_that_goes_is_unmapped_at_once_and_no_longer_followed() -> None:
    setup = Setup()
    setup.manager.populate(0, GRANULE)
    setup.manager.populate(4 * GRANULE, GRANULE)
    setup.space.register_listener(setup.listener)
    setup.root.del_subregion(setup.root.subregions[0])
    assert setup.mapped() == set() and setup.port.unmaps == [(BASE, SIZE)]
    setup.manager.populate(8 * GRANULE, GRANULE)
    assert setup.mapped() == set()


@pytest.mark.parametrize(("limit", "refused"), [(16 + 511, False), (16 + 510, True)])
def test_the_worst_case_must_fit_the_hosts_limit(limit: int, refused: bool) -> None:
    setup = Setup()
    setup.manager.populate(0, SIZE)
    setup.backend.dma_max_mappings = limit
    setup.space.register_listener(setup.listener)
    assert (setup.listener.error is not None) is refused
    assert setup.mapped() == (set() if refused else pages((0, SIZE)))


def test_a_granule_is_at_least_one_page_of_the_iommu() -> None:
    setup = Setup(granule=PAGE, page=2 * PAGE)
    with pytest.raises(AssertionError, match="at least one page"):
        setup.space.register_listener(setup.listener)


def test_ram_without_a_host_window_is_refused_managed_or_not() -> None:
    setup = Setup(window=False)
    setup.space.register_listener(setup.listener)
    assert setup.listener.error is not None and setup.listener.error.errno == errno.EINVAL


@pytest.mark.parametrize("kind", ["ram", "iommu"])
def test_all_of_the_address_space_is_unmapped_in_two_halves(kind: str) -> None:
    port = PagePort()
    backend = Backend(port)
    system = AddressSpace("memory", MemoryRegion("system", 1 << 64))
    listener = VFIOListener(backend, system, host_page_size=PAGE)
    region: MemoryRegion = DictIOMMU(system, 1 << 64, page=1 << 63)  # two entries to replay
    if kind == "ram":
        region = RAMRegion("ram", RAMBlock("ram", bytearray(PAGE), page_size=PAGE, hva=HVA))
        region.set_size(1 << 64)
    section = MemoryRegionSection(system, region, 0, 0, 1 << 64)
    if kind == "iommu":
        listener.region_add(section)
    listener.region_del(section)
    assert port.unmaps == [(0, 1 << 63), (1 << 63, 1 << 63)]


def test_a_guest_that_maps_discarded_ram_gets_no_mapping_and_the_reason_is_told() -> None:
    chain = Chain(connect=False)
    found = chain.machine.system.view.lookup(0)
    assert found is not None and isinstance(found.region, RAMRegion)
    manager = RamDiscardManager(chain.ram.size, MIB)
    found.region.set_enabled(False)
    found.region.set_discard_manager(manager)
    found.region.set_enabled(True)
    manager.populate(0, MIB)
    chain.container = chain.connect()
    assert chain.put(0, 0x1003) == 0 and chain.put(0x1000, MIB | 3) == 0
    assert chain.host_view() == {0: (0x1000, 3)}
    reasons = [fields["reason"] for fields in chain.trace.named("vfio_error")]
    assert reasons == ["iommu map to discarded memory (e.g., unplugged via virtio-mem)"]
    manager.populate(MIB, MIB)
    assert chain.put(0x1000, MIB | 3) == 0
    assert chain.host_view() == {0: (0x1000, 3), 0x1000: (MIB, 3)}
