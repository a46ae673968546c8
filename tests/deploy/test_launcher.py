"""The launcher: readiness, unexpected ends, and that nothing is left behind in any path."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import runtime_dir
from deploy.launcher import Launcher, NotReady, ProcessEnded
from tests.deploy.dummies import child_of, dummy, kill, launcher, wait_gone

OPERATOR = """
from deploy.launcher import signals_as_exceptions
from tests.deploy.dummies import operate
with signals_as_exceptions():
    operate()
"""


@pytest.fixture
def run() -> Iterator[Launcher]:
    with launcher() as run:
        yield run


def test_the_directory_is_private_and_says_which_processes_run(run: Launcher) -> None:
    run.start([dummy("one"), dummy("two", stage=1)])
    assert run.directory.stat().st_mode & 0o777 == 0o700
    file = runtime_dir.read_run_file(run.directory)
    assert file is not None and [entry.role for entry in file.processes] == ["one", "two"]
    assert all(runtime_dir.is_same(entry) for entry in file.processes)
    assert run.directory in [path for path, _ in runtime_dir.find_runs()]


def test_after_the_end_no_process_and_no_directory_remains(run: Launcher) -> None:
    run.start([dummy("one", "parent"), dummy("two")])
    pids = [child_of(run, "one"), *(daemon.pid for daemon in run.daemons.values())]
    run.stop()
    assert all(wait_gone(pid) for pid in pids)
    assert not run.directory.exists()
    assert run.leftovers == []


def test_a_daemon_that_ends_at_start_is_reported_with_its_status_and_last_lines(run: Launcher) -> None:
    with pytest.raises(ProcessEnded) as caught:
        run.start([dummy("one", "crash")])
    assert "one has ended: exit status 1" in str(caught.value)
    assert caught.value.lines[-1] == "boom: no such table"


def test_a_daemon_that_says_nothing_is_not_ready(run: Launcher) -> None:
    run.ready_seconds = 0.2
    with pytest.raises(NotReady, match="one did not answer"):
        run.start([dummy("one", "mute")])


def test_an_unexpected_end_is_reported_once_with_its_signal(run: Launcher) -> None:
    run.start([dummy("one")])
    run.check()
    kill(run.daemons["one"])
    with pytest.raises(ProcessEnded, match="one has ended: killed by SIGKILL"):
        run.check()
    run.check()


def test_an_expected_end_is_no_error(run: Launcher) -> None:
    run.start([dummy("one")])
    run.daemons["one"].expected_end = True
    kill(run.daemons["one"])
    run.check()


def test_a_daemon_is_started_afresh_when_the_scenario_says_so() -> None:
    with launcher(restart=True) as run:
        run.start([dummy("one")])
        first = run.daemons["one"].pid
        kill(run.daemons["one"])
        run.check()
        run.wait_ready("one")
        assert run.daemons["one"].pid != first and run.restarts == {"one": 1}
        file = runtime_dir.read_run_file(run.directory)
        assert file is not None and [entry.pid for entry in file.processes] == [run.daemons["one"].pid]


@pytest.mark.parametrize("mood", ["stubborn", "stopped"])
def test_a_daemon_that_does_not_end_is_killed_and_named(mood: str) -> None:
    with launcher() as run:
        run.start([dummy("one", mood)])
        pid = run.daemons["one"].pid
        if mood == "stopped":
            os.kill(pid, signal.SIGSTOP)
            os.waitid(os.P_PID, pid, os.WSTOPPED)
    assert wait_gone(pid)
    assert run.leftovers == ["one"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_when_the_operator_ends_everything_ends(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OPERATOR], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as operator:
        assert operator.stdout is not None
        directory, *pids = operator.stdout.readline().split()
        operator.send_signal(number)
        operator.wait(20)
    assert all(wait_gone(int(pid)) for pid in pids)  # the last is the watcher, which removes the directory
    assert not Path(directory).exists()
