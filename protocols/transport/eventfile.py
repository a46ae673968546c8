"""The file of a trace log: ``<role>.events`` in the runtime directory, appended to by one process.

Written with single ``write`` calls to a descriptor opened O_APPEND, so that a kill leaves whole lines but for the last
one. A process with a loop writes when it has nothing else to do and a record is older than :data:`FLUSH_NS`, but not
before it begins to wait for a peer: writing would come between the request and its answer. Records are at most
:data:`LATEST_NS` old, wherever the loop waits: so much a SIGKILL loses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from protocols.tracelog import Record, TraceLog, merge
from protocols.transport.loop import Loop, LoopTimer

FLUSH_NS = 20_000_000
LATEST_NS = 50_000_000


class EventFile:
    """A :class:`TraceLog` and the file behind it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.trace = TraceLog(self._write, os.getpid(), time.monotonic_ns)
        self._timer: LoopTimer | None = None

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def follow(self, loop: Loop) -> None:
        """Write as ``loop`` finds time to, see the module's head; it must end before :meth:`close`."""

        def due() -> None:
            self._timer = None
            self.trace.flush()

        def idle() -> None:
            oldest = self.trace.oldest_ns
            if oldest is None:
                return
            if not loop.depth and time.monotonic_ns() - oldest > FLUSH_NS:
                self.trace.flush()
            elif self._timer is None:
                self._timer = loop.call_later(LATEST_NS, due, served=True)

        loop.on_idle(idle)

    def flush(self) -> None:
        """Write what is kept."""
        self.trace.flush()

    def close(self) -> None:
        """Flush and close. Harmless twice."""
        self.trace.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_events(directory: str | os.PathLike[str]) -> Iterator[Record]:
    """The records of every ``*.events`` in ``directory``, merged by time."""
    with ExitStack() as stack:
        files = [stack.enter_context(path.open("rb")) for path in sorted(Path(directory).glob("*.events"))]
        yield from merge(files)
