"""``vfio-model ps``: the processes of every running scenario of this user, and how they are.

A process is named by the run file; its children are the device processes that hostd started. Health is asked on the
control socket: ``ok`` when the main loop answers within a second, else what the kernel knows (``stopped``, ``gone``)
or ``no answer``. A device process has no control socket: it is ``running`` or ``stopped``.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import psutil
from rich.table import Table

from deploy import runtime_dir
from deploy.runtime_dir import ProcessEntry, RunFile

PING_SECONDS = 1.0


class Health(msgspec.Struct):
    """What a daemon said. ``alive`` is None for one without a control socket; ``devices`` names its children by pid."""

    alive: bool | None = False
    devices: dict[int, str] = {}


Ask = Callable[[Path, str, float], Health]
"""Asks ``role`` of the run in a directory how it is, for at most the seconds given."""


class ProcessRow(msgspec.Struct):
    """One process. ``rss`` in bytes, ``cpu_seconds`` user and system time together, ``uptime`` in seconds."""

    run: str
    scenario: str
    role: str
    pid: int
    health: str
    rss: int = 0
    cpu_seconds: float = 0.0
    cpu_percent: float = 0.0
    fds: int = 0
    uptime: float = 0.0


def collect(ask: Ask, seconds: float = PING_SECONDS) -> list[ProcessRow]:
    """A row for every process of every run, daemons before their children."""
    rows: list[ProcessRow] = []
    for directory, run in runtime_dir.find_runs():
        for entry in run.processes:
            rows += _rows_of(directory, run, entry, ask, seconds)
    return rows


def _rows_of(directory: Path, run: RunFile, entry: ProcessEntry, ask: Ask, seconds: float) -> Iterable[ProcessRow]:
    if not runtime_dir.is_same(entry):
        return [ProcessRow(str(directory), run.scenario, entry.role, entry.pid, "gone")]
    said = Health()
    if runtime_dir.state(entry.pid) in ("T", "t"):
        health = "stopped"
    else:
        said = ask(directory, entry.role, seconds)
        health = {True: "ok", False: "no answer", None: "running"}[said.alive]
    try:
        process = psutil.Process(entry.pid)
        rows = [_measured(directory, run, entry.role, process, health)]
        for child in children(process):
            health = "stopped" if child.status() == psutil.STATUS_STOPPED else "running"
            role = f"{entry.role}/{said.devices.get(child.pid, 'device')}"
            rows.append(_measured(directory, run, role, child, health))
    except psutil.NoSuchProcess:
        return [ProcessRow(str(directory), run.scenario, entry.role, entry.pid, "gone")]
    return rows


def _measured(directory: Path, run: RunFile, role: str, process: psutil.Process, health: str) -> ProcessRow:
    with process.oneshot():
        times = process.cpu_times()
        uptime = max(time.time() - process.create_time(), 1e-3)
        cpu = times.user + times.system
        return ProcessRow(
            run=str(directory),
            scenario=run.scenario,
            role=role,
            pid=process.pid,
            health=health,
            rss=process.memory_info().rss,
            cpu_seconds=round(cpu, 2),
            cpu_percent=round(100 * cpu / uptime, 1),
            fds=process.num_fds(),
            uptime=round(uptime, 1),
        )


def children(process: psutil.Process) -> list[psutil.Process]:
    """The processes below ``process``, without the tracker that multiprocess keeps beside its own."""
    found = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if not any("resource_tracker" in word for word in child.cmdline()):
                found.append(child)
    return found


def table(rows: list[ProcessRow]) -> Table:
    """The rows as a person reads them."""
    view = Table(box=None, pad_edge=False)
    for heading in ("RUN", "SCENARIO", "ROLE"):
        view.add_column(heading, overflow="fold")
    for heading in ("PID", "RSS MiB", "CPU s", "CPU %", "FDS", "UP s"):
        view.add_column(heading, justify="right")
    view.add_column("HEALTH")
    for row in rows:
        view.add_row(
            row.run,
            row.scenario,
            row.role,
            str(row.pid),
            f"{row.rss / (1 << 20):.1f}",
            f"{row.cpu_seconds:.2f}",
            f"{row.cpu_percent:.1f}",
            str(row.fds),
            f"{row.uptime:.1f}",
            {"ok": "[green]ok[/]", "running": "[green]running[/]"}.get(row.health, f"[red]{row.health}[/]"),
        )
    return view
