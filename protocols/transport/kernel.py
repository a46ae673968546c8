"""What Linux offers and Python 3.11 does not wrap: membarrier, timerfd, prctl, fallocate; pidfd and eventfd as objects.

:class:`Membarrier` is the fence of a revoke: after ``barrier()`` every registered process has passed a full memory
barrier, so that a reader without fences of its own (Python has none) either sees the stores made before or has its lane
odd. Calls go through ``PyDLL``: they last microseconds, and giving up the GIL for them would cost a switch interval.

Sources: membarrier(2), timerfd_create(2), prctl(2) PR_SET_PDEATHSIG, pidfd_open(2), eventfd(2),
fallocate(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import select
import signal
from collections.abc import Sequence
from typing import Final

from vfio_model.errors import PeerLost

_MEMBARRIER_NUMBERS: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "ppc64": 365, "s390x": 356}
MEMBARRIER_CMD_QUERY: Final = 0
MEMBARRIER_CMD_GLOBAL_EXPEDITED: Final = 2
MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED: Final = 4
PR_SET_PDEATHSIG: Final = 1
CLOCK_MONOTONIC: Final = 1
TFD_NONBLOCK, TFD_CLOEXEC = 0o4000, 0o2000000


@functools.cache
def _libc() -> ctypes.PyDLL:
    return ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, f"{what}: {os.strerror(errno)}")
    return result


class Membarrier:
    """membarrier(2), global expedited. Conforms to the domain's ``Fence``."""

    def __init__(self, number: int) -> None:
        self._syscall = _libc().syscall
        self._syscall.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_uint, ctypes.c_int]
        self._syscall.restype = ctypes.c_long
        self._number = number

    def _call(self, command: int) -> int:
        result = int(self._syscall(self._number, command, 0, 0))
        return result if result >= 0 else _check(result, f"membarrier({command})")

    def register(self) -> None:
        """This process takes part: a device process calls it before its first DMA section."""
        self._call(MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED)

    def barrier(self) -> None:
        """A full memory barrier on every registered process, and on this one."""
        self._call(MEMBARRIER_CMD_GLOBAL_EXPEDITED)

    def supported(self) -> bool:
        """Whether the kernel has both commands."""
        try:
            mask = self._call(MEMBARRIER_CMD_QUERY)
        except OSError:
            return False
        need = MEMBARRIER_CMD_GLOBAL_EXPEDITED | MEMBARRIER_CMD_REGISTER_GLOBAL_EXPEDITED
        return mask & need == need


def probe() -> Membarrier | None:
    """The fence of this machine, or None where a revoke has to ask each device instead."""
    number = _MEMBARRIER_NUMBERS.get(platform.machine())
    if number is None:
        return None
    fence = Membarrier(number)
    return fence if fence.supported() else None


class Pidfd:
    """A process by descriptor: it cannot become another one, as a pid can. Readable when the process is dead."""

    __slots__ = ("_poll", "fd", "pid")

    def __init__(self, fd: int, pid: int = 0) -> None:
        """Takes ``fd`` over."""
        self.fd, self.pid = fd, pid
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)

    @classmethod
    def open(cls, pid: int) -> Pidfd:
        """The pidfd of ``pid``.

        :raise PeerLost: when there is no such process.
        """
        try:
            return cls(os.pidfd_open(pid), pid)
        except ProcessLookupError as error:
            raise PeerLost(f"process {pid}") from error

    def fileno(self) -> int:
        """For a poller."""
        return self.fd

    def alive(self) -> bool:
        """Whether the process still runs (a zombie does not)."""
        return not self._poll.poll(0)

    def send_signal(self, number: int) -> None:
        """Signal the process; harmless when it is dead."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.fd, number)

    def close(self) -> None:
        """Harmless twice. A closed one must not be asked."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd: a write to anything else may fail, or last."""
    return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"


