"""``-trace``: events as lines of text, as QEMU's log backend writes them (:mod:`vfio_model.trace_text`)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO

from vfio_model.errors import ConfigError
from vfio_model.trace import Trace
from vfio_model.trace_text import line


class TextTrace:
    """A trace that writes the events that match one of ``patterns`` (shell wildcards; ``-`` in front takes out again,
    the last match holds), and hands all of them on to ``inner``.
    """

    def __init__(self, inner: Trace, patterns: Sequence[str], write: Callable[[str], object]) -> None:
        self._inner, self._patterns, self._write = inner, tuple(patterns), write
        self._wanted: dict[str, bool] = {}
        self.enabled = True

    @property
    def cause(self) -> int:
        """Of the inner trace."""
        return self._inner.cause

    @cause.setter
    def cause(self, cause: int) -> None:
        self._inner.cause = cause

    def __call__(self, event: str, **fields: object) -> None:
        """One event."""
        if self._inner.enabled:
            self._inner(event, **fields)
        wanted = self._wanted.get(event)
        if wanted is None:
            wanted = self._wanted[event] = self._matches(event)
        if wanted:
            self._write(line(event, fields) + "\n")

    def _matches(self, event: str) -> bool:
        wanted = False
        for pattern in self._patterns:
            if fnmatchcase(event, pattern.removeprefix("-")):
                wanted = not pattern.startswith("-")
        return wanted


def read_patterns(path: str) -> list[str]:
    """The patterns in a file, one a line; ``#`` begins a comment.

    :raise ConfigError: when it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return [text for each in lines if (text := each.partition("#")[0].strip())]


def open_log(path: str) -> IO[str]:
    """The file of ``-D``; stderr when ``path`` is empty. What was there is lost.

    :raise ConfigError: when it cannot be written.
    """
    if not path:
        return sys.stderr
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Error opening logfile {path}: {error.strerror}") from error
