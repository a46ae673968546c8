"""The private runtime directory of one run: ``/tmp/vm-XXXXXXXX``, mode 0700.

Every socket of the run lives in it, so its path is short (an ipc path has at most 107 bytes) and nobody else may look
inside. ``run.json`` in it says which processes belong to the run; ``vfio-model ps`` and ``explain`` find running
guests by it. A pid alone proves nothing after its process has gone, so each is recorded with the kernel's start time.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

PREFIX = "vm-"
BASE_VARIABLE = "VFIO_MODEL_RUNTIME_BASE"
"""Environment variable that puts runtime directories elsewhere than under /tmp; keep the path short."""
RUN_FILE = "run.json"
# Kernel ticks: field 22 of /proc/PID/stat counts from the one after the command's closing parenthesis.
_START_TICKS = 19


class ProcessEntry(msgspec.Struct, frozen=True):
    """One daemon: ``start_ticks`` is field 22 of ``/proc/PID/stat``, which tells a reused pid apart."""

    role: str
    pid: int
    start_ticks: int


class RunFile(msgspec.Struct):
    """What ``run.json`` holds. ``started`` is seconds since the epoch."""

    scenario: str
    started: float
    operator: int
    processes: list[ProcessEntry] = []


def base() -> str:
    """Where runtime directories are made and looked for."""
    return os.environ.get(BASE_VARIABLE, "/tmp")


def create() -> Path:
    """A new private directory (0700); the caller removes it."""
    return Path(tempfile.mkdtemp(prefix=PREFIX, dir=base()))


def write_run_file(directory: Path, run: RunFile) -> None:
    """Replace ``run.json`` in one step: a reader sees the old or the new one, never half."""
    temporary = directory / (RUN_FILE + ".new")
    temporary.write_bytes(msgspec.json.encode(run))
    temporary.rename(directory / RUN_FILE)


def read_run_file(directory: Path) -> RunFile | None:
    """``run.json`` of ``directory``, or None when there is none that can be read."""
    try:
        return msgspec.json.decode((directory / RUN_FILE).read_bytes(), type=RunFile)
    except (OSError, msgspec.MsgspecError):
        return None


def find_runs() -> Iterator[tuple[Path, RunFile]]:
    """The runtime directories of this user, oldest first."""
    found: list[tuple[float, Path, RunFile]] = []
    for path in Path(base()).glob(PREFIX + "*"):
        try:
            owner = path.stat().st_uid
        except OSError:
            continue
        run = read_run_file(path) if owner == os.getuid() else None
        if run is not None:
            found.append((run.started, path, run))
    for _, path, run in sorted(found, key=lambda item: item[0]):
        yield path, run


def start_ticks(pid: int) -> int | None:
    """When ``pid`` started, in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[_START_TICKS])


def state(pid: int) -> str | None:
    """The kernel's state letter of ``pid`` (``R``, ``S``, ``T``, ``Z``…); None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()[0]


def is_same(entry: ProcessEntry) -> bool:
    """Whether the process of ``entry`` still runs (a zombie does not)."""
    return start_ticks(entry.pid) == entry.start_ticks and state(entry.pid) != "Z"


def new_run_file(scenario: str) -> RunFile:
    """The run file of a run that this process starts now."""
    return RunFile(scenario=scenario, started=time.time(), operator=os.getpid())
