"""What every test shares: a runtime directory per worker, and a look for orphans at the end.

Every process that a test starts inherits one environment variable; when the session is over nothing that bears it may
be alive, and the workers' runtime directories must be empty. Either fails the session; so does a skipped test where CI
is set. ``--kvm`` gives every machine in-kernel acceleration, see :mod:`tests.acceleration`.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.acceleration import Switch

# Examples are the same in every run; a machine under load is no reason to fail.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

SESSION = "VFIO_MODEL_TEST_SESSION"
BASE = "VFIO_MODEL_RUNTIME_BASE"
GRACE_SECONDS = 5.0
LEFT = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kvm", action="store_true", help="machines have in-kernel acceleration where no test says else")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "machine: builds a machine that --kvm accelerates; such a test must bear it")
    config.addinivalue_line(
        "markers", "long: takes a minute; make test-kvm leaves it out, pytest --kvm -m machine does not"
    )
    Switch.on = config.getoption("--kvm")
    if hasattr(config, "workerinput"):  # an xdist worker: the controller has set SESSION; the base is its own
        base = Path(os.environ[BASE]) / config.workerinput["workerid"]
        base.mkdir(mode=0o700)
        os.environ[BASE] = str(base)
        return
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:  # a background job: what tests start must not inherit it
            signal.signal(number, handler)
    os.environ[SESSION] = f"{os.getpid()}-{time.monotonic_ns()}"
    os.environ[BASE] = tempfile.mkdtemp(prefix="vmt-", dir="/tmp")  # short: a socket path holds 107 bytes


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With ``--kvm``, a test over both values of a parameter ``kvm`` has nothing new to say."""
    if Switch.on:
        stated = [item for item in items if "kvm" in getattr(getattr(item, "callspec", None), "params", ())]
        config.hook.pytest_deselected(items=stated)
        items[:] = [item for item in items if item not in stated]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    Switch.asked = False


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    yield
    if Switch.asked and item.get_closest_marker("machine") is None:
        pytest.fail("--kvm decides about a machine of this test: it needs the mark 'machine'", pytrace=False)


def _orphans(session: str) -> list[str]:
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(SESSION) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.info['cmdline'] or [])[:120]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _litter(base: Path) -> list[str]:
    workers = [path for path in base.iterdir() if path.name.startswith("gw") and path.is_dir()]
    places = [base, *workers]
    return [str(path) for place in places for path in place.iterdir() if path not in workers]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    base = Path(os.environ[BASE])
    deadline = time.monotonic() + GRACE_SECONDS
    while (orphans := _orphans(os.environ[SESSION])) and time.monotonic() < deadline:
        time.sleep(0.1)
    litter = _litter(base)
    shutil.rmtree(base, ignore_errors=True)
    left = [f"orphan process: {name}" for name in orphans] + [f"left behind: {path}" for path in litter]
    session.config.stash[LEFT] = left
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter is not None else 0
    if left or (skipped and os.environ.get("CI")):
        session.exitstatus = 4


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(LEFT, [])
    terminalreporter.write_line("orphan check: " + ("nothing left behind" if not left else f"{len(left)} left behind"))
    for line in left:
        terminalreporter.write_line(f"  {line}", red=True)
    if terminalreporter.stats.get("skipped") and os.environ.get("CI"):
        terminalreporter.write_line("a skipped test hides a gap: it is a failure here", red=True)


@pytest.fixture
def runtime_base() -> Path:
    """Where runtime directories of this worker are made; the launcher uses it through the environment."""
    return Path(os.environ[BASE])


@pytest.fixture
def runtime_dir(runtime_base: Path) -> object:
    """A private, short-named runtime directory that is gone after the test."""
    path = Path(tempfile.mkdtemp(prefix="vm-", dir=runtime_base))
    yield path
    shutil.rmtree(path)
