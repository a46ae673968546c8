"""Replays QEMU's trace lines of a PC with ``intel-iommu`` on a VT-d unit, and compares the lines that it writes.

A log holds registers, descriptors and what the unit found in guest memory (context entries, leaf entries), but no write
of the guest to its tables. So each *stimulus* of the log (a register access, a translation, an interrupt request, a
reset) is done again, with guest memory holding what the log says was found there **and nothing else**: a leaf entry is
in its table only while the line that read it is replayed. A translation that the log calls a hit can then only come out
of the unit's own IOTLB, and one that it calls a fill only if nothing is cached. What the unit writes to its trace until
the next stimulus must be what the log has there, line by line.

Formats: QEMU's ``hw/i386/trace-events`` (:data:`vfio_model.trace_text.VTD`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from vfio_model.guest_drivers.trace_compare import Mismatch, ReplayReport
from vfio_model.guest_drivers.trace_events import Malformed
from vfio_model.trace_text import fields_of
from vfio_model.trace_text import line as text_of

TRANSLATED: Final = "vtd_dmar_translate"
_FILL, _HIT, _FOUND, _READ_CONTEXT = (
    "vtd_iotlb_page_update",
    "vtd_iotlb_page_hit",
    "vtd_iotlb_cc_hit",
    "vtd_iotlb_cc_update",
)
_SWITCH = "vtd_switch_address_space"
_STIMULI: Final = frozenset(
    ("vtd_reg_read", "vtd_reg_write", "vtd_ir_remap_msi_req", "vtd_reset_exit", _FILL, _HIT, _FOUND, _READ_CONTEXT)
)
_PAGE: Final = 0xFFF
_PRESENT: Final = 1
_RW: Final = 3
_DESCRIPTOR: Final = 16
_ENTRY: Final = 8
_INDEX: Final = 0x1FF
_LEVEL_BITS: Final = 9
_MIN_LEVELS: Final = 2


class LogLine(NamedTuple):
    """A line of an event that is understood."""

    line: int
    name: str
    fields: dict[str, int]
    text: str

    @property
    def sid(self) -> int:
        """The requester that it speaks of."""
        fields = self.fields
        if "sid" in fields:
            return fields["sid"]
        devfn = fields["devfn"] if "devfn" in fields else fields["slot"] << 3 | fields["function"]
        return fields["bus"] << 8 | devfn


class Unit(Protocol):
    """What is replayed on: a VT-d unit with guest memory of its own."""

    scratch: int
    """From this guest-physical address on nothing of the recorded guest lies: tables are made there."""

    def reset(self) -> None:
        """Of the machine."""

    def read(self, offset: int, size: int) -> None:
        """A register."""

    def write(self, offset: int, size: int, value: int) -> None:
        """A register."""

    def store(self, gpa: int, data: bytes) -> None:
        """Guest memory."""

    def add_function(self, sid: int) -> None:
        """There is a function ``sid``."""

    def translate(self, sid: int, iova: int, is_write: bool) -> None:
        """A function's DMA."""

    def interrupt(self, address: int, data: int) -> None:
        """An interrupt request of a function or an I/O APIC."""

    def lines(self) -> list[str]:
        """What the unit wrote to its trace since the last call, as QEMU prints it."""


@dataclass(slots=True)
class _Context:
    """A context entry as the log shows it."""

    low: int
    high: int

    @property
    def levels(self) -> int:
        """Of its page table."""
        return _MIN_LEVELS + (self.high & 7)


