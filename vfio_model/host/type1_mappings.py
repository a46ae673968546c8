"""What a type 1 container has mapped, as its user mapped it: the unit that an unmap may not cut.

Mappings of equal size that follow one another, as a batch of single pages makes them, are kept as one *block*: 512
entries of a guest's table cost what one does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

from vfio_model.host.mm import Mm, Region


class Block:
    """``count`` mappings of ``size`` bytes each, one behind the other from ``iova`` on, pinned for ``mm``.

    ``regions`` pin the memory behind them: several only for a single mapping, else all lie somewhere in the one.
    """

    __slots__ = ("count", "dirty", "iova", "mm", "perm", "regions", "size", "vaddr_invalid")

    def __init__(self, iova: int, size: int, count: int, perm: int, regions: tuple[Region, ...], mm: Mm) -> None:
        assert count == 1 or len(regions) == 1, "mappings of one block lie in one region"
        self.iova, self.size, self.count, self.perm, self.regions, self.mm = iova, size, count, perm, regions, mm
        self.vaddr_invalid = False
        """The process has said that the address behind it will change (``VFIO_DMA_UNMAP_FLAG_VADDR``)."""
        self.dirty = False
        """All of it counts as written."""

    @property
    def bytes(self) -> int:
        """Of all its mappings."""
        return self.size * self.count

    @property
    def end(self) -> int:
        """Exclusive."""
        return self.iova + self.size * self.count

    def part(self, first: int, stop: int) -> Block:
        """Mappings ``first`` to ``stop`` (exclusive) of it."""
        if first == 0 and stop == self.count:
            return self
        part = Block(self.iova + first * self.size, self.size, stop - first, self.perm, self.regions, self.mm)
        part.vaddr_invalid, part.dirty = self.vaddr_invalid, self.dirty
        return part


class Mappings:
    """All of a container, by bus address. Ranges are given with both ends inclusive."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._blocks: list[Block] = []
        self.count = 0
        """Mappings, each counted by itself."""

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def _span(self, first: int, last: int) -> tuple[int, int]:
        """Blocks low to high (exclusive) have a byte in the range."""
        low = bisect_right(self._starts, first) - 1
        if low < 0 or self._blocks[low].end <= first:
            low += 1
        return low, max(low, bisect_right(self._starts, last))

    def overlapping(self, first: int, last: int) -> list[Block]:
        """Blocks that have a byte in the range."""
        low, high = self._span(first, last)
        return self._blocks[low:high]

    def at(self, iova: int) -> tuple[int, int] | None:
        """First and last byte of the mapping that holds ``iova``."""
        low, high = self._span(iova, iova)
        if low == high:
            return None
        block = self._blocks[low]
        start = iova - (iova - block.iova) % block.size
        return start, start + block.size - 1

    def bisected(self, first: int, last: int) -> bool:
        """Whether an end of the range lies inside a mapping."""
        low, high = self.at(first), self.at(last)
        return (low is not None and low[0] != first) or (high is not None and high[1] != last)

    def add(self, block: Block) -> None:
        """Nothing is mapped where it is."""
        at = bisect_right(self._starts, block.iova)
        self._starts.insert(at, block.iova)
        self._blocks.insert(at, block)
        self.count += block.count

    def take(self, first: int, last: int) -> list[Block]:
        """Remove every mapping that has a byte in the range, whole, and return them."""
        low, high = self._span(first, last)
        kept: list[Block] = []
        taken: list[Block] = []
        for block in self._blocks[low:high]:
            begin = max(0, (first - block.iova) // block.size)
            stop = min(block.count, (last - block.iova) // block.size + 1)
            if begin:
                kept.append(block.part(0, begin))
            taken.append(block.part(begin, stop))
            if stop < block.count:
                kept.append(block.part(stop, block.count))
        self._blocks[low:high] = kept
        self._starts[low:high] = [block.iova for block in kept]
        self.count -= sum(block.count for block in taken)
        return taken

    def split(self, first: int, last: int) -> None:
        """Make the ends of the range, which cut no mapping, ends of blocks."""
        for block in self.take(first, last):
            self.add(block)
