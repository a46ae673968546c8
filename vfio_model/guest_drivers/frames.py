"""Guest memory as a kernel hands it out: page frames, taken and given back.

What is given back is filled with :data:`POISON`, and looked at when it is taken again: somebody who writes to memory
that he no longer has is found out.
"""

from __future__ import annotations

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_tables import PAGE, PageAllocator
from vfio_model.ranges import align_up

POISON = b"\xaa"
CHUNK = 1 << 18
"""Bytes that are moved at a time."""
_LOOKED_AT = 512
"""Pages of the largest block that is filled and looked at."""
_KEPT = 64


class Frames(PageAllocator):
    """Blocks of pages from ``first`` up to ``end`` (exclusive), which the machine's start left zero."""

    def __init__(self, cpu: Cpu, first: int, end: int) -> None:
        super().__init__(cpu, first, end)
        self._free: dict[int, list[int]] = {}
        self.taken = 0
        """Pages that somebody has."""

    def take(self, count: int = 1) -> int:
        """``count`` zeroed pages in a row, naturally aligned.

        :raise DriverError: when there are none left, or one that is free was written to.
        """
        free = self._free.get(count)
        if free:
            at = free.pop()
            self._check(at, count)
            self._fill(at, count, b"\0")
        else:
            at = align_up(self._next, PAGE << (count - 1).bit_length())
            if at + count * PAGE > self._end:
                raise DriverError(f"no {count} pages left below {self._end:#x}")
            self._keep_gap(at)
            self._next = at + count * PAGE
        self.taken += count
        return at

    def _keep_gap(self, at: int) -> None:
        """The first of what alignment skips can be had as single pages."""
        gap = range(self._next, at, PAGE)[:_KEPT]
        for page in gap:
            self._fill(page, 1, POISON)
        self._free.setdefault(1, []).extend(gap)

    def give(self, at: int, count: int = 1) -> None:
        """The block at ``at``, as it was taken, is free again."""
        if count <= _LOOKED_AT:
            self._fill(at, count, POISON)
        self._free.setdefault(count, []).append(at)
        self.taken -= count

    def check(self) -> None:
        """:raise DriverError: a page that is free was written to."""
        for count, blocks in self._free.items():
            for at in blocks:
                self._check(at, count)

    def _check(self, at: int, count: int) -> None:
        if count > _LOOKED_AT:
            return
        for offset in range(0, count * PAGE, CHUNK):
            size = min(CHUNK, count * PAGE - offset)
            if self._cpu.read_memory(at + offset, size) != POISON * size:
                raise DriverError(f"a free page in the {count} at {at:#x} was written to")

    def _fill(self, at: int, count: int, byte: bytes) -> None:
        for offset in range(0, count * PAGE, CHUNK):
            self._cpu.write_memory(at + offset, byte * min(CHUNK, count * PAGE - offset))