class VtdReplayer:
    """Feed it all lines at once."""

    def __init__(self, unit: Unit) -> None:
        self._unit, self.report = unit, ReplayReport()
        self._free = unit.scratch
        self._root = self._queue = 0
        self._contexts: dict[int, _Context] = {}
        """By requester."""
        self._tables: dict[tuple[int, int], int] = {}
        """Table below (table, index)."""

    def replay(self, log: Sequence[LogLine]) -> ReplayReport:
        """All of ``log``."""
        functions = {line.sid for line in log if {"sid", "devfn", "slot"} & set(line.fields)}
        for sid in sorted(functions):
            self._unit.add_function(sid)
        self._unit.lines()
        at = 0
        while at < len(log):
            end = self._end(log, at)
            self._step(log[at:end])
            at = end
        return self.report

    def _end(self, log: Sequence[LogLine], at: int) -> int:
        """Where the consequences of the stimulus at ``at`` end."""
        end = at + 1
        if log[at].name in (_FOUND, _READ_CONTEXT) and end < len(log) and log[end].name in (_FILL, _HIT):
            end += 1
        while end < len(log) and log[end].name not in _STIMULI:
            end += 1
        return end

    def _step(self, lines: Sequence[LogLine]) -> None:
        first = lines[0]
        fields = first.fields
        self.report.events += len(lines)
        undo: list[int] = []
        match first.name:
            case "vtd_reset_exit":
                self._unit.reset()
            case "vtd_reg_read":
                self._unit.read(fields["addr"], fields["size"])
            case "vtd_reg_write":
                self._look_ahead(lines)
                self._unit.write(fields["addr"], fields["size"], fields["value"])
            case "vtd_ir_remap_msi_req":
                self._unit.interrupt(fields["addr"], fields["data"])
            case name if name in _STIMULI:
                undo = self._translate(lines)
            case _:  # before the first stimulus: the machine is being made
                return
        for gpa in undo:
            self._unit.store(gpa, bytes(_ENTRY))
        self._compare(lines, self._unit.lines())

    def _look_ahead(self, lines: Sequence[LogLine]) -> None:
        """Put the descriptors that a register write makes the unit fetch where it will look for them."""
        head = 0
        for line in lines:
            match line.name:
                case "vtd_inv_qi_setup":
                    self._queue = line.fields["addr"]
                case "vtd_reg_dmar_root":
                    self._root = line.fields["addr"] & ~_PAGE
                case "vtd_inv_qi_head":
                    head = line.fields["head"]
                case "vtd_inv_desc":
                    entry = _u64(line.fields["low"]) + _u64(line.fields["high"])
                    self._unit.store(self._queue + head * _DESCRIPTOR, entry)

    # -- translations ------------------------------------------------------------------------------------------------

    def _translate(self, lines: Sequence[LogLine]) -> list[int]:
        """One DMA; the guest-physical addresses of entries that only this line is to find."""
        by_name = {line.name: line for line in reversed(lines)}
        undo: list[int] = []
        context = by_name.get(_READ_CONTEXT) or by_name.get(_FOUND)
        if context is not None:
            self._contexts[context.sid] = _Context(context.fields["low"], context.fields["high"])
        if _READ_CONTEXT in by_name:
            undo += self._put_context(by_name[_READ_CONTEXT])
        page = by_name.get(_FILL) or by_name.get(_HIT)
        if page is None:
            self.report.unchecked += 1
            return undo
        answer = by_name.get(TRANSLATED)
        mask = _PAGE if answer is None else answer.fields["mask"]
        if page.name == _FILL:
            undo += self._put_leaf(page, mask)
        perm = page.fields["slpte"] & _RW
        self._unit.translate(page.sid, page.fields["iova"], perm == _RW - 1)
        self.report.translations_checked += answer is not None
        return undo

    def _put_context(self, line: LogLine) -> list[int]:
        table = self._below(self._root, line.fields["bus"], 2 * _ENTRY, _PRESENT)
        at = table + line.fields["devfn"] * 2 * _ENTRY
        self._unit.store(at, _u64(line.fields["low"]) + _u64(line.fields["high"]))
        return [at, at + _ENTRY]

    def _put_leaf(self, line: LogLine, mask: int) -> list[int]:
        context = self._contexts.get(line.sid)
        if context is None:
            return []
        table, level = context.low & ~_PAGE, context.levels
        leaf_level = (mask.bit_length() - 12) // _LEVEL_BITS + 1
        while level > leaf_level:
            table = self._below(table, self._index(line, level), _ENTRY, _RW)
            level -= 1
        at = table + self._index(line, leaf_level) * _ENTRY
        self._unit.store(at, _u64(line.fields["slpte"]))
        return [at]

    def _index(self, line: LogLine, level: int) -> int:
        return line.fields["iova"] >> 12 + _LEVEL_BITS * (level - 1) & _INDEX

    def _below(self, table: int, index: int, size: int, flags: int) -> int:
        """The table that entry ``index`` of ``table`` leads to, made when there is none."""
        known = self._tables.get((table, index))
        if known is None:
            known, self._free = self._free, self._free + _PAGE + 1
            self._tables[table, index] = known
            self._unit.store(table + index * size, _u64(known | flags))
        return known

    # -- comparison --------------------------------------------------------------------------------------------------

    def _compare(self, logged: Sequence[LogLine], ours: list[str]) -> None:
        """The first difference; the order in which spaces are switched means nothing."""
        theirs = _ordered([(line.line, line.text) for line in logged])
        mine = [text for _, text in _ordered([(0, text) for text in ours])]
        for index, (number, text) in enumerate(theirs):
            expected = mine[index] if index < len(mine) else "nothing"
            if text != expected:
                self.report.mismatches.append(Mismatch(number, text.split(" ", 1)[0], expected, text))
                return
        if len(mine) > len(theirs):
            last, _ = theirs[-1]
            self.report.mismatches.append(Mismatch(last, logged[-1].name, mine[len(theirs)], "nothing more"))


def _ordered(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    runs: dict[int, list[tuple[int, str]]] = defaultdict(list)
    run = 0
    for index, line in enumerate(lines):
        if not line[1].startswith(_SWITCH) or not index or not lines[index - 1][1].startswith(_SWITCH):
            run += 1
        runs[run].append(line)
    return [line for each in runs.values() for line in sorted(each, key=lambda one: one[1])]


def _u64(value: int) -> bytes:
    return value.to_bytes(_ENTRY, "little")


def parse(number: int, name: str, rest: str) -> LogLine | Malformed:
    """Line ``number``: the event ``name``, one of :data:`~vfio_model.trace_text.VTD`, with ``rest`` behind it."""
    fields = fields_of(name, rest)
    if fields is None:
        return Malformed(f"the fields of {name} do not have their form")
    numbers = {field: value for field, value in fields.items() if isinstance(value, int)}
    return LogLine(number, name, numbers, text_of(name, fields).strip())
