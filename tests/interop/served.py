"""A device of this project as a user starts it: ``vfio-model serve`` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

START_S = 20.0
END_S = 10.0


def qemu_folder() -> Path:
    """Where ``tools/get-qemu`` puts things."""
    return Path(__file__).parents[2] / ".qemu"


class Served:
    """``vfio-model serve MODEL,prop=value… --socket PATH``, from when one can connect; ends with status 0 on
    SIGTERM."""

    def __init__(self, model: str, path: Path, **props: object) -> None:
        self.socket = path
        self.log = path.with_suffix(".log")
        spec = ",".join([model, *(f"{name}={value}" for name, value in props.items())])
        self._command = [sys.executable, "-m", "deploy.cli", "serve", spec, "--socket", str(path)]
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs now."""
        assert self._child is not None, "started"
        return self._child.pid

    def start(self) -> None:
        """Start it, and wait for its socket."""
        with self.log.open("ab") as log:
            self._child = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while not self._listens():
            status = self._child.poll()
            assert status is None, f"the server ended with {status}:\n{self.said()}"
            assert time.monotonic() < deadline, f"no socket after {START_S} s:\n{self.said()}"
            time.sleep(0.01)

    def _listens(self) -> bool:
        """A file may be left of one who was killed."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def said(self) -> str:
        """Its log."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL: it leaves its socket file."""
        assert self._child is not None, "started"
        self._child.kill()
        self._child.wait()

    def __enter__(self) -> Self:
        self.start()
        return self

    def close(self) -> None:
        """End it.

        :raise AssertionError: when it does not end well.
        """
        self._stop()
        assert self._child is not None, "started"
        assert self._child.returncode in (0, -signal.SIGKILL), f"status {self._child.returncode}:\n{self.said()}"

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        self._stop()
        print(f"{self.socket.name} said:\n{self.said()}")

    def _stop(self) -> None:
        assert self._child is not None, "started"
        if self._child.poll() is None:
            os.kill(self._child.pid, signal.SIGTERM)
            try:
                self._child.wait(END_S)
            except subprocess.TimeoutExpired:
                self._child.kill()
                self._child.wait()
