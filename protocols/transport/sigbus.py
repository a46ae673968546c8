"""What happens when a file that is mapped here shrinks: its lost pages become zeros, and this process goes on.

A peer's memory may come as a file that is not sealed against shrinking (a file of ``/dev/shm``, a plain memfd). The
size is checked when it is mapped, but nothing holds the peer to it, and an access behind the end is SIGBUS. For maps
that are :class:`guarded <Guard>` the handler puts zero pages of this process under the address and the access goes on;
what is written there goes nowhere. The owner learns of it by :attr:`Guard.lost`.

SIGBUS is synchronous: the handler runs in the thread that made the access, at the instruction that failed. Every other
SIGBUS ends the process as ever. Sources: sigaction(2) "SIGBUS", mmap(2) MAP_FIXED.
"""

from __future__ import annotations

import ctypes
import mmap
import signal
from typing import Any, Final

_SA_SIGINFO: Final = 4
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value
_ADDRESS_AT: Final = 16
"""Where ``si_addr`` is in a siginfo_t of a 64-bit Linux."""

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Sigaction(ctypes.Structure):
    """``struct sigaction`` of glibc and musl on 64-bit Linux."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


class _Buffer(ctypes.Structure):
    """``Py_buffer``, as far as its length; the rest is room."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("rest", ctypes.c_ubyte * 80),
    ]


class Guard:
    """``mapped`` (which must outlive this) is guarded until :meth:`close`."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.start = _address(mapped)
        self.stop = self.start + len(mapped)
        self.lost = False
        """Whether an access went behind the end of the file."""
        _install()
        _guards.append(self)

    def close(self) -> None:
        """An access behind the end is fatal again. Harmless twice."""
        if self in _guards:
            _guards.remove(self)

    def replace(self, address: int) -> bool:
        """Zero pages from the one with ``address`` to the end of the map; False when the kernel has none."""
        self.lost = True
        page = address & -mmap.PAGESIZE
        prot = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        return bool(_mmap(page, self.stop - page, prot, flags, -1, 0) != _FAILED)


_guards: list[Guard] = []
_installed: list[Any] = []
"""The handler, kept alive for ever once it is there."""
_libc = ctypes.PyDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def _address(mapped: mmap.mmap) -> int:
    view = _Buffer()
    if ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(mapped), ctypes.byref(view), 0):
        raise BufferError("a map without an address")
    address = int(view.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(view))
    return address


def _install() -> None:
    if _installed:
        return
    handler = _Handler(_caught)
    action = _Sigaction(ctypes.cast(handler, ctypes.c_void_p).value, flags=_SA_SIGINFO)
    if _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), None):
        raise OSError(ctypes.get_errno(), "sigaction(SIGBUS)")
    _installed.append(handler)


def _caught(_number: int, info: int, _context: int) -> None:
    address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
    for guard in _guards:
        if guard.start <= address < guard.stop and guard.replace(address):
            return
    _libc.sigaction(int(signal.SIGBUS), ctypes.byref(_Sigaction()), None)  # it happens again, and is the end
