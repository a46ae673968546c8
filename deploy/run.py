"""One run from beginning to end: start, steps, verdict, report, and nothing left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from deploy import assemble, events, live, report
from deploy.events import Log
from deploy.inline.system import InlineSystem, StartRefused, check
from deploy.launcher import Launcher, NotReady, ProcessEnded
from deploy.link import Link
from deploy.live import LiveSystem
from deploy.ps import children
from deploy.report import ProcessPart, Verdict
from deploy.runner import Runner
from deploy.scenario import Scenario
from deploy.system import System
from vfio_model.errors import ConfigError, DeadlineExceeded, VfioModelError

Progress = Callable[[str, int, int], None]


class StartedSystem(System, Protocol):
    """A system that is brought up by firmware and closed at the end."""

    def bring_up(self) -> None:
        """What firmware does."""

    def close(self) -> None:
        """Give everything back."""


@dataclass
class _Run:
    """The state of one run; :meth:`verdict` sums it up."""

    scenario: Scenario
    beside: Path
    progress: Progress
    began_ns: int = field(default_factory=time.monotonic_ns)
    start_seconds: float = 0.0
    reason: str = ""
    runner: Runner | None = None
    parts: list[ProcessPart] = field(default_factory=list)

    def _seconds(self) -> float:
        return (time.monotonic_ns() - self.began_ns) / 1e9

    def checked_progress(self, action: str, done: int, total: int) -> None:
        """Show progress, and end a run that takes too long."""
        self.progress(action, done, total)
        self.check_time()

    def check_time(self) -> None:
        """:raise DeadlineExceeded: when the run has taken longer than its scenario allows."""
        if self._seconds() > self.scenario.timeout:
            raise DeadlineExceeded(f"scenario {self.scenario.name}", "its steps", self.scenario.timeout)

    def start(self, launcher: Launcher) -> bool:
        """Start every process; whether the steps can begin."""
        return self.started(lambda: launcher.start(assemble.daemons(self.scenario, launcher.directory)))

    def started(self, start: Callable[[], None]) -> bool:
        """``start()``; whether the steps can begin. A refusal that the scenario expects is a success."""
        wanted = self.scenario.start_fails
        if wanted is not None and self.scenario.kind not in wanted.only:
            wanted = None
        try:
            start()
        except (ProcessEnded, NotReady, StartRefused) as error:
            self.reason = str(error)
            if wanted is not None and error.role == wanted.role and wanted.message in str(error):
                self.reason = ""
            return False
        finally:
            self.start_seconds = self._seconds()
        if wanted is not None:
            self.reason = f"{wanted.role} was expected to refuse at start, saying {wanted.message!r}; it did not"
            return False
        return True

    def steps(self, system: StartedSystem) -> None:
        """Run the steps, then close ``system``; sets :attr:`reason` when one fails."""
        try:
            self.runner = Runner(self.scenario, system, self.beside, self.checked_progress)
            system.bring_up()
            self.reason = self.runner.run()
        except ConfigError:
            raise
        except VfioModelError as error:
            self.reason = str(error)
        finally:
            system.close()

    def count_events(self, log: Log) -> None:
        """Note in each process's part how many events it has written."""
        counts: dict[str, int] = {}
        for record in log.records:
            counts[record.role] = counts.get(record.role, 0) + 1
        for part in self.parts:
            part.events = counts.get(part.role.replace("hostd/", "device-"), 0)

    def verdict(self, log: Log) -> Verdict:
        """The outcome, once every process has ended."""
        verdict = Verdict(
            name=self.scenario.name,
            description=self.scenario.description,
            passed=not self.reason,
            reason=self.reason,
            seconds=round(self._seconds(), 3),
            start_seconds=round(self.start_seconds, 3),
            processes=self.parts,
            torn_log_lines=log.torn,
        )
        if self.runner is not None:
            verdict.totals, verdict.steps = self.runner.totals, self.runner.results
            verdict.findings = self.runner.findings
            if self.runner.first_dma_ns is not None:
                verdict.first_dma_seconds = round((self.runner.first_dma_ns - self.began_ns) / 1e9, 3)
        return verdict


