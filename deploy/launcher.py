"""Starts the daemons of a run, watches them, and ends them in every path.

A run has a private runtime directory. Daemons are commands, each in its own session with its death tied to ours;
readiness is an answer to ``hello`` on the control socket, never a delay. While anything waits, :meth:`Launcher.check`
looks at the pidfds: the unexpected end of a process is reported with its exit status and its last log lines, or the
process is started afresh when the scenario says so. Leaving the ``with`` block (normally, by an exception, by Ctrl-C
or SIGTERM) ends everything and removes the directory; should this process be killed, the watcher does it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

from deploy import runtime_dir, watcher
from deploy.daemon import Daemon
from vfio_model.errors import VfioModelError

READY_SECONDS = 20.0
QUIT_SECONDS = 3.0
TERM_SECONDS = 1.0
MAX_RESTARTS = 5
"""A daemon that ends more often than this is not started again."""
_SLICE_SECONDS = 0.05


class ProcessEnded(VfioModelError):
    """A daemon has ended that should run. ``role``, ``how`` (status or signal) and ``lines`` (the end of its log)."""

    def __init__(self, role: str, how: str, lines: Sequence[str]) -> None:
        self.role, self.how, self.lines = role, how, list(lines)
        text = f"{role} has ended: {how}"
        super().__init__(text + "".join(f"\n  {role}.log: {line}" for line in lines))


class NotReady(VfioModelError):
    """A daemon runs but did not say hello in time."""

    def __init__(self, role: str, seconds: float, lines: Sequence[str]) -> None:
        self.role = role
        text = f"{role} did not answer on its control socket within {seconds:g} s"
        super().__init__(text + "".join(f"\n  {role}.log: {line}" for line in lines))


class Control(Protocol):
    """What the launcher says on a daemon's control socket."""

    def hello(self, seconds: float) -> bool:
        """Whether it has answered within ``seconds``."""

    def quit(self) -> None:
        """Ask it to end; does not wait."""

    def close(self) -> None:
        """Give the socket back; asking again afterwards is allowed on a new one."""


class _FileControl:
    """Stands for the control socket of a daemon that has none."""

    def __init__(self, path: Path, daemon: Daemon) -> None:
        self._path, self._daemon = path, daemon

    def hello(self, seconds: float) -> bool:
        if not self._path.exists():
            self._daemon.wait(min(seconds, 0.005))
        return self._path.exists()

    def quit(self) -> None:
        self._daemon.signal(signal.SIGTERM)

    def close(self) -> None:
        return None


Connect = Callable[[Path, str], Control]
"""Makes the control connection to ``role`` of the run in a directory."""


@dataclass(frozen=True)
class DaemonSpec:
    """A daemon to start. Those of one ``stage`` start together, once every earlier stage is ready.

    One that has no control socket is ready when ``ready_file`` (its name in the runtime directory) exists, and is
    ended by SIGTERM. ``home``: the folder of the runtime directory where the control socket is, if not there;
    ``speaks``: the role on it, if another.
    """

    role: str
    argv: Sequence[str]
    stage: int = 0
    ready_file: str = ""
    home: str = ""
    speaks: str = ""


