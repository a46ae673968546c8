"""A run as a timeline that Perfetto and chrome://tracing open (Chrome's "Trace Event Format", JSON object form).

Each process has a track. A request and its answer are a span (``X``) on the asker's track; a record with ``dur_ns``
is a span that ends where it was written; everything else is an instant (``i``). The records of one cause id in
several processes are joined by flow arrows (``s``, ``t``, ``f``). Times are microseconds since the first record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from deploy.events import Log, Record

SPANS = {
    "port_return": "port_send",
    "control_return": "control_send",
    "step_end": "step_begin",
}
"""The event that ends a span, and the one of the same process and ``seq`` that began it."""

Item = dict[str, object]


def build(log: Log) -> dict[str, object]:
    """The timeline of ``log`` as the JSON object."""
    start = log.records[0].ns if log.records else 0
    items: list[Item] = [*_tracks(log)]
    begun: dict[tuple[int, str, int], Record] = {}
    for record in log.records:
        seq = record.number("seq") or 0
        if record.event in SPANS.values():
            begun[record.pid, record.event, seq] = record
        elif record.event in SPANS:
            first = begun.pop((record.pid, SPANS[record.event], seq), None)
            items.append(_span(record, first.ns if first else record.ns, start, first))
        elif (duration := record.number("dur_ns")) is not None:
            items.append(_span(record, record.ns - duration, start, None))
        else:
            items.append(_instant(record, start))
    items += [_instant(record, start) for record in begun.values()]  # requests that were never answered
    items += _flows(log, start)
    return {"traceEvents": items, "displayTimeUnit": "ns"}


def write(path: Path, log: Log) -> None:
    """The timeline of ``log`` as a file."""
    path.write_bytes(msgspec.json.encode(build(log)))


def _tracks(log: Log) -> Iterator[Item]:
    for index, pid in enumerate(dict.fromkeys(record.pid for record in log.records)):
        roles = list(dict.fromkeys(record.role for record in log.records if record.pid == pid))
        yield {"ph": "M", "name": "process_name", "pid": pid, "tid": pid, "args": {"name": "+".join(roles)}}
        yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": pid, "args": {"sort_index": index}}


def _base(record: Record, ns: int, start: int) -> Item:
    return {"pid": record.pid, "tid": record.pid, "ts": (ns - start) / 1000, "cat": record.role}


def _span(end: Record, began_ns: int, start: int, first: Record | None) -> Item:
    fields = {**(first.fields if first else {}), **end.fields, "cause": end.cause}
    name = fields.get("command") or fields.get("ioctl") or fields.get("step") or end.event
    return {
        **_base(end, began_ns, start),
        "ph": "X",
        "name": str(name),
        "dur": (end.ns - began_ns) / 1000,
        "args": fields,
    }


def _instant(record: Record, start: int) -> Item:
    args = {**record.fields, "cause": record.cause}
    return {**_base(record, record.ns, start), "ph": "i", "s": "t", "name": record.event, "args": args}


def _flows(log: Log, start: int) -> Iterator[Item]:
    by_cause: dict[int, list[Record]] = defaultdict(list)
    for record in log.records:
        if record.cause:
            by_cause[record.cause].append(record)
    for cause, records in by_cause.items():
        hops = [record for before, record in zip([None, *records], records, strict=False) if _moved(before, record)]
        if len(hops) < 2:
            continue
        for index, record in enumerate(hops):
            phase = "s" if index == 0 else "f" if index == len(hops) - 1 else "t"
            item = {**_base(record, record.ns, start), "ph": phase, "name": "cause", "id": cause}
            yield {**item, "bp": "e"} if phase == "f" else item


def _moved(before: Record | None, record: Record) -> bool:
    return before is None or before.pid != record.pid
