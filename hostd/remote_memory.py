"""Guest RAM as a remote device's client gives it: DMA_MAP with descriptors, each file mapped once and sliced.

An address is guest-physical where the device has an ATC (the client's RAM, translations come by X_TRANSLATE), and the
device's own DMA address where it has none (a client that maps what its IOMMU allows). DMA_UNMAP takes away every map
that lies inside its range; clients send ranges that cover many maps, or none. Only the bisection of a map is refused.

A file may be a memfd, sealed or not, or any regular file; one that can only be read serves reads, and writes go by
message.
"""

from __future__ import annotations

import contextlib
import errno

from protocols.transport.file_memory import FileId, FileMemory, identify
from protocols.transport.unix import close_fds
from protocols.vfio_user.messages import DmaMap, DmaUnmap
from vfio_model.memory.iova_maps import MAX_MAPS, READ, WRITE, IovaMap, IovaMaps
from vfio_model.ranges import U64_MAX

UNMAP_ALL = 2
"""``VFIO_DMA_UNMAP_FLAG_ALL``."""
_PERMISSIONS = READ | WRITE


class _File:
    """One mapped file and how many maps are cut from it."""

    def __init__(self, memory: FileMemory) -> None:
        self.memory, self.view, self.users, self.told = memory, memory.view, 0, False


class RemoteMemory:
    """The maps of one client."""

    def __init__(self, limit: int = MAX_MAPS) -> None:
        self.maps: IovaMaps[_File | None] = IovaMaps(limit)
        self._files: dict[FileId, _File] = {}

    def add(self, request: DmaMap, fds: list[int]) -> None:
        """DMA_MAP; ``fds`` are taken over.

        :raise OSError: EINVAL for a range that is empty, wraps or leaves the file; EEXIST for an overlap; ENOSPC; EPERM
            for a descriptor of what cannot be mapped.
        """
        address, size, offset, flags = request.address, request.size, request.offset, request.flags
        try:
            if flags & ~_PERMISSIONS or len(fds) > 1:
                raise OSError(errno.EINVAL, f"flags {flags:#x}, {len(fds)} descriptors")
            place = self.maps.check(address, size)
            file = self._file(fds[0], offset + size) if fds else None
        finally:
            close_fds(fds)
        if file is None:
            self.maps.insert(place, IovaMap(address, size, flags, None, None, offset))
            return
        self.maps.insert(place, IovaMap(address, size, flags, file.view[offset : offset + size], file, offset))
        file.users += 1

    def _file(self, fd: int, end: int) -> _File:
        key, size = identify(fd)
        if end > size:
            raise OSError(errno.EINVAL, f"bytes up to {end:#x} of a descriptor that has {size:#x}")
        known = self._files.get(key)
        if known is None or end > known.memory.size:  # the file has grown
            known = self._files[key] = _File(FileMemory(fd))
        return known

    def touched(self, request: DmaUnmap) -> tuple[int, int]:
        """First and last address (inclusive) of DMA_UNMAP.

        :raise OSError: EINVAL for flags, or when a map would be cut in two.
        """
        if request.flags == UNMAP_ALL and request.address == request.size == 0:
            return 0, U64_MAX
        if request.flags or request.size == 0:
            raise OSError(errno.EINVAL, f"DMA_UNMAP of {request.size:#x} bytes with flags {request.flags:#x}")
        last = min(request.address + request.size - 1, U64_MAX)
        self.maps.inside(request.address, last)
        return request.address, last

    def remove(self, first: int, last: int) -> int:
        """DMA_UNMAP of what :meth:`touched` said; returns how many bytes were mapped there.

        :raise OSError: EINVAL when a map would be cut in two: it has come since.
        """
        gone = self.maps.remove(first, last)
        self._drop(gone)
        return sum(known.size for known in gone)

    @property
    def guarded(self) -> bool:
        """Whether any of the files may shrink."""
        return any(file.memory.may_shrink for file in self._files.values())

    def shrunk(self) -> list[IovaMap[_File | None]]:
        """Maps of files that turned out shorter than they were; each file is named once."""
        files = {id(file): file for file in self._files.values() if file.memory.shrunk and not file.told}
        if not files:
            return []
        for file in files.values():
            file.told = True
        return [known for known in self.maps if id(known.memory) in files]

    def _drop(self, gone: list[IovaMap[_File | None]]) -> None:
        for known in gone:
            file = known.memory
            if file is None:
                continue
            file.users -= 1
            if not file.users:
                if self._files.get(file.memory.id) is file:
                    del self._files[file.memory.id]
                with contextlib.suppress(BufferError):  # a mapping that was not given back holds a piece
                    file.memory.close()

    def close(self) -> None:
        """Unmap everything."""
        self._drop(self.maps.clear())

    def __len__(self) -> int:
        return len(self.maps)
