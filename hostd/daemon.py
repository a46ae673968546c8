"""What every daemon of the host's side does around its work: die with its parent, take its role, trace, end in
order."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hostd.log import log
from protocols.transport.eventfile import EventFile
from protocols.transport.heap import settle
from protocols.transport.kernel import die_with_parent
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from vfio_model.trace import Trace


def arm(die: bool) -> None:
    """With ``--die-with-parent``: before anything else, ask for SIGKILL when the parent ends.

    :raise PeerLost: when it has ended already.
    """
    if die:
        die_with_parent(os.getppid())


class DaemonContext:
    """What a daemon works with."""

    def __init__(self, directory: Path, role: str, loop: Loop, trace: Trace, lock: RoleLock) -> None:
        self.directory, self.role, self.loop, self.trace, self.lock = directory, role, loop, trace, lock


@contextmanager
def daemon(directory: Path, role: str) -> Iterator[DaemonContext]:
    """A loop, the role's lock and its trace; SIGTERM and SIGINT end the loop.

    :raise ConfigError: when the directory is not ours alone, or the role is taken.
    """
    with ExitStack() as stack:
        lock = RoleLock(directory, role)
        stack.callback(lock.close)
        events = EventFile(directory / f"{role}.events")
        stack.callback(events.close)
        loop = Loop()
        stack.callback(loop.close)
        events.follow(loop)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.on_signal(number, loop.stop)
        events.trace("daemon_start", role=role, pid=os.getpid())
        log(role, f"starts in {directory}, pid {os.getpid()}")
        yield DaemonContext(directory, role, loop, events.trace, lock)
        events.trace("daemon_end", role=role)
        log(role, "ends")


def run(directory: Path, role: str, serve: Callable[[DaemonContext], Callable[[], None]]) -> None:
    """Run a daemon: ``serve(context)`` opens its sockets and returns what closes them."""
    with daemon(directory, role) as context:
        close = serve(context)
        try:
            settle()
            context.loop.run()
        finally:
            close()
