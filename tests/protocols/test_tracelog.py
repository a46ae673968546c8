"""The trace log: nothing is lost but the last line of a killed process, and logs merge by time."""

from __future__ import annotations

import itertools
from enum import IntEnum
from pathlib import Path

import msgspec
import pytest

from protocols.tracelog import FLUSH_RECORDS, Record, TraceLog, merge, parse
from protocols.transport.eventfile import EventFile, read_events


class Colour(IntEnum):
    RED = 1


def test_a_record_has_time_pid_sequence_cause_event_and_fields() -> None:
    chunks: list[bytes] = []
    log = TraceLog(chunks.append, 42, itertools.count(100).__next__)
    log.cause = 7
    log("spapr_iommu_pci_put", liobn=0x80000000, ioba=(1 << 64) - 1, text="é", flag=True, none=None)
    log("other", data=b"\x01", words=[1, 2], view=memoryview(b"\xff"))
    assert chunks == []
    log.flush()
    log.flush()
    (data,) = chunks
    first, second = parse(data.splitlines())
    fields = {"liobn": 0x80000000, "ioba": (1 << 64) - 1, "text": "é", "flag": True, "none": None}
    assert first == Record(100, 42, 1, 7, "spapr_iommu_pci_put", fields)
    assert (second.ns, second.seq, second.event, second.fields["words"]) == (101, 2, "other", [1, 2])


def test_no_field_breaks_the_log() -> None:
    chunks: list[bytes] = []
    log = TraceLog(chunks.append, 1, lambda: 1)
    log("big", value=1 << 70, other=object, colour=Colour.RED)
    log.flush()
    (record,) = parse(chunks[0].splitlines())
    assert record.event == "big" and int(str(record.fields["value"])) == 1 << 70


def test_a_full_buffer_is_written_without_waiting() -> None:
    chunks: list[bytes] = []
    log = TraceLog(chunks.append, 1, lambda: 1)
    for number in range(FLUSH_RECORDS):
        assert not chunks
        log("event", number=number)
    assert len(list(parse(chunks[0].splitlines()))) == FLUSH_RECORDS


def test_without_a_sink_nothing_is_kept() -> None:
    log = TraceLog(None, 1, lambda: 1)
    log("event")
    assert not log.enabled and log.oldest_ns is None


def test_logs_merge_by_time_and_a_cut_line_is_skipped() -> None:
    def line(ns: int, pid: int) -> bytes:
        return msgspec.json.encode(Record(ns, pid, ns, 0, "e", {}))

    one = [line(1, 10), line(4, 10), line(6, 10)[:-5]]
    two = [line(2, 11), b"not json", line(3, 11), line(5, 11)]
    assert [record.ns for record in merge([one, two])] == [1, 2, 3, 4, 5]


@pytest.mark.usefixtures("no_leak")
def test_files_are_appended_to_and_read_together(tmp_path: Path) -> None:
    for name in ("hostd", "guestd", "hostd"):
        file = EventFile(tmp_path / f"{name}.events")
        file.trace("started", role=name)
        file.close()
        file.close()
        assert not file.trace.enabled
    assert [record.fields["role"] for record in read_events(tmp_path)] == ["hostd", "guestd", "hostd"]
