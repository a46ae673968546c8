"""Page tables of a guest's processes and of its kernel, in guest memory (Intel 64 architecture, four levels)."""

from __future__ import annotations

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import Frames
from vfio_model.guest_drivers.vtd_tables import (
    ADDRESS,
    ENTRIES,
    FIRST_WRITE,
    LARGE,
    PAGE,
    PRESENT,
    PageTable,
    Stage,
    shift_of,
)
from vfio_model.ranges import align_up

LEVELS = 4
VMALLOC_BASE = 0xFFFF_C900_0000_0000
_KERNEL_HALF = ENTRIES // 2


class ProcessTable(PageTable):
    """A process's, whose kernel knows where its own tables are: a leaf of 4 KiB is one access away."""

    def __init__(self, cpu: Cpu, frames: Frames) -> None:
        super().__init__(cpu, frames, Stage.FIRST, LEVELS)
        self._frames = frames
        self._last: dict[int, int] = {}
        """Tables of the last level, by the number of their 2 MiB."""

    def slot(self, iova: int, level: int = 1) -> int:
        """See :class:`PageTable`."""
        number = iova >> shift_of(2)
        if level > 1:
            return super().slot(iova, level)
        if number not in self._last:
            self._last[number] = super().slot(number << shift_of(2))
        return self._last[number] + self._index(iova, 1) * 8

    def leaf_at(self, iova: int) -> int:
        """The entry that maps ``iova``, 0 where nothing is mapped."""
        table = self._last.get(iova >> shift_of(2))
        if table is not None:
            return self.word(table + self._index(iova, 1) * 8)
        found = self.find(iova)
        return 0 if found is None else self.word(found[0])

    def clear(self, first: int, last: int) -> bool:
        """Nothing is mapped from ``first`` to ``last`` (exclusive) any more; whether something was. What is of 4 KiB is
        read and cleared by the table.
        """
        at, were = first, False
        while at < last:
            number = at >> shift_of(2)
            end = min(last, (number + 1) << shift_of(2))
            table = self._last.get(number)
            if table is None:
                found = self.find(at)
                step = PAGE if found is None else 1 << shift_of(found[1])
                if found is not None:
                    self._cpu.mmio_write(found[0], 8, 0)
                    were = True
                at = (at & ~(step - 1)) + step if found is not None else end
                continue
            entries, size = table + self._index(at, 1) * 8, (end - at) // PAGE * 8
            if any(self._cpu.read_memory(entries, size)):
                self._cpu.write_memory(entries, bytes(size))
                were = True
            at = end
        return were

    def take_out(self, iova: int, level: int) -> int | None:
        """The table, with nothing in it, that was where a page of ``level`` is to be."""
        at = self.slot(iova, level)
        entry = self.word(at)
        if not entry & PRESENT or entry & LARGE:
            return None
        self._cpu.mmio_write(at, 8, 0)
        first, count = iova >> shift_of(2), 1 << shift_of(level) - shift_of(2)
        self._last = {number: table for number, table in self._last.items() if not first <= number < first + count}
        return entry & ADDRESS

    def give(self, table: int, level: int) -> None:
        """``table`` and what is below, which nobody uses any more; its entries are of ``level``."""
        self._give(table, level, ENTRIES)

    def close(self) -> None:
        """Nothing is mapped, and nobody uses it any more."""
        self._last.clear()
        self._give(self.root, LEVELS, _KERNEL_HALF)

    def _give(self, table: int, level: int, entries: int) -> None:
        if level > 1:
            words = memoryview(self._cpu.read_memory(table, entries * 8)).cast("Q")
            for word in words:
                if word & PRESENT and not word & LARGE:
                    self._give(word & ADDRESS, level - 1, ENTRIES)
        self._frames.give(table)


class KernelSpace:
    """The upper half, which every process has and none may touch."""

    def __init__(self, cpu: Cpu, frames: Frames) -> None:
        self._cpu, self._frames = cpu, frames
        self.table = PageTable(cpu, frames, Stage.FIRST, LEVELS)
        self._next = VMALLOC_BASE
        self.table.slot(VMALLOC_BASE)

    def vmalloc(self, data: bytes) -> int:
        """Pages of the kernel's, mapped for it alone, that hold ``data``; their address."""
        at = self._next
        for offset in range(0, len(data), PAGE):
            frame = self._frames.take()
            self._cpu.write_memory(frame, data[offset : offset + PAGE])
            self._cpu.mmio_write(self.table.slot(at + offset), 8, frame | PRESENT | FIRST_WRITE)
        self._next = at + align_up(len(data), PAGE) + PAGE
        return at

    def vfree(self, at: int, size: int) -> None:
        """The opposite."""
        for address in range(at, at + size, PAGE):
            slot = self.table.slot(address)
            self._frames.give(self.table.word(slot) & ADDRESS)
            self._cpu.mmio_write(slot, 8, 0)

    def share(self, root: int) -> None:
        """Show the upper half in the table whose root is ``root``."""
        half = _KERNEL_HALF * 8
        self._cpu.write_memory(root + half, self._cpu.read_memory(self.table.root + half, half))
