"""``check``: the recordings agree with the model, altered ones do not, damaged ones are reported as far as they go."""

from __future__ import annotations

import gzip
import random
import re
from pathlib import Path

import pytest

from deploy import check
from deploy.check import check_trace
from deploy.check_report import CheckOptions, CheckReport
from tests.guest_drivers.test_trace_replay import CREATE, indirect, new_table, put, stuff, xlate
from vfio_model.guest_drivers.trace_events import PutTce, StuffTce, Xlate, parse_line
from vfio_model.guest_drivers.trace_options import GivenOptions

RECORDINGS = Path(check.__file__).with_name("recordings")
DDW, NODDW = RECORDINGS / "pseries-ddw.trace.gz", RECORDINGS / "pseries-noddw.trace.gz"


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode().splitlines()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log.trace"


def check_lines(path: Path, lines: list[str], options: CheckOptions | None = None) -> CheckReport:
    path.write_text("".join(f"{line}\n" for line in lines))
    return check_trace(path, options)


@pytest.mark.parametrize(("path", "lines", "translations"), [(DDW, 2263, 1032), (NODDW, 3407, 2027)])
def test_the_recordings_agree(path: Path, lines: int, translations: int) -> None:
    report = check_trace(path)
    assert (report.read_lines, report.translations_checked, report.unchecked) == (lines, translations, 0)
    assert (report.mismatches, report.malformed, report.errors, report.exit_code) == (0, [], [], 0)
    assert (report.events, report.replayed + report.passed_over) == (lines, lines)
    assert 0 < report.inferred < translations


@pytest.mark.parametrize("path", [DDW, NODDW])
def test_an_altered_translation_is_a_mismatch_at_its_line(path: Path, log: Path) -> None:
    """Every translation line is altered once, a few far apart in each file."""
    lines = lines_of(path)
    translations = [i for i, line in enumerate(lines) if isinstance(parse_line(line), Xlate)]
    stride = 100
    for offset in range(stride):
        altered = list(lines)
        chosen = translations[offset::stride]
        for i in chosen:
            what = ("-> 0x", "-> 0x1") if i % 3 else ("perm=", "perm=1")
            altered[i] = lines[i].replace(*what)
        report = check_lines(log, altered)
        assert [detail["line"] for detail in report.details] == [i + 1 for i in chosen]
        assert report.exit_code == 1


@pytest.mark.parametrize("path", [DDW, NODDW])
def test_an_altered_write_is_a_mismatch_where_a_translation_relies_on_it(path: Path, log: Path) -> None:
    lines = lines_of(path)
    events = [parse_line(line) for line in lines]
    writer: dict[int, int] = {}
    used: list[tuple[int, int]] = []
    for i, event in enumerate(events):
        if isinstance(event, PutTce) and event.liobn == 0x8000_0000:
            writer[event.ioba >> 12] = i
        elif isinstance(event, StuffTce):
            for page in range((event.ioba_after >> 12) - event.npages, event.ioba_after >> 12):
                writer.pop(page, None)
        elif isinstance(event, Xlate) and event.liobn == 0x8000_0000 and event.offset >> 12 in writer:
            used.append((writer.pop(event.offset >> 12), i))
    assert used
    for write, translation in random.Random(1).sample(used, min(len(used), 25)):
        altered = list(lines)
        altered[write] = re.sub(r"tce=0x", "tce=0x1", lines[write])
        assert translation + 1 in [detail["line"] for detail in check_lines(log, altered).details]


def test_a_mapping_that_an_altered_stuff_clears_is_a_mismatch(log: Path) -> None:
    lines = [new_table(), put(0x8000, 0x5003), stuff(0x8000, 0, 4), xlate(0x8000, 0x5000)]
    assert check_lines(log, lines).mismatches == 0
    lines[2] = stuff(0x9000, 0, 4)
    assert [detail["line"] for detail in check_lines(log, lines).details] == [4]


