"""What a VT-d driver keeps in guest memory: pages, page tables of both stages, root, context and PASID tables.

Intel VT-d specification, "Translation Structure Formats" (9): root entry 9.1, scalable-mode root entry 9.2, context
entry 9.3, scalable-mode context entry 9.4, PASID directory entry 9.5, PASID table entry 9.6, first-stage and
second-stage paging entries 9.7 and 9.8. Tables live in the machine's memory alone: whoever reads them there sees what
the unit sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum, IntEnum
from typing import NamedTuple

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.ranges import align_up

PAGE_SHIFT, PAGE = 12, 4096
LEVEL_BITS, ENTRIES = 9, 512
ADDRESS = (1 << 52) - PAGE
PRESENT = 1
LARGE = 1 << 7

READ, WRITE = 1, 2
"""Permissions; the second stage's bits."""
FIRST_WRITE, FIRST_USER = 2, 4

RID_PASID = 0
"""The PASID of requests without one, as Linux has it."""
CONTEXT_PASIDE, CONTEXT_DTE, CONTEXT_PRE = 8, 4, 16
CONTEXT_PDTS_SHIFT = 9
PASID_TABLE_BITS = 6
PASID_DIRECTORY_ENTRIES = PAGE // 8
"""One page of them: 32768 PASIDs."""
PASID_DIRECTORY_PDTS = 2
PASID_ENTRY_SIZE, CONTEXT_ENTRY_SIZE, SCALABLE_CONTEXT_SIZE = 64, 16, 32


class TranslationType(IntEnum):
    """TT of a legacy context entry."""

    UNTRANSLATED = 0
    DEVICE_TLB = 1
    PASS_THROUGH = 2


class Pgtt(IntEnum):
    """PASID granular translation type."""

    FIRST = 1
    SECOND = 2
    NESTED = 3
    PASS_THROUGH = 4


class Stage(Enum):
    """Which kind of page table."""

    FIRST = 1
    SECOND = 2


class PageAllocator:
    """Pages of guest memory from ``first`` (page-aligned) up to ``end`` (exclusive), for tables and queues."""

    def __init__(self, cpu: Cpu, first: int, end: int) -> None:
        self._cpu, self._next, self._end = cpu, first, end

    def take(self, count: int = 1) -> int:
        """``count`` zeroed pages in a row, naturally aligned.

        :raise DriverError: when there are none left.
        """
        size = PAGE << (count - 1).bit_length()
        at = align_up(self._next, size)
        if at + count * PAGE > self._end:
            raise DriverError(f"no {count} pages left below {self._end:#x}")
        self._next = at + count * PAGE
        self._cpu.write_memory(at, bytes(count * PAGE))
        return at


