"""A guest process's address space, as a kernel keeps it: areas, page tables in guest memory, pages on demand.

Tables are those of the CPU (Intel 64 architecture, four levels), which a VT-d unit walks as a first stage. A page is
there from its first fault on, be it the process's own or that of a device. What is taken away is invalidated, by those
who asked to hear of it, before its memory is used for anything else.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import CHUNK, Frames
from vfio_model.guest_drivers.process_tables import KernelSpace, ProcessTable
from vfio_model.guest_drivers.vtd_tables import (
    ADDRESS,
    PAGE,
    PRESENT,
    READ,
    WRITE,
    shift_of,
)
from vfio_model.ranges import align_up

MMAP_BASE = 0x7F00_0000_0000
USER_END = 1 << 47

OnInvalidate = Callable[[int, int], None]
"""``fn(addr, size)``: returns when nobody has a translation of it any more."""


class MemFile:
    """Memory that several areas can show: a memfd."""

    def __init__(self, frames: Frames) -> None:
        self._frames = frames
        self._pages: dict[int, int] = {}

    def page(self, offset: int) -> int:
        """The frame at ``offset``, a multiple of a page."""
        if offset not in self._pages:
            self._pages[offset] = self._frames.take()
        return self._pages[offset]

    def close(self) -> None:
        """No area shows it any more."""
        for frame in self._pages.values():
            self._frames.give(frame)
        self._pages.clear()


@dataclass
class Area:
    """``start``..``end`` (exclusive), by pages of ``level``. ``frames`` and ``swap`` by address: what is anonymous."""

    start: int
    end: int
    writable: bool
    level: int = 1
    file: MemFile | None = None
    offset: int = 0
    frames: dict[int, int] = field(default_factory=dict)
    swap: dict[int, bytes] = field(default_factory=dict)

    @property
    def step(self) -> int:
        """Bytes of a page."""
        return 1 << shift_of(self.level)

    def cut(self, at: int) -> Area:
        """What is from ``at`` on becomes an area of its own."""
        rest = Area(at, self.end, self.writable, self.level, self.file, self.offset + at - self.start)
        rest.frames = {page: frame for page, frame in self.frames.items() if page >= at}
        rest.swap = {page: data for page, data in self.swap.items() if page >= at}
        self.frames = {page: frame for page, frame in self.frames.items() if page < at}
        self.swap = {page: data for page, data in self.swap.items() if page < at}
        self.end = at
        return rest


class Mm:
    """One process's."""

    def __init__(self, cpu: Cpu, frames: Frames, kernel: KernelSpace) -> None:
        self._cpu, self._frames, self._kernel = cpu, frames, kernel
        self.table = ProcessTable(cpu, frames)
        kernel.share(self.table.root)
        self.areas: list[Area] = []
        self.on_invalidate: list[OnInvalidate] = []
        self.faults = 0
        """Pages that were brought in."""
        self._next = MMAP_BASE

    # -- areas -------------------------------------------------------------------------------------------------------

    def area(self, addr: int) -> Area | None:
        """The area that ``addr`` is in."""
        return next((area for area in self.areas if area.start <= addr < area.end), None)

    def mmap(
        self,
        size: int,
        addr: int | None = None,
        *,
        writable: bool = True,
        level: int = 1,
        file: MemFile | None = None,
        offset: int = 0,
    ) -> int:
        """A new area of at least ``size`` bytes, at ``addr`` when given, by pages of ``level`` (2: 2 MiB, 3: 1 GiB).

        :raise OSError: EINVAL: no size, or nothing that is aligned; EEXIST: something is there.
        """
        step = 1 << shift_of(level)
        start, size = align_up(self._next, step) if addr is None else addr, align_up(size, step)
        if not size or start % step or start + size > USER_END or (file is not None and level > 1):
            raise OSError(errno.EINVAL, f"{size:#x} bytes at {start:#x}")
        if any(area.start < start + size and start < area.end for area in self.areas):
            raise OSError(errno.EEXIST, f"{size:#x} bytes at {start:#x}")
        if addr is None:
            self._next = start + size + step
        self.areas.append(Area(start, start + size, writable, level, file, offset))
        return start

    def munmap(self, addr: int, size: int) -> None:
        """Nothing is mapped there any more, for nobody.

        :raise OSError: EINVAL: it would end within a page.
        """
        end = addr + size
        for at in (addr, end):
            area = self.area(at)
            if area is not None and at % area.step:
                raise OSError(errno.EINVAL, f"{size:#x} bytes at {addr:#x}")
            if area is not None and at > area.start:
                self.areas.append(area.cut(at))
        gone = [area for area in self.areas if addr <= area.start and area.end <= end]
        for area in gone:
            self.areas.remove(area)
            self._forget(area)

    def pageout(self, addr: int, size: int) -> None:
        """MADV_PAGEOUT: what is there goes to swap space, or stays with its file."""
        for area in self.areas:
            first, last = max(addr, area.start), min(addr + size, area.end)
            if first < last:
                self._unmap(area, first, last)
                for page in [page for page in area.frames if first <= page < last]:
                    frame = area.frames.pop(page)
                    area.swap[page] = b"".join(self._chunks(frame, area.step))
                    self._frames.give(frame, area.step // PAGE)

    def _forget(self, area: Area) -> None:
        self._unmap(area, area.start, area.end)
        for frame in area.frames.values():
            self._frames.give(frame, area.step // PAGE)
        area.frames.clear()

    def _unmap(self, area: Area, first: int, last: int) -> None:
        """Clear what is present, then let everyone forget it."""
        if self.table.clear(first, last):
            self._tell(first, last - first)

    def _tell(self, addr: int, size: int) -> None:
        for told in tuple(self.on_invalidate):
            told(addr, size)

    # -- faults ------------------------------------------------------------------------------------------------------

    def fault(self, addr: int, *, write: bool) -> bool:
        """Bring in the page of ``addr``; False when that is not the process's, or not to be written."""
        return self._page(addr, write=write) is not None

    def _page(self, addr: int, *, write: bool) -> tuple[int, int] | None:
        """Where the page of ``addr`` is now, and its bytes; None as :meth:`fault`."""
        area = self.area(addr)
        if area is None or (write and not area.writable):
            return None
        page, step = addr & ~(area.step - 1), area.step
        leaf = self.table.leaf_at(page)
        if leaf & PRESENT:
            return leaf & ADDRESS, step
        self.faults += 1
        table = self.table.take_out(page, area.level) if area.level > 1 else None
        if table is not None:
            self._tell(page, step)
            self.table.give(table, area.level - 1)
        frame = self._frame(area, page)
        self.table.map(page, frame, step, READ | (WRITE if area.writable else 0), level=area.level)
        return frame, step

    def _frame(self, area: Area, page: int) -> int:
        if area.file is not None:
            return area.file.page(area.offset + page - area.start)
        if page not in area.frames:
            area.frames[page] = frame = self._frames.take(area.step // PAGE)
            data = area.swap.pop(page, b"")
            for offset in range(0, len(data), CHUNK):
                self._cpu.write_memory(frame + offset, data[offset : offset + CHUNK])
        return area.frames[page]

    # -- what the process does ---------------------------------------------------------------------------------------

    def _spans(self, addr: int, size: int, *, write: bool) -> Iterator[tuple[int, int]]:
        """(guest-physical address, bytes) of each piece; pages come in.

        :raise OSError: EFAULT.
        """
        end = addr + size
        while addr < end:
            found = self._page(addr, write=write)
            if found is None:
                raise OSError(errno.EFAULT, f"{'write' if write else 'read'} at {addr:#x}")
            frame, step = found
            within = addr & step - 1
            piece = min(end - addr, step - within, CHUNK)
            yield frame + within, piece
            addr += piece

    def read(self, addr: int, size: int) -> bytes:
        """:raise OSError: EFAULT."""
        return b"".join(self._cpu.read_memory(gpa, piece) for gpa, piece in self._spans(addr, size, write=False))

    def write(self, addr: int, data: bytes) -> None:
        """:raise OSError: EFAULT; what comes before that is written."""
        done = 0
        for gpa, piece in self._spans(addr, len(data), write=True):
            self._cpu.write_memory(gpa, data[done : done + piece])
            done += piece

    def _chunks(self, gpa: int, size: int) -> Iterator[bytes]:
        for offset in range(0, size, CHUNK):
            yield self._cpu.read_memory(gpa + offset, min(CHUNK, size - offset))

    def fork(self) -> Mm:
        """A copy; what is a file's stays shared."""
        child = Mm(self._cpu, self._frames, self._kernel)
        child._next = self._next
        for area in self.areas:
            copy = Area(area.start, area.end, area.writable, area.level, area.file, area.offset, swap=dict(area.swap))
            child.areas.append(copy)
            for page, frame in area.frames.items():
                copied = copy.frames[page] = self._frames.take(area.step // PAGE)
                for number, data in enumerate(self._chunks(frame, area.step)):
                    self._cpu.write_memory(copied + number * CHUNK, data)
        return child

    def exit(self) -> None:
        """The process ends; nobody uses its tables any more."""
        assert not self.on_invalidate, "nobody follows it any more"
        areas, self.areas = self.areas, []
        for area in areas:
            self._forget(area)
        self.table.close()