def test_a_report_says_what_was_expected_and_seen(log: Path) -> None:
    report = check_lines(log, [new_table(), put(0x1000, 0x5003), xlate(0x1000, 0x6000, perm=1)])
    assert report.details == [{"line": 3, "event": "xlate", "expected": "0x5000 perm=3", "seen": "0x6000 perm=1"}]
    assert report.to_dict()["exit_code"] == 1


@pytest.mark.parametrize("form", ["0x1f{}", "0x{}8", "0x{}0000"])
def test_a_translation_with_other_low_bits_is_a_mismatch(log: Path, form: str) -> None:
    lines = [new_table(), new_table(0x8000_0001), CREATE, put(1 << 59, 0x5_0003, 0x8000_0001)]
    seen = int(form.format("50000"), 16)
    assert check_lines(log, [*lines, xlate(0, seen, liobn=0x8000_0001, mask=0xFFFF)]).mismatches == 1
    low = check_lines(log, [*lines, xlate(0, 0x5_0001, liobn=0x8000_0001, mask=0xFFFF)])
    assert low.mismatches == 1


# -- machines with other options -----------------------------------------------------------------------------------


def test_a_larger_default_window_shows_in_the_log_or_is_given(log: Path) -> None:
    lines = [new_table(), *(stuff(after, 0, 512) for after in (0x20_0000, 0x6000_0000, 0x8000_0000))]
    report = check_lines(log, [*lines, put(0x7000_0000, 0x5003), xlate(0x7000_0000, 0x5000)])
    assert (report.mismatches, report.notes) == (0, ["PHB 0: dma_win_size=0x80000000, from the log"])
    given = CheckOptions(dma=GivenOptions(dma_win_size=1 << 30))
    assert check_lines(log, lines, given).mismatches == 2
    given = CheckOptions(dma=GivenOptions(dma_win_size=1 << 31))
    assert check_lines(log, lines, given).notes == []


def test_one_odd_line_is_a_mismatch_and_no_evidence(log: Path) -> None:
    report = check_lines(log, [new_table(), put(0x1000, 0x5003), put(0x7000_0000, 0x5003)])
    assert [detail["line"] for detail in report.details] == [3]


def test_a_default_window_elsewhere_shows_in_the_log(log: Path) -> None:
    lines = [new_table(), stuff(0x8020_0000, 0, 512), stuff(0xC000_0000, 0, 512), put(0x8000_1000, 0x5003)]
    report = check_lines(log, [*lines, xlate(0x1000, 0x5000)])
    assert report.mismatches == 0
    assert "PHB 0: dma_win_addr=0x80000000, from the log" in report.notes


def test_page_sizes_show_in_queries_that_agree(log: Path) -> None:
    query = (
        "spapr_iommu_ddw_query buid=0x800000020000000 addr=0x{:x}, 1 windows available, "
        "max window size=0x80000000, mask=0x{:x}"
    )
    assert check_lines(log, [query.format(0, 0x3), query.format(0x800, 0x3)]).mismatches == 0
    assert check_lines(log, [query.format(0, 0x3), query.format(0x800, 0x107)]).mismatches == 1
    assert check_lines(log, [query.format(0, 0x3)]).mismatches == 1
    given = CheckOptions(dma=GivenOptions(pgsz=1 << 12 | 1 << 16))
    assert check_lines(log, [query.format(0, 0x3)], given).mismatches == 0


def test_a_64_bit_window_elsewhere_shows_when_it_is_used_there(log: Path) -> None:
    create = CREATE.replace("start addr=0x800000000000000", "start addr=0x100000000000")
    used = put(0x1000_0000_0000, 0x5_0003, 0x8000_0001)
    assert check_lines(log, [new_table(0x8000_0001), create, used]).mismatches == 0
    assert check_lines(log, [new_table(0x8000_0001), create]).mismatches == 1


