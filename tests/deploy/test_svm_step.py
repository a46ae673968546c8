"""``svm`` steps: a process of the guest, and a device that works on its addresses."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import run, yaml_lines
from deploy.report import Verdict
from deploy.scenario import Scenario
from vfio_model.errors import ConfigError

UNIT = "{scalable-mode: true, fsts: true, svm: true, device-iotlb: true, pasid-bits: 8}"
FILE = f"""\
name: shared
machine: {{type: q35, ram: 64MiB, iommu: {UNIT}}}
devices:
  - {{id: svm, model: svm, addr: 03.0, attach: remote}}
  - {{id: other, model: svm, addr: 04.0}}
  - {{id: edu, model: edu, addr: 05.0}}
steps:
"""
STEP = "  - svm: {device: svm, test: svm_write}\n"


def ran(text: str, directory: Path) -> Verdict:
    return run.run(yaml_lines.parse(text, "svm.yaml", Scenario), directory, None, lambda *_: None, inline=True)


@pytest.mark.parametrize("attach", ["emulated", "remote"])
def test_what_a_step_counts(attach: str, tmp_path: Path) -> None:
    steps = STEP + STEP.replace("svm_write", "kernel_mem_access")
    verdict = ran(FILE.replace("remote", attach) + steps, tmp_path)
    assert verdict.passed, verdict.reason
    first, second = (step.facts for step in verdict.steps)
    assert first == {"commands": 8, "page_requests": 27, "page_faults": 27, "invalidations": 6, "most_cached": 6}
    assert second["commands"] == 4
    assert "8 command(s), 27 page request(s), 6 invalidation(s), at most 6" in verdict.steps[0].text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (FILE.replace(UNIT, "{}") + STEP, "scalable mode needs a unit that has it"),
        (FILE + STEP.replace("svm_write", "huge_pages"), "no 262144 pages left below 0x4000000"),
    ],
    ids=["a unit that cannot", "less memory than a page"],
)
def test_a_step_that_fails_says_why(text: str, reason: str, tmp_path: Path) -> None:
    verdict = ran(text, tmp_path)
    assert not verdict.passed and reason in verdict.reason


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (STEP.replace("device: svm", "device: edu"), "edu: a edu shares no address space"),
        (STEP + STEP.replace("device: svm", "device: other"), "other: the guest drives svm, and no other svm"),
    ],
)
def test_devices_that_cannot_be_driven(step: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        ran(FILE + step, tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (FILE + STEP.replace("svm_write", "svm_fly"), "test must be one of svm_write, svm_read"),
        (FILE + STEP.replace("device: svm", "device: nobody"), r"steps\[0\].svm: no device has the id nobody"),
        (
            "name: a\ndevices:\n  - {id: svm, model: edu, addr: 02.0}\nsteps:\n" + STEP,
            r"steps\[0\].svm: only a q35 machine has that",
        ),
    ],
)
def test_steps_that_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        yaml_lines.parse(text, "svm.yaml", Scenario)
