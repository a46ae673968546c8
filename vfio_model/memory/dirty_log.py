"""Which pages of RAM blocks this process has written: CPUs, emulated devices, DMA that others send as messages.

While a block has a map, every writer that goes to it marks the pages *after* it has stored the bytes. Writers are
closures, and are bound anew when a map comes or goes: without one nothing is asked and nothing is marked. A mapping in
place is marked when it is given back. Processes that have the memory mapped themselves are not seen here.

Source for the idea: QEMU's ``memory_global_dirty_log_start``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from vfio_model.memory.ram import RAMBlock

PAGE_SHIFT = 12
"""log2 of the bytes that a byte of the map stands for."""


class DirtyMap:
    """One byte for each 4 KiB of ``size`` bytes of RAM: 1 when something was written there."""

    __slots__ = ("_pages", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._pages = bytearray((size + (1 << PAGE_SHIFT) - 1) >> PAGE_SHIFT)

    def mark(self, offset: int, size: int) -> None:
        """``size`` bytes from ``offset`` were written."""
        if size <= 0:
            return
        first, last = offset >> PAGE_SHIFT, (offset + size - 1) >> PAGE_SHIFT
        if first == last:
            self._pages[first] = 1
        else:
            self._pages[first : last + 1] = b"\1" * (last - first + 1)

    @property
    def dirty_bytes(self) -> int:
        """Bytes of all pages that are marked."""
        return self._pages.count(1) << PAGE_SHIFT

    def take(self) -> Iterator[tuple[int, int]]:
        """(offset, size) in bytes of each stretch of marked pages, ascending; it is clear once it was yielded."""
        pages, at = self._pages, self._pages.find(1)
        while at >= 0:
            end = pages.find(0, at)
            end = len(pages) if end < 0 else end
            pages[at:end] = bytes(end - at)
            yield at << PAGE_SHIFT, min(end << PAGE_SHIFT, self._size) - (at << PAGE_SHIFT)
            at = pages.find(1, end)


class LoggedRegion(Protocol):
    """A RAM region (:class:`vfio_model.memory.region.RAMRegion`)."""

    @property
    def block(self) -> RAMBlock:
        """Its memory."""

    def rebind_writers(self) -> None:
        """Bind everybody who writes there anew."""


def start(regions: Iterable[LoggedRegion]) -> dict[RAMBlock, DirtyMap]:
    """Mark what is written in ``regions`` from now on; the map of each block, all clean."""
    maps: dict[RAMBlock, DirtyMap] = {}
    for region in regions:
        block = region.block
        if block not in maps:
            block.dirty = maps[block] = DirtyMap(block.size)
        region.rebind_writers()
    return maps


def stop(regions: Iterable[LoggedRegion]) -> None:
    """Mark nothing any more. Harmless twice."""
    for region in regions:
        region.block.dirty = None
        region.rebind_writers()
