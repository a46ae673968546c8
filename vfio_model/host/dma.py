"""The assigned path: a device's DMA through the host's tables in shared memory, without a message, lock or allocation.

Every copy happens in a **DMA section** (:mod:`vfio_model.memory.lane`): the lane goes odd, the state and the window's
root are loaded, the TCE is loaded and checked, at most 256 KiB are copied, the lane goes even in ``finally``. What may
be kept between sections is the decoded window record, under the value of its root word, and the place of a segment. A
translated address may not.

:meth:`AssignedImpl.read` and ``write`` are closures over everything that they need. Their first half serves an access
inside one page of the window and segment used last; all else goes to :class:`_Walker`, piece by piece. Where
``_path.c`` was built the first half is compiled (:mod:`vfio_model.batch.variant`). Source for the checks: LoPAPR,
"Translation Control Entry (TCE)".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vfio_model.batch import variant
from vfio_model.host.dma_many import PathMany, make_many
from vfio_model.host.explain import Step, explain
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import (
    DIRTY_SHIFT,
    FIRST_HPA,
    PE_BUS_MASTER,
    PE_DIRTY,
    PE_STATE,
    TCE_PERM,
    TCE_READ,
    TCE_WRITE,
)
from vfio_model.host.segments import Segments
from vfio_model.host.walk import Window, find_window, load_tce
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.mapping import BounceBudget, DMAMapping
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer, WriteBuffer

try:
    from vfio_model.host._path import Path
except ImportError:  # not built
    Path = None  # type: ignore[assignment,misc]

__all__ = ["AssignedImpl", "Segments"]

_OK, _DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR
_MOVED, _FAULT, _UNKNOWN = range(3)
assert (PE_STATE, PE_BUS_MASTER, PE_DIRTY, SECTION_BYTES) == (8, 9, 13, 262144), "the fast path has these as literals"
_NO_PLACE, _NO_RAM = HpaMap(0, 12, 0, 0), memoryview(b"")
Find = Callable[[int], tuple[Any, memoryview, int] | None]
Read = Callable[[int, WriteBuffer], MemTxResult]
Write = Callable[[int, ReadBuffer], MemTxResult]


class _Walker:
    """The general path: any number of pages, levels, windows and segments, in sections of at most 256 KiB."""

    def __init__(
        self,
        pe: memoryview,
        domain: memoryview,
        find: Find,
        lane: Lane,
        on_unknown_hpa: Callable[[], None],
        dirty: memoryview | None = None,
    ) -> None:
        self.pe, self.domain, self.find, self.lane = pe, domain, find, lane
        self.on_unknown_hpa = on_unknown_hpa
        self.dirty = memoryview(b"") if dirty is None else dirty
        self.known: dict[int, Window] = {}
        self.record = 0
        """The window record that the last section went through."""

    def move(self, iova: int, view: memoryview, need: int) -> tuple[MemTxResult, int]:
        """Move all of ``view``; returns the result and the bytes moved before a fault."""
        done, asked = 0, False
        while done < len(view):
            moved, why = self._section(iova + done, view[done : done + SECTION_BYTES], need)
            done += moved
            if why == _UNKNOWN and not asked:
                asked = True
                self.on_unknown_hpa()
            elif why != _MOVED:
                return _DECODE_ERROR, done
        return _OK, done

    def valid(self, iova: int, length: int, need: int) -> bool:
        """Whether every page of the range is mapped with ``need``; moves nothing. There is a section for each page,
        because tables may be given back between two of them.
        """
        end = iova + length
        while iova < end:
            size = self._page_size(iova, need)
            if not size:
                return False
            iova = (iova | size - 1) + 1
        return True

    def _page_size(self, iova: int, need: int) -> int:
        """Bytes of the page that maps ``iova`` with ``need``, 0 when none does."""
        lane, slot = self.lane.words, self.lane.slot
        lane[slot] += 1
        try:
            window = find_window(self.pe, self.domain, iova, self.known)
            mapped = window is not None and load_tce(self.domain, window, iova) & need
            return 1 << window.page_shift if window is not None and mapped else 0
        finally:
            lane[slot] += 1

    def _section(self, iova: int, view: memoryview, need: int) -> tuple[int, int]:
        lane, slot, pe, domain = self.lane.words, self.lane.slot, self.pe, self.domain
        lane[slot] += 1
        try:
            if pe[PE_STATE] or not pe[PE_BUS_MASTER]:
                return 0, _FAULT
            window = find_window(pe, domain, iova, self.known)
            if window is None:
                return 0, _FAULT
            self.record = window.record
            return self._pages(window, iova, view[: window.last - iova + 1], need)
        finally:
            lane[slot] += 1

    def note(self, hpa: int, size: int) -> None:
        """Mark ``size`` bytes from ``hpa``, which were just written, in the dirty map; inside the section."""
        dirty = self.dirty
        first, last = (hpa - FIRST_HPA) >> DIRTY_SHIFT, (hpa + size - 1 - FIRST_HPA) >> DIRTY_SHIFT
        for page in range(first, min(last + 1, len(dirty))):
            dirty[page] = 1

    def _pages(self, window: Window, iova: int, view: memoryview, need: int) -> tuple[int, int]:
        page, size, done = 1 << window.page_shift, len(view), 0
        while done < size:
            within = (iova + done) & (page - 1)
            tce = load_tce(self.domain, window, iova + done)
            if not tce & need:
                return done, _FAULT
            hpa = (tce & -page & ~TCE_PERM) + within
            found = self.find(hpa)
            if found is None:
                return done, _UNKNOWN
            _, ram, at = found
            count = min(page - within, size - done, len(ram) - at)
            if need == TCE_WRITE:
                ram[at : at + count] = view[done : done + count]
                if self.pe[PE_DIRTY]:
                    self.note(hpa, count)
            else:
                view[done : done + count] = ram[at : at + count]
            done += count
        return done, _MOVED


class _Near:
    """The window and segment used last; ``fast`` where the segment's memory is one run.

    ``first`` is the number of the window's first page; because the window is aligned to its size, a page's number XOR
    ``first`` is its index in the window, which has ``entries`` pages, and lies beyond their end exactly for pages
    outside. With one level ``tces`` are its entries, with several the words of the whole domain.
    """

    __slots__ = (
        "base",
        "entries",
        "fast",
        "first",
        "low",
        "place",
        "ram",
        "record",
        "root_word",
        "shift",
        "tces",
        "window",
    )

    def __init__(
        self, window: Window | None, domain: memoryview, place: HpaMap = _NO_PLACE, ram: memoryview = _NO_RAM
    ) -> None:
        self.root_word, self.record = (window.root_word, window.record) if window else (PE_STATE, -1)
        self.shift = window.page_shift if window else 12
        self.low = (1 << self.shift) - 1
        self.window = window
        self.entries = (window.last - window.start + 1) >> self.shift if window else 0
        self.first = window.start >> self.shift if window else 0
        one = window is not None and window.levels == 1
        self.tces = domain[window.table : window.table + self.entries] if window and one else domain[:]
        self.place, self.base, self.ram = place, place.base, ram
        self.fast = window is not None and place.contiguous


class AssignedImpl:
    """One lane's DMA through one PE block (a :class:`vfio_model.memory.dma.DMAImpl`).

    ``pe_words`` and ``domain_words`` are the shared areas as format ``Q``, read-only where hostd gave them. ``gate`` is
    for tests: it is called inside the section between translation and copy, and takes the fast path away.
    ``on_unknown_hpa()`` is called outside any section when a TCE points at memory that ``segments`` does not hold; it
    may add some, and the access is tried once more. ``compiled`` False keeps to Python even where the compiled half was
    built. ``dirty`` is the process's dirty map, as bytes.
    """

    read: Read
    write: Write

    def __init__(
        self,
        pe_words: memoryview,
        domain_words: memoryview,
        segments: Segments,
        lane: Lane,
        gate: Callable[[], None] | None = None,
        *,
        on_unknown_hpa: Callable[[], None] = lambda: None,
        budget: BounceBudget | None = None,
        compiled: bool = True,
        dirty: memoryview | None = None,
    ) -> None:
        self.pe, self.domain, self.segments, self.lane = pe_words, domain_words, segments, lane
        self.budget = budget or BounceBudget()
        find = segments.find if gate is None else _gated(segments.find, gate)
        self._walker = _Walker(pe_words, domain_words, find, lane, on_unknown_hpa, dirty)
        if gate is None:
            use_path = compiled and Path is not None and variant.chosen == "compiled"
            make = _make_compiled if use_path else _make_fast
            self.read, self.write, self._near, many = make(self._walker, segments)
            self.read_many, self.write_many = make_many(
                self.read, self.write, self._near, pe_words, domain_words, lane, many
            )
        else:
            self.read, self.write = _make_slow(self._walker)
            self.read_many, self.write_many = make_many(self.read, self.write, None, pe_words, domain_words, lane)

    def explain(self, iova: int, is_write: bool | None = None) -> list[Step]:
        """How an access to ``iova`` would go now, step by step."""
        return explain(self.pe, self.domain, self.segments.segments, iova, is_write)

    def valid(self, iova: int, length: int, direction: DMADirection) -> bool:
        """Whether all of ``length`` bytes from ``iova`` translate for ``direction``."""
        if self.pe[PE_STATE] or not self.pe[PE_BUS_MASTER]:
            return False
        return self._walker.valid(iova, length, _need(direction))

    def map(
        self,
        iova: int,
        length: int,
        direction: DMADirection,
        on_invalidate: Callable[[DMAMapping], None] | None = None,
    ) -> DMAMapping | None:
        """A bounce buffer: filled here for TO_DEVICE, written back at unmap for FROM_DEVICE. None without budget or
        mapping.
        """
        granted = self.budget.take(length)
        data = bytearray(granted)
        if direction == DMADirection.TO_DEVICE:
            usable = granted > 0 and self.read(iova, data) == _OK
        else:
            usable = granted > 0 and self.valid(iova, granted, direction)
        if not usable:
            self.budget.give_back(granted)
            return None
        return DMAMapping(iova, memoryview(data), direction, on_invalidate, bounce=True, release=self._release)

    def _release(self, mapping: DMAMapping, access_len: int) -> None:
        if mapping.direction == DMADirection.FROM_DEVICE and access_len:
            self.write(mapping.iova, mapping.view[:access_len])
        self.budget.give_back(mapping.length)


def _need(direction: DMADirection) -> int:
    return TCE_READ if direction == DMADirection.TO_DEVICE else TCE_WRITE


def _gated(find: Find, gate: Callable[[], None]) -> Find:
    """The walker finds the memory after it has the TCE and before it copies: that is where the gate stands."""

    def gated(hpa: int) -> tuple[Any, memoryview, int] | None:
        found = find(hpa)
        gate()
        return found

    return gated


def _make_slow(walker: _Walker) -> tuple[Read, Write]:
    def read(iova: int, out: WriteBuffer) -> MemTxResult:
        view = memoryview(out)
        result, done = walker.move(iova, view, TCE_READ)
        if result:
            view[done:] = bytes(len(view) - done)
        return result

    def write(iova: int, data: ReadBuffer) -> MemTxResult:
        return walker.move(iova, memoryview(data), TCE_WRITE)[0]

    return read, write


Made = tuple[Read, Write, Callable[[], _Near], PathMany | None]


def _make_fast(walker: _Walker, segments: Segments) -> Made:
    """``read`` and ``write`` whose fast half runs on cells that the slow half sets, and a look at those cells.

    The two fast halves are alike on purpose: a call or a test that they shared would cost more than they do. So are the
    literal 8, 9 and 13 (PE_STATE, PE_BUS_MASTER, PE_DIRTY) and 262144 (SECTION_BYTES): a global's name is looked up at
    every access. Nothing is learnt from an access that failed.
    """
    slow_read, slow_write = _make_slow(walker)
    pe, lane, slot, note = walker.pe, walker.lane.words, walker.lane.slot, walker.note
    nowhere = near = _Near(None, walker.domain)
    dull: set[int] = set()  # window records through which no access is simple
    root_word, record, first = near.root_word, near.record, near.first
    shift, low, tces = near.shift, near.low, near.tces
    page, mask, base, ram, limit = near.low + 1, ~near.low, near.base, near.ram, len(near.ram)

    def know(found: _Near) -> None:
        nonlocal near, root_word, record, first, shift, low, tces, page, mask, base, ram, limit
        near, record = found, -1
        if not found.fast or found.window is None or found.window.levels > 1:
            dull.add(walker.record)
            return
        root_word, first, shift, low, tces = found.root_word, found.first, found.shift, found.low, found.tces
        page, mask, base, ram, limit = found.low + 1, ~found.low, found.base, found.ram, len(found.ram)
        record = found.record

    def read(iova: int, out: WriteBuffer) -> MemTxResult:
        size, count = len(out), lane[slot]
        within = iova & low
        lane[slot] = count + 1
        try:
            if pe[root_word] == record and not pe[8] and pe[9]:
                tce = tces[iova >> shift ^ first]
                at = (tce & mask) - base + within
                end = at + size
                if tce & 1 and within + size <= page and at >= 0 and end <= limit and size <= 262144:
                    out[:] = ram[at:end]
                    return _OK
        except IndexError:  # not in this window
            pass
        finally:
            lane[slot] = count + 2
        result = slow_read(iova, out)
        if not result and within + size <= page and walker.record not in dull:
            know(_look(walker, segments, iova))
        return result

    def write(iova: int, data: ReadBuffer) -> MemTxResult:
        size, count = len(data), lane[slot]
        within = iova & low
        lane[slot] = count + 1
        try:
            if pe[root_word] == record and not pe[8] and pe[9]:
                tce = tces[iova >> shift ^ first]
                at = (tce & mask) - base + within
                end = at + size
                if tce & 2 and within + size <= page and at >= 0 and end <= limit and size <= 262144:
                    ram[at:end] = data
                    if pe[13] and size:
                        note((tce & mask) + within, size)
                    return _OK
        except IndexError:  # not in this window
            pass
        finally:
            lane[slot] = count + 2
        result = slow_write(iova, data)
        if not result and within + size <= page and walker.record not in dull:
            know(_look(walker, segments, iova))
        return result

    def forget() -> None:
        nonlocal near, record
        near, record = nowhere, -1  # one store each: the lane's thread may be in the middle of an access
        dull.clear()

    segments.on_change(forget)
    return read, write, lambda: near, None


def _make_compiled(walker: _Walker, segments: Segments) -> Made:
    """:func:`_make_fast` with its fast halves in C (``_path.c``)."""
    slow_read, slow_write = _make_slow(walker)
    nowhere = near = _Near(None, walker.domain)
    dull: set[int] = set()

    def learn(iova: int, size: int) -> None:
        nonlocal near
        if (iova & near.low) + size > near.low + 1 or walker.record in dull:
            return
        near = _look(walker, segments, iova)
        if near.fast and not near.ram.readonly:
            start, window = near.first << near.shift, near.window
            assert window is not None, "what is fast has a window"
            levels = window.levels, window.level_shift, window.table, near.entries
            path.know(near.root_word, near.record, start, near.shift, near.base, near.tces, near.ram, levels)
        else:
            path.forget()
            dull.add(walker.record)

    def read(iova: int, out: WriteBuffer) -> MemTxResult:
        result = slow_read(iova, out)
        if not result:
            learn(iova, len(out))
        return result

    def write(iova: int, data: ReadBuffer) -> MemTxResult:
        result = slow_write(iova, data)
        if not result:
            learn(iova, len(data))
        return result

    def forget() -> None:
        nonlocal near
        near = nowhere
        path.forget()
        dull.clear()

    # Views of our own, so that whoever mapped the areas can release his.
    dirty = memoryview(walker.dirty) if len(walker.dirty) else None
    path = Path(memoryview(walker.pe), memoryview(walker.lane.words), walker.lane.slot, read, write, _OK, dirty)
    segments.on_change(forget)
    return path.read, path.write, lambda: near, path.many


def _look(walker: _Walker, segments: Segments, iova: int) -> _Near:
    """What the fast path may know after an access at ``iova``."""
    lane, slot = walker.lane.words, walker.lane.slot
    lane[slot] += 1
    try:
        window = find_window(walker.pe, walker.domain, iova, walker.known)
        tce = load_tce(walker.domain, window, iova) if window else 0
        found = segments.find(tce & -(1 << window.page_shift) & ~TCE_PERM) if window and tce else None
    finally:
        lane[slot] += 1
    if window is None or window.start & window.last != window.start:
        return _Near(None, walker.domain)
    return _Near(window, walker.domain, found[0], found[1]) if found else _Near(None, walker.domain)