def test_other_phbs_and_vio_devices_are_made_as_the_log_needs_them(log: Path) -> None:
    far, vio = 0x8000_0300, 0x7100_0003
    lines = [
        *(new_table(), new_table(far), new_table(vio)),
        put(0x1000, 0x5003, far),
        put(0x1000, 0x6003, vio).replace("_pci", ""),
        *(xlate(0x1000, 0, 0), xlate(0x1000, 0x5000, liobn=far), xlate(0x1000, 0x6000, liobn=vio)),
    ]
    report = check_lines(log, lines)
    assert (report.mismatches, report.translations_checked, report.passed_over) == (0, 3, 0)
    lines[-1] = xlate(0x1000, 0x7000, liobn=vio)
    assert check_lines(log, lines).mismatches == 1


def test_a_phb_that_cannot_be_is_passed_over(log: Path) -> None:
    report = check_lines(log, [new_table(), put(0, 0x5003, 0x8000_FF00), put(0, 0x5003, 0x1_8000_0000)])
    assert (report.passed_over, report.mismatches) == (2, 0)


def test_ram_grows_to_hold_a_list_of_the_log(log: Path) -> None:
    line = indirect(0, 3, 0x9003).replace("tcelist=0x100000", "tcelist=0x8010001000")
    report = check_lines(log, [new_table(), line, xlate(0x3000, 0x9000)])
    assert (report.mismatches, report.notes) == (
        0,
        ["ram_size=0x8020000000, from the log: a TCE list lies at 0x8010001000"],
    )


# -- damaged files -------------------------------------------------------------------------------------------------


def test_timestamps_line_ends_and_other_lines_do_not_matter(log: Path) -> None:
    lines = [f"77@1700000000.{i:06}:{line}\r" for i, line in enumerate(lines_of(DDW))]
    report = check_lines(log, lines)
    assert (report.translations_checked, report.mismatches, report.exit_code) == (1032, 0, 0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_cut_off_gzip_file_is_checked_as_far_as_it_goes(log: Path, share: float) -> None:
    data = DDW.read_bytes()
    log.write_bytes(data[: int(len(data) * share)])
    report = check_trace(log)
    assert report.exit_code == 2
    assert "cut off" in report.errors[0]
    assert report.mismatches == 0
    assert 0 < report.read_lines < 2263
    assert report.events > 0


def test_damage_inside_a_gzip_file_is_reported(log: Path) -> None:
    data = bytearray(DDW.read_bytes())
    data[len(data) // 2 :] = bytes(100)
    log.write_bytes(data)
    report = check_trace(log)
    assert report.exit_code == 2
    assert report.read_lines > 0


def test_gzip_files_may_be_joined(log: Path) -> None:
    half = "\n".join(lines_of(DDW)[:1000]) + "\n"
    rest = "\n".join(lines_of(DDW)[1000:]) + "\n"
    log.write_bytes(gzip.compress(half.encode()) + gzip.compress(rest.encode()))
    assert check_trace(log).translations_checked == 1032


def test_malformed_lines_are_counted_with_their_numbers(log: Path) -> None:
    lines = lines_of(DDW)
    lines[600] = "spapr_iommu_xlate liobn=0x80000001 0x4496"
    lines[700] = "[   12.3456] a console line"
    report = check_lines(log, lines)
    assert [bad["line"] for bad in report.malformed] == [601, 701]
    assert report.exit_code == 2
    assert "line 601" in report.errors[0]
    assert report.mismatches == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (bytes(range(256)) * 300, "not a text file"),
        (b"\xff\xfe" * 100, "not a text file"),
        (b"x" * 200_000, "not a text file"),
        (b"\x1f\x8b" + b"no gzip at all", "damaged"),
        (b"spapr_pci_msi nothing of ours\n", "no trace of sPAPR"),
    ],
)
def test_what_is_no_recording_is_an_error(log: Path, data: bytes, said: str) -> None:
    log.write_bytes(data)
    report = check_trace(log)
    assert said in report.errors[0]
    assert (report.exit_code, report.replayed) == (2, 0)


def test_a_file_that_is_not_there_or_no_file_is_an_error(tmp_path: Path) -> None:
    assert "No such file" in check_trace(tmp_path / "none").errors[0]
    assert "directory" in check_trace(tmp_path).errors[0]
