"""Listeners to the flat view of an address space (QEMU's ``MemoryListener``), and the sections they are told of.

At a commit that changed the space every listener gets ``begin``, a ``region_del`` per vanished section (listeners by
descending priority), ``region_nop`` or ``region_add`` per unchanged or new one (ascending), ``commit``. Registering
replays the existing sections as adds; unregistering takes them away as dels.

The ``log_`` callbacks follow dirty tracking: of one section (``log_start``, ``log_stop``), of everything
(``log_global_start`` to ``log_global_stop``), and the collection of what is dirty in between.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.space import Space
from vfio_model.ranges import Range


@dataclass(frozen=True, slots=True)
class MemoryRegionSection:
    """``size`` bytes (up to 2**64) of a terminating region, as one address space shows them."""

    address_space: Space
    mr: MemoryRegion
    offset_within_region: int
    offset_within_address_space: int
    size: int
    readonly: bool = False

    @property
    def range(self) -> Range:
        """The addresses in the address space, inclusive."""
        return Range.sized(self.offset_within_address_space, self.size)


class MemoryListener:
    """Override what you want to hear. ``priority``: adds go ascending, dels descending."""

    priority = 0

    def begin(self) -> None:
        """A commit that touches the address space starts."""

    def region_add(self, section: MemoryRegionSection) -> None:
        """``section`` appeared."""

    def region_del(self, section: MemoryRegionSection) -> None:
        """``section`` is going; it still translates during the call."""

    def region_nop(self, section: MemoryRegionSection) -> None:
        """``section`` stays as it is."""

    def commit(self) -> None:
        """Everything was told."""

    def log_start(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """More clients want to know what is written in ``section``; ``old`` and ``new`` are masks of clients."""

    def log_stop(self, section: MemoryRegionSection, old: int, new: int) -> None:
        """Fewer clients want to know; masks as in :meth:`log_start`."""

    def log_sync(self, section: MemoryRegionSection) -> None:
        """Report what was written in ``section`` since the last time."""

    def log_sync_global(self, last_stage: bool) -> None:
        """Report for every section at once; instead of :meth:`log_sync`. ``last_stage``: nobody writes any more."""

    def log_clear(self, section: MemoryRegionSection) -> None:
        """What was reported of ``section`` was taken: watch it afresh."""

    def log_global_start(self) -> bool:
        """Watch everything from now on, sections still to come included. False when that is impossible: tracking does
        not start then.
        """
        return True

    def log_global_stop(self) -> None:
        """Watching everything ends."""

    def log_global_after_sync(self) -> None:
        """Every listener has reported."""
