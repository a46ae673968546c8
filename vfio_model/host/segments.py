"""The memory that a device process has mapped, found by host-physical address."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable

from vfio_model.host.hpa import HpaMap, Segment


class Segments:
    """Pairs of a segment's place and its bytes."""

    def __init__(self, items: Iterable[tuple[HpaMap, memoryview]] = ()) -> None:
        self._watchers: list[Callable[[], None]] = []
        self._bases: list[int] = []
        self._items: list[tuple[HpaMap, memoryview]] = []
        for place, view in items:
            self.add(place, view)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def segments(self) -> list[Segment]:
        """What is here, as segments named by their place."""
        return [Segment(f"hpa:{place.base:#x}", len(view), 1 << place.page_shift, place) for place, view in self._items]

    def add(self, place: HpaMap, view: memoryview) -> None:
        """Add a segment; ``view`` is its bytes (format ``B``), of the segment's length."""
        at = bisect_right(self._bases, place.base)
        self._bases.insert(at, place.base)
        self._items.insert(at, (place, view))
        self._changed()

    def remove(self, place: HpaMap) -> None:
        """Forget a segment; harmless when it is not here."""
        for at, (known, _) in enumerate(self._items):
            if known.base == place.base:
                del self._items[at], self._bases[at]
                self._changed()
                return

    def on_change(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` after every change: whoever keeps an answer forgets it then."""
        self._watchers.append(watcher)

    def _changed(self) -> None:
        for watcher in self._watchers:
            watcher()

    def find(self, hpa: int) -> tuple[HpaMap, memoryview, int] | None:
        """The segment that has a byte at ``hpa``, its bytes, and the offset of that byte in them."""
        at = bisect_right(self._bases, hpa) - 1
        if at < 0:
            return None
        place, view = self._items[at]
        offset = place.to_offset(hpa)
        return (place, view, offset) if 0 <= offset < len(view) else None
