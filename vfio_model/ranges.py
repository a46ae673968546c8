"""Addresses and ranges.

Four kinds of address meet in device passthrough, and mixing them up is the bug that the DMA API was invented against,
so each is a type of its own. A range is ``start`` and an *inclusive* ``last``: 2**64 - 1 must fit. The words ``end``
and ``size`` mean exclusive end and length in bytes. Guest arithmetic wraps at 64 bits, visibly, through :func:`wrap64`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NewType

Iova = NewType("Iova", int)
"""I/O virtual address: what a device puts on its bus."""
Gpa = NewType("Gpa", int)
"""Guest-physical address: the guest's system address space."""
Hva = NewType("Hva", int)
"""Host-virtual address: where a VFIO client has its RAM mapped (declared, not the machine's own)."""
Hpa = NewType("Hpa", int)
"""Host-physical address in the synthetic 52-bit space of the modelled host."""

U64_MAX = (1 << 64) - 1
U32_MAX = (1 << 32) - 1


def wrap64(value: int) -> int:
    """``value`` modulo 2**64, as a 64-bit register would hold it."""
    return value & U64_MAX


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """``start``..``last``, both inclusive, in bytes; never empty.

    :raise ValueError: when ``last < start`` or a bound does not fit 64 bits.
    """

    start: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.last <= U64_MAX:
            raise ValueError(f"not a range: {self.start:#x}..{self.last:#x}")

    @classmethod
    def sized(cls, start: int, size: int) -> Range:
        """The range of ``size`` bytes (at least 1) from ``start``."""
        return cls(start, start + size - 1)

    @property
    def size(self) -> int:
        """Length in bytes; 2**64 for the whole space."""
        return self.last - self.start + 1

    def overlaps(self, other: Range) -> bool:
        """Whether at least one byte is in both."""
        return self.start <= other.last and other.start <= self.last

    def contains(self, other: Range) -> bool:
        """Whether every byte of ``other`` is in this range."""
        return self.start <= other.start and other.last <= self.last

    def intersect(self, other: Range) -> Range | None:
        """The bytes in both, or None."""
        start, last = max(self.start, other.start), min(self.last, other.last)
        return Range(start, last) if start <= last else None

    def __str__(self) -> str:
        return f"{self.start:#x}..{self.last:#x}"


def is_aligned(value: int, alignment: int) -> bool:
    """Whether ``value`` is a multiple of ``alignment`` (a power of two)."""
    return value & (alignment - 1) == 0


def align_up(value: int, alignment: int) -> int:
    """The next multiple of ``alignment`` (a power of two) at or above ``value``; may exceed 64 bits."""
    return (value + alignment - 1) & ~(alignment - 1)


def align_down(value: int, alignment: int) -> int:
    """The multiple of ``alignment`` (a power of two) at or below ``value``."""
    return value & ~(alignment - 1)


def aligned_pow2_mask(start: int, last: int, max_bits: int = 64) -> int:
    """Size minus one of the largest naturally aligned power-of-two chunk from ``start`` that does not pass ``last``.

    ``last`` is inclusive. ``max_bits`` bounds the alignment when ``start`` is 0. This is the function by which QEMU
    splits an arbitrary range into UNMAP notifications (``dma_aligned_pow2_mask``).
    """
    size_mask = last - start
    if size_mask == U64_MAX:
        return U64_MAX
    max_mask = U64_MAX if max_bits == 64 else (1 << max_bits) - 1
    alignment_mask = max_mask if start == 0 else (start & -start) - 1
    alignment_mask = min(alignment_mask, max_mask)
    if alignment_mask <= size_mask:
        return alignment_mask
    return (1 << ((size_mask + 1).bit_length() - 1)) - 1
