"""The command line: exit status, errors in one sentence, JSON, and that help imports nothing heavy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from deploy import assemble, cli, shipped
from hostd.topology_file import read_topology


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = cli.invoke(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.mark.parametrize("name", ["run", "scenarios", "explain", "ps"])
def test_every_command_has_help_and_json(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None and command.help
    assert any("--json" in option.opts for option in command.params)


def test_scenarios_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = said(capsys, "scenarios", "--json")
    assert status == 0 and {each["name"] for each in json.loads(out)} == set(shipped.scenario_names())


def test_a_wrong_scenario_is_status_2_and_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\nsteps:\n  - dma: {device: nic, iova: many, gpa: 0}\n")
    status, out, err = said(capsys, "run", str(file))
    assert (status, out) == (2, "")
    assert err == f"error: {file}:3: steps[0].dma.iova: Expected int or a size such as 64K, got str 'many'\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("run", "nope"), "no scenario is called nope"),
        (("run",), "Missing argument 'SCENARIO'"),
        (("frobnicate",), "No such command 'frobnicate'"),
        (("explain", "nic", "many"), "Expected int or a size"),
        (("explain", "nic", "0x1000", "--dir", "/nonexistent"), "no run is described there"),
    ],
)
def test_what_makes_no_sense_is_status_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], text: str
) -> None:
    status, _, err = said(capsys, *arguments)
    assert status == 2 and text in err and "Traceback" not in err


def test_help_imports_neither_zmq_nor_numpy_nor_rich() -> None:
    code = (
        "import sys, deploy.cli as c\nc.invoke(['--help'])\nprint({'zmq', 'numpy', 'rich', 'yaml'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize("name", shipped.scenario_names())
def test_the_files_of_every_shipped_scenario_are_what_the_daemons_read(name: str, tmp_path: Path) -> None:
    scenario = shipped.load_scenario(name)
    roles = [spec.role for spec in assemble.daemons(scenario, tmp_path)]
    assert roles[0] == "hostd" and roles[-1] == "guestd" and ("interposer" in roles) == bool(scenario.interpose)
    groups = read_topology(tmp_path / "hostd.json", None).validate().groups
    config = json.loads((tmp_path / "guestd.json").read_bytes())
    names = {device.name for group in groups for device in group.devices}
    copies = {name for _, _, name in assemble.assigned(scenario, 1)} if assemble.copies(scenario) > 1 else set()
    assert copies <= names
    assert names - copies == {device["host"] for device in config["devices"] if device["attach"] == "assigned"}
