"""All that second-level tables map in a range, for followers of a space (:mod:`.shadow`).

Source: Intel Virtualization Technology for Directed I/O specification, "Second-Stage Translation" (3.7). What a walk
would fault at is not mapped: a missing permission, a reserved bit, a table that cannot be read, the interrupt range.
"""

from __future__ import annotations

from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.structures import Binding
from vfio_model.iommu.vtd.table_memory import TableMemory
from vfio_model.iommu.vtd.walk import ADDRESS_BITS, LARGE, READ, WRITE, page_mask, second_reserved

Mapped = tuple[int, int, int]
"""Level (1: 4 KiB, 2: 2 MiB, 3: 1 GiB), address and permission of a page."""
_ENTRIES = 512


class Leaves:
    """Goes through second-level tables."""

    def __init__(self, options: VtdOptions, memory: TableMemory) -> None:
        self._memory, self._reserved = memory, second_reserved(options)
        self._address = ADDRESS_BITS & (1 << options.aw_bits) - 1

    def mapped(self, binding: Binding, first: int, last: int) -> dict[int, Mapped]:
        """Every page that meets ``first``..``last`` (inclusive), by its iova, in order."""
        found: dict[int, Mapped] = {}
        last = min(last, (1 << binding.second_width) - 1)
        if first <= last:
            self._table(found, (binding.second_root, binding.second_levels, 0, READ | WRITE), first, last)
        return found

    def _table(self, found: dict[int, Mapped], table: tuple[int, int, int, int], first: int, last: int) -> None:
        """``table``: its address, its level, the first iova below it, what was permitted on the way to it."""
        at, level, base, perm = table
        words = self._memory.words(at, _ENTRIES)
        if words is None:
            return
        shift, address = 3 + 9 * level, self._address
        low, high = max(first - base, 0) >> shift, min(last - base >> shift, _ENTRIES - 1)
        entries = words[low : high + 1].tolist()
        if level == 1:
            self._pages(found, base + (low << shift), entries, perm)
            return
        for iova, pte in _with_iovas(base + (low << shift), 1 << shift, entries):
            granted = perm & pte
            if not granted or self._reserved.of(pte, level):
                continue
            if not pte & LARGE:
                self._table(found, (pte & address, level - 1, iova, granted), first, last)
                continue
            page = pte & address & ~page_mask(level)
            if page > INTERRUPT_LAST or page | page_mask(level) < INTERRUPT_FIRST:
                found[iova] = level, page, granted

    def _pages(self, found: dict[int, Mapped], iova: int, entries: list[int], perm: int) -> None:
        """The lowest level: ``entries`` from that of ``iova`` on."""
        reserved, address = self._reserved.plain[1], self._address
        found.update(
            (at, (1, pte & address, perm & pte))
            for at, pte in _with_iovas(iova, 1 << 12, entries)
            if perm & pte and not pte & reserved and not INTERRUPT_FIRST <= pte & address <= INTERRUPT_LAST
        )


def _with_iovas(start: int, step: int, entries: list[int]) -> zip[tuple[int, int]]:
    """Each entry with its iova."""
    return zip(range(start, start + step * len(entries), step), entries, strict=True)
