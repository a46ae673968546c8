"""Shared memory: sealed memfds mapped as memoryviews.

A segment or table is a memfd sealed against growing and shrinking *before* anybody else sees it, so that no access
through a map can raise SIGBUS: an unsealed descriptor is never mapped. Host tables bear F_SEAL_FUTURE_WRITE besides:
their maker keeps its writable map, every later map is read-only. The kernel frees a memfd with its last user, so a
crash leaks nothing.

8-byte words are stored through ``words`` (a cast to 'Q'), never by ``struct.pack_into``, which tears. Sources:
memfd_create(2), fcntl(2) "File Sealing".
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Iterator

from vfio_model.errors import RemoteProtocolError

F_SEAL_FUTURE_WRITE = 0x10
"""include/uapi/linux/fcntl.h; Python 3.11 does not name it."""
SEGMENT_SEALS = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
TABLE_SEALS = SEGMENT_SEALS | F_SEAL_FUTURE_WRITE


class MappedMemory:
    """A mapped memfd: ``view`` ('B') and ``words`` ('Q', native-endian) over the same ``size`` bytes.

    Owns its descriptor ``fd`` and the map. Made by :func:`create_memory` or :func:`map_memory`.
    """

    __slots__ = ("_map", "fd", "name", "size", "view", "words", "writable")

    def __init__(self, fd: int, size: int, *, writable: bool, name: str = "") -> None:
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, prot)
        self.fd, self.size, self.writable, self.name = fd, size, writable, name
        self.view = memoryview(self._map)
        self.words = self.view[: size & ~7].cast("Q")

    def extents(self) -> Iterator[tuple[int, int]]:
        """(offset, size) of each stretch that may hold anything but zeros, ascending (lseek(2), SEEK_DATA)."""
        at = 0
        while at < self.size:
            try:
                start = os.lseek(self.fd, at, os.SEEK_DATA)
            except OSError:  # ENXIO: nothing behind it
                return
            at = min(os.lseek(self.fd, start, os.SEEK_HOLE), self.size)
            yield start, at - start

    def discard(self) -> None:
        """Make all of it zero, and give the memory back (madvise(2), MADV_REMOVE)."""
        self._map.madvise(mmap.MADV_REMOVE)

    def close(self) -> None:
        """Unmap and close. Harmless twice.

        :raise BufferError: when somebody still holds a view cut from ``view`` or ``words``; the descriptor is closed
            then, and the
            memory goes with that view.
        """
        if self.fd < 0:
            return
        os.close(self.fd)
        self.fd = -1
        self.words.release()
        self.view.release()
        self._map.close()

    def __enter__(self) -> MappedMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def create_memory(name: str, size: int, *, exclusive: bool = False) -> MappedMemory:
    """A new memfd of ``size`` zero bytes (a multiple of 8), sealed and mapped writable.

    ``exclusive`` adds F_SEAL_FUTURE_WRITE after this map, so that nobody else can ever map it writable.

    :raise OSError: when the kernel refuses.
    """
    if size <= 0 or size % 8:
        raise ValueError(f"{name}: {size} bytes is not a positive multiple of 8")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEGMENT_SEALS)
        memory = MappedMemory(fd, size, writable=True, name=name)
    except (OSError, ValueError, OverflowError):
        os.close(fd)
        raise
    if exclusive:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
    return memory


def sealed_size(fd: int, required_seals: int = SEGMENT_SEALS, what: str = "memory") -> int:
    """The size in bytes of a memfd that bears at least ``required_seals``.

    :raise RemoteProtocolError: when it is no such descriptor.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        status = os.fstat(fd)
    except OSError as error:
        raise RemoteProtocolError(f"{what}: not a memfd ({error.strerror})") from error
    if not stat.S_ISREG(status.st_mode):
        raise RemoteProtocolError(f"{what}: not a memfd")
    if seals & required_seals != required_seals:
        raise RemoteProtocolError(f"{what}: seals {seals:#x}, {required_seals:#x} are needed")
    return status.st_size


def map_memory(
    fd: int,
    *,
    writable: bool = False,
    size: int | None = None,
    required_seals: int = SEGMENT_SEALS,
    what: str = "memory",
) -> MappedMemory:
    """Map a received memfd. ``fd`` is taken over in every case: closed here when it is refused.

    ``size`` is the least size in bytes that the caller needs; the whole memfd is mapped.

    :raise RemoteProtocolError: when seals or size are not as they must be, or the kernel does not let it be mapped so.
    """
    try:
        found = sealed_size(fd, required_seals, what)
        if found == 0 or (size is not None and found < size):
            raise RemoteProtocolError(f"{what}: {found} bytes, {size or 1} are needed")
        return MappedMemory(fd, found, writable=writable, name=what)
    except (OSError, ValueError, OverflowError) as error:
        os.close(fd)
        raise RemoteProtocolError(f"{what}: cannot be mapped: {error}") from error
    except RemoteProtocolError:
        os.close(fd)
        raise
