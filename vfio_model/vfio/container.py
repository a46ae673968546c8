"""A VFIO container as its user holds it, and the queue between a guest's IOMMU and the host.

``MappingBackend`` is what the memory listener talks to: it maps, unmaps, adds and removes windows, and never sees an
ioctl. ``VFIOIOMMU`` is one that a host has (QEMU's ``VFIOIOMMUClass``); :mod:`vfio_model.vfio.vfio_user` is the other
one. One hypercall may change many entries: the listener only *queues*;
:meth:`VFIOIOMMU.flush` sends what is queued, entries of one kind in one message, and waits for one answer. The
order of what was queued is kept.

When the host is gone (:class:`~vfio_model.errors.PeerLost`) the container is *lost*: its devices are dead, so
there is nothing left that a mapping could serve, and changes are dropped until the owner builds a new container,
whose listeners replay every mapping.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from vfio_model.errors import PeerLost
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.ranges import Hva, Iova
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.vfio import DmaMap, DmaMapFlags, DmaUnmap, Ioctl
from vfio_model.vfio.host_window import HostWindows
from vfio_model.vfio.ioctl import BatchError, ContainerFile, Ioctls

_RW = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)
_RO = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ)
_WO = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)
_MAP, _UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
DMA_MAX_MAPPINGS = 65535
"""What the kernel's type 1 driver allows by default (``dma_entry_limit``)."""
_pack_map, _pack_unmap = DmaMap.FORMAT.pack, DmaUnmap.FORMAT.pack


class MappingBackend(Protocol):
    """What memory listeners need, whoever maps."""

    windows: HostWindows
    host_page_size: int
    queue: MappingQueue

    @property
    def container(self) -> ContainerFile:
        """Its file."""

    dma_max_mappings: int
    """How many mappings there may be at a time."""
    coalesces: bool
    """Whether one MAP_DMA may cover pages that are unmapped one by one later."""
    write_only: bool
    """Whether a mapping can be written and not read. On a host's container it can be read, too."""
    whole_windows: bool
    """Whether an IOMMU's window is all that is mapped, whatever its entries say: nobody follows these then."""

    def add_window(self, section: MemoryRegionSection) -> None:
        """Make the host able to map all of ``section``.

        :raise OSError: when the host can't; nothing has changed then.
        """
        ...

    def del_window(self, section: MemoryRegionSection) -> None:
        """Give back what :meth:`add_window` of this section made."""
        ...


class VFIOIOMMU(MappingBackend, Protocol):
    """A container of a host, whatever its kind."""

    kind: ContainerKind

    def set_type(self) -> None:
        """``VFIO_SET_IOMMU``; a group must be attached. :raise OSError: as it does."""
        ...

    def start(self) -> None:
        """Make the container ready to map, and learn what it can. RAM that must be preregistered is already.

        :raise OSError: as the ioctls that this takes do.
        """
        ...


class Tracker(Protocol):
    """Who follows what becomes of mappings while writes are tracked."""

    def unmap(self, iova: int, size: int) -> None:
        """Unmap, in the queue's place. :raise OSError: as the host does."""

    def mapped(self, maps: memoryview) -> None:
        """These ``struct vfio_iommu_type1_dma_map`` are mapped; entries that were overwritten lead elsewhere now."""


