"""A page of ``docs/`` as something to run: its files and its console sessions.

A block of Python whose first line is a comment with a file's name is that file. In a block of ``console`` every line
that begins with ``$`` is a command, and what follows is what it says, in a folder that the page calls :data:`FOLDER`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).parents[2] / "docs"
FOLDER = "/home/me"
SECONDS = 60
_VOLATILE = ((r"\b\d\d:\d\d:\d\d\b", "12:00:00"), (r"\bpid \d+", "pid 4711"), (r"\bin \d+\.\d+s", "in 0.01s"))
"""What differs from run to run, and how the page writes it."""


class Step(NamedTuple):
    """One command, and what it says."""

    command: str
    said: str


class Page:
    """``docs/NAME``, run in ``folder``; ``path`` is searched for programs before this environment's."""

    def __init__(self, name: str, folder: Path, path: tuple[Path, ...] = ()) -> None:
        self._folder = folder
        self._text = (DOCS / name).read_text()
        places = [*map(str, path), str(Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = {**os.environ, "PATH": os.pathsep.join(places), "COLUMNS": "80"}
        for file, text in self.files().items():
            (folder / file).write_text(text)

    def _blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self._text, re.MULTILINE | re.DOTALL)

    def files(self) -> dict[str, str]:
        """Name -> text."""
        named = ((re.match(r"# (\S+\.py)\n", block), block) for block in self._blocks("python"))
        return {name[1]: block for name, block in named if name is not None}

    def steps(self) -> list[Step]:
        """Every command, in order."""
        found = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", "".join(self._blocks("console")), re.MULTILINE)
        return [Step(*each) for each in found]

    def step(self, beginning: str) -> Step:
        """The command that begins so."""
        return next(step for step in self.steps() if step.command.startswith(beginning))

    def shown(self, said: str) -> str:
        """What a program says, as the page would write it."""
        for pattern, word in _VOLATILE:
            said = re.sub(pattern, word, said)
        return said.replace(str(self._folder.resolve()), FOLDER)

    def run(self, step: Step) -> str:
        """Run it to its end; what it says, as the page would write it.

        :raise AssertionError: it ends with another status than 0.
        """
        done = subprocess.run(
            self._words(step), cwd=self._folder, env=self.environment, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{step.command}: {done.stdout}{done.stderr}"
        return self.shown(done.stdout)

    def _words(self, step: Step) -> list[str]:
        return shlex.split(step.command.replace(FOLDER, str(self._folder.resolve())))

    @contextlib.contextmanager
    def running(self, step: Step) -> Iterator[str]:
        """Run it meanwhile; gives as many lines of what it says as the page has, and ends it in the end."""
        words = self._words(step)
        with subprocess.Popen(
            words, cwd=self._folder, env=self.environment, stderr=subprocess.PIPE, text=True
        ) as process:
            alarm = threading.Timer(SECONDS, process.kill)
            alarm.start()
            try:
                assert process.stderr is not None
                lines = [process.stderr.readline() for _ in step.said.splitlines()]
                yield self.shown("".join(lines))
            finally:
                alarm.cancel()
                process.terminate()
            assert process.wait(SECONDS) == 0
