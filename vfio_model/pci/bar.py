"""Base address registers: what a device asks for, and where the guest has put it.

PCI Local Bus Specification 3.0, "Base Addresses": the low bits of a BAR are read-only type bits, the bits below the
size are hardwired to zero (which is how a guest sizes it: write all ones, read back), the rest is the address.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from vfio_model.errors import ConfigError
from vfio_model.ranges import U32_MAX, U64_MAX, Range

BARS = 6
BAR_OFFSET = 0x10
MMAP_UNIT = 4096
"""Areas of a BAR that can be mapped begin and end at multiples of this."""

_ACCESSES = {(low, high) for low in (1, 2, 4, 8) for high in (1, 2, 4, 8) if low <= high}


class BarType(Enum):
    """Which space a BAR decodes, and how wide its register is."""

    MEM32 = 0x0
    MEM64 = 0x4
    IO = 0x1


@dataclass(frozen=True, slots=True)
class BarSpec:
    """BAR ``index`` (0..5) of ``size`` bytes, a power of two of at least 16 (memory) or 4 (I/O).

    ``access`` bounds the sizes in bytes that the device accepts, smallest and largest; others are decode errors.
    ``mmap`` lists areas, (offset, size) in multiples of 4096 bytes, ascending and apart, that are plain memory: the
    device's user may map them, and no access to them reaches the device class.

    :raise ConfigError: when there is no such BAR.
    """

    index: int
    size: int
    type: BarType = BarType.MEM32
    prefetch: bool = False
    access: tuple[int, int] = (1, 8)
    mmap: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        last = BARS - 2 if self.type is BarType.MEM64 else BARS - 1
        self._check(0 <= self.index <= last, f"a BAR of this type has an index from 0 to {last}")
        smallest = 4 if self.type is BarType.IO else 16
        power = self.size >= smallest and self.size & (self.size - 1) == 0
        self._check(power, f"its size is {self.size}, no power of two from {smallest} on")
        low, high = self.access
        self._check((low, high) in _ACCESSES, f"access is {self.access}: smallest and largest of 1, 2, 4 and 8 bytes")
        self._check(not (self.mmap and self.is_io), "an I/O BAR cannot be mapped")
        end = 0
        for offset, size in self.mmap:
            whole = not (offset | size) % MMAP_UNIT and size > 0
            self._check(whole, f"mmap area ({offset:#x}, {size:#x}) is not (offset, size) in pages of {MMAP_UNIT}")
            self._check(offset >= end, f"mmap area ({offset:#x}, {size:#x}) begins before the one before it ends")
            end = offset + size
        self._check(end <= self.size, f"an mmap area ends at {end:#x}, past the BAR's {self.size:#x} bytes")

    def _check(self, holds: bool, what: str) -> None:
        if not holds:
            raise ConfigError(what, where=f"BarSpec({self.index})")

    @property
    def offset(self) -> int:
        """Offset of the register in configuration space."""
        return BAR_OFFSET + 4 * self.index

    @property
    def width(self) -> int:
        """Bytes of the register: 8 for a 64-bit BAR, which takes two."""
        return 8 if self.type is BarType.MEM64 else 4

    @property
    def type_bits(self) -> int:
        """The read-only low bits."""
        return self.type.value | (8 if self.prefetch and self.type is not BarType.IO else 0)

    @property
    def write_mask(self) -> int:
        """Which bits the guest may write."""
        return (U64_MAX if self.type is BarType.MEM64 else U32_MAX) & ~(self.size - 1)

    @property
    def is_io(self) -> bool:
        """Whether it decodes I/O space."""
        return self.type is BarType.IO

    def decoded(self, value: int, *, allow_zero: bool = False) -> Range | None:
        """The bus addresses that the register value ``value`` decodes, or None.

        An address of 0 counts as not set, unless the machine's guests use it (``allow_zero``). The all-ones of a guest
        that is sizing the BAR, and a range that leaves the register's width, decode nothing.
        """
        start = value & self.write_mask
        last = start + self.size - 1
        top = U64_MAX if self.type is BarType.MEM64 else U32_MAX
        if (start == 0 and not allow_zero) or last >= top:
            return None
        return Range(start, last)