class PageTable:
    """``levels`` (3 to 5) of one stage. Addresses are input and output addresses in bytes."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, stage: Stage = Stage.SECOND, levels: int = 4) -> None:
        self._cpu, self._pages = cpu, pages
        self.stage, self.levels = stage, levels
        self.root = pages.take()

    def word(self, at: int) -> int:
        """An entry, by its guest-physical address."""
        return self._cpu.mmio_read(at, 8)

    def slot(self, iova: int, level: int = 1) -> int:
        """The guest-physical address of the entry for ``iova`` at ``level`` (1: 4 KiB); tables on the way are made.

        :raise DriverError: a larger page is in the way.
        """
        table = self.root
        for above in range(self.levels, level, -1):
            at = table + self._index(iova, above) * 8
            entry = self.word(at)
            if not entry & (READ | WRITE):
                entry = self._pages.take() | (READ | WRITE | (FIRST_USER if self.stage is Stage.FIRST else 0))
                self._cpu.mmio_write(at, 8, entry)
            elif entry & LARGE:
                raise DriverError(f"{iova:#x} is in a page of {1 << shift_of(above)} bytes")
            table = entry & ADDRESS
        return table + self._index(iova, level) * 8

    def find(self, iova: int) -> tuple[int, int] | None:
        """(address of the leaf entry, its level) for ``iova``, or None where nothing is mapped."""
        table = self.root
        for level in range(self.levels, 0, -1):
            at = table + self._index(iova, level) * 8
            entry = self.word(at)
            if not entry & (READ | WRITE):
                return None
            if level == 1 or entry & LARGE:
                return at, level
            table = entry & ADDRESS
        raise AssertionError("the last level is a leaf")

    def _index(self, iova: int, level: int) -> int:
        return iova >> shift_of(level) & ENTRIES - 1

    def leaf(self, gpa: int, perm: int, level: int = 1) -> int:
        """The entry that maps to ``gpa``. In the first stage everything present can be read."""
        large = LARGE if level > 1 else 0
        if self.stage is Stage.SECOND:
            return gpa | perm | large
        return gpa | PRESENT | FIRST_USER | large | (FIRST_WRITE if perm & WRITE else 0)

    def map(self, iova: int, gpa: int, size: int, perm: int, *, level: int = 1) -> None:
        """Map ``size`` bytes by pages of ``level``; all are multiples of such a page."""
        step = 1 << shift_of(level)
        for offset in range(0, size, step):
            self._cpu.mmio_write(self.slot(iova + offset, level), 8, self.leaf(gpa + offset, perm, level))

    def unmap(self, iova: int, size: int) -> Iterator[tuple[int, int]]:
        """Clear what is mapped in ``size`` bytes; (input address, bytes) of each page that was."""
        at, end = iova, iova + size
        while at < end:
            found = self.find(at)
            step = PAGE
            if found is not None:
                entry, level = found
                step = 1 << shift_of(level)
                self._cpu.mmio_write(entry, 8, 0)
                yield at & ~(step - 1), step
            at = (at & ~(step - 1)) + step


def shift_of(level: int) -> int:
    """log2 of the bytes that an entry of ``level`` (1: 4 KiB) covers."""
    return PAGE_SHIFT + LEVEL_BITS * (level - 1)


class PasidEntry(NamedTuple):
    """A PASID table entry: what translates, in domain ``did``."""

    pgtt: Pgtt
    did: int
    first_root: int = 0
    second_root: int = 0
    levels: int = 4
    """Of the second stage, or of pass-through."""
    first_levels: int = 4

    def words(self) -> tuple[int, ...]:
        """Eight words of 64 bits."""
        return (
            PRESENT | (self.levels - 2) << 2 | self.pgtt << 6 | self.second_root,
            self.did,
            (self.first_levels - 4) << 2 | self.first_root,
            *(0,) * 5,
        )


class PasidTable:
    """A PASID directory of one function, with its tables."""

    def __init__(self, cpu: Cpu, pages: PageAllocator) -> None:
        self._cpu, self._pages = cpu, pages
        self.directory = pages.take()

    def _entry(self, pasid: int) -> int:
        index = pasid >> PASID_TABLE_BITS
        if index >= PASID_DIRECTORY_ENTRIES:
            raise DriverError(f"PASID {pasid:#x} does not fit the directory")
        at = self.directory + index * 8
        table = self._cpu.mmio_read(at, 8)
        if not table & PRESENT:
            table = self._pages.take() | PRESENT
            self._cpu.mmio_write(at, 8, table)
        return (table & ADDRESS) + (pasid & (1 << PASID_TABLE_BITS) - 1) * PASID_ENTRY_SIZE

    def set(self, pasid: int, entry: PasidEntry | None) -> None:
        """Store the entry of ``pasid``, its present bit last; None clears it, the present bit first."""
        at, words = self._entry(pasid), (0,) * 8 if entry is None else entry.words()
        order = range(8) if entry is None else range(7, -1, -1)
        for n in order:
            self._cpu.mmio_write(at + 8 * n, 8, words[n])


class RootTable:
    """Root and context tables. ``scalable``: of scalable mode."""

    def __init__(self, cpu: Cpu, pages: PageAllocator, *, scalable: bool) -> None:
        self._cpu, self._pages, self._scalable = cpu, pages, scalable
        self.root = pages.take()

    def entry(self, sid: int) -> int:
        """The guest-physical address of the context entry of requester ``sid``; its table is made."""
        bus, devfn = sid >> 8, sid & 0xFF
        at = self.root + bus * 16
        if self._scalable:
            at, devfn = at + (8 if devfn & 0x80 else 0), devfn & 0x7F
        table = self._cpu.mmio_read(at, 8)
        if not table & PRESENT:
            table = self._pages.take() | PRESENT
            self._cpu.mmio_write(at, 8, table)
        return (table & ADDRESS) + devfn * (SCALABLE_CONTEXT_SIZE if self._scalable else CONTEXT_ENTRY_SIZE)

    def present(self, sid: int) -> bool:
        """Whether ``sid`` has a context."""
        return bool(self._cpu.mmio_read(self.entry(sid), 8) & PRESENT)

    def set(self, sid: int, lo: int, hi: int) -> None:
        """Store the first two words of a context entry, the one with the present bit last."""
        at = self.entry(sid)
        self._cpu.mmio_write(at + 8, 8, hi)
        self._cpu.mmio_write(at, 8, lo)

    def clear(self, sid: int) -> None:
        """Nobody's."""
        at = self.entry(sid)
        self._cpu.mmio_write(at, 8, 0)
        self._cpu.mmio_write(at + 8, 8, 0)
