"""DMA windows that the host gives a container: QEMU's ``VFIOHostDMAWindow``.

A window is ``min_iova``..``max_iova`` (inclusive) with a bitmap of IOMMU page sizes. Windows of one container never
overlap. A lookup succeeds only when one window holds the whole range.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass

from vfio_model.ranges import Range


@dataclass(frozen=True, slots=True)
class VFIOHostDMAWindow:
    """One window; ``iova_pgsizes`` has bit *n* set when pages of 2**n bytes can be mapped."""

    min_iova: int
    max_iova: int
    iova_pgsizes: int

    @property
    def range(self) -> Range:
        """Both ends inclusive."""
        return Range(self.min_iova, self.max_iova)


class HostWindows:
    """The list of windows of one container."""

    def __init__(self) -> None:
        self._windows: list[VFIOHostDMAWindow] = []

    def __iter__(self) -> Iterator[VFIOHostDMAWindow]:
        return iter(tuple(self._windows))

    def __len__(self) -> int:
        return len(self._windows)

    def overlapping(self, wanted: Range) -> VFIOHostDMAWindow | None:
        """The first window that shares a byte with ``wanted``, or None."""
        return next((window for window in self._windows if window.range.overlaps(wanted)), None)

    def add(self, window: VFIOHostDMAWindow) -> None:
        """Add ``window``.

        :raise OSError: EINVAL when it overlaps one that is there.
        """
        if other := self.overlapping(window.range):
            raise OSError(errno.EINVAL, f"host window {window.range} overlaps {other.range}")
        self._windows.append(window)

    def remove(self, wanted: Range) -> VFIOHostDMAWindow:
        """Remove the window that is exactly ``wanted``, both ends.

        :raise OSError: EINVAL when there is none ("Cannot delete missing window").
        """
        for window in self._windows:
            if window.range == wanted:
                self._windows.remove(window)
                return window
        raise OSError(errno.EINVAL, f"cannot delete missing window {wanted}")

    def lookup(self, wanted: Range) -> VFIOHostDMAWindow | None:
        """The window that holds all of ``wanted``, or None."""
        return next((window for window in self._windows if window.range.contains(wanted)), None)
