"""QEMU's trace lines about sPAPR DMA windows, as records.

How a line is written :mod:`vfio_model.trace_text` says; the log backend may put ``PID@SEC.USEC:`` before each. One
table says which events are understood and what is made of their fields. A line of any other event is passed over; a
line that bears the name of one of these but not its fields is *malformed*, as is text that does not begin like an event
at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from vfio_model.ranges import U64_MAX
from vfio_model.trace_text import fields_of


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


Maker = Callable[..., TraceEvent]


def _query(buid: int, cfgaddr: int, available: int, largest: int, mask: int) -> TraceEvent:
    return DdwQuery(0, buid, cfgaddr, available, largest, mask)


def _create(buid: int, cfgaddr: int, page_size: int, size: int, start: int, liobn: int) -> TraceEvent:
    return DdwCreate(liobn, buid, cfgaddr, page_size, size, start)


def _reset(buid: int, cfgaddr: int) -> TraceEvent:
    return DdwReset(0, buid, cfgaddr)


_TABLE: dict[str, tuple[str, Maker]] = {
    "put": ("liobn ioba tce ret", PutTce),
    "get": ("liobn ioba ret tce", GetTce),
    "stuff": ("liobn ioba tcevalue npages ret", StuffTce),
    "indirect": ("liobn ioba tcelist iobaN tceN ret", PutTceIndirect),
}
EVENTS: dict[str, tuple[str, Maker]] = {
    **{f"spapr_iommu_{kind}{name}": row for kind in ("", "pci_") for name, row in _TABLE.items()},
    "spapr_iommu_new_table": ("liobn fd", NewTable),
    "spapr_iommu_xlate": ("liobn ioba tce perm pgsize", Xlate),
    "spapr_iommu_ddw_query": ("buid cfgaddr wa win_size pgmask", _query),
    "spapr_iommu_ddw_create": ("buid cfgaddr pg_size req_size start liobn", _create),
    "spapr_iommu_ddw_remove": ("liobn", DdwRemove),
    "spapr_iommu_ddw_reset": ("buid cfgaddr", _reset),
}
"""What is understood: event name to (fields as :data:`vfio_model.trace_text.SPAPR` names them, the record of them)."""
_RESULT = re.compile(r",? ret=-?\d+$")
"""Which some versions print behind a removal."""

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
    names, make = row
    fields = fields_of(name, _RESULT.sub("", rest) if make is DdwRemove else rest)
    if fields is None:
        return Malformed(f"the fields of {name} do not have their form")
    values = [fields[field] for field in names.split()]
    if any(not isinstance(value, int) or abs(value) > U64_MAX for value in values):
        return Malformed(f"a field of {name} has more than 64 bits")
    return make(*values)
