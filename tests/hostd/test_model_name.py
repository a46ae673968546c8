"""What ``vfio-model serve`` may be given as a class of one's own."""

from __future__ import annotations

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
