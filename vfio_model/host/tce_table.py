"""One DMA window's TCE table: the words in shared memory, and what the kernel keeps beside them.

The words are what devices walk: one level, or several whose lower tables come when the first TCE of theirs does. Beside
them is the host's private record of the region that each TCE pins (the kernel's "user-space view"), kept in chunks that
exist where something was ever mapped. So clearing a table, however large, never reads the parts that were not used.

What must not be broken: a TCE is stored before its region number is forgotten, and the count of a region is given back
by the caller only after the revocation. Tables that are freed are zero again.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from vfio_model.batch import variant
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import TCE_PERM
from vfio_model.host.mm import Mm, Region
from vfio_model.host.pending import Revocation, Work
from vfio_model.host.platform import Geometry
from vfio_model.host.table_memory import TableMemory

CHUNK_SHIFT = 12
"""log2 of the most entries that one chunk of the private record covers."""

Dropped = dict[int, int]
"""Region number → TCEs that no longer point into it."""

_LEAST = 4
"""Fewer TCEs are faster one by one."""
_PLAIN = 32
"""Up to so many are computed without numpy."""


class PageRun(NamedTuple):
    """Pages from byte ``offset`` of the segment that lies at ``hpa``; ``perm`` is what their TCEs allow."""

    hpa: HpaMap
    offset: int
    perm: int


class TceTable:
    """Entries are numbered from 0 at ``start``. ``slot`` is its place in the container and in the PE block."""

    def __init__(self, memory: TableMemory, geometry: Geometry, start: int, slot: int, pages: int) -> None:
        self.memory, self.geometry, self.start, self.slot = memory, geometry, start, slot
        self.accounted = pages
        """Host pages counted against the mm for this table."""
        self.page_shift = geometry.page_shift
        self.page = 1 << geometry.page_shift
        self.entries = geometry.entries
        self.last = start + geometry.window_size - 1
        self._top_size = 8 * self.entries if geometry.levels == 1 else 8 << geometry.level_shift
        self.root = memory.alloc(self._top_size)
        self._tables: dict[tuple[int, int], int] = {(0, 0): self.root}
        """(level from the top, number of the table in its level) → byte offset."""
        self._chunk_shift = min(CHUNK_SHIFT, geometry.level_shift)
        self._regions: dict[int, array[int]] = {}
        record = (start, self.last, self.page_shift, geometry.levels, geometry.level_shift, self.root, slot)
        try:
            self.record = memory.publish_record(record)
        except OSError:
            memory.free(self.root, self._top_size)
            raise

    def contains(self, iova: int) -> bool:
        """Whether bus address ``iova`` lies in the window."""
        return self.start <= iova <= self.last

    # Storing

    def store(self, index: int, tces: memoryview, region: int) -> Dropped:
        """Store consecutive TCEs from ``index`` on, all into ``region``; returns what they replaced.

        ``tces`` has format ``Q``. The stretch must lie within one chunk, see :meth:`chunk_room`.

        :raise OSError: ENOMEM when a lower table is needed and the domain is full; then nothing is stored.
        """
        count = len(tces)
        word = self._word(index)
        regions = self._chunk(index)
        at = index & (1 << self._chunk_shift) - 1
        self.memory.words[word : word + count] = tces
        before = regions[at : at + count]
        regions[at : at + count] = array("I", [region]) * count
        return _count(before)

    def fill(self, index: int, count: int, pages: PageRun, region: int) -> Dropped:
        """Store the TCEs of ``count`` pages of the window's size that follow one another in a segment, as :meth:`store`
        does.
        """
        kernel = variant.kernel()
        if kernel is None or count < _LEAST:
            return self.store(index, _tces(pages, count, self.page_shift), region)
        word = self._word(index)
        regions = self._chunk(index)
        at, hpa = index & (1 << self._chunk_shift) - 1, pages.hpa
        place = hpa.base, hpa.page_shift, hpa.bits, hpa.multiplier, hpa.addend
        kernel.store_run(self.memory.words, word, count, pages.offset, self.page_shift, pages.perm, *place)
        before = kernel.claim(regions, at, count, region)
        if before is not None:
            return {before: count} if before else {}
        mixed = regions[at : at + count]
        regions[at : at + count] = array("I", [region]) * count
        return _count(mixed)

    def store_one(self, index: int, tce: int, region: int) -> int:
        """Store one TCE; returns the number of the region that the replaced one pinned, 0 when there was none."""
        word = self._word(index)
        regions = self._chunk(index)
        at = index & (1 << self._chunk_shift) - 1
        self.memory.words[word] = tce
        before, regions[at] = regions[at], region
        return before

    def chunk_room(self, index: int) -> int:
        """Entries from ``index`` to the end of its chunk or of the window."""
        return min((1 << self._chunk_shift) - (index & (1 << self._chunk_shift) - 1), self.entries - index)

    def clear(self, index: int, count: int) -> Dropped:
        """Zero ``count`` entries; returns what they pinned. Entries that were never mapped cost nothing."""
        if count == 1:
            return self._clear_one(index)
        dropped: Dropped = {}
        for at, length in self._stretches(index, count):
            self._clear_stretch(at, length, dropped)
        return dropped

    def clearing(self, index: int, count: int, dropped: Dropped, revocation: Revocation) -> Work:
        """As :meth:`clear`, in slices; counts in ``dropped``."""
        for at, length in self._stretches(index, count):
            self._clear_stretch(at, length, dropped)
            if revocation.spend(length):
                yield

    def _clear_stretch(self, index: int, length: int, dropped: Dropped) -> None:
        regions = self._regions[index >> self._chunk_shift]
        low = index & (1 << self._chunk_shift) - 1
        before = regions[low : low + length]
        zeros = bytes(4 * length)
        if before.tobytes() == zeros:
            return
        word = self._word(index)
        self.memory.words[word : word + length] = memoryview(bytes(8 * length)).cast("Q")
        regions[low : low + length] = array("I", zeros)
        add(dropped, _count(before))

    def _clear_one(self, index: int) -> Dropped:
        regions = self._regions.get(index >> self._chunk_shift)
        at = index & (1 << self._chunk_shift) - 1
        region = 0 if regions is None else regions[at]
        if regions is None or not region:
            return {}
        self.memory.words[self._word(index)] = 0
        regions[at] = 0
        return {region: 1}

    def read(self, index: int) -> int:
        """The TCE at ``index``; 0 where nothing is mapped. For tests and inspection."""
        word = self._find(index)
        return self.memory.words[word] if word >= 0 else 0

    def mapped(self) -> Iterator[tuple[int, int]]:
        """(index, TCE) of every entry that is mapped."""
        for chunk in sorted(self._regions):
            base = chunk << self._chunk_shift
            for low, region in enumerate(self._regions[chunk]):
                if region:
                    yield base + low, self.read(base + low)

    def free(self) -> None:
        """Give the tables back; every entry was cleared before."""
        for (level, _), offset in self._tables.items():
            if level < self.geometry.levels - 1:
                words = self._top_size // 8
                self.memory.words[offset // 8 : offset // 8 + words] = memoryview(bytes(8 * words)).cast("Q")
            self.memory.free(offset, self._top_size)
        self._tables.clear()

    # Finding

    def vacant(self, index: int, count: int) -> bool:
        """Whether none of these entries is mapped."""
        for at, length in self._stretches(index, count):
            low = at & (1 << self._chunk_shift) - 1
            if self._regions[at >> self._chunk_shift][low : low + length].tobytes() != bytes(4 * length):
                return False
        return True

    def prepare(self, index: int, count: int) -> None:
        """Make the tables for these entries. :raise OSError: ENOMEM when the domain is full."""
        end = index + count
        while index < end:
            self._word(index)
            index += self.chunk_room(index)

    def _stretches(self, index: int, count: int) -> Iterator[tuple[int, int]]:
        """The parts (index, length) of a range that lie in chunks that exist, in order."""
        end, shift = index + count, self._chunk_shift
        first, last = index >> shift, (end - 1) >> shift
        if count <= 0 or not self._regions:
            return
        if last - first < len(self._regions):
            chunks = [chunk for chunk in range(first, last + 1) if chunk in self._regions]
        else:
            chunks = sorted(chunk for chunk in self._regions if first <= chunk <= last)
        for chunk in chunks:
            low, high = max(index, chunk << shift), min(end, chunk + 1 << shift)
            yield low, high - low

    def _chunk(self, index: int) -> array[int]:
        number = index >> self._chunk_shift
        regions = self._regions.get(number)
        if regions is None:
            regions = self._regions[number] = array("I", bytes(4 << self._chunk_shift))
        return regions

    def _find(self, index: int) -> int:
        """Word index of an entry, -1 when its table does not exist yet."""
        levels, shift = self.geometry.levels, self.geometry.level_shift
        if levels == 1:
            return (self.root >> 3) + index
        offset = self._tables.get((levels - 1, index >> shift))
        return -1 if offset is None else (offset >> 3) + (index & (1 << shift) - 1)

    def _word(self, index: int) -> int:
        """As :meth:`_find`, but makes what is missing, from the top down."""
        word = self._find(index)
        if word >= 0:
            return word
        levels, shift, words = self.geometry.levels, self.geometry.level_shift, self.memory.words
        for level in range(1, levels):
            number = index >> shift * (levels - level)
            if (level, number) not in self._tables:
                offset = self._tables[level, number] = self.memory.alloc(self._top_size)
                parent = self._tables[level - 1, number >> shift]
                words[(parent >> 3) + (number & (1 << shift) - 1)] = offset | TCE_PERM
        return self._find(index)


def add(dropped: Dropped, more: Dropped) -> None:
    """Count what ``more`` counts in ``dropped`` too."""
    for number, count in more.items():
        dropped[number] = dropped.get(number, 0) + count


def give_back(mm: Mm, dropped: Dropped) -> None:
    """Tell the regions that TCEs into them are gone."""
    for number, count in dropped.items():
        mm.unmapped(mm.regions[number], count)


def take(region: Region, count: int) -> None:
    """Count ``count`` TCEs into ``region``."""
    region.mapped += count


def _tces(pages: PageRun, count: int, page_shift: int) -> memoryview:
    hpa, offset, perm = pages
    if count <= _PLAIN:
        return memoryview(array("Q", [hpa.to_hpa(offset + (n << page_shift)) | perm for n in range(count)]))
    np = lazy_numpy()
    offsets = np.arange(offset, offset + (count << page_shift), 1 << page_shift, dtype=np.uint64)
    return (hpa.to_hpa_many(offsets) | perm).data.cast("B").cast("Q")


def _count(regions: array[int]) -> Dropped:
    """How often each region number but 0 appears; one number throughout is the usual case."""
    size = len(regions)
    first = regions[0] if size else 0
    if regions.tobytes() == array("I", [first]).tobytes() * size:
        return {first: size} if first else {}
    counted = Counter(regions)
    del counted[0]
    return dict(counted)
