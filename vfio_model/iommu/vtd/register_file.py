"""The registers of a VT-d unit as 32-bit words that a guest reads and writes in fours and eights of bytes.

What a write does to bits says the table in :mod:`.regs`; what it sets in motion is :mod:`.registers`' matter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

from vfio_model.iommu.vtd import regs
from vfio_model.ranges import U32_MAX, U64_MAX

_COUNT = regs.SIZE // 4
_WORDS = struct.Struct(f"<{_COUNT}I")


class RegisterFile:
    """``resets`` replaces the reset values of registers by their offset. Offsets are multiples of 4."""

    def __init__(self, resets: Mapping[int, int], *, page_requests: bool) -> None:
        self._values = [0] * _COUNT
        self._writable = [0] * _COUNT
        self._clearable = [0] * _COUNT
        self._readable = [U32_MAX] * _COUNT
        self._resets = [0] * _COUNT
        for each in regs.REGISTERS:
            if page_requests or not each.page_requests:
                self._add(each, resets.get(each.offset, each.reset))
        self.reset()

    def _add(self, register: regs.Register, reset: int) -> None:
        for at in range(0, register.size, 4):
            word, shift = (register.offset + at) // 4, at * 8
            self._writable[word] = register.writable >> shift & U32_MAX
            self._clearable[word] = register.clear_on_write >> shift & U32_MAX
            self._readable[word] = ~register.write_only >> shift & U32_MAX
            self._resets[word] = reset >> shift & U32_MAX

    def reset(self) -> None:
        """Every register to its reset value."""
        self._values = list(self._resets)

    # -- as the unit sees them

    def get(self, offset: int) -> int:
        """32 bits."""
        return self._values[offset >> 2]

    def put(self, offset: int, value: int) -> None:
        """32 bits, whatever may be written."""
        self._values[offset >> 2] = value & U32_MAX

    def get_quad(self, offset: int) -> int:
        """64 bits."""
        return self._values[offset >> 2] | self._values[(offset >> 2) + 1] << 32

    def put_quad(self, offset: int, value: int) -> None:
        """64 bits, whatever may be written."""
        value &= U64_MAX
        self._values[offset >> 2], self._values[(offset >> 2) + 1] = value & U32_MAX, value >> 32

    def change(self, offset: int, clear: int = 0, set_: int = 0) -> int:
        """Bits of 32; the new value."""
        value = self._values[offset >> 2] = self._values[offset >> 2] & ~clear | set_
        return value

    # -- as a guest sees them

    def read(self, offset: int, size: int) -> int:
        """4 or 8 bytes."""
        at = offset >> 2
        low = self._values[at] & self._readable[at]
        if size == 4:
            return low
        return low | (self._values[at + 1] & self._readable[at + 1]) << 32

    def write(self, offset: int, size: int, value: int) -> None:
        """4 or 8 bytes."""
        self._write(offset >> 2, value & U32_MAX)
        if size == 8:
            self._write((offset >> 2) + 1, value >> 32)

    def _write(self, at: int, value: int) -> None:
        writable = self._writable[at]
        self._values[at] = (self._values[at] & ~writable | value & writable) & ~(self._clearable[at] & value)

    # -- migration

    def export(self) -> bytes:
        """All of them, little-endian."""
        return _WORDS.pack(*self._values)

    def load(self, data: bytes) -> None:
        """What :meth:`export` gave."""
        self._values = list(_WORDS.unpack(data))