class MappingQueue:
    """MAP_DMA and UNMAP_DMA calls that wait to be sent to one container."""

    tracker: Tracker | None = None

    def __init__(self, port: Ioctls, handle: int, *, trace: Trace = NULL_TRACE) -> None:
        self._port, self._handle, self._trace = port, handle, trace
        self._pending: list[tuple[int, bytes | bytearray | memoryview, int]] = []
        self.lost = False
        self.on_lost: Callable[[PeerLost], None] = lambda _error: None

    def __len__(self) -> int:
        return sum(count for _, _, count in self._pending)

    def _append(self, cmd: int, structs: bytes | bytearray | memoryview, count: int) -> None:
        pending = self._pending
        if pending and pending[-1][0] == cmd:
            _, args, queued = pending[-1]
            if not isinstance(args, bytearray):
                args = bytearray(args)
            args += structs
            pending[-1] = (cmd, args, queued + count)
        else:
            pending.append((cmd, structs, count))

    def map(self, iova: Iova, size: int, vaddr: Hva, *, readonly: bool, writeonly: bool = False) -> None:
        """Queue one mapping of ``size`` bytes."""
        assert not (readonly and writeonly), "a mapping permits something"
        flags = _RO if readonly else _WO if writeonly else _RW
        self._append(_MAP, _pack_map(DmaMap.SIZE, flags, vaddr, iova, size), 1)

    def map_packed(self, structs: bytes | memoryview, count: int) -> None:
        """Queue ``count`` ``struct vfio_iommu_type1_dma_map`` that lie back to back, and that do not change."""
        self._append(_MAP, structs, count)

    def unmap(self, iova: Iova, size: int) -> None:
        """Queue the removal of what is mapped in ``size`` bytes from ``iova``; all 2**64 go as two halves."""
        if size == 1 << 64:  # the structure's size has 64 bits
            half = 1 << 63
            self._append(_UNMAP, _pack_unmap(DmaUnmap.SIZE, 0, iova, half), 1)
            iova, size = Iova(iova + half), half
        self._append(_UNMAP, _pack_unmap(DmaUnmap.SIZE, 0, iova, size), 1)

    def flush(self, *, go_on: bool = False) -> OSError | None:
        """Send everything queued and wait for the answers.

        :param go_on: leave out what the host refuses, and do the rest; without it what was queued behind is dropped,
            for a caller that undoes the whole. What came before stays done.
        :returns: None, or the host's first error. A host that is gone is not an error (see the module text).
        """
        pending, self._pending = self._pending, []
        first: OSError | None = None
        try:
            for cmd, args, count in pending:
                error = None if self.lost else self._send_all(cmd, memoryview(args), count, go_on)
                first = first or error
                if error is not None and not go_on:
                    break
        except PeerLost as gone:
            self.gone(gone)
        return first

    def _send_all(self, cmd: int, args: memoryview, count: int, go_on: bool) -> OSError | None:
        size, done = len(args) // count, 0
        first: OSError | None = None
        while done < count:
            try:
                self._send(cmd, args[done * size :], count - done)
            except BatchError as error:
                self._trace("vfio_dma_error", errno=errno.errorcode.get(error.errno or 0, "?"), done=error.done)
                first = first or error
                done += error.done + 1
            else:
                break
            if not go_on:
                break
        return first

    def _send(self, cmd: int, args: bytes | bytearray | memoryview, count: int) -> None:
        if self.tracker is None:
            self._port.ioctl_many(self._handle, cmd, args, count)
        elif cmd == _UNMAP:
            self._unmap_tracked(self.tracker, args, count)
        else:
            maps = memoryview(args)
            try:
                self._port.ioctl_many(self._handle, cmd, args, count)
            except BatchError as error:
                self.tracker.mapped(maps[: error.done * DmaMap.SIZE])
                raise
            self.tracker.mapped(maps[: count * DmaMap.SIZE])

    @staticmethod
    def _unmap_tracked(tracker: Tracker, args: bytes | bytearray | memoryview, count: int) -> None:
        for done, (_, _, iova, size) in enumerate(DmaUnmap.FORMAT.iter_unpack(args[: count * DmaUnmap.SIZE])):
            try:
                tracker.unmap(iova, size)
            except OSError as error:
                raise BatchError(error.errno or 0, error.strerror or "", done) from error

    def gone(self, error: PeerLost) -> None:
        """The host is gone: forget what is queued and tell the owner, once."""
        self._pending.clear()
        if not self.lost:
            self.lost = True
            self.on_lost(error)
