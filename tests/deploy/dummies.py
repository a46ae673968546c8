"""Dummy daemons for the launcher's tests: tiny scripts that say hello on an AF_UNIX socket, and the control that
talks to them.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
from pathlib import Path

from deploy.daemon import Daemon
from deploy.launcher import DaemonSpec, Launcher

SCRIPT = """
import os, signal, socket, subprocess, sys
role, mood = sys.argv[1:3]
print(role, "starts", flush=True)
if mood == "crash":
    sys.exit("boom: no such table")
if mood == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if mood == "parent":
    child = subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL)
    with open(role + ".child", "w") as file:
        file.write(str(child.pid))
with open(role + ".sock.lock", "w"):
    if os.path.exists(role + ".sock"):
        os.unlink(role + ".sock")
server = socket.socket(socket.AF_UNIX)
server.bind(role + ".sock")
server.listen()
while mood == "mute":
    signal.pause()
while True:
    peer, _ = server.accept()
    with peer:
        word = peer.recv(16)
        if word == b"quit" and mood != "stubborn":
            break
        peer.sendall(b"ok")
"""


class DummyControl:
    """Says ``hello`` and ``quit`` to a dummy."""

    def __init__(self, directory: Path, role: str) -> None:
        self._path = str(directory / f"{role}.sock")

    def _say(self, word: bytes, seconds: float) -> bytes:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(seconds)
            try:
                peer.connect(self._path)
                peer.sendall(word)
                return peer.recv(16)
            except OSError:
                select.select([], [], [], 0.01)
                return b""

    def hello(self, seconds: float) -> bool:
        return self._say(b"hello", seconds) == b"ok"

    def quit(self) -> None:
        self._say(b"quit", 0.2)

    def close(self) -> None:
        return None


def dummy(role: str, mood: str = "good", stage: int = 0) -> DaemonSpec:
    return DaemonSpec(role, [sys.executable, "-I", "-S", "-c", SCRIPT, role, mood], stage)


def launcher(*, restart: bool = False) -> Launcher:
    return Launcher("dummies", DummyControl, restart=restart, ready_seconds=20, quit_seconds=0.5, term_seconds=0.2)


def child_of(launcher: Launcher, role: str) -> int:
    return int((launcher.directory / f"{role}.child").read_text())


def wait_gone(pid: int, seconds: float = 20) -> bool:
    """Whether ``pid`` has ended, after at most ``seconds``."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], seconds)[0])
    finally:
        os.close(fd)


def kill(daemon: Daemon) -> None:
    """Kill ``daemon`` and return when it is dead."""
    os.kill(daemon.pid, signal.SIGKILL)
    assert daemon.wait(20)


def operate() -> None:
    """The body of an operator's command: start two dummies, say so, and wait for ever."""
    with launcher() as run:
        run.start([dummy("one", "parent"), dummy("two")])
        pids = [str(daemon.pid) for daemon in run.daemons.values()]
        assert run.watcher_pid is not None
        print(run.directory, child_of(run, "one"), *pids, run.watcher_pid, flush=True)
        while True:
            run.check()
            select.select([], [], [], 0.05)
