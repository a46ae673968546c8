"""Where memory lies in the synthetic host-physical address space, which has 52 bits.

Segments (the memfds that clients register) are placed once, aligned to their backing page, and no address is ever used
twice: a stale translation then points at nothing instead of at somebody else's page. ``scatter`` puts neighbouring
backing pages apart, as a real host's page allocator does, to catch whoever assumes contiguity across them.

The scattering is a formula, ``page * multiplier + addend`` modulo a power of two, so that a map is six numbers, has an
inverse, and costs the same for one page as for a million.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from errno import EINVAL, ENOMEM
from typing import TYPE_CHECKING, Literal

from vfio_model.host.layout import FIRST_HPA
from vfio_model.ranges import align_up

if TYPE_CHECKING:
    import numpy as np

    U64Array = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

HPA_BITS = 52
MAX_PAGE = 16 << 30
"""The largest backing page there is. One that were larger would use the whole space up for everybody."""
_GOLDEN = 0x9E37_79B9_7F4A_7C15


@functools.cache
def _inverse(multiplier: int, bits: int) -> int:
    return pow(multiplier, -1, 1 << bits)


Placement = Literal["contiguous", "scatter"]


@dataclass(frozen=True, slots=True)
class HpaMap:
    """Backing page ``p`` of a segment lies at ``base + ((p * multiplier + addend) mod 2**bits << page_shift)``."""

    base: int
    page_shift: int
    pages: int
    bits: int
    multiplier: int = 1
    addend: int = 0

    @property
    def contiguous(self) -> bool:
        """Whether the whole segment is one run of addresses."""
        return self.multiplier == 1 and self.addend == 0

    @property
    def end(self) -> int:
        """The address behind the last one that the map may use (exclusive)."""
        return self.base + (1 << (self.bits + self.page_shift))

    def to_hpa(self, offset: int) -> int:
        """The address of byte ``offset`` of the segment."""
        page = (offset >> self.page_shift) * self.multiplier + self.addend & (1 << self.bits) - 1
        return self.base + (page << self.page_shift) + (offset & (1 << self.page_shift) - 1)

    def to_offset(self, hpa: int) -> int:
        """The byte of the segment that lies at ``hpa``; -1 when none does."""
        relative = hpa - self.base
        if not 0 <= relative < 1 << (self.bits + self.page_shift):
            return -1
        inverse = _inverse(self.multiplier, self.bits)
        page = ((relative >> self.page_shift) - self.addend) * inverse & (1 << self.bits) - 1
        return (page << self.page_shift) + (relative & (1 << self.page_shift) - 1) if page < self.pages else -1

    def to_hpa_many(self, offsets: U64Array) -> U64Array:
        """:meth:`to_hpa` of a ``uint64`` array."""
        if self.contiguous:
            return offsets + self.base
        mask = (1 << self.bits) - 1
        page = ((offsets >> self.page_shift) * self.multiplier + self.addend) & mask
        return self.base + (page << self.page_shift) + (offsets & (1 << self.page_shift) - 1)

    def to_offset_many(self, hpas: U64Array) -> U64Array:
        """:meth:`to_offset` of a ``uint64`` array; at or beyond the segment's size where nothing lies."""
        relative = hpas - self.base
        if self.contiguous:
            return relative
        inverse = _inverse(self.multiplier, self.bits)
        mask = (1 << self.bits) - 1
        page = ((relative >> self.page_shift) - self.addend) * inverse & mask
        page |= (relative >> (self.bits + self.page_shift)) << self.bits  # outside stays outside
        return (page << self.page_shift) + (relative & (1 << self.page_shift) - 1)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of memory that clients map: ``id``, ``length`` in bytes, backing ``page_size``, and where it lies."""

    id: str
    length: int
    page_size: int
    hpa: HpaMap


class HpaSpace:
    """Hands out host-physical addresses. ``granule`` is the host's page size: no backing page is smaller."""

    def __init__(self, placement: Placement = "contiguous", granule: int = 0x1_0000) -> None:
        self.placement, self.granule = placement, granule
        self._next = FIRST_HPA
        self._count = 0

    def place(self, segment_id: str, length: int, page_size: int) -> Segment:
        """A new segment of ``length`` bytes backed by pages of ``page_size`` bytes.

        :raise OSError: EINVAL for a length below 1 or a page size that is no power of two or beyond :data:`MAX_PAGE`;
            ENOMEM when the space is used up.
        """
        if length < 1 or not 1 <= page_size <= MAX_PAGE or page_size & (page_size - 1):
            raise OSError(EINVAL, f"segment {segment_id}: length {length:#x}, page size {page_size:#x}")
        page = max(page_size, self.granule)
        pages = align_up(length, page) // page
        bits = (pages - 1).bit_length()
        multiplier, addend = 1, 0
        if self.placement == "scatter":
            bits = max(3, bits + 1)
            multiplier = _GOLDEN >> (64 - bits) | 1
            addend = self._count * _GOLDEN & (1 << bits) - 1
        used = HpaMap(align_up(self._next, page), page.bit_length() - 1, pages, bits, multiplier, addend)
        if used.end > 1 << HPA_BITS:
            raise OSError(ENOMEM, f"segment {segment_id}: the host-physical space is used up")
        # A hole of one page keeps segments from touching, so that an overrun is seen.
        self._next = used.end + page
        self._count += 1
        return Segment(segment_id, length, page, used)
