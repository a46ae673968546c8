"""Where the guest keeps its tables: 64-bit little-endian words of system memory, read in place when they are RAM."""

from __future__ import annotations

import sys

from vfio_model.memory.access import ram_view
from vfio_model.memory.flatview import FlatView
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.space import Space

_IN_PLACE = sys.byteorder == "little"
_NOTHING = memoryview(b"").cast("Q")


class TableMemory:
    """Table entries in ``system``. Addresses are multiples of 8."""

    def __init__(self, system: Space) -> None:
        self.system = system
        self._view: FlatView | None = None
        self._stretches: list[tuple[int, int, memoryview]] = []
        """RAM by start, size in bytes and words; the one used last is in front."""
        self._start = self._size = 0
        self._words = _NOTHING

    def word(self, addr: int) -> int | None:
        """The word at ``addr``; None: nothing decodes there."""
        if self.system.view is self._view:
            at = addr - self._start
            if 0 <= at < self._size:
                value: int = self._words[at >> 3]
                return value
        return self._elsewhere(addr)

    def window(self) -> tuple[int, int, memoryview]:
        """The stretch of RAM that was used last: its start, its size in bytes (0: none), its words."""
        if self.system.view is not self._view:
            self._look()
        return self._start, self._size, self._words

    def words(self, addr: int, count: int) -> memoryview | None:
        """``count`` words from ``addr`` on, in place where they are RAM; None: not all of them decode."""
        self.word(addr)
        at = addr - self._start
        if at >= 0 and at + count * 8 <= self._size:
            return self._words[at >> 3 : (at >> 3) + count]
        data = bytearray(count * 8)
        if self.system.read(addr, data):
            return None
        return memoryview(data).cast("Q") if _IN_PLACE else self._swapped(data)

    def store(self, addr: int, value: int) -> bool:
        """Write one word; False: nothing decodes there."""
        return not self.system.write(addr, value.to_bytes(8, "little"))

    def ram(self) -> tuple[int, memoryview]:
        """The largest stretch of RAM: address of its first byte, and its words; empty where there is none that can be
        read in place."""
        self._look()
        largest = max(self._stretches, key=lambda one: one[1], default=(0, 0, _NOTHING))
        return largest[0], largest[2]

    @staticmethod
    def _swapped(data: bytearray) -> memoryview:
        words = memoryview(bytearray(len(data))).cast("Q")
        for i in range(len(words)):
            words[i] = int.from_bytes(data[i * 8 : i * 8 + 8], "little")
        return words

    def _look(self) -> None:
        """Find the stretches of RAM anew when the view has changed."""
        view = self.system.view
        if view is self._view:
            return
        self._view = view
        self._start, self._size, self._words = 0, 0, _NOTHING
        self._stretches = [
            (r.start, r.size, ram_view(r).cast("Q"))
            for r in view.ranges
            if _IN_PLACE and isinstance(r.region, RAMRegion) and not r.region.ram_device and not (r.start | r.size) % 8
        ]

    def _elsewhere(self, addr: int) -> int | None:
        self._look()
        for start, size, words in self._stretches:
            if 0 <= addr - start < size:
                self._start, self._size, self._words = start, size, words
                value: int = words[(addr - start) >> 3]
                return value
        data = bytearray(8)
        return None if self.system.read(addr, data) else int.from_bytes(data, "little")
