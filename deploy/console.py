"""Where text goes: the verdict to stdout, progress to stderr; bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

_PLAIN_WIDTH = 140


def output() -> Console:
    """stdout; wide enough for a table where it is not a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=_PLAIN_WIDTH)


class StepProgress:
    """Shows how far a run is; call it with (action, done, total). A context manager.

    It never starts a thread: processes are forked while it shows.
    """

    def __init__(self, *, silent: bool = False) -> None:
        self._silent = silent
        self._last = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        if not silent and sys.stderr.isatty():
            columns = (TextColumn("{task.description:12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, action: str, done: int, total: int) -> None:
        if self._silent:
            return
        if self._bar is None:
            if action != self._last:
                print(f"{action} ...", file=sys.stderr, flush=True)
            self._last = action
            return
        if self._task is None or action != self._last:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(action, total=total or None)
        self._last = action
        self._bar.update(self._task, completed=done, total=total or None, refresh=True)
