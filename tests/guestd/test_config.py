"""The configuration file: what is missing has a default, what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestd.config import UNLIMITED, GuestConfig, load
from vfio_model.errors import ConfigError


def write(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "guest.json"
    path.write_text(json.dumps(value))
    return path


def test_defaults(tmp_path: Path) -> None:
    config = load(write(tmp_path, {}))
    assert config == GuestConfig()
    assert config.machine.dma_options(config.machine.phbs[0]).pgsz == 0x0121_1000
    assert config.memlock_bytes == UNLIMITED and config.host_page == 65536


def test_everything_said(tmp_path: Path) -> None:
    machine = {"type": "pseries", "ram": 1 << 24, "page_size": 4096, "ddw": False, "pgsz": [4096, 65536], "memlock": 5}
    device = {"id": "nic", "model": "edu", "attach": "assigned", "addr": "02.0", "host": "0000:01:00.0", "group": 26}
    config = load(
        write(tmp_path, {"machine": machine, "devices": [device], "notifier": "inline", "host_page_size": 4096})
    )
    assert config.machine.dma_options(config.machine.phbs[0]).pgsz == 0x11000
    assert config.memlock_bytes == 5 and config.host_page == 4096
    assert config.devices[0].group_path == "/dev/vfio/26"


def test_the_clients_own_limit_comes_first(tmp_path: Path) -> None:
    config = load(write(tmp_path, {"machine": {"memlock": 5}, "memlock": 7}))
    assert config.memlock_bytes == 7


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ({"machine": {"ram": 100}}, "ram"),
        ({"machine": {"page_size": 3000}}, "page_size"),
        ({"machine": {"colour": 1}}, "colour"),
        ({"devices": [{"id": "a", "addr": "1"}]}, "model"),
        ({"devices": [{"id": "a", "addr": "1", "attach": "assigned"}]}, "group"),
        ({"devices": [{"id": "a", "addr": "1", "attach": "remote"}]}, "socket"),
        ({"devices": [{"id": "a", "model": "edu", "addr": "1"}] * 2}, "two devices"),
        ([], "object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, value: object, word: str) -> None:
    with pytest.raises(ConfigError, match=word) as caught:
        load(write(tmp_path, value))
    assert "guest.json" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "none.json")
