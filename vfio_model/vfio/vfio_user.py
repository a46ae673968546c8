"""A vfio-user server as the one whose DMA follows the guest's IOMMU: the counterpart of a container of a host.

The same listeners drive it; what they queue as MAP_DMA and UNMAP_DMA becomes DMA_MAP and DMA_UNMAP here, sent one after
another and awaited together. The server is told what the document lets it ask for: maps never overlap, an unmap is
exactly a map that was made, and there are never more of them than it takes. So the table of what it has is kept here:

- pages that follow one another in both address spaces within one queue become one map; when one of them goes, the whole
  map goes and what is left of it comes back;
- an entry that is overwritten is unmapped first;
- memory without a descriptor is mapped without one: the server asks for every access, by message.

A window goes *by message* as a whole when the server has no room for its maps, refuses one, has larger pages, or when
everything shall: one map without a descriptor covers it, and each access is translated and checked where it is served.
It maps pages again after all of it was unmapped.

A server that refuses an unmap, or even a map by message, cannot be told any more what is valid: it is given up, and is
lost as one whose process died. The guest goes on.

Source: QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_DMA_MAP", "VFIO_USER_DMA_UNMAP").
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from vfio_model.errors import PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U64_MAX, Hva, Range
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl
from vfio_model.vfio.container import DMA_MAX_MAPPINGS, MappingQueue
from vfio_model.vfio.host_window import HostWindows, VFIOHostDMAWindow
from vfio_model.vfio.ioctl import BatchError, ContainerFile
from vfio_model.vfio.listener import VFIOListener
from vfio_model.vfio.sent_maps import SentMap, SentMaps

_MAP, _UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
_RW: Final = 3


class DmaChange(NamedTuple):
    """One DMA_MAP or DMA_UNMAP. A map with ``fd`` -1 is one by message; ``perm``: 1 read, 2 write; ``offset`` in the
    file."""

    is_map: bool
    iova: int
    size: int
    perm: int = 0
    fd: int = -1
    offset: int = 0


class DmaPeer(Protocol):
    """The server."""

    @property
    def name(self) -> str:
        """For messages."""

    def dma_many(self, changes: Sequence[DmaChange]) -> list[int]:
        """Send all, in order, and wait for all answers: the errno of each, 0 for done. :raise PeerLost: it is gone, or
        too late."""

    def give_up(self, reason: str) -> None:
        """Treat it as gone."""


class DmaLimits(NamedTuple):
    """What the server takes: maps at a time, and a bitmap of page sizes in bytes."""

    max_dma_maps: int = DMA_MAX_MAPPINGS
    pgsizes: int = 4096


class _Window:
    """An IOMMU section."""

    def __init__(self, section: Range, *, by_message: bool) -> None:
        self.range, self.always = section, by_message
        self.by_message = by_message

    @property
    def map(self) -> DmaChange:
        """All of it, by message."""
        return DmaChange(True, self.range.start, self.range.size, _RW)

    @property
    def unmap(self) -> DmaChange:
        return DmaChange(False, self.range.start, self.range.size)


class VfioUserMaps:
    """The maps that ``peer`` has, behind the ioctls of a container (:class:`~vfio_model.vfio.ioctl.Ioctls`)."""

    def __init__(
        self, peer: DmaPeer, blocks: Sequence[RAMBlock], limits: DmaLimits, *, by_message: bool, trace: Trace
    ) -> None:
        self._peer, self._blocks, self._limits, self._trace = peer, tuple(blocks), limits, trace
        self._by_message = by_message
        self._maps = SentMaps()
        """All but those of windows that go by message."""
        self._windows: list[_Window] = []

    def __len__(self) -> int:
        return len(self._maps) + sum(window.by_message for window in self._windows)

    @property
    def maps(self) -> list[DmaChange]:
        """What the server has, in order of address."""
        found = [self._change(known) for known in self._maps]
        found += [window.map for window in self._windows if window.by_message]
        return sorted(found, key=lambda change: change.iova)

    # -- windows -----------------------------------------------------------------------------------------------------

    def add_window(self, section: Range, page: int) -> None:
        """``section`` is an IOMMU's, with pages of ``page`` bytes. :raise PeerLost: the server is gone."""
        smallest = self._limits.pgsizes & -self._limits.pgsizes
        window = _Window(section, by_message=self._by_message or page < smallest)
        self._windows.append(window)
        if window.by_message:
            self._tell(section, "by message is asked for" if self._by_message else f"pages of {page:#x} bytes")
            self._send([window.map])

    def del_window(self, section: Range) -> None:
        """It is gone; its pages were unmapped. :raise PeerLost: the server is gone."""
        window = next(window for window in self._windows if window.range == section)
        self._windows.remove(window)
        if window.by_message:
            self._send([window.unmap])

    def _window(self, iova: int) -> _Window | None:
        return next((window for window in self._windows if window.range.start <= iova <= window.range.last), None)

    # -- ioctls ------------------------------------------------------------------------------------------------------

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """See ``Ioctls``."""
        self.ioctl_many(handle, cmd, arg, 1)
        return arg

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """MAP_DMA and UNMAP_DMA; see ``Ioctls``.

        :raise BatchError: ENOTTY for others, EFAULT where no RAM is, ENOSPC. :raise PeerLost: the server is gone.
        """
        changes: list[DmaChange] = []
        if cmd == _MAP:
            for iova, size, vaddr, perm in _in_runs(args, count):
                changes += self._map(iova, size, vaddr, perm)
        elif cmd == _UNMAP:
            for _, _, iova, size in DmaUnmap.FORMAT.iter_unpack(args[: count * DmaUnmap.SIZE]):
                changes += self._unmap(iova, iova + size - 1)
        else:
            raise BatchError(errno.ENOTTY, f"ioctl {cmd:#x} of a vfio-user server's memory", 0)
        self._send(changes)
        return count

    def _map(self, iova: int, size: int, vaddr: int, perm: int) -> list[DmaChange]:
        window = self._window(iova)
        if window is not None and window.by_message:
            return []
        last = iova + size - 1
        known = self._maps.touching(iova, last)
        if known == [SentMap(iova, size, perm, vaddr)]:
            return []
        changes = self._clear(iova, last)
        while len(self) >= self._limits.max_dma_maps:
            full = self._fullest()
            if full is None:
                raise BatchError(errno.ENOSPC, f"{self._peer.name} takes {self._limits.max_dma_maps} maps", 0)
            self._tell(full.range, f"{self._peer.name} takes {self._limits.max_dma_maps} maps")
            changes += self._go_by_message(full)
            if full is window:
                return changes
        changes.append(self._add(iova, size, vaddr, perm))
        return changes

    def _add(self, iova: int, size: int, vaddr: int | None, perm: int) -> DmaChange:
        new = SentMap(iova, size, perm, vaddr)
        self._maps.add(new)
        return self._change(new)

    def _change(self, known: SentMap) -> DmaChange:
        """The DMA_MAP of it."""
        if not self._by_message and known.vaddr is not None:
            for block in self._blocks:
                offset = block.offset_of(Hva(known.vaddr))
                if offset is not None and offset + known.size <= block.size and block.fd >= 0:
                    offset += block.fd_offset
                    return DmaChange(True, known.iova, known.size, known.perm, block.fd, offset)
        return DmaChange(True, known.iova, known.size, known.perm)

    def _unmap(self, first: int, last: int) -> list[DmaChange]:
        last = min(last, U64_MAX)
        changes = []
        for window in self._windows:
            if window.by_message and not window.always and first <= window.range.start <= window.range.last <= last:
                window.by_message = False
                changes.append(window.unmap)
        return changes + self._clear(first, last)

    def _clear(self, first: int, last: int) -> list[DmaChange]:
        """Every map that shares a byte with the range goes; what of it lies outside comes back."""
        gone = self._maps.take(first, last)
        changes = [DmaChange(False, known.iova, known.size) for known in gone]
        for known in gone[:1]:
            if known.iova < first:
                changes.append(self._add(known.iova, first - known.iova, known.vaddr, known.perm))
        for known in gone[-1:]:
            if known.last > last:
                vaddr = None if known.vaddr is None else known.vaddr + last + 1 - known.iova
                changes.append(self._add(last + 1, known.last - last, vaddr, known.perm))
        return changes

    def _fullest(self) -> _Window | None:
        """The window whose going by message makes the most room."""
        counts = [
            (self._maps.count(window.range.start, window.range.last), number)
            for number, window in enumerate(self._windows)
            if not window.by_message
        ]
        most, number = max(counts, default=(0, 0))
        return self._windows[number] if most else None

    def _go_by_message(self, window: _Window) -> list[DmaChange]:
        changes = self._clear(window.range.start, window.range.last)
        window.by_message = True
        return [*changes, window.map]

    # -- the server --------------------------------------------------------------------------------------------------

    def _send(self, changes: list[DmaChange]) -> None:
        """:raise PeerLost: the server is gone, or was given up."""
        refused = self._refused(changes)
        if not refused:
            return
        never = {(change.iova, change.size) for change in refused if change.is_map}
        for change in refused:
            if change.fd < 0 and (change.is_map or (change.iova, change.size) not in never):
                self._give_up(change)
        again = self._instead_of(refused)
        if failed := self._refused(again):
            self._give_up(failed[0])

    def _instead_of(self, refused: list[DmaChange]) -> list[DmaChange]:
        """What goes by message because the server has not taken these maps."""
        missing = [
            known
            for change in refused
            if change.is_map
            for known in self._maps.touching(change.iova, change.iova + change.size - 1)
            if (known.iova, known.size) == (change.iova, change.size)
        ]
        for known in missing:
            self._tell(Range.sized(known.iova, known.size), f"{self._peer.name} refuses its map")
            self._maps.take(known.iova, known.last)
        again: list[DmaChange] = []
        for known in missing:
            window = self._window(known.iova)
            if window is None:
                again.append(self._add(known.iova, known.size, None, known.perm))
            elif not window.by_message:
                again += self._go_by_message(window)
        return again

    def _refused(self, changes: list[DmaChange]) -> list[DmaChange]:
        if not changes:
            return []
        if self._trace.enabled:
            for change in changes:
                event = "vfio_user_dma_map" if change.is_map else "vfio_user_dma_unmap"
                self._trace(event, name=self._peer.name, iova=change.iova, size=change.size, flags=change.perm)
        errors = self._peer.dma_many(changes)
        return [change for change, number in zip(changes, errors, strict=True) if number]

    def _give_up(self, change: DmaChange) -> None:
        what = f"{'DMA_MAP by message' if change.is_map else 'DMA_UNMAP'} of {change.size:#x} bytes at {change.iova:#x}"
        self._peer.give_up(f"it refuses {what}")
        raise PeerLost(self._peer.name, f"it refuses {what}")

    def _tell(self, where: Range, why: str) -> None:
        self._trace("vfio_user_dma_by_message", name=self._peer.name, start=where.start, last=where.last, reason=why)


