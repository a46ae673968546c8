"""The event logs of a run, read and merged.

Each process writes ``<role>.events`` into the runtime directory: one JSON object per line, {ns, pid, seq, cause,
event, fields}, ``ns`` on CLOCK_MONOTONIC, which all processes of a machine share. A process that was killed may leave
half a line at the end: it is counted, not fatal. The merged order is by time, then by each process's own sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import msgspec

SUFFIX = ".events"


class Record(msgspec.Struct):
    """One line of a log, and whose log it is. ``ns`` monotonic nanoseconds, ``seq`` counts within the process,
    ``cause`` is 0 when there is none.
    """

    ns: int
    pid: int
    seq: int
    cause: int
    event: str
    fields: dict[str, object] = {}
    role: str = ""
    """The log's name, added when it is read."""

    def number(self, field: str) -> int | None:
        """``fields[field]`` when it is an integer."""
        value = self.fields.get(field)
        return value if isinstance(value, int) else None


_DECODER = msgspec.json.Decoder(Record)


class Log(msgspec.Struct):
    """Merged records; ``torn`` lines could not be read."""

    records: list[Record]
    torn: int = 0

    def named(self, *events: str) -> list[Record]:
        """The records of ``events``, in order."""
        return [record for record in self.records if record.event in events]

    def roles(self) -> list[str]:
        """The processes that wrote something, in the order in which they did first."""
        return list(dict.fromkeys(record.role for record in self.records))


def read(directory: Path) -> Log:
    """Every log in ``directory``, merged. A process with a folder of its own there (a second guest) bears its name."""
    records: list[Record] = []
    torn = 0
    for path in sorted((*directory.glob("*" + SUFFIX), *directory.glob("*/*" + SUFFIX))):
        role = path.name.removesuffix(SUFFIX) if path.parent == directory else path.parent.name
        some, bad = parse(path.read_bytes(), role)
        records += some
        torn += bad
    return merge(records, torn)


def parse(data: bytes, role: str) -> tuple[list[Record], int]:
    """The records in the log of ``role``, and how many lines could not be read."""
    records: list[Record] = []
    torn = 0
    for line in data.splitlines():
        try:
            record = _DECODER.decode(line)
        except msgspec.MsgspecError:
            torn += 1
            continue
        record.role = role
        records.append(record)
    return records, torn


def merge(records: Iterable[Record], torn: int = 0) -> Log:
    """The records of all logs, in order."""
    return Log(sorted(records, key=lambda record: (record.ns, record.pid, record.seq)), torn)


def write(path: Path, records: Iterable[Record]) -> None:
    """The records as JSON lines."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        for record in records:
            file.write(encoder.encode(record) + b"\n")
