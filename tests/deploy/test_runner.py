"""Steps on a machine in this process: what passes, what fails, and what the run says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import yaml_lines
from deploy.runner import Runner
from deploy.scenario import Scenario
from tests.deploy.machine_system import MachineSystem

pytestmark = pytest.mark.machine

HEAD = """\
name: mine
description: a test
machine: {ram: 64MiB}
devices:
  - {id: nic, model: edu, addr: 02.0, props: {dma_mask: 0xffffffffffffffff}}
"""
BOOT = """\
name: boot
description: a recorded boot
devices:
  - {id: nic, model: edu, addr: 02.0, props: {dma_mask: 0xffffffffffffffff}}
"""


def run(steps: str, head: str = HEAD) -> tuple[Runner, MachineSystem, str]:
    scenario = yaml_lines.parse(head + "steps:\n" + steps, "mine.yaml", Scenario)
    system = MachineSystem(scenario)
    runner = Runner(scenario, system, Path())
    return runner, system, runner.run()


def test_a_mapped_page_takes_dma_and_an_unmapped_one_refuses_it() -> None:
    runner, _, reason = run(
        "  - map: {iova: 0x3000, gpa: 0x200000}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000, direction: read}\n"
        "  - unmap: {iova: 0x3000}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000, expect: refused}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000, direction: read, expect: refused}\n"
    )
    assert reason == ""
    assert (runner.totals.dma_moved, runner.totals.dma_refused) == (2, 2)
    assert (runner.totals.pages_mapped, runner.totals.pages_unmapped) == (1, 1)
    assert runner.first_dma_ns is not None


def test_a_page_mapped_for_reading_takes_no_store() -> None:
    _, _, reason = run(
        "  - map: {iova: 0x3000, gpa: 0x200000, perm: r}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000, direction: read}\n"
        "  - dma: {device: nic, iova: 0x3000, gpa: 0x200000, expect: refused}\n"
    )
    assert reason == ""


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (
            "dma: {device: nic, iova: 0x9000, gpa: 0x200000}",
            "step 0 (dma): nic: a write at 0x9000 was refused, expected ok",
        ),
        (
            "map: {iova: 0x100000000, gpa: 0}",
            "step 0 (map): H_PUT_TCE at 0x100000000 returned H_PARAMETER, expected H_SUCCESS",
        ),
        (
            "hcall: {name: H_GET_TCE, args: [1, 2]}",
            "step 0 (hcall): H_GET_TCE returned H_PARAMETER, expected H_SUCCESS",
        ),
        (
            "expect: {role: hostd, key: windows.open, equals: 1}",
            "step 0 (expect): hostd: windows.open is 2, expected 1",
        ),
        ("wait: {role: notifier}", "step 0 (wait): notifier was not ready within 10 s"),
        (
            "explain: {device: nic, iova: 0x1000, fails: none}",
            "step 0 (explain): nic at 0x1000: fails in stage-1, TCE; expected to fail: none",
        ),
        ("find_lost: {expect: 1}", "step 0 (find_lost): 0 message(s) lost; expected 1"),
        (
            "linux_ddw: {device: nic, expect: refused}",
            "step 0 (linux_ddw): expected to be refused, got a window at 0x800000000000000, "
            "pages of 16384 KiB, 4 mapped",
        ),
    ],
)
def test_a_step_that_fails_says_what_was_expected(step: str, reason: str) -> None:
    assert run(f"  - {step}\n")[2] == reason


@pytest.mark.parametrize(
    "step",
    [
        "hcall: {name: 0x1c, args: [0x80000000, 0x1000]}",
        "hcall: {name: H_GET_TCE, args: [1, 2], expect: H_PARAMETER}",
        "rtas: {name: 'ibm,query-pe-dma-window', args: [0, 0x8000000, 0x20000000], nret: 5}",
        "expect: {role: hostd, key: locked_vm, at_least: 7, at_most: 7}",
        "linux_ddw: {device: nic, page_size: 16M}",
        "explain: {device: nic, iova: 0x1000, fails: any}",
        "wait: {role: hostd}",
    ],
)
def test_a_step_that_is_as_expected_passes(step: str) -> None:
    assert run(f"  - {step}\n")[2] == ""


def test_the_first_step_that_fails_ends_the_run() -> None:
    runner, system, reason = run("  - wait: {role: notifier}\n  - arm: {}\n")
    assert reason and len(runner.results) == 1 and system.armed == 0


def test_a_move_that_is_not_as_expected_fails() -> None:
    runner, system, reason = run("  - migrate: {}\n  - migrate: {expect: failed}\n  - migrate: {}\n  - arm: {}\n")
    assert reason == "step 2 (migrate): move 3, expected completed" and system.armed == 0
    assert [result.text for result in runner.results] == ["move 1", "move 2", "move 3"]


def test_a_signal_armed_for_later_is_sent_in_mid_replay(tmp_path: Path) -> None:
    trace = tmp_path / "short.trace"
    trace.write_text(
        "".join(f"spapr_iommu_pci_put liobn=0x80000000 ioba={n * 4096:#x} tce=0x3 ret=0\n" for n in range(9))
    )
    _, system, reason = run(f"  - kill: {{role: hostd, at: 5}}\n  - replay: {{trace: {trace}}}\n")
    assert reason == ""
    assert [target.role for target, _ in system.signals] == ["hostd"]


def test_a_replay_that_differs_names_line_and_values(tmp_path: Path) -> None:
    trace = tmp_path / "bad.trace"
    trace.write_text(
        "spapr_iommu_pci_put liobn=0x80000000 ioba=0x1000 tce=0x5003 ret=0\n"
        "spapr_iommu_xlate liobn=0x80000000 0x1000 -> 0x6000 perm=3 mask=0xfff\n"
    )
    reason = run(f"  - replay: {{trace: {trace}}}\n")[2]
    assert reason == "step 0 (replay): line 2, xlate: expected 0x5000 perm=3, seen 0x6000 perm=3"


def test_a_line_that_cannot_be_read_names_the_file(tmp_path: Path) -> None:
    trace = tmp_path / "torn.trace"
    trace.write_text("spapr_iommu_pci_put liobn=0x80000000 io")
    with pytest.raises(Exception, match=r"torn\.trace:1"):
        run(f"  - replay: {{trace: {trace}}}\n")


@pytest.mark.parametrize("name", ["pseries-ddw", "pseries-noddw"])
def test_a_recorded_boot_is_probed_before_and_after_every_unmap(name: str) -> None:
    machine = "" if name == "pseries-ddw" else "machine: {ddw: false}\n"
    steps = f"  - replay: {{trace: {name}, probes: [{{device: nic}}]}}\n"
    runner, system, reason = run(steps, BOOT + machine)
    assert reason == ""
    facts = runner.results[0].facts
    tried = [record.fields for record in system.trace.log.named("dma")]
    assert (
        facts["mismatches"] == 0 and facts["translations_checked"] == {"pseries-ddw": 1032, "pseries-noddw": 2027}[name]
    )
    assert any(each["moved"] for each in tried) and any(each["expected"] is False for each in tried)
    gone = [record.number("iova") for record in system.trace.log.named("unmap_pages")]
    refused = {each["iova"] for each in tried if each["expected"] is False}
    assert all(any(iova is not None and iova <= at < iova + 4096 for at in refused) for iova in gone)
