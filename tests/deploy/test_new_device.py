"""``vfio-model new-device``: what it makes works as it is, and what it cannot make it refuses in a sentence."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.cli import invoke
from deploy.commands.new_device import MAX_NAME
from tests.deploy.raw_client import RawClient, served

ROOT = Path(__file__).parents[2]
LONGEST = ("a_name_" * MAX_NAME)[: MAX_NAME - 1] + "x"


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=100, env={**os.environ, **environment}, check=False
    )


@pytest.mark.parametrize("name", ["my_card", LONGEST])
def test_its_own_test_passes_and_the_checkers_have_nothing_to_say(tmp_path: Path, name: str) -> None:
    assert invoke(["new-device", name, "--directory", str(tmp_path)]) == 0
    folder = tmp_path / name
    assert sorted(path.name for path in folder.iterdir()) == ["__init__.py", "device.py", "regs.py", f"test_{name}.py"]
    tools = [
        ("pytest", "-q", "-p", "no:cacheprovider", name),
        ("ruff", "check", "--no-cache", "--config", str(ROOT / "pyproject.toml"), name),
        ("ruff", "format", "--no-cache", "--config", str(ROOT / "pyproject.toml"), "--check", name),
    ]
    if name != LONGEST:  # types are the same ones
        tools.append(("mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), name))
    for tool, *arguments in tools:
        done = run(sys.executable, "-m", tool, *arguments, cwd=tmp_path, MYPYPATH=str(ROOT))
        assert done.returncode == 0, f"{tool}: {done.stdout}{done.stderr}"
        if tool == "pytest":
            assert "7 passed" in done.stdout


def test_it_is_served_as_the_command_says(runtime_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["new-device", "my_card", "--directory", str(runtime_dir), "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["class"] == "MyCard" and all(Path(path).is_file() for path in made["files"])
    path = runtime_dir / "card.sock"
    with served(f"{made['device']},delay_ns=0", path), RawClient(path) as client:
        assert client.read(0, 0x00, 4) == 0xCAFE0001
        client.write(0, 0x0C, 4, 8)
        client.write(0, 0x10, 4, 1)
        client.wait(lambda: client.read(0, 0x14, 4) == 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("My-Card", "no name for a package (lower-case letters"),
        ("../up", "no name for a package"),
        ("", "no name for a package"),
        ("7up", "no name for a package"),
        ("größe", "no name for a package"),
        ("a" * (MAX_NAME + 1), f"at most {MAX_NAME}"),
        ("lambda", "a word of Python's"),
        ("match", "a word of Python's"),
        ("edu", "there is a model 'edu' already"),
        ("json", "there is a Python module 'json' already"),
        ("vfio_model", "there is a Python module 'vfio_model' already"),
        ("there", "it exists already (nothing was written)"),
        ("file", "it exists already"),
    ],
)
def test_what_it_cannot_make(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("kept")
    (tmp_path / "file").write_text("kept")
    assert invoke(["new-device", name, "--directory", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    kept = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert kept == ["file", "there", "there/mine"]


def test_a_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    assert invoke(["new-device", "my_card", "--directory", str(tmp_path / "file" / "deep")]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_templates_and_types_are_in_the_package() -> None:
    """The data of the distribution, as ``pyproject.toml`` states it."""
    for package, pattern in ("deploy", "skeleton/*.txt"), ("vfio_model", "py.typed"), ("hostd", "py.typed"):
        assert list((ROOT / package).glob(pattern))
        assert f'"{pattern}"' in (ROOT / "pyproject.toml").read_text()
    assert importlib.metadata.version("vfio-model")


def test_a_state_that_does_not_fit_its_description_is_told_when_it_is_served(
    runtime_dir: Path,
) -> None:
    assert invoke(["new-device", "my_card", "--directory", str(runtime_dir)]) == 0
    device = runtime_dir / "my_card" / "device.py"
    device.write_text(device.read_text().replace('"remaining_ns": self', '"remaining": self'))
    done = run(sys.executable, "-m", "deploy.cli", "serve", f"{device}:MyCard", "--socket", "x", cwd=runtime_dir)
    assert done.returncode == 2
    assert done.stderr == "hostd: MyCard.export_state: my_card: the state has no 'remaining_ns'\n"
