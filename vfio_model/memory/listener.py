"""Listeners to the flat view of an address space (QEMU's ``MemoryListener``), and the sections they are told of.

At a commit that changed the space every listener gets ``begin``, a ``region_del`` per vanished section (listeners by
descending priority), ``region_nop`` or ``region_add`` per unchanged or new one (ascending), ``commit``. Registering
replays the existing sections as adds; unregistering takes them away as dels.
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
