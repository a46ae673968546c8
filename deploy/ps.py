"""``vfio-model ps``: the processes of every running scenario of this user, and how they are.

A process is named by the run file; its children are the device processes that hostd started. Health is asked on the
control socket: ``ok`` when the main loop answers within a second, else what the kernel knows (``stopped``, ``gone``)
or ``no answer``. A device process has no control socket: it is ``running`` or ``stopped``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import psutil
from rich.table import Table

from deploy import runtime_dir
from deploy.runtime_dir import ProcessEntry, RunFile

PING_SECONDS = 1.0

Ping = Callable[[Path, str, float], bool]
"""Whether ``role`` of the run in a directory answers within the seconds given."""


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


def collect(ping: Ping, seconds: float = PING_SECONDS) -> list[ProcessRow]:
    """A row for every process of every run, daemons before their children."""
    rows: list[ProcessRow] = []
    for directory, run in runtime_dir.find_runs():
        for entry in run.processes:
            rows += _rows_of(directory, run, entry, ping, seconds)
    return rows


def _rows_of(directory: Path, run: RunFile, entry: ProcessEntry, ping: Ping, seconds: float) -> Iterable[ProcessRow]:
    if not runtime_dir.is_same(entry):
        return [ProcessRow(str(directory), run.scenario, entry.role, entry.pid, "gone")]
    if runtime_dir.state(entry.pid) in ("T", "t"):
        health = "stopped"
    else:
        health = "ok" if ping(directory, entry.role, seconds) else "no answer"
    try:
        process = psutil.Process(entry.pid)
        rows = [_measured(directory, run, entry.role, process, health)]
        for child in process.children(recursive=True):
            if is_helper(child):
                continue
            health = "stopped" if child.status() == psutil.STATUS_STOPPED else "running"
            rows.append(_measured(directory, run, f"{entry.role}/{device_name(child)}", child, health))
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


def is_helper(process: psutil.Process) -> bool:
    """multiprocess keeps a tracker process of its own beside the devices."""
    return any("resource_tracker" in word for word in process.cmdline())


def device_name(process: psutil.Process) -> str:
    """The name that a device process gave itself (``device:NAME``), or ``device``."""
    words = process.cmdline()
    named = [word.removeprefix("device:") for word in words if word.startswith("device:")]
    return named[0] if named else "device"


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
