"""An in-kernel TCE table as the host holds it, what it is linked to, and the VM's memory slots.

The area that is shared with the VM's process is that of :mod:`vfio_model.memory.tce_area`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.host.container import VfioContainer
from vfio_model.host.mm import Mm
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.tce_table import TceTable
from vfio_model.memory.tce_area import init_tce_area

_DESCRIPTOR = 120
"""Bytes of ``struct kvmppc_spapr_tce_table`` on a 64-bit kernel without lock debugging."""
_POINTER = 8
_ENTRY = 8


def locked_pages(entries: int, host_page: int) -> int:
    """Host pages that a table counts as locked: those of its entries, and those of its descriptor, which ends with a
    pointer to each of them (Linux ``arch/powerpc/kvm/book3s_64_vio.c``).
    """
    pages = -(-entries * _ENTRY // host_page)
    return pages - (-(_DESCRIPTOR + pages * _POINTER) // host_page)


@dataclass(frozen=True, slots=True)
class MemorySlot:
    """Guest-physical ``gpa``..``end`` (exclusive) is the process's memory from ``ua`` on."""

    gpa: int
    end: int
    ua: int
    readonly: bool

    @property
    def to_ua(self) -> int:
        """What to add to a guest-physical address."""
        return self.ua - self.gpa


@dataclass(slots=True)
class Link:
    """A host window that shadows a table; ``groups`` are those that it was linked through."""

    container: VfioContainer
    driver: SpaprTceContainer
    window: TceTable
    groups: set[int]

    @property
    def live(self) -> bool:
        """Whether the window is still there: it goes by itself with TCE_REMOVE, its container or its last group."""
        alive = bool(self.groups) and self.container.driver is self.driver
        return alive and any(table is self.window for table in self.driver.tables)

    @property
    def mm(self) -> Mm:
        """The process whose memory the window maps."""
        assert self.driver.mm is not None, "only a container that is bound to a process is linked"
        return self.driver.mm

    def index(self, table: KvmTable, entry: int) -> int:
        """The window's entry for the table's ``entry``: the first one where its pages are smaller."""
        return entry << table.page_shift - self.window.page_shift


class KvmTable:
    """``size`` entries from page number ``offset`` of the bus on, in ``words`` behind their header. ``tables`` are
    those of its machine, ``mm`` its process, which has ``accounted`` host pages locked for it.
    """

    def __init__(
        self,
        liobn: int,
        page_shift: int,
        offset: int,
        size: int,
        words: memoryview,
        tables: dict[int, KvmTable],
        mm: Mm,
        accounted: int,
    ) -> None:
        self.liobn, self.page_shift, self.offset, self.size = liobn, page_shift, offset, size
        self.page = 1 << page_shift
        self.words = words
        self.entries = init_tce_area(words, size)
        self.links: list[Link] = []
        self._tables, self._mm, self._accounted = tables, mm, accounted

    def drop(self) -> None:
        """Its file was closed: the machine has it no longer, and its memory is not locked any more."""
        self._mm.unaccount(self._accounted)
        if self._tables.get(self.liobn) is self:
            del self._tables[self.liobn]
        self.links.clear()

    def live_links(self) -> int:
        """How many windows shadow this table; those that are gone are forgotten."""
        if self.links and not all(link.live for link in self.links):
            self.links = [link for link in self.links if link.live]
        return len(self.links)

    def entry(self, ioba: int, npages: int) -> int | None:
        """The first entry of ``npages`` pages from bus address ``ioba``; None when it is misaligned or they leave the
        window.
        """
        index = (ioba >> self.page_shift) - self.offset
        if ioba & self.page - 1 or index < 0 or index + npages > self.size:
            return None
        return index
