"""The IO page table of a type 1 domain: a radix tree of 9 bits a level, with leaves of 4 KiB, 2 MiB and 1 GiB.

It is published once, as a window over all bus addresses of the domain's width; an address is mapped by an entry of the
last level or by a leaf above it (:data:`~vfio_model.host.layout.TCE_LEAF`). Leaves are as large as bus address, memory
address and the memory's backing page allow. A table exists while something is mapped below it.

What must not be broken: a table that became empty is unlinked at once, and its memory is given back by the caller only
after the revocation (:meth:`IoPageTable.take_retired`), because a device may be walking it.

Source: the page tables of AMD's IOMMU (``AMD I/O Virtualization Technology Specification``, "I/O Page Tables"), whose
modes have up to six levels of nine bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from errno import ENOMEM
from typing import NamedTuple

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import TCE_LEAF, TCE_PERM
from vfio_model.host.pending import TABLE, Revocation, Work
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.walk import Window, decode

PAGE_SHIFT = 12
LEVEL_SHIFT = 9
PGSIZES = 1 << 12 | 1 << 21 | 1 << 30
"""Bitmap of the sizes of leaves, in bytes."""
_LEAF_LEVELS = (2, 1, 0)
_ENTRIES = 1 << LEVEL_SHIFT
_LOW = _ENTRIES - 1
_TABLE_BYTES = 8 * _ENTRIES
_PLAIN = 32
"""Stretches up to so many entries are computed without numpy."""

_Key = tuple[int, int]
"""Level (0 is the last) and number of a table among those of its level."""


class _Piece(NamedTuple):
    """``leaves`` of ``level`` from page number ``page`` on, all in one table, for memory from ``offset`` on."""

    level: int
    page: int
    leaves: int
    offset: int


class IoPageTable:
    """Bus addresses of ``width`` bits, tables in ``memory``. :raise OSError: ENOMEM without memory for the root."""

    def __init__(self, memory: TableMemory, width: int) -> None:
        self.memory = memory
        self.levels = -(-(width - PAGE_SHIFT) // LEVEL_SHIFT)
        self.root = memory.alloc(_TABLE_BYTES)
        self._tables: dict[_Key, int] = {(self.levels - 1, 0): self.root}
        self._used: dict[_Key, int] = {(self.levels - 1, 0): 0}
        """Entries of each table that are not 0."""
        self._retired: list[int] = []
        try:
            fields = (0, (1 << width) - 1, PAGE_SHIFT, self.levels, LEVEL_SHIFT, self.root, 0)
            self.record = memory.publish_record(fields)
        except OSError:
            memory.free(self.root, _TABLE_BYTES)
            raise

    @property
    def window(self) -> Window:
        """The table as a device decodes it."""
        return decode(self.memory.words, 0, self.record)

    def __len__(self) -> int:
        return len(self._tables)

    # Storing

    def store(self, iova: int, size: int, hpa: HpaMap, offset: int, perm: int, revocation: Revocation) -> Work:
        """Map ``size`` bytes of the segment at ``hpa`` from ``offset`` on, with ``perm``; nothing is mapped there.

        :raise OSError: ENOMEM without memory for tables; then nothing is mapped, and tables may be retired.
        """
        self._check_room(iova, size, hpa, offset)
        done = iova
        try:
            for piece in _pieces(iova, size, hpa, offset, self.levels):
                self._prepare([piece])
                self._put(piece, _entries(hpa, piece, perm | TCE_LEAF if piece.level else perm))
                done += piece.leaves << PAGE_SHIFT + LEVEL_SHIFT * piece.level
                if revocation.spend(TABLE + piece.leaves):
                    yield
        except OSError:
            yield from self.clearing(iova, done - iova, revocation)
            raise

    def store_pages(self, iova: int, tces: memoryview) -> None:
        """Store consecutive entries of 4 KiB pages (format ``Q``); nothing is mapped there. :raise OSError: as
        :meth:`store`.
        """
        index, done, pieces = iova >> PAGE_SHIFT, 0, []
        while done < len(tces):
            count = min(len(tces) - done, _ENTRIES - (index + done & _LOW))
            pieces.append(_Piece(0, index + done, count, done))
            done += count
        self._prepare(pieces)
        for piece in pieces:
            self._put(piece, tces[piece.offset : piece.offset + piece.leaves])

    def _check_room(self, iova: int, size: int, hpa: HpaMap, offset: int) -> None:
        """Refuse at once what needs more tables of the last level than there can be: pages too small for larger leaves
        fill one for every 2 MiB.
        """
        shift = PAGE_SHIFT + LEVEL_SHIFT
        least = (size >> shift) - 1
        plain = hpa.page_shift < shift or (iova - offset) & (1 << shift) - 1
        if plain and least > 0 and least * _TABLE_BYTES > self.memory.free_bytes:
            raise OSError(ENOMEM, f"the tables of {size:#x} bytes do not fit the table memory left in this domain")

    def _put(self, piece: _Piece, entries: memoryview) -> None:
        key = (piece.level, piece.page >> LEVEL_SHIFT * (piece.level + 1))
        word = self._word(key, piece.page)
        self.memory.words[word : word + piece.leaves] = entries
        self._used[key] += piece.leaves

    def _word(self, key: _Key, index: int) -> int:
        """Where the entry of page number ``index`` is, in the table ``key``."""
        return (self._tables[key] >> 3) + (index >> LEVEL_SHIFT * key[0] & _LOW)

    def _prepare(self, pieces: list[_Piece]) -> None:
        made: list[_Key] = []
        try:
            for piece in pieces:
                self._make(piece, made)
        except OSError:
            for key in reversed(made):
                self._retire(key, piece.page)
            raise

    def _make(self, piece: _Piece, made: list[_Key]) -> None:
        """Make the tables above and at the level of ``piece``, from the top down."""
        if (piece.level, piece.page >> LEVEL_SHIFT * (piece.level + 1)) in self._tables:
            return
        for level in range(self.levels - 2, piece.level - 1, -1):
            key = (level, piece.page >> LEVEL_SHIFT * (level + 1))
            if key in self._tables:
                continue
            offset = self.memory.alloc(_TABLE_BYTES)
            self._tables[key], self._used[key] = offset, 0
            made.append(key)
            parent = (level + 1, key[1] >> LEVEL_SHIFT)
            self.memory.words[(self._tables[parent] >> 3) + (key[1] & _LOW)] = offset | TCE_PERM
            self._used[parent] += 1

    # Clearing

    def clearing(self, iova: int, size: int, revocation: Revocation) -> Work:
        """Zero the entries of whole mappings that fill ``size`` bytes from ``iova``; empty tables are retired."""
        for index, key, word, count in self._runs(iova, size):
            self.memory.words[word : word + count] = memoryview(bytes(8 * count)).cast("Q")
            self._used[key] -= count
            if not self._used[key]:
                self._retire(key, index)
            if revocation.spend(TABLE + count):
                yield

    def _runs(self, iova: int, size: int) -> Iterator[tuple[int, _Key, int, int]]:
        """Page number, table, word and number of the entries of one table that map a part of ``size`` bytes from
        ``iova``, which whole mappings fill; what was given may be cleared before the next is asked for.
        """
        index, end = iova >> PAGE_SHIFT, (iova + size) >> PAGE_SHIFT
        while index < end:
            level = next(level for level in range(self.levels) if self._key(level, index) in self._tables)
            key, bits = self._key(level, index), LEVEL_SHIFT * level
            assert level in _LEAF_LEVELS, "what is asked for is mapped"
            word = self._word(key, index)
            most = min(_ENTRIES - (index >> bits & _LOW), (end - index) >> bits)
            count = most if level == 0 else _leaves(self.memory.words[word : word + most])
            assert count > 0, "a leaf lies in one mapping"
            yield index, key, word, count
            index += count << bits

    def _key(self, level: int, index: int) -> _Key:
        return level, index >> LEVEL_SHIFT * (level + 1)

    def _retire(self, key: _Key, index: int) -> None:
        """Unlink the table ``key``, which is empty, and those above it that become so."""
        level, number = key
        if level == self.levels - 1 or key not in self._tables or self._used[key]:
            return
        parent = (level + 1, number >> LEVEL_SHIFT)
        self.memory.words[(self._tables[parent] >> 3) + (number & _LOW)] = 0
        self._retired.append(self._tables.pop(key))
        del self._used[key]
        self._used[parent] -= 1
        if not self._used[parent]:
            self._retire(parent, index)

    def take_retired(self) -> list[int]:
        """Tables that became empty since the last call: :meth:`give_back` takes them when no device walks them."""
        retired, self._retired = self._retired, []
        return retired

    def give_back(self, retired: list[int]) -> None:
        """Their memory may be used anew."""
        for offset in retired:
            self.memory.free(offset, _TABLE_BYTES)

    # Inspection

    def stretches(self, iova: int, size: int) -> Iterator[tuple[int, int, int]]:
        """Page number, pages of 4 KiB and entry of what maps ``size`` bytes from ``iova``, which whole mappings fill.

        Leaves that follow one another in memory too are one stretch, with the entry of the first; pages of the last
        level are another, with entry 0: each has one of its own.
        """
        first, pages, entry = iova >> PAGE_SHIFT, 0, 0
        for index, count, found in self._leaves_in(iova, size):
            if pages and found != (entry + (pages << PAGE_SHIFT) if entry else 0):
                yield first, pages, entry
                first, pages = index, 0
            if not pages:
                entry = found
            pages += count
        if pages:
            yield first, pages, entry

    def _leaves_in(self, iova: int, size: int) -> Iterator[tuple[int, int, int]]:
        for index, (level, _), word, count in self._runs(iova, size):
            if not level:
                yield index, count, 0
                continue
            leaf = 1 << LEVEL_SHIFT * level
            for at, entry in enumerate(self.memory.words[word : word + count]):
                yield index + at * leaf, leaf, entry

    def mapped(self) -> Iterator[tuple[int, int, int]]:
        """(bus address, size, entry) of every leaf, in no particular order; for tests and inspection."""
        for (level, number), offset in self._tables.items():
            bits = LEVEL_SHIFT * level
            for low in range(_ENTRIES):
                entry = self.memory.words[(offset >> 3) + low]
                if entry and (not level or entry & TCE_LEAF):
                    yield ((number << LEVEL_SHIFT | low) << bits + PAGE_SHIFT), 1 << bits + PAGE_SHIFT, entry


def _pieces(iova: int, size: int, hpa: HpaMap, offset: int, levels: int) -> Iterator[_Piece]:
    done = 0
    while done < size:
        at, left = iova + done, size - done
        for level in _LEAF_LEVELS:
            shift = PAGE_SHIFT + LEVEL_SHIFT * level
            fits = left >> shift and not (at | offset + done) & (1 << shift) - 1
            if not level or (level < levels and shift <= hpa.page_shift and fits):
                break
        count = min(left >> shift, _ENTRIES - (at >> shift & _LOW))
        yield _Piece(level, at >> PAGE_SHIFT, count, offset + done)
        done += count << shift


def _entries(hpa: HpaMap, piece: _Piece, bits: int) -> memoryview:
    shift = PAGE_SHIFT + LEVEL_SHIFT * piece.level
    if piece.leaves <= _PLAIN:
        found = [hpa.to_hpa(piece.offset + (n << shift)) | bits for n in range(piece.leaves)]
        return memoryview(array("Q", found))
    np = lazy_numpy()
    offsets = np.arange(piece.offset, piece.offset + (piece.leaves << shift), 1 << shift, dtype=np.uint64)
    return (hpa.to_hpa_many(offsets) | bits).data.cast("B").cast("Q")


def _leaves(words: memoryview) -> int:
    """How many entries from the first one on are leaves."""
    for count, entry in enumerate(words):
        if not entry & TCE_LEAF:
            return count
    return len(words)
