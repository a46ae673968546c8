"""Real processes for tests of the host's side. Nothing here sleeps: readiness is an answer, an end is a pidfd."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from protocols.control import messages as control
from protocols.transport.loop import deadline_scale
from tests.processes.port_client import SECONDS, RawPort, control_call

TOPOLOGY = {
    "groups": [
        {"id": 26, "devices": [{"name": "0000:01:00.0", "model": "dma-burst"}]},
        {"id": 27, "devices": [{"name": "0000:02:00.0", "model": "edu"}]},
        {"id": 28, "devices": [{"name": "0000:03:00.0"}]},
    ]
}


class HostProcess:
    """``hostd container`` (or another role) in a directory."""

    def __init__(self, directory: Path, *args: str, role: str = "hostd", command: str = "container") -> None:
        self.directory, self.role = directory, role
        self.log = directory / f"{role}.log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "hostd", command, "--dir", str(directory), "--die-with-parent", *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = self.popen.pid

    def ready(self) -> HostProcess:
        """Answered Hello."""
        welcome = control_call(self.directory, self.role, control.Hello())
        assert isinstance(welcome, control.Welcome) and welcome.pid == self.pid
        return self

    def status(self) -> dict[str, object]:
        """Its Status."""
        answer = control_call(self.directory, self.role, control.Status())
        assert isinstance(answer, control.Document)
        document: dict[str, object] = msgspec.json.decode(answer.json)
        return document

    def until(self, condition: Callable[[dict[str, object]], bool]) -> dict[str, object]:
        """Ask Status until ``condition`` holds (each question is a round trip: no sleep)."""
        for _ in range(20000):
            status = self.status()
            if condition(status):
                return status
        raise AssertionError(f"never came: {status}")

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it and wait; returns its status."""
        self.popen.send_signal(number)
        return self.popen.wait(SECONDS * deadline_scale())

    def close(self) -> None:
        """Kill and reap."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()

    def fds(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def text(self) -> str:
        """Its log."""
        return self.log.read_text()


def wait_dead(pidfd: int) -> None:
    """Until the process of ``pidfd`` is dead."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    assert poll.poll(SECONDS * deadline_scale() * 1000), "the process lives"


@pytest.fixture
def start_host(runtime_dir: Path) -> Iterator[Callable[..., HostProcess]]:
    """Start ``hostd container``; ended after the test."""
    started: list[HostProcess] = []

    def start(*args: str, topology: dict[str, object] = TOPOLOGY) -> HostProcess:
        path = runtime_dir / "topology.json"
        path.write_text(json.dumps(topology))
        host = HostProcess(runtime_dir, "--topology", str(path), *args)
        started.append(host)
        return host.ready()

    yield start
    for host in started:
        host.close()


@pytest.fixture
def host(start_host: Callable[..., HostProcess]) -> HostProcess:
    """A running hostd."""
    return start_host()


@pytest.fixture
def client(runtime_dir: Path) -> Iterator[Callable[..., RawPort]]:
    """Connect clients; those that are left are closed after the test."""
    ports: list[RawPort] = []

    def connect(**options: object) -> RawPort:
        ports.append(RawPort(runtime_dir, **options))  # type: ignore[arg-type]
        return ports[-1]

    yield connect
    for port in ports:
        if not port.zmq.client.closed:
            port.close()
