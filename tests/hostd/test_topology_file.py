"""The host's topology from a file: what is wrong is named with file and field."""

from __future__ import annotations

from pathlib import Path

import pytest

from hostd.device_shell import requester_id
from hostd.topology_file import DEFAULT_TOPOLOGY, read_topology
from vfio_model.errors import ConfigError


def test_without_a_file_there_is_one_group_with_an_edu() -> None:
    assert read_topology(None) == DEFAULT_TOPOLOGY
    assert read_topology(None, "scatter").hpa == "scatter"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "truncated"),
        ('{"groups": [{"id": "x"}]}', "$.groups[0].id"),
        ('{"groups": [{"id": 1}, {"id": 1}]}', "more than once"),
        ('{"host_page_size": 5}', "host_page_size"),
    ],
)
def test_a_wrong_file_is_named_with_its_field(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "topology.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"topology\.json") as refused:
        read_topology(path)
    assert what in str(refused.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        read_topology(tmp_path / "nowhere.json")


def test_a_requester_id_is_bus_and_devfn() -> None:
    assert requester_id("0000:01:02.3") == 0x113
    assert requester_id("mine") == 0
