"""Memory regions: the tree that an address space is rendered from (QEMU's ``docs/devel/memory.rst``).

A region is a container, RAM, I/O (answered by ops), an alias of a part of another region, or an IOMMU. Subregions lie
above what their parent shows itself; where siblings overlap, the higher priority wins, and among equals the one added
last. Sizes go up to 2**64. Every change takes effect at the end of the outermost :func:`transaction`.
"""

from __future__ import annotations

import errno
from typing import Protocol
from weakref import WeakSet

from vfio_model.memory.discard import RamDiscardManager
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.topology import TopologyView, mark_dirty, transaction
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import Range

__all__ = ["AliasRegion", "IORegion", "MemoryRegion", "RAMRegion", "RegionOps", "transaction"]


class RegionOps(Protocol):
    """What answers accesses to an :class:`IORegion`. Addresses are relative to the region, sizes in bytes (1, 2, 4,
    8).

    An access is split into naturally aligned pieces of at most ``max_access_size``; a piece smaller than
    ``min_access_size`` is a DECODE_ERROR and never reaches the device.
    """

    @property
    def min_access_size(self) -> int:
        """Smallest access in bytes that the device takes."""

    @property
    def max_access_size(self) -> int:
        """Largest access in bytes that the device takes, at most 8."""

    def read(self, addr: int, size: int) -> int | None:
        """The value, or None for a device error."""

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """Take ``value``."""


class MemoryRegion:
    """A container, and the base of the other kinds. ``size`` in bytes, 1..2**64.

    :raise ValueError: on a size out of range.
    """

    terminates = False
    """Whether this region itself answers where no subregion does."""

    def __init__(self, name: str, size: int) -> None:
        if not 0 < size <= 1 << 64:
            raise ValueError(f"region {name}: size {size:#x}")
        self.name = name
        self.size = size
        self.parent: MemoryRegion | None = None
        self.offset = 0
        """Where it lies in its parent, in bytes."""
        self.priority = 0
        self.enabled = True
        self.subregions: list[MemoryRegion] = []
        """Highest priority first."""
        self.watchers: WeakSet[TopologyView] = WeakSet()
        """The address spaces that were rendered through this region."""

    def add_subregion(self, offset: int, region: MemoryRegion, priority: int = 0) -> None:
        """Put ``region`` at ``offset``, above every sibling of the same or lower priority."""
        assert region.parent is None, f"region {region.name} already has a parent"
        with transaction():
            region.parent, region.offset, region.priority = self, offset, priority
            place = next((i for i, other in enumerate(self.subregions) if other.priority <= priority), None)
            self.subregions.insert(len(self.subregions) if place is None else place, region)
            mark_dirty(self.watchers)

    def del_subregion(self, region: MemoryRegion) -> None:
        """Take ``region`` out."""
        assert region.parent is self, f"region {region.name} is not a subregion of {self.name}"
        with transaction():
            self.subregions.remove(region)
            region.parent = None
            mark_dirty(self.watchers)

    def set_enabled(self, enabled: bool) -> None:
        """Show or hide this region and all below it, also where aliases show it."""
        if enabled != self.enabled:
            with transaction():
                self.enabled = enabled
                mark_dirty(self.watchers)

    def set_offset(self, offset: int) -> None:
        """Move within the parent (a BAR that was reprogrammed)."""
        if offset != self.offset:
            with transaction():
                self.offset = offset
                mark_dirty(self.watchers)

    def set_size(self, size: int) -> None:
        """Resize; 1..2**64 bytes."""
        assert 0 < size <= 1 << 64, "a region has 1..2**64 bytes"
        if size != self.size:
            with transaction():
                self.size = size
                mark_dirty(self.watchers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, size={self.size:#x})"


class RAMRegion(MemoryRegion):
    """A whole RAM block. ``readonly``: writes by anybody on the bus are not decoded (a ROM). ``ram_device``: device
    memory behind an mmapped BAR: accessed in place, never mapped for zero copy.
    """

    terminates = True

    def __init__(self, name: str, block: RAMBlock, *, readonly: bool = False, ram_device: bool = False) -> None:
        super().__init__(name, block.size)
        self.block = block
        self.readonly = readonly
        self.ram_device = ram_device
        self._discard_manager: RamDiscardManager | None = None

    @property
    def discard_manager(self) -> RamDiscardManager | None:
        """What says which parts are there, or None: all of it is, always."""
        return self._discard_manager

    def set_discard_manager(self, manager: RamDiscardManager | None) -> None:
        """Attach ``manager``, or with None detach the one that is there; only while no address space shows the region.

        :raise OSError: EBUSY when the region has a manager already.
        """
        assert not any(space.shows(self) for space in self.watchers), f"region {self.name} is mapped"
        assert manager is None or manager.size == self.size, f"region {self.name}: a manager covers all of it"
        previous = self._discard_manager
        if manager is not None and previous is not None:
            raise OSError(errno.EBUSY, f"region {self.name} has a discard manager")
        self._discard_manager = manager
        if manager is not None:
            manager.on_discarded = self._discarded
        elif previous is not None:
            previous.on_discarded = lambda _part: None

    def rebind_writers(self) -> None:
        """Writes to the block begin to be logged, or end to be."""
        for space in list(self.watchers):
            space.rebind_writers()

    def _discarded(self, part: Range) -> None:
        """Mappings of bytes that are no longer there must be given back, wherever they are shown."""
        for space in list(self.watchers):
            space.discarded(self, part.start, part.last)


class IORegion(MemoryRegion):
    """Answered by ``ops``. ``big_endian``: byte order of the values that ops see (``MemoryRegionOps.endianness``)."""

    terminates = True

    def __init__(
        self, name: str, size: int, ops: RegionOps, ram_device: bool = False, *, big_endian: bool = False
    ) -> None:
        super().__init__(name, size)
        self.ops = ops
        self.ram_device = ram_device
        self.big_endian = big_endian


class AliasRegion(MemoryRegion):
    """Shows ``size`` bytes of ``target`` from ``offset`` in it, wherever the target itself lies, if anywhere."""

    def __init__(self, name: str, target: MemoryRegion, offset: int, size: int) -> None:
        super().__init__(name, size)
        self.target = target
        self.target_offset = offset

    def set_target_offset(self, offset: int) -> None:
        """Show the target from ``offset``."""
        if offset != self.target_offset:
            with transaction():
                self.target_offset = offset
                mark_dirty(self.watchers)
