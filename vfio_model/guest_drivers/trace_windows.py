"""What a log's reader may know about each DMA window, from the lines read so far.

An entry is *known* when an earlier line wrote it, or when an earlier line says that the table was new and so all
zero. Two kinds of line leave
*doubt*: an H_PUT_TCE_INDIRECT, whose list is not in the log but for its last entry (guests map consecutive pages, so
the rest is inferred as a linear list), and an H_STUFF_TCE that failed at the window's end, whose start is not in the
log. A window whose creation is not in the log is unknown but for what lines write. Doubt never becomes knowledge by
looking at a translation; it only narrows to what was seen, so that the same entry cannot say two things.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vfio_model.iommu.spapr.regs import TCE_PERM_MASK
from vfio_model.ranges import U64_MAX, Range


@dataclass(slots=True)
class ListLine:
    """One H_PUT_TCE_INDIRECT line whose contents were inferred, and what translations said of its entries."""

    line: int
    agreed: set[int] = field(default_factory=set)
    """Entries seen as inferred."""
    deviant: dict[int, int] = field(default_factory=dict)
    """Entries seen otherwise: index to the TCE seen."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why an entry is not known. ``tces`` are the values it may have (empty: anything)."""

    tces: frozenset[int]
    list_line: ListLine | None = None


@dataclass(slots=True)
class Window:
    """One window of ``nb_table`` pages at ``bus_offset``. ``fresh``: its creation is in the log."""

    liobn: int
    bus_offset: int
    page_shift: int
    nb_table: int
    fresh: bool
    in_kernel: bool = False
    """Whether its entries change without a line in the log."""
    doubts: dict[int, Doubt] = field(default_factory=dict)
    _written: set[int] = field(default_factory=set)
    """Entries written by a line, where that makes a difference (not fresh)."""

    @property
    def page_size(self) -> int:
        """Bytes per entry."""
        return 1 << self.page_shift

    @property
    def range(self) -> Range:
        """The bus addresses of the window."""
        return Range.sized(self.bus_offset, self.nb_table << self.page_shift)

    def index(self, ioba: int) -> int:
        """Entry of bus address ``ioba``; huge when it lies below the window."""
        return ((ioba & -self.page_size) - self.bus_offset & U64_MAX) >> self.page_shift

    def meaning(self, tce: int) -> int:
        """What of ``tce`` a translation shows: page address and permission."""
        return tce & -self.page_size | tce & TCE_PERM_MASK

    def wrote(self, first: int, count: int) -> None:
        """A line says what these entries are."""
        stop = min(first + count, self.nb_table)
        if self.doubts:
            doubted = range(first, stop) if stop - first < len(self.doubts) else list(self.doubts)
            for index in doubted:
                if first <= index < stop:
                    self.doubts.pop(index, None)
        if not self.fresh:
            self._written.update(range(first, stop))

    def doubt(self, index: int, doubt: Doubt) -> None:
        """A line was about this entry, but does not say all."""
        if index < self.nb_table:
            self.doubts[index] = doubt

    def doubt_of(self, index: int) -> Doubt | None:
        """The doubt about entry ``index``, or None when it is known. Beyond the table everything is known."""
        doubt = self.doubts.get(index)
        if doubt is not None or self.fresh or index >= self.nb_table or index in self._written:
            return doubt
        return Doubt(frozenset())

    def renew(self, *, fresh: bool, in_kernel: bool) -> None:
        """A line says that the table is another one: all zero (``fresh``), or with contents that the log may lack."""
        self.fresh, self.in_kernel = fresh, in_kernel
        self.doubts.clear()
        self._written.clear()
