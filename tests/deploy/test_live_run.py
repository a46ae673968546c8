"""Shipped scenarios against live processes: the verdict, the report, and that nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deploy import run, runtime_dir, shipped
from deploy.quantity import dec_hook
from deploy.report import Verdict
from deploy.scenario import Scenario
from tests import acceleration
from vfio_model.vfio.kinds import ContainerKind

pytestmark = pytest.mark.machine


def ran(name: str, folder: Path, *, kvm: bool | None = None, kind: ContainerKind | None = None) -> Verdict:
    chosen = shipped.load_scenario(name)
    if kind is not None:
        chosen.use_container(kind)
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


def test_a_remote_device_gets_maps_as_the_guests_iommu_maps(tmp_path: Path) -> None:
    chosen = shipped.load_scenario("remote-by-message")
    (device,) = chosen.devices
    device.dma = "mapped"
    verdict = run.run(chosen, Path(), tmp_path, lambda *_: None)
    assert verdict.passed, verdict.reason
    events = (tmp_path / "events.jsonl").read_text()
    assert '"vfio_user_dma_map"' in events and '"vfio_user_dma_unmap"' in events


@pytest.mark.parametrize(
    ("kind", "kvm"), [("spapr-v2", True), ("spapr-v1", False), ("type1v2", False), ("type1", True)]
)
def test_a_guest_moves_twice_with_each_kind_of_container(kind: ContainerKind, kvm: bool, tmp_path: Path) -> None:
    verdict = ran("live-migration", tmp_path, kvm=kvm, kind=kind)
    assert verdict.last_line == "PASS live-migration", verdict.reason
    ended = {part.role: part.ended for part in verdict.processes}
    assert {"guestd", "guestd-2", "guestd-3", "card", "card-2", "card-3"} < set(ended)
    moved = [step.text for step in verdict.steps if step.action == "migrate"]
    assert [text.partition(":")[0] for text in moved] == ["moved to guestd-2", "moved to guestd-3"]
    with (tmp_path / "events.jsonl").open() as events:
        assert any('"guestd-3"' in line for line in events)


def test_a_guest_whose_destination_cannot_take_it_goes_on(tmp_path: Path) -> None:
    steps = [
        {"map": {"iova": 0, "gpa": 0x100000}},
        {"kill": {"device": "nic"}},
        {"wait": {"role": "guestd"}},
        {"expect": {"role": "guestd", "key": "devices_lost", "equals": 1, "within": 10}},
        {"migrate": {"expect": "failed"}},
        {"hcall": {"name": "H_GET_TCE", "args": [0x80000000, 0]}},
    ]
    devices = [{"id": "nic", "model": "edu", "attach": "assigned", "addr": "02.0"}]
    document = {"name": "stays", "machine": {"type": "pseries", "ram": 64 << 20}, "devices": devices, "steps": steps}
    verdict = run.run(msgspec.convert(document, Scenario, dec_hook=dec_hook), Path(), None, lambda *_: None)
    assert verdict.passed and verdict.leftovers == [], verdict.reason
    assert "failed" in verdict.steps[4].text and "is gone" in verdict.steps[4].text


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
