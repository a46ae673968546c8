"""QEMU's trace lines about sPAPR DMA windows, as records.

The formats are those of QEMU's ``hw/ppc/trace-events``; the log backend may put ``PID@SEC.USEC:`` before each. One
table says which events are understood and what their fields are. A line of any other event is passed over; a line
that bears the name of one of these but not its fields is *malformed*, as is text that does not begin like an event at
all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vfio_model.ranges import U64_MAX


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Base of the records. ``liobn`` is 0 where an event names a PHB instead."""

    liobn: int


@dataclass(frozen=True, slots=True)
class NewTable(TraceEvent):
    """A table was allocated, all zero: a PHB was reset, a window is being created, or a VIO device appeared. ``fd``
    other than -1: it lies in the kernel (KVM), which answers hypercalls without a line in the log."""

    fd: int


@dataclass(frozen=True, slots=True)
class PutTce(TraceEvent):
    """H_PUT_TCE."""

    ioba: int
    tce: int
    ret: int


@dataclass(frozen=True, slots=True)
class GetTce(TraceEvent):
    """H_GET_TCE."""

    ioba: int
    ret: int
    tce: int


@dataclass(frozen=True, slots=True)
class StuffTce(TraceEvent):
    """H_STUFF_TCE. ``ioba_after`` is the bus address *behind* the last entry that was written."""

    ioba_after: int
    value: int
    npages: int
    ret: int


@dataclass(frozen=True, slots=True)
class PutTceIndirect(TraceEvent):
    """H_PUT_TCE_INDIRECT. ``last_index`` is the zero-based index of the last entry written, ``last_tce`` the TCE
    handled last; the rest of the list is not in the log."""

    ioba: int
    tce_list: int
    last_index: int
    last_tce: int
    ret: int


@dataclass(frozen=True, slots=True)
class Xlate(TraceEvent):
    """A translation that a device asked for. ``offset`` is relative to the window; ``mask`` is cut to 32 bits."""

    offset: int
    translated: int
    perm: int
    mask: int


@dataclass(frozen=True, slots=True)
class DdwQuery(TraceEvent):
    """ibm,query-pe-dma-window."""

    buid: int
    cfgaddr: int
    available: int
    largest: int
    mask: int


@dataclass(frozen=True, slots=True)
class DdwCreate(TraceEvent):
    """ibm,create-pe-dma-window, successful; ``liobn`` and ``start`` are its answer. Sizes in bytes."""

    buid: int
    cfgaddr: int
    page_size: int
    size: int
    start: int


@dataclass(frozen=True, slots=True)
class DdwRemove(TraceEvent):
    """ibm,remove-pe-dma-window, successful."""


@dataclass(frozen=True, slots=True)
class DdwReset(TraceEvent):
    """ibm,reset-pe-dma-window, or the default window restored after the last one went."""

    buid: int
    cfgaddr: int


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that cannot be read; ``reason`` says what was expected."""

    reason: str


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A line of an event that says nothing about DMA windows."""

    name: str


_X = r"(?:0x)?([0-9a-fA-F]+)"
_D = r"(-?\d+)"
_LIOBN = rf"liobn={_X}"
_PE = rf"buid={_X} addr={_X}"

Maker = Callable[..., TraceEvent]
Row = tuple[str, str, Maker]
"""Pattern of the fields, the base of each (x hexadecimal, d decimal), and the record made of them."""

_PUT: Row = (rf"{_LIOBN} ioba={_X} tce={_X} ret={_D}", "xxxd", PutTce)
_GET: Row = (rf"{_LIOBN} ioba={_X} ret={_D} tce={_X}", "xxdx", GetTce)
_STUFF: Row = (rf"{_LIOBN} ioba={_X} tcevalue={_X} npages={_D} ret={_D}", "xxxdd", StuffTce)
_INDIRECT: Row = (
    rf"{_LIOBN} ioba={_X} tcelist={_X} iobaN={_X} tceN={_X} ret={_D}",
    "xxxxxd",
    PutTceIndirect,
)


def _query(buid: int, cfgaddr: int, available: int, largest: int, mask: int) -> TraceEvent:
    return DdwQuery(0, buid, cfgaddr, available, largest, mask)


def _create(buid: int, cfgaddr: int, page_size: int, size: int, start: int, liobn: int) -> TraceEvent:
    return DdwCreate(liobn, buid, cfgaddr, page_size, size, start)


def _reset(buid: int, cfgaddr: int) -> TraceEvent:
    return DdwReset(0, buid, cfgaddr)


_FORMATS: dict[str, Row] = {
    "spapr_iommu_new_table": (rf"{_LIOBN} table=\S+ fd={_D}", "xd", NewTable),
    "spapr_iommu_pci_put": _PUT,
    "spapr_iommu_put": _PUT,
    "spapr_iommu_pci_get": _GET,
    "spapr_iommu_get": _GET,
    "spapr_iommu_pci_stuff": _STUFF,
    "spapr_iommu_stuff": _STUFF,
    "spapr_iommu_pci_indirect": _INDIRECT,
    "spapr_iommu_indirect": _INDIRECT,
    "spapr_iommu_xlate": (rf"{_LIOBN} {_X} -> {_X} perm={_D} mask={_X}", "xxxdx", Xlate),
    "spapr_iommu_ddw_query": (
        rf"{_PE}, {_D} windows available, max window size={_X}, mask={_X}",
        "xxdxx",
        _query,
    ),
    "spapr_iommu_ddw_create": (
        rf"{_PE}, page size={_X}, requested={_X}, start addr={_X}, liobn={_X}",
        "xxxxxx",
        _create,
    ),
    "spapr_iommu_ddw_remove": (rf"{_LIOBN}(?:,? ret=-?\d+)?", "x", DdwRemove),
    "spapr_iommu_ddw_reset": (_PE, "xx", _reset),
}

EVENTS: dict[str, tuple[re.Pattern[str], tuple[int, ...], Maker]] = {
    name: (re.compile(pattern), tuple(16 if base == "x" else 10 for base in bases), make)
    for name, (pattern, bases, make) in _FORMATS.items()
}
"""What is understood: event name to (pattern of its fields, number bases, record)."""

_LINE = re.compile(r"(?:\d+@\d+(?:\.\d+)?:)?([A-Za-z_][A-Za-z0-9_]*)(?:[ :]+(.*?))?\s*", re.DOTALL)


def event_of(line: str) -> tuple[str, str] | Malformed | None:
    """The name of the event on ``line`` and what is behind it; None for an empty line."""
    text = line.strip()
    if not text:
        return None
    match = _LINE.fullmatch(text)
    if match is None:
        return Malformed("does not begin with the name of a trace event")
    return match[1], match[2] or ""


def parse_line(line: str) -> TraceEvent | PassedOver | Malformed | None:
    """What ``line`` says; None for an empty line."""
    event = event_of(line)
    return parse_event(*event) if isinstance(event, tuple) else event


def parse_event(name: str, rest: str) -> TraceEvent | PassedOver | Malformed:
    """What the event ``name`` with ``rest`` behind it says."""
    row = EVENTS.get(name)
    if row is None:
        return PassedOver(name)
    pattern, bases, make = row
    fields = pattern.fullmatch(rest)
    if fields is None:
        return Malformed(f"the fields of {name} do not have their form")
    values = [int(value, base) for value, base in zip(fields.groups(), bases, strict=True)]
    if any(abs(value) > U64_MAX for value in values):
        return Malformed(f"a field of {name} has more than 64 bits")
    return make(*values)
