"""From a requester to what translates its requests: root, context, PASID directory and PASID table.

Source: Intel Virtualization Technology for Directed I/O specification, "Translation Structure Formats" (9): "Root
Entry" (9.1), "Scalable-mode Root Entry" (9.2), "Context Entry" (9.3), "Scalable-mode Context-Entry" (9.4),
"Scalable-Mode PASID Directory Entry" (9.5) and "PASID Table Entry" (9.6); "Fault Conditions" (7.1). The first check
that fails wins, in the order of the code. Reasons are those of legacy mode where QEMU's unit reports these in scalable
mode, too: root, context and second level.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple

from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.table_memory import TableMemory
from vfio_model.ranges import U64_MAX

_P, _FPD = 1, 2
PAGE_MASK: Final = 0xFFF
_REMEMBERED = 1024
"""Bindings by the words that name them."""


RID_PASID: Final = 0
"""The PASID of requests without one in scalable mode, where ECAP.RPS is not reported."""


class Reason(IntEnum):
    """Why a request is blocked, as fault records say it ("Fault Conditions", 7.1)."""

    NONE = 0
    ROOT_NOT_PRESENT = 0x1
    CONTEXT_NOT_PRESENT = 0x2
    CONTEXT_INVALID = 0x3
    BEYOND_WIDTH = 0x4
    WRITE = 0x5
    READ = 0x6
    PAGING_UNREADABLE = 0x7
    ROOT_UNREADABLE = 0x8
    CONTEXT_UNREADABLE = 0x9
    ROOT_RESERVED = 0xA
    CONTEXT_RESERVED = 0xB
    PAGING_RESERVED = 0xC
    REQUEST_TYPE = 0xD
    INTERRUPT_ADDRESS = 0xE
    PAGE_REQUESTS_OFF = 0x47
    DIRECTORY_UNREADABLE = 0x50
    DIRECTORY_NOT_PRESENT = 0x51
    PASID_TABLE_UNREADABLE = 0x58
    PASID_NOT_PRESENT = 0x59
    PASID_INVALID = 0x5B
    FIRST_UNREADABLE = 0x70
    FIRST_NOT_PRESENT = 0x71
    FIRST_RESERVED = 0x72
    FIRST_ROOT_INVALID = 0x73
    NOT_CANONICAL = 0x80
    PRIVILEGE = 0x81
    SCALABLE_WRITE = 0x85
    SCALABLE_INTERRUPT_ADDRESS = 0x87
    BIT_UPDATE = 0x91


UNQUALIFIED: Final = frozenset(
    (
        Reason.ROOT_NOT_PRESENT,
        Reason.ROOT_UNREADABLE,
        Reason.CONTEXT_UNREADABLE,
        Reason.ROOT_RESERVED,
        Reason.CONTEXT_RESERVED,
        Reason.DIRECTORY_UNREADABLE,
        Reason.PASID_TABLE_UNREADABLE,
    )
)
"""What is reported even where fault processing is disabled (FPD)."""

RECOVERABLE: Final = frozenset(
    (Reason.WRITE, Reason.READ, Reason.FIRST_NOT_PRESENT, Reason.PRIVILEGE, Reason.SCALABLE_WRITE)
)
"""What a translation request is told without a fault record: it may ask for the page ("Recoverable Faults", 7.1)."""


class TableType(IntEnum):
    """What translates, numbered as a PASID entry's PGTT."""

    FIRST = 1
    SECOND = 2
    NESTED = 3
    PASS_THROUGH = 4


class Context(NamedTuple):
    """A present context entry without reserved bits. ``lo`` and ``hi`` are its first two words."""

    lo: int
    hi: int
    scalable: bool

    @property
    def fpd(self) -> bool:
        """Fault processing disabled."""
        return bool(self.lo & _FPD)

    @property
    def page_requests(self) -> bool:
        """PRE (scalable mode)."""
        return self.scalable and bool(self.lo & 0x10)

    @property
    def device_tlb(self) -> bool:
        """Whether translation requests and translated requests are allowed: DTE, or TT = 1 in legacy mode."""
        return bool(self.lo & 4) if self.scalable else self.lo >> 2 & 3 == 1


class Binding(NamedTuple):
    """What translates the requests of one function with one PASID. Levels and widths are 0 where there is no such
    table; ``width`` counts the bits of an input address."""

    type: TableType
    did: int
    pasid: int
    """That of the request, or :data:`RID_PASID`; :data:`RID` in legacy mode."""
    fpd: bool = False
    first_root: int = 0
    first_levels: int = 0
    first_width: int = 0
    second_root: int = 0
    second_levels: int = 0
    second_width: int = 0


