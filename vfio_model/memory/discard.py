"""RAM of which parts may be absent (QEMU's ``RamDiscardManager``): memory that was unplugged through virtio-mem.

A RAM region with a manager is either *populated* or *discarded*, granule by granule; it starts discarded. Nothing
may be mapped for a device where it is discarded, so whoever maps it listens::

    populate:  listeners are asked in order, each may veto ──► those already told get a discard, nothing has changed
    discard:   listeners are told; nobody can refuse

A part is a :class:`~vfio_model.ranges.Range` of byte offsets into the *region*, both inclusive. A listener hears of
its own section only, and its calls are cropped to it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import Protocol

from vfio_model.ranges import Range, is_aligned


class RegionPart(Protocol):
    """Where a section lies in its region, in bytes; a ``MemoryRegionSection`` is one."""

    @property
    def offset_within_region(self) -> int:
        """First byte."""

    @property
    def size(self) -> int:
        """Length in bytes."""


class RamDiscardListener:
    """Override both. ``double_discard``: a discard may cover what is discarded already, so that leaving takes one
    call for the whole section.
    """

    double_discard = False

    def notify_populate(self, part: Range) -> None:
        """``part`` is about to be populated.

        :raise OSError: to veto; this listener has then kept nothing of ``part``.
        """

    def notify_discard(self, part: Range) -> None:
        """``part`` is about to be discarded; cannot fail."""


def _part_of(section: RegionPart) -> Range:
    return Range.sized(section.offset_within_region, section.size)


class RamDiscardManager:
    """What is populated of ``size`` bytes of RAM, in granules of ``granularity`` bytes.

    :raise ValueError: when ``granularity`` is not a power of two or ``size`` is not a multiple of it.
    """

    def __init__(self, size: int, granularity: int) -> None:
        if granularity <= 0 or not is_aligned(granularity, granularity):
            raise ValueError(f"granularity {granularity:#x} is not a power of two")
        if size <= 0 or not is_aligned(size, granularity):
            raise ValueError(f"{size:#x} bytes are not whole granules of {granularity:#x}")
        self.size = size
        self._granularity = granularity
        self._state = bytearray(size // granularity)
        """1 for a populated granule."""
        self._listeners: list[tuple[RamDiscardListener, Range]] = []
        self.on_discarded: Callable[[Range], None] = lambda _part: None
        """Told after a discard; belongs to the region that the manager is attached to."""

    def get_min_granularity(self) -> int:
        """Bytes; every part begins and ends at a multiple of it, unless a section cuts it."""
        return self._granularity

    def is_populated(self, section: RegionPart) -> bool:
        """Whether all of ``section`` is populated; nothing outside the RAM is."""
        return self.populated_length(section.offset_within_region) >= section.size

    def populated_length(self, offset: int) -> int:
        """How many bytes from ``offset`` on are populated without a gap; 0 when that byte is discarded."""
        if not 0 <= offset < self.size:
            return 0
        gap = self._state.find(0, offset // self._granularity)
        return max(0, (self.size if gap < 0 else gap * self._granularity) - offset)

    def replay_populated(self, section: RegionPart, fn: Callable[[Range], None]) -> None:
        """Call ``fn`` for each populated part of ``section``, ascending; what it raises ends the replay."""
        for part in self._parts(_part_of(section), 1):
            fn(part)

    def replay_discarded(self, section: RegionPart, fn: Callable[[Range], None]) -> None:
        """Call ``fn`` for each discarded part of ``section``, ascending; what it raises ends the replay."""
        for part in self._parts(_part_of(section), 0):
            fn(part)

    def register_listener(self, listener: RamDiscardListener, section: RegionPart) -> None:
        """Tell ``listener`` of what is populated in ``section``, now and from now on.

        :raise OSError: its veto; it has got a discard for what it had accepted and is not registered.
        """
        assert all(one is not listener for one, _ in self._listeners), "a discard listener registers once"
        scope = _part_of(section)
        self._ask([(listener, part) for part in self._parts(scope, 1)])
        self._listeners.append((listener, scope))

    def unregister_listener(self, listener: RamDiscardListener) -> None:
        """Discard what ``listener`` was told of, as far as it is concerned, and forget it."""
        scope = next(scope for one, scope in self._listeners if one is listener)
        self._listeners = [(one, scope) for one, scope in self._listeners if one is not listener]
        for part in [scope] if listener.double_discard else list(self._parts(scope, 1)):
            listener.notify_discard(part)

    def populate(self, offset: int, size: int) -> None:
        """Populate whole granules; those that are populated already stay as they are, unannounced.

        :raise OSError: EINVAL for what is not whole granules of this RAM; a listener's veto, and nothing has changed.
        """
        wanted = self._granules(offset, size)
        fresh = list(self._parts(wanted, 0))
        self._ask([(one, met) for one, scope in self._listeners for part in fresh if (met := scope.intersect(part))])
        self._set(wanted, 1)

    def discard(self, offset: int, size: int) -> None:
        """Discard whole granules; those that are discarded already stay as they are, unannounced.

        :raise OSError: EINVAL for what is not whole granules of this RAM.
        """
        wanted = self._granules(offset, size)
        going = list(self._parts(wanted, 1))
        for listener, scope in self._listeners:
            for part in going:
                if met := scope.intersect(part):
                    listener.notify_discard(met)
        self._set(wanted, 0)
        for part in going:
            self.on_discarded(part)

    @staticmethod
    def _ask(calls: list[tuple[RamDiscardListener, Range]]) -> None:
        told = 0
        try:
            for listener, part in calls:
                listener.notify_populate(part)
                told += 1
        except OSError:
            for listener, part in calls[:told]:
                listener.notify_discard(part)
            raise

    def _granules(self, offset: int, size: int) -> Range:
        if size <= 0 or offset < 0 or offset + size > self.size or not is_aligned(offset | size, self._granularity):
            raise OSError(errno.EINVAL, f"{offset:#x}, {size:#x} bytes: not whole granules of this RAM")
        return Range.sized(offset, size)

    def _set(self, part: Range, state: int) -> None:
        first, count = part.start // self._granularity, part.size // self._granularity
        self._state[first : first + count] = bytes([state]) * count

    def _parts(self, scope: Range, state: int) -> Iterator[Range]:
        """The longest runs of granules in ``state``, cropped to ``scope``."""
        at, end, granularity = scope.start, min(scope.last + 1, self.size), self._granularity
        while at < end:
            granule = self._state.find(state, at // granularity)
            if granule < 0:
                return
            start = max(at, granule * granularity)
            behind = self._state.find(1 - state, granule)
            at = min(end, self.size if behind < 0 else behind * granularity)
            if start < at:
                yield Range(start, at - 1)
