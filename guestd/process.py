"""A guest machine's process: everything that it serves, on one loop, from its start to its end."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from guestd.config import GuestConfig
from guestd.control import ROLE, GuestControl
from guestd.guest import Guest
from guestd.operations import RunState
from guestd.qmp import Monitors
from guestd.qtest import QtestServer
from guestd.text_trace import TextTrace, open_log
from protocols.transport.eventfile import EventFile
from protocols.transport.heap import settle
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from vfio_model.trace import NullTrace, Trace


@dataclass(frozen=True)
class Surroundings:
    """What does not belong to the machine."""

    realtime: bool = False
    """Whether virtual time follows real time, where no qtest steps it."""
    record: bool = True
    """Whether the runtime directory gets an event log."""
    patterns: Sequence[str] = ()
    """Events to be written as text."""
    log: str = ""
    """Where to; empty for stderr."""


def serve(directory: Path, config: GuestConfig, around: Surroundings | None = None) -> None:
    """Run the guest until it is told to end. Signals SIGTERM and SIGINT tell it.

    :raise ConfigError: when it cannot be built. :raise VMStateError: it was to come from elsewhere, and did not.
    """
    around = around or Surroundings()
    with ExitStack() as stack:
        lock = RoleLock(directory, ROLE)
        stack.callback(lock.close)
        loop = Loop()
        trace = _trace(directory, around, loop, stack)
        stack.callback(loop.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, loop.stop)
        guest = Guest(config, directory, loop, trace, realtime=around.realtime and config.qtest is None)
        stack.callback(guest.close)
        guest.start()
        control = GuestControl(guest, directory, lock, loop, trace)
        stack.callback(control.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, lambda: control.operations.quit("host-signal"))
        _begin(config, control)
        if config.qtest is not None:
            stack.callback(QtestServer(config.qtest, control.operations, loop).close)
        monitors = Monitors(control.monitor, loop)
        stack.callback(monitors.close)
        for endpoint in config.monitors:
            monitors.start(endpoint)
        settle()
        loop.run()
        if control.operations.fatal is not None:
            raise control.operations.fatal


def _trace(directory: Path, around: Surroundings, loop: Loop, stack: ExitStack) -> Trace:
    trace: Trace = NullTrace()
    if around.record:
        events = EventFile(directory / f"{ROLE}.events")
        stack.callback(events.close)
        events.follow(loop)
        trace = events.trace
    if around.patterns:
        log = open_log(around.log)
        if around.log:
            stack.callback(log.close)

        def flush() -> None:
            with contextlib.suppress(BrokenPipeError):
                log.flush()

        loop.on_idle(flush)
        trace = TextTrace(trace, around.patterns, log.write)
    return trace


def _begin(config: GuestConfig, control: GuestControl) -> None:
    """A machine that does not run from the start.

    :raise ConfigError, VMStateError: it cannot come from where it is said to.
    """
    operations = control.operations
    if config.incoming:
        operations.autostart = not config.paused
        operations.stop(RunState.INMIGRATE)
        control.monitor.migration.expect(config.incoming)
    elif config.paused:
        operations.stop(RunState.PRELAUNCH)
