"""Many addresses through the tables at once, level by level, over guest RAM.

The results are those of single translations that find nothing cached. There are no side effects: where a single
translation would report a fault, set a bit in a table, or look outside of the largest stretch of RAM, there is no
permission here, and the caller goes on with a single one.
"""

from __future__ import annotations

from typing import Any

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.iommu.vtd.lookup import Lookup
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import Binding, TableType
from vfio_model.iommu.vtd.walk import ACCESSED, ADDRESS_BITS, DIRTY, LARGE, PRESENT, READ, USER, WRITABLE, WRITE
from vfio_model.memory.iommu_region import TranslatedPieces


class BatchWalker:
    """Walks for :meth:`.spaces.VtdRegion.translate_many`."""

    def __init__(self, options: VtdOptions, lookup: Lookup) -> None:
        self._lookup = lookup
        self._address = ADDRESS_BITS & (1 << options.aw_bits) - 1

    def translate_many(self, space: VtdSpace, iovas: Any, want: int) -> TranslatedPieces | None:
        """Addresses and permissions (0: none, or not by this way) of ``iovas``; None when the tables are not for it."""
        lookup = self._lookup
        if not lookup.enabled:
            return lookup.system, iovas, READ | WRITE
        _, _, binding = lookup.unseen(space)
        if binding is None or binding.type is TableType.NESTED:
            return None
        if binding.type is TableType.PASS_THROUGH:
            return lookup.system, iovas, READ | WRITE
        addresses, perms = self.walk(binding, iovas, want)
        return lookup.system, addresses, perms

    def walk(self, binding: Binding, iovas: Any, want: int) -> tuple[Any, Any]:
        """Addresses (uint64) and permissions (uint8) of ``iovas`` (numpy uint64)."""
        np = lazy_numpy()
        first = binding.type is TableType.FIRST
        base, words = self._lookup.memory.ram()
        table = np.frombuffer(words, dtype=np.uint64) if len(words) else np.zeros(1, dtype=np.uint64)
        level, root = (
            (binding.first_levels, binding.first_root) if first else (binding.second_levels, binding.second_root)
        )
        reserved = self._lookup.walker.first_reserved if first else self._lookup.walker.second_reserved
        u64, count = np.uint64, len(iovas)
        pte = np.zeros(count, dtype=u64)
        perm = np.full(count, READ | WRITE, dtype=u64)
        mask = np.zeros(count, dtype=u64)
        alive = self._in_range(binding, iovas)
        open_ = alive.copy()
        at = np.full(count, root, dtype=u64)
        while level:
            where = (at + (iovas >> u64(9 * level) & u64(0xFF8)) - u64(base)) >> u64(3)
            alive &= ~open_ | (where < u64(len(words)))
            entry = table[np.where(alive & open_, where, u64(0)).astype(np.intp)]
            large = (entry & u64(LARGE)) != 0 if level > 1 else np.zeros(count, dtype=bool)
            bad = np.where(large, entry & u64(reserved.large[level]), entry & u64(reserved.plain[level])) != 0
            if first:
                granted = np.where(entry & u64(WRITABLE), u64(3), u64(1))
                bad |= (entry & u64(PRESENT | USER | ACCESSED)) != u64(PRESENT | USER | ACCESSED)
            else:
                granted = entry & u64(3)
            perm = np.where(open_, perm & granted, perm)
            alive &= ~(open_ & bad) & (perm & u64(want or 3) != 0) & ((perm & u64(want)) == u64(want))
            leaf = open_ & (large | (level == 1))
            pte = np.where(leaf, entry, pte)
            mask = np.where(leaf, u64((1 << 3 + 9 * level) - 1), mask)
            open_ &= ~leaf & alive
            at = entry & u64(self._address)
            level -= 1
        if first and want & WRITE:
            alive &= (pte & u64(DIRTY)) != 0
        page = pte & u64(self._address) & ~mask
        alive &= (page > u64(INTERRUPT_LAST)) | ((page | mask) < u64(INTERRUPT_FIRST))
        return page | iovas & mask, np.where(alive, perm, u64(0)).astype(np.uint8)

    @staticmethod
    def _in_range(binding: Binding, iovas: Any) -> Any:
        np = lazy_numpy()
        if binding.type is TableType.SECOND:
            return iovas >> np.uint64(binding.second_width) == 0
        upper = iovas >> np.uint64(binding.first_width - 1)
        return (upper == 0) | (upper == np.uint64((1 << 65 - binding.first_width) - 1))
