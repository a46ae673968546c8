"""The DMA implementations that :mod:`tests.conformance.test_dma` runs over.

To add one: write a function that makes a :class:`Bench` and name it in :data:`EXPECTED` and :data:`IMPLEMENTATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec

from deploy.inline.guest import served
from guestd.dma_services import DmaServices
from hostd.remote_dma import MessageDma, translator
from protocols.vfio_user.messages import Command, Payload
from tests.host.rig import Rig
from tests.memory.fakes import DictIOMMU, ram_block, system_memory
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.hpa import Placement
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.region import AliasRegion, MemoryRegion, RAMRegion
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.memory.ring import RingReader, RingWriter, init_ring, ring_size

PAGE = 65536
PAGES = 8
"""Pages of RAM."""


@dataclass
class Bench:
    """An implementation, the RAM behind it, and the operator's hand on its mappings."""

    impl: DMAImpl
    ram: memoryview
    """``PAGES`` pages."""
    remap: Callable[[Mapping[int, tuple[int, int]]], None]
    """Make exactly these mappings valid: iova page -> (RAM page, permission)."""
    permissions: bool = True
    """Whether permissions can be told apart; else every mapping is RW."""


def plain() -> Bench:
    """System memory without an IOMMU: pages are aliases of RAM."""
    block = ram_block(PAGES * PAGE)
    ram = RAMRegion("ram", block)
    root = MemoryRegion("system", 1 << 64)
    space = AddressSpace("memory", root)

    def remap(pages: Mapping[int, tuple[int, int]]) -> None:
        for region in list(root.subregions):
            root.del_subregion(region)
        for iova, (page, _) in pages.items():
            root.add_subregion(iova * PAGE, AliasRegion(f"page{iova}", ram, page * PAGE, PAGE))

    return Bench(space, block.view, remap, permissions=False)


def viommu(*, vectors: bool) -> Bench:
    """An address space behind an IOMMU region."""
    system, block = system_memory(PAGES * PAGE)
    iommu = DictIOMMU(system, 1 << 40, vectors=vectors, page=PAGE)

    def remap(pages: Mapping[int, tuple[int, int]]) -> None:
        iommu.pages = {iova: (page * PAGE, perm) for iova, (page, perm) in pages.items()}

    return Bench(AddressSpace("device", iommu), block.view, remap)


def assigned(*, compiled: bool, hpa: Placement = "contiguous", levels: int = 1, gated: bool = False) -> Bench:
    """An assigned device of a host whose client maps and unmaps; a page takes sixteen TCEs."""
    rig = Rig(hpa=hpa, levels=levels)
    pe, domain = rig.device.pe.words.toreadonly(), rig.domain().toreadonly()
    gate = (lambda: None) if gated else None
    impl = AssignedImpl(pe, domain, rig.port.segments, rig.lane, gate, compiled=compiled)
    mapped: list[int] = []

    def remap(pages: Mapping[int, tuple[int, int]]) -> None:
        for iova in mapped:
            rig.container.unmap_dma(iova * PAGE, PAGE)
        mapped[:] = pages
        for iova, (page, perm) in pages.items():
            rig.map(iova * PAGE, page * PAGE, PAGE, perm)

    return Bench(impl, rig.ram[: PAGES * PAGE], remap)


class CachingDevice:
    """A remote device that caches a vIOMMU's translations, asked for as guestd answers them, and the vIOMMU's half of
    their invalidation. What the device cannot cache goes by message.
    """

    AS_ID = 7

    def __init__(self) -> None:
        system, block = system_memory(PAGES * PAGE)
        self.view = block.view
        self.iommu = DictIOMMU(system, 1 << 40, page=PAGE)
        words, lanes = memoryview(bytearray(ring_size(16))).cast("Q"), memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_ring(words, 16)
        init_lanes(lanes)
        self.ring, self.lanes, self.lane = RingWriter(words), LaneArea("device", lanes), Lane(lanes, 0)
        self._answer = served(DmaServices(AddressSpace("device", self.iommu), system, lambda: True))
        ram: IovaMaps[None] = IovaMaps()
        ram.add(IovaMap(0, len(block.view), READ | WRITE, block.view, None))
        rest = MessageDma(self._call)
        ask = translator(self._call)
        self.impl = CachedImpl(ask, RingReader(words), self.lane, ram, as_id=self.AS_ID, fallback=rest)
        self.impl.arm()

    def _call(self, command: Command, payload: Payload) -> Payload | None:
        assert not self.lane.inside, "nobody waits for anything inside a DMA section"
        return self._answer(command, payload)

    def remap(self, pages: Mapping[int, tuple[int, int]]) -> None:
        """Change the table, publish an invalidation for each page that was there, wait for the sections before."""
        gone = list(self.iommu.pages)
        self.iommu.pages = {iova: (page * PAGE, perm) for iova, (page, perm) in pages.items()}
        for iova in gone:
            self.ring.append(self.AS_ID, iova * PAGE, iova * PAGE + PAGE - 1)
        self.ring.publish()
        assert Revoke(NoFence(), [self.lanes]).start(), "no section is open between accesses"


def cached() -> Bench:
    """An ATC."""
    device = CachingDevice()
    return Bench(device.impl, device.view, device.remap)


IMPLEMENTATIONS: dict[str, Callable[[], Bench]] = {
    "plain": plain,
    "viommu": lambda: viommu(vectors=False),
    "viommu-vectors": lambda: viommu(vectors=True),
    "assigned": lambda: assigned(compiled=False),
    "assigned-gated": lambda: assigned(compiled=False, gated=True),
    "assigned-scatter": lambda: assigned(compiled=False, hpa="scatter"),
    "assigned-levels": lambda: assigned(compiled=False, levels=2),
    "cached": cached,
}
EXPECTED: tuple[str, ...] = (
    "plain",
    "viommu",
    "viommu-vectors",
    "assigned",
    "assigned-gated",
    "assigned-scatter",
    "assigned-levels",
    "cached",
)
"""Every test of the suite runs over each of these."""
if find_spec("vfio_model.host._path") is not None:  # built
    COMPILED: dict[str, Callable[[], Bench]] = {
        "assigned-compiled": lambda: assigned(compiled=True),
        "assigned-compiled-scatter": lambda: assigned(compiled=True, hpa="scatter"),
        "assigned-compiled-levels": lambda: assigned(compiled=True, levels=2),
    }
    IMPLEMENTATIONS |= COMPILED
    EXPECTED += ("assigned-compiled", "assigned-compiled-scatter", "assigned-compiled-levels")
WITHOUT_PERMISSIONS = frozenset({"plain"})
"""Where every mapping is readable and writable."""
