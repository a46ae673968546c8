"""Shipped scenarios against live processes: the verdict, the report, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import run, runtime_dir, shipped
from deploy.report import Verdict
from tests import acceleration

pytestmark = pytest.mark.machine


def ran(name: str, folder: Path, *, kvm: bool | None = None) -> Verdict:
    chosen = shipped.load_scenario(name)
    chosen.machine.kvm = acceleration.kvm(kvm)
    verdict = run.run(chosen, Path(), folder, lambda *_: None)
    assert verdict.leftovers == [] and list(runtime_dir.find_runs()) == []
    return verdict


@pytest.mark.parametrize("kvm", [False, True], ids=["user", "kvm"])
@pytest.mark.parametrize(
    "name",
    ["window-refused", "memlock-limit", "misbehaving-device", "hostd-restart", "remote-by-message", "two-bridges"],
)
def test_a_shipped_scenario_passes_and_leaves_nothing_behind(name: str, kvm: bool, tmp_path: Path) -> None:
    verdict = ran(name, tmp_path, kvm=kvm)
    assert verdict.last_line == f"PASS {name}", verdict.reason
    assert {path.name for path in tmp_path.iterdir()} >= {"verdict.json", "events.jsonl", "timeline.json"}
    assert verdict.first_dma_seconds is not None


def test_the_lost_unmap_is_named_with_its_mapping_dma_and_hop(tmp_path: Path) -> None:
    verdict = ran("lost-unmap", tmp_path)
    assert verdict.passed, verdict.reason
    text = "\n".join(verdict.findings)
    for said in ("UNMAP_DMA of iova 0x3000", "lost in the interposer", "to gpa 0x200000", "nic, a write of 64 bytes"):
        assert said in text


def test_a_recorded_boot_passes_with_dma_through_its_pages(tmp_path: Path) -> None:
    verdict = ran("linux-ddw-boot", tmp_path)
    assert verdict.passed, verdict.reason
    totals = verdict.totals
    assert (totals.translations_checked, totals.mismatches, totals.pages_unmapped) == (1032, 0, 269)
    assert totals.dma_moved > 300 and totals.dma_refused > 300