def run(
    scenario: Scenario,
    beside: Path,
    folder: Path | None,
    progress: Progress,
    *,
    keep: bool = False,
    inline: bool = False,
) -> Verdict:
    """Run ``scenario``, whose file is in the folder ``beside``; the report goes to ``folder`` (None: nowhere).

    With ``keep`` everything stays after the last step until Ctrl-C.

    :raise ConfigError: when the scenario asks for what does not exist.
    """
    state = _Run(scenario, beside, progress)
    if inline:
        return _run_inline(state, folder, keep=keep)
    restart = scenario.restart == "on-failure"
    with Launcher(scenario.name, live.connect, restart=restart) as launcher:
        progress("start", 0, 0)
        if state.start(launcher):
            state.steps(LiveSystem(scenario, launcher, state.check_time))
        if keep:
            _wait_for_operator(launcher, progress)
        state.parts = _measure(launcher)
        ends = launcher.end()
        for part in state.parts:
            part.ended = ends.get(part.role, part.ended)
            part.restarts = launcher.restarts.get(part.role, 0)
        log = events.read(launcher.directory)
        state.count_events(log)
        verdict = state.verdict(log)
        verdict.leftovers = launcher.leftovers
        if folder is not None:
            _write_report(folder, verdict, log, sorted(launcher.directory.glob("*.log")))
    return verdict


def _run_inline(state: _Run, folder: Path | None, *, keep: bool) -> Verdict:
    """All roles in this process, which is the one that the verdict lists."""
    check(state.scenario)
    if keep:
        raise ConfigError("--keep and --inline exclude each other: nothing would be left running to look at")
    state.progress("start", 0, 0)
    system: InlineSystem | None = None

    def start() -> None:
        nonlocal system
        system = InlineSystem(state.scenario, state.check_time)

    log = Log([])
    if state.started(start) and system is not None:
        state.steps(system)
    if system is not None:
        system.close()
        log = system.log()
    part = ProcessPart("inline", os.getpid(), events=len(log.records), ended="")
    _fill(part, psutil.Process())
    state.parts = [part]
    verdict = state.verdict(log)
    if folder is not None:
        _write_report(folder, verdict, log, [])
    return verdict


def _write_report(folder: Path, verdict: Verdict, log: Log, logs: list[Path]) -> None:
    try:
        report.write(folder, verdict, log, logs)
    except OSError as error:
        raise ConfigError(f"the report cannot be written: {error.strerror}", where=str(folder)) from error


def _wait_for_operator(launcher: Launcher, progress: Progress) -> None:
    progress(f"running in {launcher.directory}; Ctrl-C ends it", 0, 0)
    try:
        while True:
            launcher.check()
            signal.sigtimedwait([], 0.2)
    except (KeyboardInterrupt, VfioModelError):
        return


def _measure(launcher: Launcher) -> list[ProcessPart]:
    """What each process has used so far, daemons before the devices that they run."""
    parts: list[ProcessPart] = []
    names = _device_names(launcher)
    for role, daemon in launcher.daemons.items():
        parts.append(ProcessPart(role, daemon.pid))
        try:
            process = psutil.Process(daemon.pid)
            _fill(parts[-1], process)
            for child in children(process):
                parts.append(ProcessPart(f"{role}/{names.get(child.pid, 'device')}", child.pid))
                _fill(parts[-1], child)
        except psutil.Error:
            continue  # it ended while we looked
    return parts


def _device_names(launcher: Launcher) -> dict[int, str]:
    """Which device a child of hostd is, by pid; nothing when hostd cannot say."""
    daemon = launcher.daemons.get("hostd")
    if daemon is None or daemon.ended or daemon.stopped:
        return {}
    link = Link(launcher.directory, "hostd", seconds=1)
    try:
        return live.device_pids(link)
    except VfioModelError:
        return {}
    finally:
        link.close()


def _fill(part: ProcessPart, process: psutil.Process) -> None:
    times = process.cpu_times()
    part.cpu_seconds = round(times.user + times.system, 3)
    part.peak_rss = _peak_rss(process)


def _peak_rss(process: psutil.Process) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return int(process.memory_info().rss)
