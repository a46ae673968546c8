"""A file as a disk (a ``vfio_model.backends.block.BlockBackend``), locked against a second user."""

from __future__ import annotations

import errno
import fcntl
import os
import stat

from protocols.transport.kernel import fallocate
from vfio_model.errors import ConfigError

FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
"""include/uapi/linux/falloc.h"""
_UNSUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL)
ZEROES = bytes(64 << 10)


class FileDisk:
    """The file at ``path``, as large as it is now.

    :raise ConfigError: when it cannot be opened or locked, is empty, or no file or block device.
    """

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        self.read_only = read_only
        self._fd = -1
        try:
            self._fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            mode = os.fstat(self._fd).st_mode
            self.size = os.lseek(self._fd, 0, os.SEEK_END)
            fcntl.flock(self._fd, (fcntl.LOCK_SH if read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise ConfigError("another process uses it", where=path, hint="a disk has one writer") from error
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot be opened: {error.strerror}", where=path) from error
        if not self.size or not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            self.close()
            raise ConfigError("no disk: empty, or not a file", where=path, hint="truncate -s 64M PATH makes one")

    def read(self, offset: int, out: bytearray | memoryview) -> None:
        """Fill ``out``; what lies behind the end of a file that has shrunk is EIO."""
        view, done = memoryview(out), 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if not got:
                raise OSError(errno.EIO, "the file has shrunk")
            done += got

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """All of ``data``."""
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], offset + done)

    def flush(self) -> None:
        """fdatasync."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Punches a hole where the file system can."""
        self._allocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, length)

    def write_zeroes(self, offset: int, length: int) -> None:
        """A range of zeroes, or zeroes one by one where the file system has no such thing."""
        if self._allocate(FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, length):
            return
        while length:
            count = min(length, len(ZEROES))
            self.write(offset, memoryview(ZEROES)[:count])
            offset, length = offset + count, length - count

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        if self.read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        try:
            fallocate(self._fd, mode, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            return False
        return True

    def close(self) -> None:
        """Unlocks it. Harmless twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def open_file(text: str) -> FileDisk:
    """The disk of ``file:PATH[,ro]``, or of a bare path.

    :raise ConfigError: as :class:`FileDisk`.
    """
    path = text.removeprefix("file:")
    read_only = path.endswith(",ro")
    return FileDisk(path.removesuffix(",ro"), read_only=read_only)
