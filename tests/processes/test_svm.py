"""The user program's ten tests on real processes: the device inside guestd, and in a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from deploy import run, shipped
from deploy.scenario import Scenario
from deploy.scenario_steps import Step, Svm
from vfio_model.guest_drivers import svm_program

SCENARIO = "svm-demo"
MOST_CACHED = 8
"""Translations of a write of 14 MiB and 4 KiB by pages of 2 MiB."""


def test_the_demo_has_every_test_of_the_program() -> None:
    steps = [step.svm for step in shipped.load_scenario(SCENARIO).steps]
    assert [step.test for step in steps if isinstance(step, Svm)] == [*svm_program.TESTS]


def facts_of(scenario: Scenario) -> dict[str, dict[str, int | str | bool | float]]:
    """By test, of a run that passes and leaves nothing."""
    verdict = run.run(scenario, Path(), None, lambda *_: None)
    assert verdict.last_line == f"PASS {SCENARIO}", verdict.reason
    assert verdict.leftovers == []
    remote = scenario.devices[0].attach == "remote"
    assert ("svm" in {part.role for part in verdict.processes}) is remote
    return {step.text.split(":")[0]: step.facts for step in verdict.steps}


def test_the_program_with_the_device_in_its_own_process() -> None:
    facts = facts_of(shipped.load_scenario(SCENARIO))
    assert [*facts] == [*svm_program.TESTS]
    assert facts["svm_write"] == {**facts["svm_write"], "commands": 8, "page_requests": 27, "invalidations": 6}
    assert facts["huge_pages"] == {**facts["huge_pages"], "page_requests": 10, "most_cached": MOST_CACHED}
    assert facts["interrupt_range"]["page_requests"] == facts["interrupt_range"]["commands"] == 256


def test_the_program_with_the_device_in_guestd() -> None:
    scenario = shipped.load_scenario(SCENARIO)
    scenario.devices[0].attach = "emulated"
    tests = [test for test in svm_program.TESTS if test not in ("huge_pages", "pri_stress")]
    scenario.steps = [Step(svm=Svm(device="svm", test=test)) for test in tests]
    assert [*facts_of(scenario)] == tests


@pytest.mark.parametrize("dma", ["mapped", "message"])
def test_a_device_that_is_passed_through_without_a_pasid_keeps_its_connection(
    dma: Literal["mapped", "message"],
) -> None:
    """Its first message interrupt makes the unit find the pass-through, while the device is being answered."""
    scenario = shipped.load_scenario(SCENARIO)
    scenario.devices[0].dma = dma
    tests = ["svm_write", "permission_error", "stack_operations"]
    scenario.steps = [Step(svm=Svm(device="svm", test=test)) for test in tests]
    assert [*facts_of(scenario)] == tests
