"""Page-table walks: second level, first level with accessed and dirty bits, and one through the other (nested).

Source: Intel Virtualization Technology for Directed I/O specification, "Hierarchical Translation Structures" (3.5),
"First-Stage Translation" (3.6), "Second-Stage Translation" (3.7), "Nested Translation" (3.8), "First-Stage Paging
Entries" (9.7) and "Second-Stage Paging Entries" (9.8), "Interrupt Address Range" (3.14). At each level: what is there,
then what it permits, then its reserved bits. A walk that fails says at which level, so that whoever caches holes knows
how large this one is; level 0: the walk never began.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.structures import Binding, Reason, TableType
from vfio_model.iommu.vtd.table_memory import TableMemory
from vfio_model.ranges import U64_MAX

READ, WRITE = 1, 2
LARGE: Final = 1 << 7
"""A leaf above the last level (PS)."""
ADDRESS_BITS: Final = 0xF_FFFF_FFFF_F000
PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1, 2, 4, 0x20, 0x40
"""Of a first-level entry."""
_SNOOP, _TRANSIENT = 1 << 11, 1 << 62


class Walk(NamedTuple):
    """How a walk ended. ``level``: 1 for 4 KiB, 2 for 2 MiB, 3 for 1 GiB; after a failure where it ended.

    ``page`` is the address of the page that was reached, ``perm`` has :data:`READ` and :data:`WRITE`, ``pte`` is the
    leaf entry. ``dirty``: a write need not set a dirty bit any more.
    """

    reason: Reason
    level: int
    page: int = 0
    perm: int = 0
    pte: int = 0
    dirty: bool = True


_GOOD = Reason.NONE
_PAGE_MASKS = tuple((1 << 12 + 9 * max(level - 1, 0)) - 1 for level in range(6))


def page_mask(level: int) -> int:
    """Size minus one of a page of ``level``; of 4 KiB for level 0."""
    return _PAGE_MASKS[level]


class ReservedBits(NamedTuple):
    """By level: what must be zero in a table pointer or 4 KiB leaf, and in a large leaf."""

    plain: tuple[int, ...]
    large: tuple[int, ...]

    def of(self, pte: int, level: int) -> int:
        """Those that are set in ``pte``."""
        return pte & (self.large if level > 1 and pte & LARGE else self.plain)[level]


def second_reserved(options: VtdOptions) -> ReservedBits:
    """Of second-level entries."""
    above = ADDRESS_BITS & ~((1 << options.aw_bits) - 1) | _TRANSIENT
    leaf = above & ~(_TRANSIENT if options.device_iotlb and options.stale_tm else 0)
    snoop = 0 if options.scalable_mode or options.snoop_control else _SNOOP
    table, top = above | _SNOOP, above | _SNOOP | LARGE
    return ReservedBits(
        (0, leaf | snoop, table, table, top, top),
        (0, 0, leaf | 0x1F_F000 | snoop, leaf | 0x3FFF_F000 | snoop, top, top),
    )


def first_reserved(options: VtdOptions) -> ReservedBits:
    """Of first-level entries."""
    above = ADDRESS_BITS & ~((1 << options.aw_bits) - 1)
    giant = above | (0x3FFF_E000 if options.fs1gp or options.has(quirks.FS1GP_IGNORED) else LARGE)
    return ReservedBits(
        (0, above, above, above, above | LARGE, above | LARGE),
        (0, 0, above | 0x1F_E000, giant, above | LARGE, above | LARGE),
    )


class Walker:
    """Walks the tables that a binding names."""

    def __init__(self, options: VtdOptions, memory: TableMemory) -> None:
        self._memory = memory
        self.second_reserved, self.first_reserved = second_reserved(options), first_reserved(options)
        self._address = ADDRESS_BITS & (1 << options.aw_bits) - 1
        self._flags_once = options.has(quirks.FLAGS_SET_ONCE)
        self._ones = options.has(quirks.ALL_ONES_UNREADABLE)
        scalable = options.scalable_mode
        self._interrupt = Reason.SCALABLE_INTERRUPT_ADDRESS if scalable else Reason.INTERRUPT_ADDRESS

    def walk(self, binding: Binding, iova: int, want: int, *, soft_write: bool = False) -> Walk:
        """Translate ``iova`` for an access that needs ``want`` (0: for none in particular; nothing is marked then).

        ``soft_write``: as a translation request does that would like to write: the dirty bit is set if writing is
        permitted, and it is no failure if not.
        """
        if binding.type is TableType.SECOND:
            done = self.second(binding, iova, want)
        else:
            done = self._first(binding, iova, want, soft_write)
        if done.pte == U64_MAX and done.reason and self._ones:
            return self._unreadable(binding, done.level)
        page = done.page
        if page <= INTERRUPT_LAST and page | _PAGE_MASKS[done.level] >= INTERRUPT_FIRST and done.reason is _GOOD:
            return Walk(self._interrupt, done.level)
        return done

    @staticmethod
    def _unreadable(binding: Binding, level: int) -> Walk:
        """By quirk: an entry that is all ones."""
        if binding.type is TableType.SECOND:
            top, reason = level == binding.second_levels, Reason.PAGING_UNREADABLE
            return Walk(Reason.CONTEXT_INVALID if top else reason, level)
        top = level == binding.first_levels
        return Walk(Reason.FIRST_ROOT_INVALID if top else Reason.FIRST_UNREADABLE, level)

    # -- second level --------------------------------------------------------------------------------------------

    def second(self, binding: Binding, iova: int, want: int) -> Walk:
        """Through the second-level tables alone."""
        level, addr = binding.second_levels, binding.second_root
        if iova >> binding.second_width:
            return Walk(Reason.BEYOND_WIDTH, 0)
        word, (plain, large), mask = self._memory.word, self.second_reserved, self._address
        start, size, words = self._memory.window()
        need, perm = want or READ | WRITE, READ | WRITE
        while True:
            at = addr + (iova >> 9 * level & 0xFF8)
            offset = at - start
            pte = words[offset >> 3] if 0 <= offset < size else word(at)
            if pte is None:
                top = level == binding.second_levels
                return Walk(Reason.CONTEXT_INVALID if top else Reason.PAGING_UNREADABLE, level)
            perm &= pte
            if (need & ~pte) if want else not need & pte:
                write = want & WRITE and not pte & WRITE
                return Walk(Reason.WRITE if write else Reason.READ, level)
            leaf = level == 1 or pte & LARGE
            if pte & (large if level > 1 and leaf else plain)[level]:
                return Walk(Reason.PAGING_RESERVED, level, pte=pte)
            if leaf:
                return Walk(_GOOD, level, pte & mask & ~_PAGE_MASKS[level], perm, pte)
            addr = pte & mask
            level -= 1

    # -- first level ---------------------------------------------------------------------------------------------

    def _first(self, binding: Binding, iova: int, want: int, soft_write: bool) -> Walk:
        """Through the first-level tables. Nested: the second level translates their addresses, and those of pages."""
        level, addr = binding.first_levels, binding.first_root
        if not _canonical(iova, binding.first_width):
            return Walk(Reason.NOT_CANONICAL, 0)
        memory, mask, writable = self._memory, self._address, True
        nested, table_perm = binding.type is TableType.NESTED, READ | WRITE
        while True:
            at = addr + (iova >> 9 * level & 0xFF8)
            if nested:
                table = self.second(binding, at, READ)
                if table.reason:
                    return Walk(table.reason, level)
                at, table_perm = table.page | at & page_mask(table.level), table.perm
            pte = memory.word(at)
            if pte is None:
                top = level == binding.first_levels
                return Walk(Reason.FIRST_ROOT_INVALID if top else Reason.FIRST_UNREADABLE, level)
            writable = writable and bool(pte & WRITABLE)
            reason = self._first_permits(pte, level, want)
            if reason:
                return Walk(reason, level, pte=0 if nested else pte)
            leaf = level == 1 or bool(pte & LARGE)
            page, reached, perm = pte & mask, level, READ | WRITE if writable else READ
            if leaf and nested:
                gpa = page & ~page_mask(level) | iova & page_mask(level)
                behind = self.second(binding, gpa, want or READ)
                if behind.reason:
                    return Walk(behind.reason, behind.level)
                page, perm = behind.page | gpa & page_mask(behind.level), behind.perm & perm
                reached = min(level, behind.level)
            marked = self._marked(pte, want, leaf and perm & WRITE != 0 and (soft_write or bool(want & WRITE)))
            if marked != pte and not (table_perm & WRITE and memory.store(at, marked)):
                return Walk(Reason.BIT_UPDATE, level)
            if leaf:
                return Walk(Reason.NONE, reached, page & ~page_mask(reached), perm, marked, bool(marked & DIRTY))
            addr = page
            level -= 1

    def _first_permits(self, pte: int, level: int, want: int) -> Reason:
        if not pte & PRESENT:
            return Reason.FIRST_NOT_PRESENT
        if not pte & USER:
            return Reason.PRIVILEGE
        if want & WRITE and not pte & WRITABLE:
            return Reason.SCALABLE_WRITE
        if self.first_reserved.of(pte, level):
            return Reason.FIRST_RESERVED
        return Reason.NONE

    def _marked(self, pte: int, want: int, dirty: bool) -> int:
        """An entry that is used: accessed, and dirty if it is."""
        flags = (ACCESSED if want else 0) | (DIRTY if dirty else 0)
        return pte if self._flags_once and pte & flags else pte | flags


def _canonical(iova: int, width: int) -> bool:
    upper = iova >> width - 1
    return upper == 0 or upper == U64_MAX >> width - 1
