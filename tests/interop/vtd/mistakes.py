"""Each mistake that a driver can make in its tables, one at a time: what is wrong, and the reason of the fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from tests.interop.vtd.operations import Operation, edu_dma, edu_message, entry
from tests.interop.vtd.places import (
    DOMAINS,
    OUTSIDE,
    PAGES,
    PASID_DIRECTORY,
    PASID_TABLE,
    REMAPPING,
    ROOTS,
)
from tests.interop.vtd.topology import Topology

_INTERRUPTS = 0xFEE0_0000
_HIGH_BIT = 1 << 51
"""Of an address: more than the unit has."""


class Tables(Protocol):
    """What is right, and where."""

    @property
    def topology(self) -> Topology:
        """Of the machine."""

    @property
    def scalable(self) -> bool:
        """The mode of the root table."""

    @property
    def first_stage(self) -> bool:
        """Whether tables are those of the first stage."""

    def good_root(self, bus: int) -> tuple[int, int]:
        """A root entry."""

    def context_at(self, sid: int) -> int:
        """Where a context entry is."""

    def good_context(self, index: int) -> tuple[int, ...]:
        """That of a domain."""

    def good_pasid(self, index: int) -> tuple[int, ...]:
        """That of a domain."""


@dataclass(frozen=True)
class Mistake:
    """``at`` is ``wrong`` and then ``right`` again; in between edu writes or reads ``iova``, or sends message
    ``message`` (an index)."""

    name: str
    reason: int
    at: int
    wrong: tuple[int, ...]
    right: tuple[int, ...]
    iova: int = 0
    write: bool = True
    message: int | None = None

    def operation(self, topology: Topology) -> Operation:
        """What meets it."""
        if self.message is None:
            return edu_dma(self.iova | 8, 64, to_ram=self.write)
        return edu_message(topology.edu, _INTERRUPTS | 1 << 4 | self.message << 5, 0)


def mistakes(tables: Tables, *, remapping: bool) -> Iterator[Mistake]:
    """Those that the mode knows. ``remapping``: of interrupts, whose table has 256 entries."""
    yield from _above(tables)
    if tables.scalable:
        yield from _pasid(tables)
    yield from _first(tables) if tables.first_stage else _second(tables)
    if remapping:
        yield from _interrupts(tables)


def _above(tables: Tables) -> Iterator[Mistake]:
    sid = tables.topology.edu.sid
    root, (low, high) = ROOTS[0] + (sid >> 8) * 16, tables.good_root(sid >> 8)
    at, context = tables.context_at(sid), tables.good_context(0)
    first, second, *rest = context
    yield Mistake("root absent", 0x1, root, (0, 0), (low, high))
    yield Mistake("root reserved", 0xA, root, (low | 2, high), (low, high))
    yield Mistake("contexts outside", 0x9, root, (OUTSIDE | 1, high), (low, high))
    yield Mistake("context absent", 0x2, at, (first & ~1, second, *rest), context)
    yield Mistake("context reserved", 0xB, at, (first | 1 << 60, second, *rest), context)
    if not tables.scalable:
        yield Mistake("unsupported width", 0x3, at, (first, second | 7), context)


def _pasid(tables: Tables) -> Iterator[Mistake]:
    at, context = tables.context_at(tables.topology.edu.sid), tables.good_context(0)
    pasid = tables.good_pasid(0)
    directory = (PASID_TABLE | 1,)
    yield Mistake("directory outside", 0x50, at, (OUTSIDE | 1, *context[1:]), context)
    yield Mistake("directory absent", 0x51, PASID_DIRECTORY, (0,), directory)
    yield Mistake("PASID table outside", 0x58, PASID_DIRECTORY, (OUTSIDE | 1,), directory)
    yield Mistake("PASID entry absent", 0x59, PASID_TABLE, (pasid[0] & ~1, *pasid[1:]), pasid)
    yield Mistake("PASID entry of no type", 0x5B, PASID_TABLE, (pasid[0] | 7 << 6, *pasid[1:]), pasid)


def _second(tables: Tables) -> Iterator[Mistake]:
    leaf, table, good = DOMAINS[0].leaves[0].gpa, DOMAINS[0].inner[5], PAGES[0]
    below, right = table.below | 3, (good | 3,)
    yield Mistake("beyond the width", 0x4, leaf, right, right, iova=1 << 48)
    yield Mistake("not writable", 0x5, leaf, (good | 1,), right)
    yield Mistake("not readable", 0x6, leaf, (good | 2,), right, write=False)
    yield Mistake("table outside", 0x7, table.gpa, (OUTSIDE | 3,), (below,))
    yield Mistake("leaf reserved", 0xC, leaf, (good | 3 | _HIGH_BIT,), right)


def _first(tables: Tables) -> Iterator[Mistake]:
    leaf, table, good = DOMAINS[0].leaves[0].gpa, DOMAINS[0].inner[5], PAGES[0]
    below, right, pasid = table.below | 7, (good | 7,), tables.good_pasid(0)
    yield Mistake("top outside", 0x73, PASID_TABLE, (*pasid[:2], OUTSIDE, *pasid[3:]), pasid)
    yield Mistake("table outside", 0x70, table.gpa, (OUTSIDE | 7,), (below,))
    yield Mistake("not present", 0x71, leaf, (good | 6,), right)
    yield Mistake("leaf reserved", 0x72, leaf, (good | 7 | _HIGH_BIT,), right)
    yield Mistake("not canonical", 0x80, leaf, right, right, iova=1 << 47)
    yield Mistake("privileged", 0x81, leaf, (good | 3,), right, write=False)
    yield Mistake("not writable", 0x85, leaf, (good | 5,), right)
    yield Mistake("among the interrupts", 0x87, leaf, (_INTERRUPTS | 7,), right)


def _interrupts(tables: Tables) -> Iterator[Mistake]:
    sid = tables.topology.edu.sid
    right = (1 | 0x51 << 16, sid | 1 << 18)
    at = REMAPPING + 16
    yield Mistake("beyond the table", 0x21, at, right, right, message=300)
    yield Mistake("interrupt absent", 0x22, at, (0, 0), right, message=1)
    yield Mistake("interrupt reserved", 0x24, at, (right[0] | 1 << 12, right[1]), right, message=1)
    yield Mistake("another's interrupt", 0x26, at, (right[0], right[1] ^ 0xFF), right, message=1)


def steps(mistake: Mistake, topology: Topology) -> tuple[Operation, Operation, Operation]:
    """The mistake, what meets it, and the repair."""
    wrong = entry(mistake.name, mistake.at, *mistake.wrong)
    return wrong, mistake.operation(topology), entry("repair", mistake.at, *mistake.right)
