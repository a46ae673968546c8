"""``check`` of a recorded PC: every line comes out of the unit again, and a line that was altered does not."""

from __future__ import annotations

import gzip
import random
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from deploy import check
from deploy.check import check_trace
from deploy.check_report import CheckReport

RECORDING = Path(check.__file__).with_name("recordings") / "q35-vtd-strict.trace.gz"
LINES = gzip.decompress(RECORDING.read_bytes()).decode().splitlines()


def checked(path: Path, lines: Sequence[str]) -> CheckReport:
    path.write_text("".join(f"{line}\n" for line in lines))
    return check_trace(path)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.trace"


def numbers(event: str) -> list[int]:
    return [at for at, line in enumerate(LINES) if line.startswith(f"{event} ")]


def test_the_recording_agrees() -> None:
    report = check_trace(RECORDING)
    assert (report.read_lines, report.replayed, report.passed_over) == (13677, 13677, 0)
    assert (report.translations_checked, report.unchecked, report.mismatches) == (2109, 0, 0)
    assert (report.malformed, report.errors, report.exit_code) == ([], [], 0)


def test_a_recording_with_time_stamps_agrees(log: Path) -> None:
    report = checked(log, [f"77@1700000000.{at:06}:{line}\r" for at, line in enumerate(LINES)])
    assert (report.translations_checked, report.mismatches, report.exit_code) == (2109, 0, 0)


@pytest.mark.parametrize(
    ("event", "old", "new"),
    [
        ("vtd_dmar_translate", "-> gpa 0x", "-> gpa 0x1"),
        ("vtd_dmar_translate", "mask 0xfff", "mask 0x1fffff"),
        ("vtd_iotlb_page_hit", "slpte 0x", "slpte 0x1"),
        ("vtd_iotlb_page_hit", "domain 0x4", "domain 0x3"),
        ("vtd_iotlb_cc_hit", "gen 1", "gen 2"),
        ("vtd_inv_desc_iotlb_pages", "domain 0x4", "domain 0x5"),
        ("vtd_inv_desc_wait_sw", "data 0x2", "data 0x3"),
        ("vtd_inv_qi_head", "head 1", "head 2"),
        ("vtd_reg_write", "addr 0x88", "addr 0x8c"),
    ],
)
def test_an_altered_line_is_a_mismatch(log: Path, event: str, old: str, new: str) -> None:
    lines = list(LINES)
    at = random.Random(f"{event} {old}").choice([at for at in numbers(event) if old in LINES[at]])
    lines[at] = LINES[at].replace(old, new, 1)
    report = checked(log, lines)
    assert report.exit_code == 1
    assert any(abs(detail["line"] - (at + 1)) <= 8 for detail in report.details)


def test_a_hit_without_a_fill_is_a_mismatch(log: Path) -> None:
    """What the log calls a hit was filled by an earlier line, which is taken away here, with its translation."""
    fill = next(at for at in numbers("vtd_iotlb_page_update") if LINES[at + 1].startswith("vtd_dmar_translate"))
    page = re.search(r"iova (0x[0-9a-f]+)000 ", LINES[fill])
    assert page is not None
    report = checked(log, [line for at, line in enumerate(LINES) if at not in (fill - 1, fill, fill + 1)])
    assert report.mismatches > 0
    assert any(page[1] in detail["seen"] for detail in report.details)


def test_a_fill_of_what_is_cached_is_a_mismatch(log: Path) -> None:
    """A hit that becomes a fill: the page was cached."""
    at = numbers("vtd_iotlb_page_hit")[100]
    lines = list(LINES)
    lines[at] = LINES[at].replace("page_hit", "page_update").replace("page hit", "page update")
    report = checked(log, lines)
    assert at + 1 in [detail["line"] for detail in report.details]


def test_an_invalidation_of_another_page_explains_no_fill(log: Path) -> None:
    """The descriptor is altered with the line that speaks of it: what is filled later would have been a hit."""
    at = numbers("vtd_inv_desc_iotlb_pages")[0]
    page = re.search(r"addr (0x[0-9a-f]+)000 ", LINES[at])
    assert page is not None
    lines = list(LINES)
    lines[at] = LINES[at].replace(page[1], "0x1")
    lines[at - 1] = LINES[at - 1].replace(page[1], "0x1")
    assert lines[at - 1] != LINES[at - 1]
    details = checked(log, lines).details
    number = details[0]["line"]
    filled = next(line for line in LINES[number - 1 :] if line.startswith("vtd_iotlb_page_update"))
    assert page[1] in filled and f"iova {page[1]}" in details[0]["expected"], "the model still has it"


@pytest.mark.parametrize("text", ["vtd_dmar_translate dev 00:02.00 iova", "vtd_reg_read addr x size 0x4"])
def test_a_malformed_line_is_reported(log: Path, text: str) -> None:
    report = checked(log, [*LINES[:50], text, *LINES[50:100]])
    assert [bad["line"] for bad in report.malformed] == [51]
    assert report.exit_code == 2


def test_a_log_of_nothing_but_odd_lines_is_survived(log: Path) -> None:
    rng = random.Random(9)
    for _ in range(20):
        lines = rng.sample(LINES, 60)
        assert checked(log, lines).exit_code in (0, 1)
