"""The file of a trace log: ``<role>.events`` in the runtime directory, appended to by one process.

Written with single ``write`` calls to a descriptor opened O_APPEND, so that a kill leaves whole lines but for the last
one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from protocols.tracelog import Record, TraceLog, merge


class EventFile:
    """A :class:`TraceLog` and the file behind it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self.trace = TraceLog(self._write, os.getpid(), time.monotonic_ns)

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def flush(self) -> None:
        """Write what is buffered; for :meth:`protocols.transport.loop.Loop.on_idle`."""
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