class Structures:
    """Reads them. ``scalable`` follows RTADDR.TTM, ``root`` is the address of the root table."""

    def __init__(self, options: VtdOptions, memory: TableMemory) -> None:
        self._memory = memory
        self.root, self.scalable = 0, False
        self._aw = options.aw_bits
        above = U64_MAX & ~((1 << options.aw_bits) - 1)
        self._root_reserved = above | 0xFFE
        self._context_reserved = above | 0xFF0
        self._scalable_reserved = above | 0x1E0
        self._levels = frozenset(range(3, (options.aw_bits - 12) // 9 + 1))
        self._translations = {0, *((1,) if options.device_iotlb else ()), *((2,) if options.pass_through else ())}
        self._types = frozenset(
            (
                *((TableType.FIRST,) if options.first_stage else ()),
                *((TableType.SECOND,) if options.second_stage else ()),
                *((TableType.NESTED,) if options.nested else ()),
                *((TableType.PASS_THROUGH,) if options.pass_through else ()),
            )
        )
        self._bindings: dict[tuple[int, ...], Binding] = {}
        self._checked_once = options.has(quirks.PASID_CHECKED_ONCE)
        self._fpd_when_present = options.has(quirks.FPD_WHEN_PRESENT)
        self._first_levels = frozenset((4,) if options.aw_bits < 57 else (4, 5))

    # -- root and context ----------------------------------------------------------------------------------------

    def context(self, bus: int, devfn: int) -> tuple[Reason, bool, Context | None]:
        """The context entry of a function: reason, FPD, entry."""
        word = self._memory.word
        at = self.root + bus * 16
        lo, hi = word(at), word(at + 8)
        if lo is None or hi is None:
            return Reason.ROOT_UNREADABLE, False, None
        if self.scalable:
            return self._scalable_context(lo, hi, devfn)
        if not lo & _P:
            return Reason.ROOT_NOT_PRESENT, False, None
        if hi or lo & self._root_reserved:
            return Reason.ROOT_RESERVED, False, None
        at = (lo & ~PAGE_MASK) + devfn * 16
        lo, hi = word(at), word(at + 8)
        if lo is None or hi is None:
            return Reason.CONTEXT_UNREADABLE, False, None
        return self._checked_legacy(Context(lo, hi, False))

    def _checked_legacy(self, context: Context) -> tuple[Reason, bool, Context | None]:
        lo, hi, fpd = context.lo, context.hi, context.fpd
        if not lo & _P:
            return Reason.CONTEXT_NOT_PRESENT, fpd, None
        if hi & 0xFFFF_FFFF_FF00_0080 or lo & self._context_reserved:
            return Reason.CONTEXT_RESERVED, fpd, None
        if 2 + (hi & 7) not in self._levels or lo >> 2 & 3 not in self._translations:
            return Reason.CONTEXT_INVALID, fpd, None
        return Reason.NONE, fpd, context

    def _scalable_context(self, lo: int, hi: int, devfn: int) -> tuple[Reason, bool, Context | None]:
        root = lo if devfn < 0x80 else hi
        if not root & _P:
            return Reason.ROOT_NOT_PRESENT, False, None
        if (lo | hi) & self._root_reserved:
            return Reason.ROOT_RESERVED, False, None
        words = self._memory.words((root & ~PAGE_MASK) + (devfn & 0x7F) * 32, 4)
        if words is None:
            return Reason.CONTEXT_UNREADABLE, False, None
        lo, hi, q2, q3 = words
        fpd = bool(lo & _FPD)
        if not lo & _P:
            return Reason.CONTEXT_NOT_PRESENT, fpd, None
        if lo & self._scalable_reserved or hi & 0xFFFF_FFFF_FFE0_0000 or q2 or q3:
            return Reason.CONTEXT_RESERVED, fpd, None
        return Reason.NONE, fpd, Context(lo, hi, True)

    # -- what translates -----------------------------------------------------------------------------------------

    def binding(self, context: Context, pasid: int, *, cached: bool = False) -> tuple[Reason, bool, Binding | None]:
        """What ``context`` says for requests with ``pasid`` (:data:`RID`: without): reason, FPD, binding. ``cached``:
        the context entry was, and good then."""
        if context.scalable:
            pasid = RID_PASID if pasid == RID else pasid
            read = self._pasid_again if cached and self._checked_once else self._pasid_entry
            return read(context, pasid)
        key = context.lo, context.hi
        known = self._bindings.get(key)
        if known is None:
            known = self._remember(key, self._legacy(context))
        return Reason.NONE, known.fpd, known

    def pasid_words(self, context: Context, pasid: int) -> tuple[int, ...] | None:
        """All 8 words of the PASID entry, None if that is not present and good, or there is none."""
        pasid = RID_PASID if pasid == RID else pasid
        if not context.scalable or self._pasid_entry(context, pasid)[2] is None:
            return None
        directory = self._memory.word((context.lo & ~PAGE_MASK) + (pasid >> 6 & 0x3FFF) * 8)
        words = None if directory is None else self._memory.words((directory & ~PAGE_MASK) + (pasid & 63) * 64, 8)
        return None if words is None else tuple(words)

    def _remember(self, key: tuple[int, ...], binding: Binding) -> Binding:
        """The same words mean the same: most walks begin with words that were seen before."""
        if len(self._bindings) >= _REMEMBERED:
            self._bindings.clear()
        self._bindings[key] = binding
        return binding

    def _legacy(self, context: Context) -> Binding:
        lo, hi, fpd = context.lo, context.hi, context.fpd
        did, levels = hi >> 8 & 0xFFFF, 2 + (hi & 7)
        if lo >> 2 & 3 == 2:
            return Binding(TableType.PASS_THROUGH, did, RID, fpd)
        width = min(12 + 9 * levels, self._aw)
        root = lo & ~PAGE_MASK
        return Binding(TableType.SECOND, did, RID, fpd, second_root=root, second_levels=levels, second_width=width)

    def _pasid_entry(self, context: Context, pasid: int) -> tuple[Reason, bool, Binding | None]:
        fpd, memory = context.fpd, self._memory
        looked_at = 0 if self._fpd_when_present else _FPD
        directory = memory.word((context.lo & ~PAGE_MASK) + (pasid >> 6 & 0x3FFF) * 8)
        if directory is None:
            return Reason.DIRECTORY_UNREADABLE, fpd, None
        if not directory & _P:
            return Reason.DIRECTORY_NOT_PRESENT, fpd or bool(directory & looked_at), None
        words = memory.words((directory & ~PAGE_MASK) + (pasid & 63) * 64, 3)
        if words is None:
            return Reason.PASID_TABLE_UNREADABLE, fpd, None
        q0, q1, q2 = words
        kind = q0 >> 6 & 7
        if kind not in self._types or not self._level_supported(kind, q0, q2):
            return Reason.PASID_INVALID, fpd or bool((directory | q0) & looked_at), None
        if not q0 & _P:
            return Reason.PASID_NOT_PRESENT, fpd or bool((directory | q0) & looked_at), None
        return self._found(TableType(kind), pasid, fpd or bool((directory | q0) & _FPD), (q0, q1, q2))

    def _found(
        self, kind: TableType, pasid: int, fpd: bool, words: tuple[int, ...]
    ) -> tuple[Reason, bool, Binding | None]:
        key = *words, pasid, fpd, kind
        known = self._bindings.get(key)
        if known is None:
            known = self._remember(key, self._bound(kind, pasid, fpd, words))
        return Reason.NONE, fpd, known

    def _pasid_again(self, context: Context, pasid: int) -> tuple[Reason, bool, Binding | None]:
        """By quirk: of a context entry that is cached. Where nothing is checked, absent entries are zeroes; and what
        is not a present pass-through entry translates, by the one stage that there is."""
        fpd, memory, words = context.fpd, self._memory, None
        directory = memory.word((context.lo & ~PAGE_MASK) + (pasid >> 6 & 0x3FFF) * 8)
        if directory is None and not fpd:
            return Reason.DIRECTORY_UNREADABLE, fpd, None
        present = directory is not None and bool(directory & _P)
        checked = not fpd and not (directory or 0) & _FPD
        if checked and not present:
            return Reason.DIRECTORY_NOT_PRESENT, False, None
        if present and directory is not None:
            words = memory.words((directory & ~PAGE_MASK) + (pasid & 63) * 64, 3)
        if checked and words is None:
            return Reason.PASID_TABLE_UNREADABLE, False, None
        q0, q1, q2 = words or (0, 0, 0)
        kind = q0 >> 6 & 7
        if checked and (kind not in self._types or not self._level_supported(kind, q0, q2)):
            return Reason.PASID_INVALID, False, None
        if not (kind in self._types and q0 & _P):
            kind = TableType.FIRST if TableType.FIRST in self._types else TableType.SECOND
        return self._found(TableType(kind), pasid, not checked or bool(q0 & _FPD), (q0, q1, q2))

    def _level_supported(self, kind: int, q0: int, q2: int) -> bool:
        if kind & 1 and 4 + (q2 >> 2 & 3) not in self._first_levels:
            return False
        return not kind & 2 or 2 + (q0 >> 2 & 7) in self._levels

    def _bound(self, kind: TableType, pasid: int, fpd: bool, words: tuple[int, ...]) -> Binding:
        q0, q1, q2 = words
        second_levels = 2 + (q0 >> 2 & 7)
        width = 12 + 9 * second_levels
        did = q1 & 0xFFFF
        if kind is TableType.PASS_THROUGH:
            return Binding(kind, did, pasid, fpd)
        first = second = (0, 0, 0)
        if kind & 1:
            levels = 4 + (q2 >> 2 & 3)
            limit = 12 + 9 * levels if kind is TableType.NESTED else min(width, 12 + 9 * levels)
            first = (q2 & ~PAGE_MASK, levels, limit)
        if kind & 2:
            second = (q0 & ~PAGE_MASK, second_levels, min(width, self._aw))
        return Binding(kind, did, pasid, fpd, *first, *second)
