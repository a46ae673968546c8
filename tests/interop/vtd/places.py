"""Where programs keep things in a PC's RAM and on its bus.

Two domains have a page table each, over the same few addresses: a few 4 KiB pages, places for leaves of 2 MiB and
1 GiB, and a page high up in 48 bits. Levels: Intel Virtualization Technology for Directed I/O, "Second-Stage
Translation" and "First-Stage Translation" (3.6, 3.7).
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.ranges import Range

RAM_SIZE = 256 << 20
EDU_SLOT, TESTDEV_SLOT = 2, 3
EDU_BAR, TESTDEV_BAR = 0xE000_0000, 0xE010_0000
UNIT = 0xFED9_0000
PAGE = 4096

ROOTS = (0x10_0000, 0x10_1000)
"""Two root tables."""
CONTEXTS = 0x10_2000
"""Of bus 0; two pages in scalable mode."""
CONTEXTS_BELOW = 0x10_8000
"""Of further buses, two pages each."""
PASID_DIRECTORY, PASID_TABLE = 0x10_4000, 0x10_5000
QUEUE = 0x10_6000
STATUS = 0x11_0000
"""Where wait descriptors store."""
REMAPPING = 0x11_2000
"""Interrupt remapping table, 256 entries."""
TABLES = Range.sized(0x20_0000, 0x20_0000)
DATA = Range.sized(0x100_0000, 0x40_0000)
"""The pages that leaves name; compared whole at the end of a program."""
PAGES = tuple(range(DATA.start, DATA.start + 24 * PAGE, PAGE))
LARGE = (0x120_0000, 0x100_0000)
"""Pages of 2 MiB."""
OUTSIDE = RAM_SIZE + (16 << 20)
"""Nothing is there."""
HIGH = 0x7F12_3456_7000


@dataclass(frozen=True)
class Place:
    """An entry of a page table: at ``gpa``, of ``level`` (1: a 4 KiB leaf); ``iova`` is the first address behind it.
    ``below``: the table that it leads to, if it does."""

    gpa: int
    level: int
    iova: int
    below: int = 0


@dataclass(frozen=True)
class Domain:
    """A domain of programs: its number and the tables of its page table."""

    did: int
    base: int

    @property
    def root(self) -> int:
        """The table of level 4."""
        return self.base

    @property
    def root3(self) -> int:
        """The table of level 3 for low addresses: what a 39-bit domain begins with."""
        return self.base + 0x1000

    @property
    def inner(self) -> tuple[Place, ...]:
        """Entries that lead to tables, from the top."""
        at, rest = self.base, HIGH
        return (
            Place(at, 4, 0, at + 0x1000),
            Place(at + (rest >> 39 & 511) * 8, 4, rest, at + 0x2000),
            Place(at + 0x1000, 3, 0, at + 0x3000),
            Place(at + 0x1000 + 8, 3, 1 << 30, at + 0x4000),
            Place(at + 0x2000 + (rest >> 30 & 511) * 8, 3, rest, at + 0x5000),
            Place(at + 0x3000, 2, 0, at + 0x6000),
            Place(at + 0x3000 + 8, 2, 2 << 20, at + 0x7000),
            Place(at + 0x4000, 2, 1 << 30, at + 0x8000),
            Place(at + 0x5000 + (rest >> 21 & 511) * 8, 2, rest, at + 0x9000),
        )

    @property
    def leaves(self) -> tuple[Place, ...]:
        """Places for 4 KiB leaves."""
        low = [Place(self.base + 0x6000 + n * 8, 1, n * PAGE) for n in range(6)]
        second = [Place(self.base + 0x7000 + n * 8, 1, (2 << 20) + n * PAGE) for n in (0, 1, 511)]
        far = [Place(self.base + 0x8000 + n * 8, 1, (1 << 30) + n * PAGE) for n in range(2)]
        return (*low, *second, *far, Place(self.base + 0x9000 + (HIGH >> 12 & 511) * 8, 1, HIGH))

    @property
    def large(self) -> tuple[Place, ...]:
        """Places for leaves of 2 MiB and 1 GiB."""
        two = [Place(self.base + 0x3000 + n * 8, 2, n << 21) for n in (2, 3)]
        return (*two, Place(self.base + 0x1000 + 2 * 8, 3, 2 << 30))


DOMAINS = (Domain(5, TABLES.start), Domain(6, TABLES.start + 0x10_0000))
PASID_DID = 7
"""The domain number of the entry of RID_PASID."""
