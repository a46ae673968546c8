"""Guest RAM as a remote device's client gives it: DMA_MAP with descriptors, mapped once per file and sliced.

An address is guest-physical where the device has an ATC (the client's RAM, translations come by X_TRANSLATE), and the
device's own DMA address where it has none (a client that maps what its IOMMU allows). DMA_UNMAP takes away every map
that lies inside its range; clients send ranges that cover many maps, or none. Only the bisection of a map is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
from dataclasses import dataclass

from protocols.transport.shm import MappedMemory, map_memory
from protocols.transport.unix import close_fds
from protocols.vfio_user.messages import DmaMap, DmaUnmap
from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.atc_entries import GuestRam

MAX_MAPS = 65535
_READ, _WRITE = 1, 2


@dataclass(eq=False)
class Mapping:
    """``size`` bytes at ``address``; ``file`` is None for memory that can be reached by message only."""

    address: int
    size: int
    flags: int
    file: tuple[int, int] | None

    @property
    def last(self) -> int:
        """Inclusive."""
        return self.address + self.size - 1


class RemoteMemory:
    """The maps of one client. :attr:`ram` holds those with bytes behind them, readable and writable ones."""

    def __init__(self) -> None:
        self.ram = GuestRam()
        self._maps: dict[int, Mapping] = {}
        self._files: dict[tuple[int, int], tuple[MappedMemory, int]] = {}

    def add(self, request: DmaMap, fds: list[int]) -> None:
        """DMA_MAP; ``fds`` are taken over.

        :raise OSError: EINVAL for a range that is empty, wraps or leaves the file; EEXIST for an overlap; ENOSPC;
        EPERM for a
            descriptor that is no sealed memfd or not writable.
        """
        try:
            self._check(request, fds)
        except OSError:
            close_fds(fds)
            raise
        # A map that the device may not write is not for zero copy: everything cached here can be written.
        if not fds or request.flags & (_READ | _WRITE) != _READ | _WRITE:
            close_fds(fds)
            self._maps[request.address] = Mapping(request.address, request.size, request.flags, None)
            return
        key, memory = self._file(fds[0])
        if request.offset + request.size > memory.size:
            self._put(key)
            raise OSError(errno.EINVAL, f"the descriptor has {memory.size:#x} bytes")
        view = memory.view[request.offset : request.offset + request.size]
        self._maps[request.address] = Mapping(request.address, request.size, request.flags, key)
        self.ram.add(request.address, view)

    def _check(self, request: DmaMap, fds: list[int]) -> None:
        last = request.address + request.size - 1
        if request.size == 0 or last >= 1 << 64 or len(fds) > 1 or request.flags & ~(_READ | _WRITE):
            raise OSError(errno.EINVAL, f"DMA_MAP of {request.size:#x} bytes at {request.address:#x}")
        if any(known.address <= last and request.address <= known.last for known in self._maps.values()):
            raise OSError(errno.EEXIST, f"{request.address:#x} is mapped already")
        if len(self._maps) >= MAX_MAPS:
            raise OSError(errno.ENOSPC, f"{MAX_MAPS} maps")

    def _file(self, fd: int) -> tuple[tuple[int, int], MappedMemory]:
        status = os.fstat(fd)
        key = (status.st_dev, status.st_ino)
        if key in self._files:
            os.close(fd)
            memory, users = self._files[key]
        else:
            try:
                memory, users = map_memory(fd, writable=True, what="guest RAM"), 0
            except RemoteProtocolError as error:
                raise OSError(errno.EPERM, str(error)) from error
        self._files[key] = (memory, users + 1)
        return key, memory

    def remove(self, request: DmaUnmap) -> int:
        """DMA_UNMAP; returns how many maps went.

        :raise OSError: EINVAL when a map would be cut in two; then nothing has changed.
        """
        last = request.address + request.size - 1
        touched = [known for known in self._maps.values() if known.address <= last and request.address <= known.last]
        if any(known.address < request.address or known.last > last for known in touched):
            raise OSError(
                errno.EINVAL, f"DMA_UNMAP of {request.size:#x} bytes at {request.address:#x} cuts a map in two"
            )
        for known in touched:
            self._drop(known)
        return len(touched)

    def _drop(self, known: Mapping) -> None:
        del self._maps[known.address]
        if known.file is not None:
            self.ram.remove(known.address)
            self._put(known.file)

    def _put(self, key: tuple[int, int]) -> None:
        memory, users = self._files[key]
        self._files[key] = (memory, users - 1)
        if users == 1:
            del self._files[key]
            with contextlib.suppress(BufferError):
                memory.close()

    def close(self) -> None:
        """Unmap everything."""
        for known in list(self._maps.values()):
            self._drop(known)

    def __len__(self) -> int:
        return len(self._maps)
