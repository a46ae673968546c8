"""``ps``: rows for live, stopped, silent and dead daemons, and for the processes below them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import ps
from deploy.launcher import Launcher
from deploy.ps import Health, ProcessRow
from tests.deploy.dummies import DummyControl, child_of, dummy, kill, launcher


def ask(directory: Path, role: str, seconds: float) -> Health:
    if role == "three":
        return Health(alive=None)
    child = int((directory / "one.child").read_text())
    return Health(DummyControl(directory, role).hello(seconds), {child: "edu"})


def rows(run: Launcher, seconds: float = 10) -> dict[str, ProcessRow]:
    return {row.role: row for row in ps.collect(ask, seconds) if row.run == str(run.directory)}


@pytest.fixture
def run() -> Iterator[Launcher]:
    with launcher() as run:
        run.start([dummy("one", "parent"), dummy("two")])
        yield run


def test_a_live_daemon_is_ok_and_measured(run: Launcher) -> None:
    row = rows(run)["one"]
    assert (row.health, row.scenario, row.pid) == ("ok", "dummies", run.daemons["one"].pid)
    assert row.rss > 1 << 20 and row.fds > 3 and row.uptime > 0


def test_its_children_are_listed_below_it(run: Launcher) -> None:
    assert rows(run)["one/edu"].pid == child_of(run, "one")


def test_a_stopped_daemon_is_stopped_and_a_dead_one_gone(run: Launcher) -> None:
    pid = run.daemons["one"].pid
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)
    kill(run.daemons["two"])
    found = rows(run)
    assert (found["one"].health, found["two"].health) == ("stopped", "gone")


def test_a_daemon_that_does_not_answer_is_said_so(run: Launcher) -> None:
    found = {row.role: row.health for row in ps.collect(lambda *_: Health(), 0) if row.run == str(run.directory)}
    assert found["one"] == "no answer"


def test_a_daemon_without_a_control_socket_is_only_known_to_run(run: Launcher) -> None:
    run.start([dummy("three")])
    assert rows(run)["three"].health == "running"


def test_the_table_has_a_line_for_each(run: Launcher) -> None:
    assert ps.table(list(rows(run).values())).row_count == 3
