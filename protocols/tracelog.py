"""Trace records as JSON lines, one file for each process (``<role>.events``), and reading them back as one log.

A line is ``{"ns":…,"pid":…,"seq":…,"cause":…,"event":…,"fields":{…}}``: CLOCK_MONOTONIC, which all processes of a
machine share, so that files merge by ``ns``; ``seq`` orders what one process emitted in the same nanosecond. The writer
buffers and is flushed when the process's loop is idle and at exit: a SIGKILL loses little. The file itself is opened by
:mod:`protocols.transport.eventfile`; here are only records, bytes and callables.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from enum import Enum

import msgspec
from msgspec import Struct

FLUSH_BYTES = 64 << 10
"""Buffered bytes at which the log is written without waiting for the loop to be idle."""


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
        self._seq = 0
        self._buffer = bytearray()
        self._encoder = msgspec.json.Encoder(enc_hook=_plain)

    def __call__(self, event: str, **fields: object) -> None:
        """Keep one record."""
        if not self.enabled:
            return
        self._seq += 1
        record = Record(self._now_ns(), self._pid, self._seq, self.cause, event, fields)
        try:
            line = self._encoder.encode(record)
        except (OverflowError, TypeError, ValueError):
            line = self._encoder.encode(msgspec.structs.replace(record, fields=_as_text(fields)))
        self._buffer += line
        self._buffer += b"\n"
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Hand what is buffered to the sink; cheap when there is nothing."""
        if self._buffer and self._sink is not None:
            self._sink(bytes(self._buffer))
            self._buffer.clear()

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
