"""Logs merged, lost messages found, the timeline and the verdict."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from deploy import events, report, timeline
from deploy.events import Log, Record
from deploy.lost import find_lost
from deploy.report import ProcessPart, StepResult, Verdict

GUEST, BETWEEN, HOST, OTHER_HOST, OPERATOR = 10, 11, 12, 13, 1
ROLES = {GUEST: "guestd", BETWEEN: "interposer", HOST: "hostd", OTHER_HOST: "hostd", OPERATOR: "operator"}


def log(*rows: tuple[int, int, str, dict[str, object]]) -> Log:
    """Rows of (pid, cause, event, fields), one microsecond apart."""
    return Log(
        [
            Record(1_000_000 + number * 1000, pid, number, cause, event, fields, ROLES[pid])
            for number, (pid, cause, event, fields) in enumerate(rows, 1)
        ]
    )


def message(seq: int, ioctl: str = "VFIO_IOMMU_MAP_DMA", **fields: object) -> dict[str, object]:
    return {"seq": seq, "ioctl": ioctl, **fields}


UNMAP = {"ioctl": "VFIO_IOMMU_UNMAP_DMA", "iova": 0x3000, "size": 4096}
ARRIVES = [
    (GUEST, 5, "port_send", message(1, iova=0x3000, size=4096, vaddr=0x7000)),
    (BETWEEN, 5, "port_take", message(1, iova=0x3000, size=4096, vaddr=0x7000)),
    (BETWEEN, 5, "port_forward", message(1, iova=0x3000, size=4096, vaddr=0x7000)),
    (HOST, 5, "port_recv", message(1)),
    (GUEST, 5, "port_return", message(1)),
]
LOST = [
    (GUEST, 6, "port_send", {"seq": 2, "ioctl": "VFIO_IOMMU_UNMAP_DMA"}),
    (BETWEEN, 6, "port_take", {"seq": 2, **UNMAP}),
    (BETWEEN, 6, "port_drop", {"seq": 2, **UNMAP}),
    (GUEST, 6, "port_return", {"seq": 2}),
]
DMA = {"device": "nic", "direction": "write", "iova": 0x3040, "length": 64, "moved": True}


def test_nothing_is_lost_when_every_message_arrived() -> None:
    assert find_lost(log(*ARRIVES)) == []


def test_a_lost_unmap_names_mapping_dma_and_hop() -> None:
    (lost,) = find_lost(log(*ARRIVES, *LOST, (OPERATOR, 0, "dma", DMA)))
    assert (lost.ioctl, lost.iova, lost.sender) == ("VFIO_IOMMU_UNMAP_DMA", 0x3000, "guestd")
    assert lost.hop == "in the interposer: it did not pass it on to hostd"
    assert lost.mapping == "iova 0x3000, 0x1000 bytes to hva 0x7000"
    assert lost.stale_dma == ["nic, a write of 64 bytes at 0x3040, 0.0 ms later"]
    assert "lost in the interposer" in lost.text()


@pytest.mark.parametrize(
    "later",
    [
        {**DMA, "moved": False},
        {**DMA, "iova": 0x4000},
    ],
)
def test_only_dma_that_went_through_at_that_mapping_is_stale(later: dict[str, object]) -> None:
    (lost,) = find_lost(log(*ARRIVES, *LOST, (OPERATOR, 0, "dma", later)))
    assert lost.stale_dma == []


def test_dma_after_the_guest_mapped_the_page_anew_is_not_stale() -> None:
    anew = (OPERATOR, 0, "map_pages", {"iova": 0x3000, "gpa": 0, "size": 4096})
    (lost,) = find_lost(log(*ARRIVES, *LOST, anew, (OPERATOR, 0, "dma", DMA)))
    assert lost.stale_dma == []


def test_what_was_sent_just_before_hostd_was_killed_is_not_judged() -> None:
    last = [(GUEST, 6, "port_send", message(2)), (GUEST, 6, "port_return", message(2))]
    assert len(find_lost(log(*ARRIVES, *last))) == 1
    assert find_lost(log(*ARRIVES, *last, (GUEST, 0, "port_lost", {}))) == []
    again = [(OTHER_HOST, 0, "daemon_start", {}), (OTHER_HOST, 7, "port_recv", message(3))]
    assert find_lost(log(*ARRIVES, *last, *again)) == []
    in_order = (HOST, 0, "daemon_end", {})
    assert len(find_lost(log(*ARRIVES, in_order, *last, (GUEST, 0, "port_lost", {})))) == 1


def test_a_message_that_was_passed_on_and_never_came_was_lost_behind_the_interposer() -> None:
    rows = [*ARRIVES, LOST[0], (BETWEEN, 6, "port_forward", {"seq": 2, **UNMAP}), LOST[3]]
    assert find_lost(log(*rows))[0].hop == "between interposer and hostd"


def test_without_an_interposer_the_hop_is_the_socket() -> None:
    rows = [(GUEST, 6, "port_send", message(1)), (GUEST, 6, "port_return", message(1))]
    assert find_lost(log(*rows))[0].hop == "between guestd and hostd"


def test_a_message_under_way_when_the_log_ends_is_not_called_lost() -> None:
    assert find_lost(log(*ARRIVES, (GUEST, 7, "port_send", message(3)))) == []


def test_logs_merge_by_time_and_a_torn_line_is_counted(tmp_path: Path) -> None:
    encode = msgspec.json.encode
    (tmp_path / "guestd.events").write_bytes(
        encode(Record(20, 1, 1, 0, "b")) + b"\n" + encode(Record(40, 1, 2, 0, "d")) + b'\n{"ns": 5, "pi'
    )
    (tmp_path / "hostd.events").write_bytes(encode(Record(10, 2, 1, 0, "a")) + b"\n" + encode(Record(30, 2, 2, 0, "c")))
    merged = events.read(tmp_path)
    assert [record.event for record in merged.records] == ["a", "b", "c", "d"]
    assert merged.records[0].role == "hostd" and merged.torn == 1


def test_the_timeline_has_a_track_for_each_process_spans_and_flows() -> None:
    built = timeline.build(log(*ARRIVES, (GUEST, 0, "port_send", message(9))))
    items = built["traceEvents"]
    assert isinstance(items, list)
    names = {item["args"]["name"] for item in items if item["name"] == "process_name"}
    assert names == {"guestd", "interposer", "hostd"}
    (span,) = [item for item in items if item["ph"] == "X"]
    assert (span["pid"], span["ts"], span["dur"]) == (GUEST, 0.0, 4.0)
    flow = [item["ph"] for item in items if item["name"] == "cause"]
    assert flow == ["s", "t", "t", "f"]
    assert [item["args"]["seq"] for item in items if item["name"] == "port_send"] == [9]  # never answered


def verdict(reason: str = "") -> Verdict:
    steps = [StepResult(0, "map", True, 0.1, "1 page"), StepResult(1, "dma", not reason, 0.1, "moved", reason)]
    return Verdict("mine", "a test", not reason, reason, steps=steps, processes=[ProcessPart("hostd", 12)])


def shown(given: Verdict) -> str:
    text = StringIO()
    report.show(given, Console(file=text, width=140), Path("vfio-model-report/mine"))
    return text.getvalue()


def test_the_last_line_says_pass_or_fail_and_why() -> None:
    assert shown(verdict()).rstrip().splitlines()[-1] == "PASS mine"
    lines = shown(verdict("nic: a write was refused\n  hostd.log: [boom]")).rstrip().splitlines()
    assert lines[-1] == "FAIL mine: nic: a write was refused"
    assert any("hostd.log: [boom]" in line for line in lines)


def test_the_folder_holds_verdict_events_timeline_and_logs(tmp_path: Path) -> None:
    (tmp_path / "hostd.log").write_text("a line\n")
    (tmp_path / "guestd.log").touch()
    folder = tmp_path / "report"
    report.write(folder, verdict(), log(*ARRIVES), [tmp_path / "hostd.log", tmp_path / "guestd.log"])
    assert sorted(path.name for path in folder.iterdir()) == [
        "events.jsonl",
        "hostd.log",
        "timeline.json",
        "verdict.json",
    ]
    assert msgspec.json.decode((folder / "verdict.json").read_bytes(), type=Verdict).passed
    assert len((folder / "events.jsonl").read_text().splitlines()) == len(ARRIVES)
    assert "traceEvents" in msgspec.json.decode((folder / "timeline.json").read_bytes())
