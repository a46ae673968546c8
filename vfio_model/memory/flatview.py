"""The flat view of a region tree: which region answers at each address (QEMU's ``FlatView``).

Rendering walks the tree from the top, highest priority first, and lets each terminating region fill only the gaps
that are left. Aliases are followed into their target; disabled regions show nothing. Neighbouring ranges of one
region are merged.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from vfio_model.memory.region import AliasRegion, MemoryRegion, RAMRegion
from vfio_model.ranges import U64_MAX


@dataclass(frozen=True, slots=True)
class FlatRange:
    """``start``..``last`` (inclusive) shows ``region`` from ``offset`` in it."""

    start: int
    last: int
    region: MemoryRegion
    offset: int
    readonly: bool

    @property
    def size(self) -> int:
        """Length in bytes, up to 2**64."""
        return self.last - self.start + 1

    def joins(self, other: FlatRange) -> bool:
        """Whether ``other`` goes on where this ends."""
        return (
            self.last + 1 == other.start
            and self.region is other.region
            and self.readonly == other.readonly
            and self.offset + self.size == other.offset
        )


class FlatView:
    """Sorted, disjoint ranges. ``regions`` are all regions met while rendering, hidden ones included."""

    __slots__ = ("ranges", "regions", "starts")

    def __init__(self, ranges: list[FlatRange], regions: set[MemoryRegion]) -> None:
        self.ranges = ranges
        self.starts = [r.start for r in ranges]
        self.regions = regions

    def lookup(self, addr: int) -> FlatRange | None:
        """The range that holds ``addr``, or None."""
        i = bisect_right(self.starts, addr) - 1
        if i < 0:
            return None
        found = self.ranges[i]
        return found if addr <= found.last else None

    def gap_last(self, addr: int) -> int:
        """Last address (inclusive) of the unassigned stretch that holds ``addr``."""
        i = bisect_right(self.starts, addr)
        return self.starts[i] - 1 if i < len(self.starts) else U64_MAX


EMPTY_VIEW = FlatView([], set())


class _Renderer:
    def __init__(self) -> None:
        self.ranges: list[FlatRange] = []
        self.regions: set[MemoryRegion] = set()

    def region(self, mr: MemoryRegion, base: int, lo: int, hi: int, readonly: bool) -> None:
        """Show ``mr``, whose byte 0 lies at ``base`` (any integer), within ``lo``..``hi`` (inclusive)."""
        self.regions.add(mr)
        if not mr.enabled:
            return
        lo, hi = max(lo, base), min(hi, base + mr.size - 1)
        if lo > hi:
            return
        if isinstance(mr, AliasRegion):
            self.region(mr.target, base - mr.target_offset, lo, hi, readonly)
            return
        for child in mr.subregions:
            self.region(child, base + child.offset, lo, hi, readonly)
        if mr.terminates:
            self.fill(mr, base, lo, hi, readonly or (isinstance(mr, RAMRegion) and mr.readonly))

    def fill(self, mr: MemoryRegion, base: int, lo: int, hi: int, readonly: bool) -> None:
        """Give ``mr`` what nobody has taken of ``lo``..``hi``."""
        fresh = []
        for taken in self.ranges:
            if taken.last < lo:
                continue
            if taken.start > hi:
                break
            if lo < taken.start:
                fresh.append(FlatRange(lo, taken.start - 1, mr, lo - base, readonly))
            lo = taken.last + 1
        if lo <= hi:
            fresh.append(FlatRange(lo, hi, mr, lo - base, readonly))
        if fresh:
            self.ranges = sorted(self.ranges + fresh, key=lambda r: r.start)


def _merged(ranges: list[FlatRange]) -> list[FlatRange]:
    result: list[FlatRange] = []
    for r in ranges:
        if result and result[-1].joins(r):
            head = result.pop()
            r = FlatRange(head.start, r.last, head.region, head.offset, head.readonly)
        result.append(r)
    return result


def render(root: MemoryRegion | None) -> FlatView:
    """What an address space with ``root`` shows."""
    if root is None:
        return EMPTY_VIEW
    renderer = _Renderer()
    renderer.region(root, 0, 0, U64_MAX, False)
    return FlatView(_merged(renderer.ranges), renderer.regions)
