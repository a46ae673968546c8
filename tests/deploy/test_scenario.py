"""The scenario schema: what is accepted, and that every error names file, line and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import shipped, yaml_lines
from deploy.scenario import Scenario
from deploy.scenario_steps import Dma
from vfio_model.errors import ConfigError

HEAD = """\
name: mine
description: a test
devices:
  - id: nic
    model: edu
    attach: assigned
    addr: 02.0
"""


def parse(text: str) -> Scenario:
    return yaml_lines.parse(text, "mine.yaml", Scenario)


def error(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_sizes_are_written_as_people_write_them() -> None:
    scenario = parse(HEAD + "machine: {ram: 1GiB, page_size: 16M}\nhost: {memlock: 0x1000, page_size: 64K}\n")
    assert (scenario.machine.ram, scenario.machine.page_size) == (1 << 30, 1 << 24)
    assert (scenario.host.memlock, scenario.host.page_size) == (0x1000, 1 << 16)


def test_a_pci_address_stays_the_text_that_was_written() -> None:
    assert parse(HEAD).devices[0].addr == "02.0"


def test_a_step_is_known_by_its_key() -> None:
    scenario = parse(HEAD + "steps:\n  - dma: {device: nic, iova: 0x1000, gpa: 0, expect: refused}\n")
    name, action = scenario.steps[0].action
    assert name == "dma" and isinstance(action, Dma) and action.iova == 0x1000


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        (
            "steps:\n  - dma:\n      device: nic\n      iova: many\n      gpa: 0\n",
            "mine.yaml:11: steps[0].dma.iova: Expected int or a size such as 64K, got str 'many'",
        ),
        ("steps:\n  - dma: {iova: 1, gpa: 0, device: 7}\n", "mine.yaml:9: steps[0].dma.device: Expected str, got int"),
        ("machine:\n  ram: 1G\n  cpus: 4\n", "mine.yaml:10: machine: Object contains unknown field cpus"),
        (
            "steps:\n\n  - dma: {device: nic, gpa: 0}\n",
            "mine.yaml:10: steps[0].dma: Object missing required field iova",
        ),
        ("steps:\n  - {}\n", "mine.yaml:9: steps[0]: a step has exactly one action, got none"),
        (
            "steps:\n  - arm: {}\n    unmap: {iova: 0}\n",
            "mine.yaml:9: steps[0]: a step has exactly one action, got unmap and arm",
        ),
        (
            "machine: {ram: 100}\n",
            "mine.yaml:8: machine: ram must be a positive multiple of page_size (65536), not 100",
        ),
        ("host:\n  hpa: random\n", "mine.yaml:9: host.hpa: Invalid enum value 'random' (known: contiguous, scatter)"),
        ("name: again\n", "mine.yaml:8: name: given twice"),
        ("host: [\n", "mine.yaml:9: not YAML: expected the node content, but found '<stream end>'"),
        ("notifier: 3\n", "mine.yaml:8: notifier: Expected str, got int"),
        ("steps:\n  - kill: {}\n", "mine.yaml:9: steps[0].kill: give either role or device"),
    ],
)
def test_an_error_names_file_line_and_field(tail: str, expected: str) -> None:
    assert error(HEAD + tail) == expected


def test_a_step_that_names_no_device_of_the_scenario_is_an_error() -> None:
    text = error(HEAD + "steps:\n  - dma: {device: disk, iova: 1, gpa: 0}\n")
    assert "steps[0].dma: no device has the id disk" in text


def test_an_empty_and_a_missing_file_are_errors(tmp_path: Path) -> None:
    assert error("") == "mine.yaml:1: the file is empty"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        yaml_lines.load(tmp_path / "none.yaml", Scenario)


def test_every_shipped_scenario_fits_the_schema_and_says_what_it_is() -> None:
    found = shipped.scenarios()
    assert {"linux-ddw-boot", "linux-ddw-boot-64k", "linux-noddw-boot", "lost-unmap"} <= {item.name for item in found}
    for item in found:
        assert shipped.load_scenario(item.name).description


def test_an_unknown_scenario_names_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="linux-ddw-boot"):
        shipped.load_scenario("no-such-thing")