class EventFd:
    """A doorbell: :meth:`ring` from anywhere, :meth:`drain` by the one that waits. DMA writes precede a ring."""

    __slots__ = ("fd",)

    def __init__(self, fd: int = -1) -> None:
        """Takes ``fd`` over, or makes a new one."""
        self.fd = fd if fd >= 0 else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        """For a poller, or to be passed on."""
        return self.fd

    def ring(self) -> None:
        """Add one; a full counter is as good as a ringing one."""
        with contextlib.suppress(BlockingIOError):
            os.write(self.fd, b"\x01\0\0\0\0\0\0\0" if _LITTLE else b"\0\0\0\0\0\0\0\x01")

    def drain(self) -> int:
        """Rings since the last drain; 0 when none."""
        try:
            return int.from_bytes(os.read(self.fd, 8), "little" if _LITTLE else "big")
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


_LITTLE = memoryview(b"\x01\0").cast("H")[0] == 1


class _Timespec(ctypes.Structure):
    _fields_ = [("sec", ctypes.c_long), ("nsec", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class TimerFd:
    """A one-shot timer on CLOCK_MONOTONIC with nanosecond resolution; readable when it has expired."""

    __slots__ = ("_set", "_spec", "fd")

    def __init__(self) -> None:
        libc = _libc()
        self.fd = _check(libc.timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create")
        self._set = libc.timerfd_settime
        self._spec = _Itimerspec()

    def fileno(self) -> int:
        """For a poller."""
        return self.fd

    def arm_ns(self, delay_ns: int) -> None:
        """Expire once, ``delay_ns`` from now (at least 1 ns), replacing an earlier moment."""
        self._spec.value.sec, self._spec.value.nsec = divmod(max(delay_ns, 1), 1_000_000_000)
        _check(self._set(self.fd, 0, ctypes.byref(self._spec), None), "timerfd_settime")

    def disarm(self) -> None:
        """Not readable from now on."""
        self._spec.value.sec = self._spec.value.nsec = 0
        _check(self._set(self.fd, 0, ctypes.byref(self._spec), None), "timerfd_settime")

    def drain(self) -> int:
        """Expirations since the last drain; 0 when none."""
        try:
            return int.from_bytes(os.read(self.fd, 8), "little" if _LITTLE else "big")
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Harmless twice."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2) with its modes, which ``os.posix_fallocate`` has not.

    :raise OSError: EOPNOTSUPP when the file system has not got that mode.
    """
    call = _libc().fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    _check(call(fd, mode, offset, length), "fallocate")


def die_with_parent(parent_pid: int | None = None, number: int = signal.SIGKILL) -> None:
    """Get signal ``number`` when the parent *thread* that started this process ends. Called before anything else.

    ``parent_pid`` is what the parent said its pid is: a parent that died before this call is noticed by it.

    :raise PeerLost: when the parent is already gone.
    """
    _check(_libc().prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")
    if parent_pid is not None and os.getppid() != parent_pid:
        raise PeerLost("parent", "starting")


class PeerLanes:
    """The lanes of one peer process, read by the side that revokes. Conforms to the domain's ``LaneSet``.

    ``words`` is the peer's lane memory; lane n's counter is ``words[first + n * stride]`` (in 8-byte words).
    """

    __slots__ = ("_counters", "_pidfd", "name")

    def __init__(self, name: str, words: memoryview, pidfd: Pidfd, *, first: int = 8, stride: int = 8) -> None:
        self.name, self._pidfd, self._counters = name, pidfd, words[first::stride]

    def snapshot(self) -> list[int]:
        """The counters now; an odd one is inside a DMA section."""
        counters: Sequence[int] = self._counters.tolist()
        return list(counters)

    def alive(self) -> bool:
        """Whether the process that owns the lanes still runs."""
        return self._pidfd.alive()

    def close(self) -> None:
        """Give the view back, so that its memory can be unmapped. The pidfd is the caller's."""
        self._counters.release()
