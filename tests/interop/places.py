"""Where programs keep things in the machine's RAM and on its bus.

The mailbox and its arguments lie below 16 MiB; the pages that TCEs name lie in :data:`POOL`, which is compared whole
at the end of a run.
"""

from __future__ import annotations

from vfio_model.iommu.spapr.regs import PCI_MEM32_BUS, pci_mem32_window
from vfio_model.ranges import Range

ARENA = 0x10_0000
SLOT = 0x4000
"""Bytes of arguments for each call of a batch: an unaligned TCE list, or an RTAS buffer."""
BATCH = 64

EDU_BAR, TESTDEV_BAR = PCI_MEM32_BUS, PCI_MEM32_BUS + 0x10_0000
"""Bus addresses of BAR 0, on each bus."""

POOL = Range.sized(0x100_0000, 0x300_0000)


def _spread(start: int, shift: int, count: int) -> tuple[int, ...]:
    return tuple(start + (i << shift) for i in range(count))


PAGES: dict[int, tuple[int, ...]] = {
    12: _spread(0x100_0000, 12, 64),
    16: _spread(0x110_0000, 16, 16),
    21: _spread(0x120_0000, 21, 6),
    24: _spread(0x200_0000, 24, 2),
}
"""Pages of the pool by page shift."""


def bar_gpa(phb: int, bar: int) -> int:
    """Where the CPU sees bus address ``bar`` of the 32-bit window of bridge ``phb``."""
    return pci_mem32_window(phb) + bar - PCI_MEM32_BUS