class VfioUserIOMMU:
    """:class:`~vfio_model.vfio.container.MappingBackend` over a vfio-user server that takes ``limits``."""

    def __init__(
        self,
        peer: DmaPeer,
        blocks: Sequence[RAMBlock],
        limits: DmaLimits = DmaLimits(),
        *,
        by_message: bool = False,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.maps = VfioUserMaps(peer, blocks, limits, by_message=by_message, trace=trace)
        self.container = ContainerFile(self.maps, 0)
        self.queue = MappingQueue(self.maps, 0, trace=trace)
        self.host_page_size = limits.pgsizes & -limits.pgsizes
        self.windows = HostWindows()
        self.windows.add(VFIOHostDMAWindow(0, U64_MAX, limits.pgsizes))
        self.dma_max_mappings = limits.max_dma_maps
        self.coalesces = True
        self.write_only = True
        self.whole_windows = by_message

    def add_window(self, section: MemoryRegionSection) -> None:
        """See ``MappingBackend``."""
        region = section.mr
        if isinstance(region, IOMMUMemoryRegion) and not self.queue.lost:
            try:
                self.maps.add_window(section.range, region.get_min_page_size())
            except PeerLost as error:
                self.queue.gone(error)

    def del_window(self, section: MemoryRegionSection) -> None:
        """See ``MappingBackend``."""
        if not self.queue.lost:
            try:
                self.maps.del_window(section.range)
            except PeerLost as error:
                self.queue.gone(error)


class VfioUserSpace:
    """``backend`` follows the address space ``device``; RAM lies in ``system``.

    :raise OSError: a section of the space cannot be followed; nothing is, then. :raise PeerLost: the server is gone.
    """

    def __init__(
        self, backend: VfioUserIOMMU, system: AddressSpace, device: AddressSpace, *, trace: Trace = NULL_TRACE
    ) -> None:
        self.backend, self._device = backend, device
        self.listener = VFIOListener(backend, system, host_page_size=backend.host_page_size, trace=trace)
        lost: list[PeerLost] = []
        backend.queue.on_lost = lost.append
        device.register_listener(self.listener)
        self._follows = True
        if lost or self.listener.error is not None:
            self.abandon()
            raise lost[0] if lost else self.listener.error or OSError(errno.EIO, "no listener")
        backend.queue.on_lost = lambda _error: None
        self.listener.initialized = True

    @property
    def lost(self) -> bool:
        """Whether the server is gone."""
        return self.backend.queue.lost

    def abandon(self) -> None:
        """Forget the server: nothing is unmapped. Harmless twice."""
        self.backend.queue.lost = True
        self.close()

    def close(self) -> None:
        """Unmap everything and follow the space no more. Harmless twice."""
        if self._follows:
            self._follows = False
            self._device.unregister_listener(self.listener)


def _in_runs(args: bytes | bytearray | memoryview, count: int) -> Iterator[tuple[int, int, int, int]]:
    """(iova, size, vaddr, flags) of MAP_DMA structures; those that go on where the one before ends, in both address
    spaces, are one."""
    run: tuple[int, int, int, int] | None = None
    for _, flags, vaddr, iova, size in DmaMap.FORMAT.iter_unpack(args[: count * DmaMap.SIZE]):
        if run is not None and run[0] + run[1] == iova and run[2] + run[1] == vaddr and run[3] == flags:
            run = run[0], run[1] + size, run[2], flags
            continue
        if run is not None:
            yield run
        run = iova, size, vaddr, flags
    if run is not None:
        yield run
