"""The operator's command is killed at random points of a run: everything that it started ends, nothing is left."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deploy.runtime_dir import BASE_VARIABLE
from tests.acceleration import kvm
from tests.processes.disturbance import ROUNDS, seeds, told
from tests.processes.rig import until

pytestmark = pytest.mark.machine

MARK = "VFIO_MODEL_TEST_OPERATOR"
"""Environment variable that every process of one run inherits."""
SCENARIO = "linux-ddw-boot"
LATEST_SECONDS = 3.0
"""A run takes a little longer: points lie in start-up, in the replay and in the end."""


@pytest.fixture
def base(runtime_base: Path) -> Iterator[Path]:
    """A place for runtime directories that nobody else uses."""
    path = Path(tempfile.mkdtemp(prefix="o", dir=runtime_base))
    yield path
    path.rmdir()  # fails when something is left in it


def start(base: Path, mark: str) -> subprocess.Popen[bytes]:
    """``vfio-model run``."""
    return subprocess.Popen(
        [sys.executable, "-m", "deploy.cli", "run", SCENARIO, "--no-report", *(["--kvm"] if kvm() else [])],
        env={**os.environ, BASE_VARIABLE: str(base), MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def alive(mark: str) -> list[str]:
    """Processes of the run that ``mark`` names."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())[:100]}")
        except psutil.Error:
            continue
    return found


def pass_the_time(seconds: float, run: subprocess.Popen[bytes]) -> None:
    """Until the point has come, or the run is over."""
    point = time.monotonic() + seconds
    until("the point comes", lambda: time.monotonic() >= point or run.poll() is not None)


@pytest.mark.parametrize("number", ROUNDS)
def test_a_killed_operator_leaves_nothing_behind(base: Path, number: int) -> None:
    for seed in seeds(21000, number):
        with told(seed), start(base, str(seed)) as run:
            pass_the_time(random.Random(seed).uniform(0.0, LATEST_SECONDS), run)
            run.send_signal(signal.SIGKILL)
            run.wait()
            until("every process of the run ends", lambda: not alive(str(seed)))  # noqa: B023
            until("its directory is gone", lambda: not list(base.iterdir()))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_operator_that_is_told_to_end_leaves_nothing_behind(base: Path, number: signal.Signals) -> None:
    with start(base, number.name) as run:
        until("a run is there", lambda: list(base.iterdir()) or run.poll() is not None)
        run.send_signal(number)
        assert run.wait() != 0
    assert not alive(number.name) and not list(base.iterdir())


def test_an_operator_that_was_stopped_goes_on(base: Path) -> None:
    with start(base, "stopped") as run:
        pass_the_time(1.5, run)
        run.send_signal(signal.SIGSTOP)
        pass_the_time(1.0, run)
        run.send_signal(signal.SIGCONT)
        output = run.communicate()[0].decode()
    assert run.returncode == 0 and "PASS" in output.splitlines()[-1], output[-2000:]
    assert not alive("stopped")
