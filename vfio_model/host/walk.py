"""Reading a host's tables as a device does: PE block, window record, TCE levels.

Only whole words are loaded, and each decision is made on the value that was loaded. Called inside a DMA section,
nothing here may be kept beyond it but what a window record said, which never changes (:mod:`vfio_model.host.layout`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vfio_model.host.layout import (
    PE_WINDOW0,
    PE_WINDOWS,
    TCE_LEAF,
    TCE_PERM,
    WINDOW_LAST,
    WINDOW_LEVEL_SHIFT,
    WINDOW_LEVELS,
    WINDOW_PAGE_SHIFT,
    WINDOW_ROOT,
    WINDOW_START,
)


@dataclass(frozen=True, slots=True)
class Window:
    """A decoded window record. ``root_word`` is the PE word that published it, ``record`` the value found there."""

    root_word: int
    record: int
    start: int
    last: int
    page_shift: int
    levels: int
    level_shift: int
    table: int
    """Word index of the topmost table."""


def decode(domain: memoryview, root_word: int, record: int) -> Window:
    """The record at byte offset ``record``."""
    at = record >> 3
    return Window(
        root_word,
        record,
        domain[at + WINDOW_START],
        domain[at + WINDOW_LAST],
        domain[at + WINDOW_PAGE_SHIFT],
        domain[at + WINDOW_LEVELS],
        domain[at + WINDOW_LEVEL_SHIFT],
        domain[at + WINDOW_ROOT] >> 3,
    )


def find_window(pe: memoryview, domain: memoryview, iova: int, known: dict[int, Window]) -> Window | None:
    """The published window that holds ``iova``; ``known`` caches decoded records by their offset."""
    for root_word in range(PE_WINDOW0, PE_WINDOW0 + PE_WINDOWS):
        record = pe[root_word]
        if record:
            window = known.get(record)
            if window is None:
                window = known[record] = decode(domain, root_word, record)
            if window.start <= iova <= window.last:
                return window
    return None


def load_tce(domain: memoryview, window: Window, iova: int) -> int:
    """The TCE of ``iova``, which lies in ``window``; 0 where a table is missing. Under a leaf of a higher level it is
    what a page of the window's size would have.
    """
    index = (iova - window.start) >> window.page_shift
    table, shift = window.table, window.level_shift
    for level in range(window.levels - 1, 0, -1):
        entry: int = domain[table + (index >> shift * level & (1 << shift) - 1)]
        if not entry:
            return 0
        if entry & TCE_LEAF:
            return (entry ^ TCE_LEAF) | (index & (1 << shift * level) - 1) << window.page_shift
        table = (entry & ~TCE_PERM) >> 3
    tce: int = domain[table + (index & (1 << shift) - 1 if window.levels > 1 else index)]
    return tce


def page_shift_at(domain: memoryview, window: Window, iova: int) -> int:
    """log2 of the page that maps ``iova``, as large as the leaf that does; the window's where none does."""
    index = (iova - window.start) >> window.page_shift
    table, shift = window.table, window.level_shift
    for level in range(window.levels - 1, 0, -1):
        entry: int = domain[table + (index >> shift * level & (1 << shift) - 1)]
        if not entry:
            break
        if entry & TCE_LEAF:
            return window.page_shift + shift * level
        table = (entry & ~TCE_PERM) >> 3
    return window.page_shift


def load_tces(domain: Any, window: Window, indices: Any) -> Any:
    """:func:`load_tce` of many page numbers of ``window`` (int64 array), from ``domain`` as a uint64 array. Each entry
    is loaded once.
    """
    if window.levels == 1:
        return domain[window.table + indices]
    shift, mask, page_shift = window.level_shift, (1 << window.level_shift) - 1, window.page_shift
    table, dead, result = indices * 0 + window.table, indices < 0, indices.astype("u8") * 0
    for level in range(window.levels - 1, 0, -1):
        entries = domain[table + (indices >> shift * level & mask)]
        ends = ((entries & (TCE_LEAF | TCE_PERM)) != TCE_PERM) & ~dead
        if ends.any():
            inner = (indices & (1 << shift * level) - 1).astype("u8") << page_shift
            result += ((entries | TCE_LEAF) ^ TCE_LEAF | inner) * (ends & (entries != 0))
            dead |= ends
        table = (entries >> 3).view("i8") * ~dead  # the permission bits fall out; the dead stay inside the area
    tces = domain[table + (indices & mask)] * ~dead
    return tces + result
