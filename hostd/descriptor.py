"""A descriptor with one owner: the machine's side of :class:`hostd.events.Descriptor`."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from protocols.transport.shm import MappedMemory, map_memory, sealed_size


class OwnedFd:
    """Owns ``fd``. Whoever closes it last has closed it once."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def release(self) -> int:
        """The number, which is the caller's to close from now on."""
        fd, self.fd = self.fd, -1
        return fd

    def duplicate(self) -> OwnedFd:
        """A second descriptor of the same thing."""
        return OwnedFd(os.dup(self.fd))

    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino

    def sealed_size(self) -> int:
        """Bytes of the memfd behind it, sealed against growing and shrinking.

        :raise RemoteProtocolError: when it is none.
        """
        return sealed_size(self.fd)

    def map(self) -> MappedMemory:
        """All of the memfd, to be read. :raise RemoteProtocolError: when that cannot be."""
        return map_memory(os.dup(self.fd), what="guest memory")


def pid_of_pidfd(fd: int) -> int | None:
    """The process that pidfd ``fd`` stands for; None when it is no pidfd, or its process is gone."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Pid" and int(value) > 0:
                return int(value)
    return None


def is_seqpacket(fd: int) -> bool:
    """Whether ``fd`` is a SEQPACKET socket."""
    own = os.dup(fd)
    try:
        probe = socket.socket(fileno=own)
    except OSError:  # it takes nothing over then
        os.close(own)
        return False
    with probe:
        return probe.family == socket.AF_UNIX and probe.type == socket.SOCK_SEQPACKET
