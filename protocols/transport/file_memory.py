"""A peer's file as memory: sealed memfds, others, files of a tmpfs or of a disk.

A file that is not sealed against shrinking is guarded (:mod:`protocols.transport.sigbus`): should the peer cut it, its
lost pages read as zeros here and :attr:`FileMemory.shrunk` says so.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import stat
from typing import NamedTuple

from protocols.transport.sigbus import Guard


class FileId(NamedTuple):
    """Which file, and whether the descriptor lets it be written."""

    device: int
    inode: int
    writable: bool


def identify(fd: int) -> tuple[FileId, int]:
    """The file behind ``fd`` and its size in bytes.

    :raise OSError: EPERM when it is no regular file, or cannot be read.
    """
    status = os.fstat(fd)
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EPERM, "the descriptor is no memfd or regular file")
    if mode == os.O_WRONLY:
        raise OSError(errno.EPERM, "the descriptor cannot be read, and so not be mapped")
    return FileId(status.st_dev, status.st_ino, mode == os.O_RDWR), status.st_size


class FileMemory:
    """All of the file behind ``fd`` (the caller's), mapped once; ``view`` is read-only when the descriptor is.

    :raise OSError: when it cannot be mapped.
    """

    def __init__(self, fd: int) -> None:
        self.id, self.size = identify(fd)
        if self.size == 0:
            raise OSError(errno.EINVAL, "the file is empty")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if self.id.writable else 0)
        try:
            self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED, prot)
        except (ValueError, OverflowError) as error:
            raise OSError(errno.EINVAL, str(error)) from error
        self._guard = None if _cannot_shrink(fd) else Guard(self._map)
        self.view = memoryview(self._map)

    @property
    def may_shrink(self) -> bool:
        """Whether the file is not sealed against it."""
        return self._guard is not None

    @property
    def shrunk(self) -> bool:
        """Whether an access found that the file is shorter than it was."""
        return self._guard is not None and self._guard.lost

    def close(self) -> None:
        """Unmap. Harmless twice.

        :raise BufferError: when somebody still holds a piece of ``view``; the memory goes with that piece.
        """
        self.view.release()
        self._map.close()
        if self._guard is not None:
            self._guard.close()


def _cannot_shrink(fd: int) -> bool:
    try:
        return bool(fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    except OSError:  # no memfd
        return False
