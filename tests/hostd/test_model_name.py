"""What ``vfio-model serve`` may be given as a class of one's own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.model_name import find_class
from vfio_model.errors import ConfigError

DEVICE = """
from vfio_model.device_api import PCIDevice
{more}
class Mine(PCIDevice):
    VENDOR_ID, DEVICE_ID = 0x1234, NUMBER
"""


@pytest.fixture(autouse=True)
def modules() -> Iterator[None]:
    path, loaded = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - loaded:
        del sys.modules[name]


def test_a_file_is_executed_once(tmp_path: Path) -> None:
    (tmp_path / "one_file.py").write_text(DEVICE.format(more="NUMBER = 1"))
    name = f"{tmp_path}/one_file.py:Mine"
    assert find_class(name) is find_class(name)


def test_a_file_finds_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbour_facts.py").write_text("NUMBER = 2")
    (tmp_path / "one_device.py").write_text(DEVICE.format(more="from neighbour_facts import NUMBER"))
    assert find_class(f"{tmp_path}/one_device.py:Mine").DEVICE_ID == 2


def test_a_file_in_a_package_has_relative_imports(tmp_path: Path) -> None:
    inner = tmp_path / "outer_package" / "inner"
    inner.mkdir(parents=True)
    for folder in inner, inner.parent:
        (folder / "__init__.py").write_text("")
    (inner.parent / "facts.py").write_text("NUMBER = 3")
    (inner / "device.py").write_text(DEVICE.format(more="from ..facts import NUMBER"))
    found = find_class(f"{inner}/device.py:Mine")
    assert (found.DEVICE_ID, found.__module__) == (3, "outer_package.inner.device")


def test_a_file_that_is_called_as_a_module_of_python_hides_nothing(tmp_path: Path) -> None:
    (tmp_path / "signal.py").write_text(DEVICE.format(more="NUMBER = 4"))
    assert find_class(f"{tmp_path}/signal.py:Mine").DEVICE_ID == 4
    assert sys.modules["signal"].__file__ != str(tmp_path / "signal.py")


def test_files_in_the_working_directory_hide_nothing(tmp_path: Path) -> None:
    for name in "signal.py", "socket.py":
        (tmp_path / name).write_text("raise RuntimeError")
    (tmp_path / "mine.py").write_text(DEVICE.format(more="NUMBER = 5"))
    command = [sys.executable, "-P", "-m", "deploy.cli", "serve", "mine.py:Mine", "--socket", "nowhere/x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "cannot listen" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("Yours", r"there is no class 'Yours' \(device classes there: Mine\)"),
        ("NUMBER", r"no subclass of PCIDevice is 'NUMBER' \(device classes there: Mine\)"),
        ("PCIDevices", "there is no class"),
    ],
)
def test_what_is_no_device_is_told_with_what_is(tmp_path: Path, attribute: str, words: str) -> None:
    (tmp_path / "some_file.py").write_text(DEVICE.format(more="NUMBER = 6"))
    with pytest.raises(ConfigError, match=words):
        find_class(f"{tmp_path}/some_file.py:{attribute}")


BROKEN = {
    "an import": ("import vfio_modle", 3, "ModuleNotFoundError: No module named 'vfio_modle'"),
    "a name": ("from vfio_model.device_api import Nothing", 3, "ImportError: cannot import name 'Nothing'"),
    "syntax": ("def broken(:", 3, "SyntaxError: "),
    "an exception": ("raise KeyError('deep')", 3, "KeyError: 'deep'"),
    "a class that cannot be": ("import msgspec; msgspec.json.decode(b'{')", 3, "DecodeError: "),
    "an end": ("import sys; sys.exit(7)", 3, "SystemExit: 7"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_cannot_be_imported_is_told_with_its_line(tmp_path: Path, what: str) -> None:
    more, line, words = BROKEN[what]
    (tmp_path / "broken_file.py").write_text(DEVICE.format(more=more))
    for _ in range(2):
        with pytest.raises(ConfigError) as caught:
            find_class(f"{tmp_path}/broken_file.py:Mine")
        assert str(caught.value).startswith(f"{tmp_path}/broken_file.py:{line}: {words}"), "the second time, too"
        assert f"python {tmp_path}/broken_file.py" in str(caught.value)


def test_what_is_wrong_beside_the_file_is_told_there(tmp_path: Path) -> None:
    (tmp_path / "broken_facts.py").write_text("NUMBER = 1\nNUMBER += None\n")
    (tmp_path / "good_file.py").write_text(DEVICE.format(more="from broken_facts import NUMBER"))
    with pytest.raises(ConfigError, match=r"broken_facts\.py:2: TypeError"):
        find_class(f"{tmp_path}/good_file.py:Mine")


def test_a_module_that_lacks_another_is_not_taken_for_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"needs_more\.py:1: ModuleNotFoundError: .*not_there_at_all"):
        find_class("needs_more:Mine")
    with pytest.raises(ConfigError, match=r"a file is named with its \.py"):
        find_class("nowhere.at.all:Mine")


def test_the_command_says_it_in_a_sentence_and_ends_with_status_2(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(DEVICE.format(more="from vfio_model.device_api import Nothing"))
    command = [sys.executable, "-m", "deploy.cli", "serve", "mine.py:Mine", "--socket", str(tmp_path / "x")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "mine.py:3: ImportError" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 1