@dataclass
class Launcher:
    """The processes of one run; a context manager. ``directory`` exists inside it."""

    scenario: str
    connect: Connect
    restart: bool = False
    """Whether a daemon that ends unexpectedly is started afresh."""
    env: Mapping[str, str] | None = None
    directory: Path = field(init=False)
    daemons: dict[str, Daemon] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    """After the end: processes that had not ended by themselves, nor when they were asked."""
    ready_seconds: float = READY_SECONDS
    quit_seconds: float = QUIT_SECONDS
    term_seconds: float = TERM_SECONDS
    _specs: dict[str, DaemonSpec] = field(default_factory=dict)
    _buried: list[Daemon] = field(default_factory=list)
    _watcher: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        try:
            with _signals_held():
                self.directory = runtime_dir.create()
                self._begin()
        except BaseException:  # one of the held signals, too
            self.stop()
            raise
        return self

    def _begin(self) -> None:
        self._run = runtime_dir.new_run_file(self.scenario)
        self._watcher = subprocess.Popen(
            [sys.executable, "-I", "-S", watcher.__file__, str(self.directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        runtime_dir.write_run_file(self.directory, self._run)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, specs: Sequence[DaemonSpec]) -> None:
        """Start ``specs``, stage by stage, and return when all have said hello.

        :raise ProcessEnded: when one ends meanwhile.
        :raise NotReady: when one stays silent.
        """
        for stage in sorted({spec.stage for spec in specs}):
            together = [spec for spec in specs if spec.stage == stage]
            for spec in together:
                self._specs[spec.role] = spec
                self._spawn(spec)
            for spec in together:
                self.wait_ready(spec.role)

    def _spawn(self, spec: DaemonSpec) -> None:
        if spec.ready_file:
            (self.directory / spec.ready_file).unlink(missing_ok=True)  # a killed one has left it behind
        with _signals_held():  # a process that has started is known
            daemon = Daemon(spec.role, spec.argv, self.directory, self.env)
            self.daemons[spec.role] = daemon
            if self._watcher is not None and self._watcher.stdin is not None:
                self._watcher.stdin.write(f"{daemon.pid} {daemon.entry.start_ticks}\n")
                self._watcher.stdin.flush()
        self._run.processes = [each.entry for each in self.daemons.values()]
        runtime_dir.write_run_file(self.directory, self._run)

    @property
    def watcher_pid(self) -> int | None:
        """The process that cleans up should this one be killed; None outside the ``with`` block."""
        return self._watcher.pid if self._watcher is not None else None

    def wait_ready(self, role: str, seconds: float | None = None) -> None:
        """Return when ``role`` has said hello. Errors as :meth:`start`."""
        seconds = self.ready_seconds if seconds is None else seconds
        deadline = time.monotonic() + seconds
        control = self._control(role)
        try:
            while not control.hello(_SLICE_SECONDS):
                self.check()
                if time.monotonic() > deadline:
                    raise NotReady(role, seconds, self.daemons[role].last_lines())
        finally:
            control.close()

    def check(self) -> None:
        """Look whether a daemon has ended.

        :raise ProcessEnded: when one has that was not killed on purpose and is not to be started afresh.
        """
        for role, daemon in list(self.daemons.items()):
            if not daemon.ended or daemon in self._buried:
                continue
            self._buried.append(daemon)
            if self.restart and self.restarts.get(role, 0) < MAX_RESTARTS:
                self.restarts[role] = self.restarts.get(role, 0) + 1
                self._spawn(self._specs[role])
            elif not daemon.expected_end:
                raise ProcessEnded(role, daemon.how, daemon.last_lines())

    def end(self) -> dict[str, str]:
        """End every process, in the reverse order of starting; how each ended, by role. Harmless when repeated.

        The directory stays, so that logs can be read; :meth:`stop` removes it.
        """
        with _signals_held():
            before = {role: daemon.how for role, daemon in self.daemons.items() if daemon.ended}
            every = [*self.daemons.values(), *(old for old in self._buried if old not in self.daemons.values())]
            for daemon in reversed(list(self.daemons.values())):
                self._end(daemon)
            ends = {role: before.get(role) or _words(daemon) for role, daemon in self.daemons.items()}
            for daemon in every:
                daemon.close()
            self.daemons.clear()
            self._buried.clear()
        return ends

    def end_one(self, role: str, seconds: float) -> None:
        """End one process, which is known to have ended on purpose then; at once if it does not within ``seconds``."""
        daemon = self.daemons[role]
        daemon.expected_end = True
        if not daemon.ended:
            self._ask_to_quit(daemon)
            if not daemon.wait(seconds):
                daemon.signal(signal.SIGKILL)

    def stop(self) -> None:
        """:meth:`end` everything and remove the directory. Harmless when repeated."""
        with _signals_held():
            self.end()
            if hasattr(self, "directory"):
                shutil.rmtree(self.directory, ignore_errors=True)
            self._dismiss_watcher()

    def _end(self, daemon: Daemon) -> None:
        if daemon.ended:
            return
        if not daemon.stopped:
            self._ask_to_quit(daemon)
            if daemon.wait(self.quit_seconds):
                return
            daemon.signal(signal.SIGTERM)
            if daemon.wait(self.term_seconds):
                return
        self.leftovers.append(daemon.role)
        daemon.signal(signal.SIGKILL)
        daemon.wait(self.quit_seconds)

    def _ask_to_quit(self, daemon: Daemon) -> None:
        control = self._control(daemon.role)
        try:
            control.quit()
        finally:
            control.close()

    def _control(self, role: str) -> Control:
        spec = self._specs[role]
        if spec.ready_file:
            return _FileControl(self.directory / spec.ready_file, self.daemons[role])
        return self.connect(self.directory / spec.home, spec.speaks or role)

    def _dismiss_watcher(self) -> None:
        if self._watcher is None or self._watcher.stdin is None:
            return
        try:
            self._watcher.stdin.write("done\n")
            self._watcher.stdin.close()
        except (BrokenPipeError, ValueError):
            pass
        self._watcher.wait()
        self._watcher = None


def _words(daemon: Daemon) -> str:
    return "in order" if daemon.how == "exit status 0" else daemon.how


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the block has ended: cleaning up is never cut short."""
    held = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception: ``with`` blocks clean up. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise :class:`Terminated` as SIGINT raises KeyboardInterrupt."""

    def raise_it(number: int, _frame: FrameType | None) -> None:
        raise Terminated(number)

    before = {number: signal.signal(number, raise_it) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def python(*words: str) -> list[str]:
    """The command of one of our own daemons: ``python(\"-m\", \"hostd\", …)``."""
    return [sys.executable, *words]


def inherited_env() -> dict[str, str]:
    """The environment of daemons: ours, with their output unbuffered so that a log's last line is the last thing
    said.
    """
    return {**os.environ, "PYTHONUNBUFFERED": "1"}
