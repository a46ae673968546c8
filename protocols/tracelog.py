"""Trace records as JSON lines, one file for each process (``<role>.events``), and reading them back as one log.

A line is ``{"ns":…,"pid":…,"seq":…,"cause":…,"event":…,"fields":{…}}``: CLOCK_MONOTONIC, which all processes of a
machine share, so that files merge by ``ns``; ``seq`` orders what one process emitted in the same nanosecond.

A record is kept as it came and becomes a line only at the flush, so that the operation that it tells of does not wait
for its log: a field must not change afterwards. When to flush is :mod:`protocols.transport.eventfile`'s business, as is
the file; here are only records, bytes and callables.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from enum import Enum

import msgspec
from msgspec import Struct

FLUSH_RECORDS = 2048
"""Kept records at which the log is written without waiting for the process to be idle."""

_Kept = tuple[int, int, str, dict[str, object]]
"""Time, cause, event and fields."""


class Record(Struct, frozen=True):
    """One event."""

    ns: int
    pid: int
    seq: int
    cause: int
    event: str
    fields: dict[str, object]


def _plain(value: object) -> object:
    """Numpy integers and other things that a field may hold, as what JSON can say."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, memoryview | bytearray):
        return bytes(value).hex()
    if hasattr(value, "__index__"):
        return int(value)
    return str(value)


class TraceLog:
    """A :class:`vfio_model.trace.Trace` that writes lines to ``sink(data)``.

    ``now_ns()`` gives the time of a record. With ``sink`` None nothing is kept and ``enabled`` is False.
    """

    def __init__(self, sink: Callable[[bytes], None] | None, pid: int, now_ns: Callable[[], int]) -> None:
        self.enabled = sink is not None
        self.cause = 0
        self._sink, self._pid, self._now_ns = sink, pid, now_ns
        self._written = 0
        self._kept: list[_Kept] = []
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)

    def __call__(self, event: str, **fields: object) -> None:
        """Keep one record."""
        if self.enabled:
            kept = self._kept
            kept.append((self._now_ns(), self.cause, event, fields))
            if len(kept) >= FLUSH_RECORDS:
                self.flush()

    @property
    def oldest_ns(self) -> int | None:
        """When the first record that is not written was made; None when all are."""
        return self._kept[0][0] if self._kept else None

    def flush(self) -> None:
        """Hand what is kept to the sink; cheap when there is nothing."""
        if self._kept and self._sink is not None:
            kept, self._kept = self._kept, []
            lines = [self._line(self._written + place, *record) for place, record in enumerate(kept, 1)]
            self._written += len(kept)
            self._sink(b"".join(lines))

    def _line(self, seq: int, ns: int, cause: int, event: str, fields: dict[str, object]) -> bytes:
        record = Record(ns, self._pid, seq, cause, event, fields)
        try:
            return self._encoder.encode(record) + b"\n"
        except (OverflowError, TypeError, ValueError):
            return self._encoder.encode(msgspec.structs.replace(record, fields=_as_text(fields))) + b"\n"

    def close(self) -> None:
        """Flush, and drop what comes afterwards."""
        self.flush()
        self.enabled, self._sink = False, None


def _as_text(fields: dict[str, object]) -> dict[str, object]:
    """Fields that JSON cannot say (an integer above 64 bits) as text: an event is never lost for its fields."""
    return {name: str(value) for name, value in fields.items()}


_DECODER = msgspec.json.Decoder(Record)


def parse(lines: Iterable[bytes]) -> Iterator[Record]:
    """The records of one file. A last line cut short by a kill is skipped, as is what is no record."""
    for line in lines:
        try:
            yield _DECODER.decode(line)
        except (msgspec.MsgspecError, ValueError):
            continue


def merge(logs: Iterable[Iterable[bytes]]) -> Iterator[Record]:
    """The records of several files in the order of their time; records of one process never change places."""
    return heapq.merge(*(parse(lines) for lines in logs), key=lambda record: (record.ns, record.pid, record.seq))
