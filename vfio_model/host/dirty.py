"""Which pages of a container's mappings its devices have written.

Every device process that writes has a *dirty map*, one byte for each 4 KiB of host-physical memory, and sets bytes of
it after it has written and before its lane is even again, while its PE block says so
(:data:`~vfio_model.host.layout.PE_DIRTY`). Nobody else sets them, so no two writers share a byte. Collecting reads the
bytes of the pages in question and clears those that it saw set; then comes a barrier on the writers (the caller's
revocation), and only then may anybody copy the pages. A write that ends later sets its byte again.

A writer that died may have written without noting it, and so may one whose map is not known: all that they could write
counts as written. So does memory beyond the end of the maps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.layout import DIRTY_BYTES, DIRTY_SHIFT, FIRST_HPA, TCE_WRITE
from vfio_model.host.type1_mappings import Block
from vfio_model.host.type1_table import PAGE_SHIFT, IoPageTable
from vfio_model.host.walk import load_tces

_CHUNK = 1 << 18
"""Pages looked at in one step."""


class Writer(Protocol):
    """A device as who collects sees it (:class:`vfio_model.host.group.HostDevice`)."""

    @property
    def dirty(self) -> memoryview | None:
        """Its map, bytes; None when it has none."""

    @property
    def open_count(self) -> int:
        """0 while nobody has it open: then it writes nothing."""


class Extent(NamedTuple):
    """What ``block`` has, or had before it was unmapped, for ``pages`` of 4 KiB from ``iova`` on: the ``entry`` of
    leaves that lie one behind the other in memory, or one of the last level for each page, ``tces``.
    """

    block: Block
    iova: int
    pages: int
    entry: int
    tces: Any


def extents(table: IoPageTable, blocks: Iterable[Block]) -> Iterator[Extent]:
    """The entries of ``blocks``, which are mapped, as they are when they are asked for."""
    np = lazy_numpy()
    words, window = np.frombuffer(table.memory.words, dtype="u8"), table.window
    for block in blocks:
        for first, pages, entry in table.stretches(block.iova, block.bytes):
            for done in range(0, pages, _CHUNK):
                at, count = first + done, min(_CHUNK, pages - done)
                if entry:
                    yield Extent(block, at << PAGE_SHIFT, count, entry + (done << PAGE_SHIFT), None)
                else:
                    tces = load_tces(words, window, np.arange(at, at + count, dtype="i8"))
                    yield Extent(block, at << PAGE_SHIFT, count, 0, tces)


class Collection:
    """What ``writers()`` have written of extents that are given one after another, in ``bitmap``: a bit for every page
    of ``page`` bytes, of which bit 0 stands for the page at bus address ``first``, which is not above any of them. What
    was seen is clear from then on.
    """

    def __init__(self, writers: Callable[[], Iterable[Writer]], page: int, first: int, bitmap: bytearray) -> None:
        self._writers, self._page, self._first, self._bitmap = writers, page, first, bitmap
        self._blocks: dict[int, Block] = {}

    def take(self, extent: Extent) -> None:
        """Look at one."""
        maps = [writer.dirty for writer in self._writers() if writer.open_count]
        known = [m for m in maps if m is not None]
        everything = extent.block.dirty or len(known) < len(maps)
        written = (
            _written_leaves(extent, known, everything) if extent.entry else _written(extent.tces, known, everything)
        )
        if written is not None:
            at = (extent.iova - self._first) // self._page
            _or_bits(self._bitmap, at, written.reshape(-1, self._page >> PAGE_SHIFT).any(1))
        self._blocks[id(extent.block)] = extent.block

    def end(self) -> None:
        """Everything was looked at."""
        for block in self._blocks.values():
            block.dirty = False


def collect(found: Iterable[Extent], writers: Iterable[Writer], page: int, first: int, bitmap: bytearray) -> None:
    """A :class:`Collection` of all of ``found`` at once."""
    writers = list(writers)
    collection = Collection(lambda: writers, page, first, bitmap)
    for extent in found:
        collection.take(extent)
    collection.end()


def _written(tces: Any, maps: list[memoryview], everything: bool) -> Any:
    """For each of ``tces`` whether its 4 KiB were written."""
    np = lazy_numpy()
    may = (tces & TCE_WRITE) != 0
    at = ((tces - FIRST_HPA) >> DIRTY_SHIFT).view("i8")
    written = may & (everything or (at >= DIRTY_BYTES) & bool(maps))
    within = np.flatnonzero(may & (at < DIRTY_BYTES))
    at = at[within]
    for view in maps:
        noted = np.frombuffer(view, dtype="u1")
        hits = np.flatnonzero(noted[at])
        noted[at[hits]] = 0
        written[within[hits]] = True
    return written


def _written_leaves(extent: Extent, maps: list[memoryview], everything: bool) -> Any:
    """As :func:`_written` of the pages of leaves; None when it is none of them."""
    np = lazy_numpy()
    if not extent.entry & TCE_WRITE:
        return None
    at = (extent.entry - FIRST_HPA) >> DIRTY_SHIFT
    within = max(0, min(extent.pages, DIRTY_BYTES - at))
    written = None
    if everything or (maps and within < extent.pages):
        written = np.full(extent.pages, everything)
        written[within:] = True
    for view in maps if within else ():
        noted = np.frombuffer(view, dtype="u1", count=within, offset=at)
        if not noted.any():
            continue
        if written is None:
            written = np.zeros(extent.pages, dtype=bool)
        hits = np.flatnonzero(noted.copy())  # of the map itself it raises when a writer sets a byte meanwhile
        noted[hits] = 0
        written[hits] = True
    return written


def _or_bits(bitmap: bytearray, first: int, bits: Any) -> None:
    """Or ``bits`` into ``bitmap`` from bit number ``first`` on, least significant bit first."""
    np = lazy_numpy()
    low = first & 7
    padded = np.concatenate([np.zeros(low, dtype=bool), bits])
    packed = np.packbits(padded, bitorder="little")
    view = np.frombuffer(bitmap, dtype="u1")[first >> 3 : (first >> 3) + len(packed)]
    view |= packed
