"""Many addresses through the tables at once, level by level, over guest RAM (:mod:`vfio_model.batch.walks`).

The results are those of single translations that find nothing cached. There are no side effects: where a single
translation would report a fault, set a bit in a table, or look outside of the largest stretch of RAM, there is no
permission here, and the caller goes on with a single one.
"""

from __future__ import annotations

from typing import Any

from vfio_model.batch.walk_variant import walk
from vfio_model.batch.walks import WalkSpec
from vfio_model.iommu.vtd.lookup import Lookup
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import Binding, TableType
from vfio_model.iommu.vtd.walk import ACCESSED, ADDRESS_BITS, DIRTY, PRESENT, READ, USER, WRITE
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
        base, words = lookup.memory.ram()
        addresses, perms = walk(self.spec(binding, want), base, words, iovas)
        return lookup.system, addresses, perms

    def spec(self, binding: Binding, want: int) -> WalkSpec:
        """What a walk through the tables of ``binding``, first or second level, looks at."""
        first = binding.type is TableType.FIRST
        walker = self._lookup.walker
        reserved = walker.first_reserved if first else walker.second_reserved
        return WalkSpec(
            root=binding.first_root if first else binding.second_root,
            levels=binding.first_levels if first else binding.second_levels,
            width=binding.first_width if first else binding.second_width,
            signed=int(first),
            want=want,
            required=PRESENT | USER | ACCESSED if first else 0,
            leaf_required=DIRTY if first and want & WRITE else 0,
            address=self._address,
            hole_first=INTERRUPT_FIRST,
            hole_last=INTERRUPT_LAST,
            plain=reserved.plain,
            large=reserved.large,
        )
