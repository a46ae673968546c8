"""A block of RAM: a buffer somebody gave us, and what it was declared to be (QEMU's ``RAMBlock``).

The domain maps no memory. A process maps a memfd and hands the buffer in, or a test gives a ``bytearray``. The
backing page size and the host-virtual address are *declared* properties of the model, independent of how the buffer
is backed.
"""

from __future__ import annotations

from typing import Protocol

from vfio_model.memory.types import WriteBuffer
from vfio_model.ranges import Hva, is_aligned


class WriteLog(Protocol):
    """Notes what is written (:class:`vfio_model.memory.dirty_log.DirtyMap`)."""

    def mark(self, offset: int, size: int) -> None:
        """``size`` bytes from ``offset`` were written."""


class RAMBlock:
    """``buffer`` as RAM. ``page_size`` is the declared backing page size in bytes, ``hva`` the declared address at
    which a VFIO client has it mapped; ``fd`` and ``fd_offset`` say where it can be shared from (fd -1: it cannot).

    :raise ValueError: when the buffer is read-only or empty, or ``page_size`` is not a power of two.
    """

    __slots__ = ("dirty", "fd", "fd_offset", "hva", "name", "page_size", "size", "view")

    def __init__(
        self, name: str, buffer: WriteBuffer, *, page_size: int, hva: Hva, fd: int = -1, fd_offset: int = 0
    ) -> None:
        view = memoryview(buffer).cast("B")
        if view.readonly or not len(view):
            raise ValueError(f"RAM block {name}: the buffer must be writable and not empty")
        if page_size <= 0 or not is_aligned(page_size, page_size):
            raise ValueError(f"RAM block {name}: page size {page_size:#x} is not a power of two")
        self.name = name
        self.view = view
        self.size = len(view)
        self.page_size = page_size
        self.hva = hva
        self.fd, self.fd_offset = fd, fd_offset
        self.dirty: WriteLog | None = None
        """Where writes by this process are noted, or None; see :mod:`vfio_model.memory.dirty_log`."""

    def hva_of(self, offset: int) -> Hva:
        """The host-virtual address of byte ``offset``."""
        assert 0 <= offset < self.size, "an offset into a RAM block lies inside it"
        return Hva(self.hva + offset)

    def offset_of(self, hva: Hva) -> int | None:
        """The offset of ``hva`` in this block, or None when it lies elsewhere."""
        offset = hva - self.hva
        return offset if 0 <= offset < self.size else None

    def __repr__(self) -> str:
        return f"RAMBlock({self.name!r}, size={self.size:#x}, hva={self.hva:#x})"
