"""The maps that a vfio-user server was told of, in order of their addresses. They do not overlap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import NamedTuple


class SentMap(NamedTuple):
    """``size`` bytes from ``iova`` with permissions ``perm`` (1 read, 2 write); ``vaddr`` is where the first byte lies
    in the client, None for a map by message."""

    iova: int
    size: int
    perm: int
    vaddr: int | None

    @property
    def last(self) -> int:
        """Inclusive."""
        return self.iova + self.size - 1


class SentMaps:
    """See the module's head."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._maps: list[SentMap] = []

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[SentMap]:
        return iter(self._maps)

    def _span(self, first: int, last: int) -> tuple[int, int]:
        low = bisect_right(self._starts, first) - 1
        if low < 0 or self._maps[low].last < first:
            low += 1
        return low, bisect_right(self._starts, last)

    def count(self, first: int, last: int) -> int:
        """How many share a byte with ``first``..``last`` (inclusive)."""
        low, high = self._span(first, last)
        return max(high - low, 0)

    def touching(self, first: int, last: int) -> list[SentMap]:
        """Those that share a byte with ``first``..``last`` (inclusive)."""
        low, high = self._span(first, last)
        return self._maps[low:high]

    def take(self, first: int, last: int) -> list[SentMap]:
        """Remove those that :meth:`touching` tells, and return them."""
        low, high = self._span(first, last)
        found = self._maps[low:high]
        del self._starts[low:high], self._maps[low:high]
        return found

    def add(self, new: SentMap) -> None:
        """Add a map that shares no byte with another."""
        assert not self.count(new.iova, new.last), "maps do not overlap"
        at = bisect_left(self._starts, new.iova)
        self._starts.insert(at, new.iova)
        self._maps.insert(at, new)
