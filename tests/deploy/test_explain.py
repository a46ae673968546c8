"""``explain`` combines what the daemons read in their tables; here they are played by the test."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from deploy import explain, runtime_dir
from deploy.explain import DeviceInfo, choose_device, choose_run
from protocols.control.messages import Command, DeviceList, Explain
from vfio_model.errors import ConfigError, RemoteProtocolError

GOOD = {"steps": [{"what": "TCE 0x3", "value": "0x200003", "ok": True}], "result": 0x200000, "perm": "rw"}
BAD = {"steps": [{"what": "window", "value": "0"}, {"what": "TCE 0x3", "value": "0: not mapped", "ok": False}]}
NIC = DeviceInfo("nic", "edu", "00:02.0", "assigned", "0000:01:00.0")
CACHE = DeviceInfo("cache", "edu", "00:03.0", "remote")


class Daemon:
    """Answers every Explain with ``answer`` and remembers whom it was asked about."""

    def __init__(self, role: str, answer: dict[str, object]) -> None:
        self.role, self.answer = role, answer
        self.asked: list[Command] = []

    def document(self, command: Command) -> dict[str, object]:
        self.asked.append(command)
        if isinstance(command, DeviceList):
            return {"devices": [{"id": "nic", "model": "edu", "address": "00:02.0", "more": 1}]}
        return self.answer


@pytest.mark.parametrize(
    ("guest", "host", "fails", "disagree"),
    [
        (GOOD, GOOD, "none", ""),
        (BAD, BAD, "stage-1", ""),
        (GOOD, BAD, "stage-2", "refused"),
        (BAD, GOOD, "stage-1", "took back"),
    ],
)
def test_the_first_stage_that_fails_is_named(
    guest: dict[str, object], host: dict[str, object], fails: str, disagree: str
) -> None:
    ours, theirs = Daemon("guestd", guest), Daemon("hostd", host)
    found = explain.explain(ours, theirs, NIC, 0x3000)  # type: ignore[arg-type]
    assert found.fails == fails and (disagree in found.disagreement) and bool(disagree) == bool(found.disagreement)
    assert found.entry == ("" if fails == "none" else "TCE 0x3: 0: not mapped")
    assert theirs.asked == [Explain("0000:01:00.0", 0x3000)] and ours.asked == [Explain("00:02.0", 0x3000)]


def test_a_device_that_is_not_assigned_has_no_second_stage() -> None:
    theirs = Daemon("hostd", GOOD)
    found = explain.explain(Daemon("guestd", GOOD), theirs, CACHE, 0x3000)  # type: ignore[arg-type]
    assert found.host is None and theirs.asked == []


def test_both_walks_are_shown_step_by_step() -> None:
    found = explain.explain(Daemon("guestd", BAD), Daemon("hostd", GOOD), NIC, 0x3000)  # type: ignore[arg-type]
    text = StringIO()
    explain.show(found, Console(file=text, width=140))
    lines = text.getvalue().splitlines()
    assert "    2. FAIL TCE 0x3: 0: not mapped" in lines and "    = 0x200000 rw" in lines
    assert lines[-1] == "fails in stage-1: TCE 0x3: 0: not mapped"


def test_an_answer_of_another_shape_is_the_daemons_error() -> None:
    with pytest.raises(RemoteProtocolError, match="guestd"):
        explain.explain(Daemon("guestd", {"steps": 3}), Daemon("hostd", GOOD), NIC, 0)  # type: ignore[arg-type]


def test_a_device_is_chosen_by_id_or_address() -> None:
    known = explain.devices(Daemon("guestd", {}))  # type: ignore[arg-type]
    assert choose_device(known, "nic").id == choose_device(known, "02.0").id == choose_device(known, "00:02.0").id
    with pytest.raises(ConfigError, match=r"no device disk \(it has: nic at 00:02.0\)"):
        choose_device(known, "disk")


def test_a_run_is_chosen_when_it_is_the_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(runtime_dir.BASE_VARIABLE, str(tmp_path))
    with pytest.raises(ConfigError, match="no guest is running"):
        choose_run(None)
    file = runtime_dir.new_run_file("mine")
    us = runtime_dir.ProcessEntry("guestd", file.operator, runtime_dir.start_ticks(file.operator) or 0)
    file.processes = [us]
    first, second = runtime_dir.create(), runtime_dir.create()
    runtime_dir.write_run_file(first, file)
    assert choose_run(None) == choose_run(str(first)) == first
    runtime_dir.write_run_file(second, file)
    with pytest.raises(ConfigError, match="2 guests are running"):
        choose_run(None)
