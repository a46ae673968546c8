"""The DMA implementations that :mod:`tests.conformance.test_dma` runs over.

To add one: write a function that makes a :class:`Bench` and name it in :data:`EXPECTED` and :data:`IMPLEMENTATIONS`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from deploy.inline.guest import served
from guestd.dma_services import DmaServices
from hostd.remote_dma import MessageDma, asking, translator
from hostd.remote_memory import RemoteMemory
from protocols.transport.shm import MappedMemory, create_memory
from protocols.vfio_user.messages import Command, DmaMap, DmaUnmap, Payload
from tests.host.rig import Rig
from tests.memory.fakes import DictIOMMU, ram_block, system_memory
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.hpa import Placement
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iommu_region import IOMMUTLBEntry, IOMMUTLBEvent
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.mapped_dma import MappedDma
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import AliasRegion, MemoryRegion, RAMRegion
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.memory.ring import RingReader, RingWriter, init_ring, ring_size
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import Hva
from vfio_model.vfio.vfio_user import DmaChange, VfioUserIOMMU, VfioUserSpace

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
    knows: bool = True
    """Whether it is known without an access where a write would go; else a map for writing fails when it is given
    back.
    """


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

    def __init__(self, *, compiled: bool) -> None:
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
        rest = MessageDma(asking(self._call))
        ask = translator(self._call)
        self.impl = CachedImpl(
            ask, RingReader(words), self.lane, ram, as_id=self.AS_ID, fallback=rest, compiled=compiled
        )
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


def cached(*, compiled: bool) -> Bench:
    """An ATC."""
    device = CachingDevice(compiled=compiled)
    return Bench(device.impl, device.view, device.remap)


@functools.cache
def _shared_ram() -> MappedMemory:
    """RAM of a vfio-user client, which lives as long as this process."""
    return create_memory("conformance", PAGES * PAGE)


class MappingClient:
    """A client that has its server follow an IOMMU by DMA_MAP; in between is nothing but the payloads."""

    name = "server"

    def __init__(self, *, by_message: bool = False) -> None:
        memory = _shared_ram()
        memory.view[:] = bytes(len(memory.view))
        self.block = RAMBlock("ram", memory.view, page_size=PAGE, hva=Hva(1 << 40), fd=memory.fd)
        root = MemoryRegion("system", 1 << 64)
        root.add_subregion(0, RAMRegion("ram", self.block))
        system = AddressSpace("memory", root)
        self.iommu = DictIOMMU(system, 64 * PAGE, page=PAGE)
        space = AddressSpace("device", self.iommu)
        self._answer = served(DmaServices(space, system, lambda: True))
        self.server = RemoteMemory()
        self.impl = MappedDma(self.server.maps, MessageDma(asking(self._call)))
        VfioUserSpace(VfioUserIOMMU(self, (self.block,), by_message=by_message), system, space)

    def _call(self, command: Command, payload: Payload) -> Payload | None:
        return self._answer(command, payload)

    def dma_many(self, changes: Sequence[DmaChange]) -> list[int]:
        """The server's side of DMA_MAP and DMA_UNMAP, which takes all that it is sent."""
        for change in changes:
            if change.is_map:
                request = DmaMap(32, change.perm, change.offset, change.iova, change.size)
                self.server.add(request, [] if change.fd < 0 else [os.dup(change.fd)])
            else:
                self.server.remove(*self.server.touched(DmaUnmap(24, 0, change.iova, change.size)))
        return [0] * len(changes)

    def give_up(self, reason: str) -> None:
        """It is not."""
        raise AssertionError(reason)

    def remap(self, pages: Mapping[int, tuple[int, int]]) -> None:
        """Change the table and tell those who follow it."""
        for iova in self.iommu.pages:
            gone = IOMMUTLBEntry(None, iova * PAGE, 0, PAGE - 1, IOMMUAccessFlags.NONE)
            self.iommu.notify(IOMMUTLBEvent(IOMMUNotifierFlag.UNMAP, gone))
        self.iommu.pages = {iova: (page * PAGE, perm) for iova, (page, perm) in pages.items()}
        for iova, (page, perm) in pages.items():
            entry = IOMMUTLBEntry(self.iommu.target, iova * PAGE, page * PAGE, PAGE - 1, IOMMUAccessFlags(perm))
            self.iommu.notify(IOMMUTLBEvent(IOMMUNotifierFlag.MAP, entry))
        assert self.iommu.flush() is None


def vfio_user() -> Bench:
    """A vfio-user server without extensions."""
    client = MappingClient()
    return Bench(client.impl, client.block.view, client.remap)


def by_message() -> Bench:
    """A vfio-user server whose client has mapped nothing: it asks for every access."""
    system, block = system_memory(PAGES * PAGE)
    iommu = DictIOMMU(system, 1 << 40, page=PAGE)
    answer = served(DmaServices(AddressSpace("device", iommu), system, lambda: True))

    def remap(pages: Mapping[int, tuple[int, int]]) -> None:
        iommu.pages = {iova: (page * PAGE, perm) for iova, (page, perm) in pages.items()}

    return Bench(MessageDma(asking(answer)), block.view, remap, knows=False)


def vfio_user_by_message() -> Bench:
    """The same, of a client that maps its IOMMU's window as a whole, by message."""
    client = MappingClient(by_message=True)
    return Bench(client.impl, client.block.view, client.remap, knows=False)


IMPLEMENTATIONS: dict[str, Callable[[], Bench]] = {
    "plain": plain,
    "viommu": lambda: viommu(vectors=False),
    "viommu-vectors": lambda: viommu(vectors=True),
    "assigned": lambda: assigned(compiled=False),
    "assigned-gated": lambda: assigned(compiled=False, gated=True),
    "assigned-scatter": lambda: assigned(compiled=False, hpa="scatter"),
    "assigned-levels": lambda: assigned(compiled=False, levels=2),
    "cached": lambda: cached(compiled=False),
    "vfio-user": vfio_user,
    "message": by_message,
    "vfio-user-message": vfio_user_by_message,
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
    "vfio-user",
    "message",
    "vfio-user-message",
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
if find_spec("vfio_model.memory._atc") is not None:
    IMPLEMENTATIONS["cached-compiled"] = lambda: cached(compiled=True)
    EXPECTED += ("cached-compiled",)
WITHOUT_PERMISSIONS = frozenset({"plain"})
"""Where every mapping is readable and writable."""
