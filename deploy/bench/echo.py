"""A bare ZeroMQ peer: it sends back what it gets. The limit of everything that needs an answer from another process.

``python -m deploy.bench.echo PATH`` serves one ROUTER socket until it is sent an empty frame.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import zmq

_ANSWER_MS = 10_000


def serve(path: str) -> None:
    """Answer until an empty frame comes."""
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.linger = 0
    socket.bind(f"ipc://{path}")
    while True:
        peer, frame = socket.recv_multipart()
        if not frame:
            break
        socket.send_multipart([peer, frame])
    context.destroy(linger=0)


class RoundTrips:
    """A DEALER on the echo, which is process ``pid``."""

    def __init__(self, socket: zmq.Socket[bytes], pid: int) -> None:
        self._socket, self.pid = socket, pid

    def once(self, frame: bytes = b"x" * 64) -> float:
        """One round trip, in seconds."""
        start = time.perf_counter()
        self._socket.send(frame)
        self._socket.recv()
        return time.perf_counter() - start

    def times(self, count: int) -> list[float]:
        """``count`` round trips."""
        return [self.once() for _ in range(count)]


@contextmanager
def echo(directory: Path) -> Iterator[RoundTrips]:
    """An echo process whose socket lies in ``directory``, warmed up; it is gone afterwards."""
    path = directory / "echo.zmq"
    process = subprocess.Popen([sys.executable, "-m", "deploy.bench.echo", str(path)], stdin=subprocess.DEVNULL)
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.rcvtimeo = _ANSWER_MS
    socket.connect(f"ipc://{path}")
    try:
        trips = RoundTrips(socket, process.pid)
        trips.times(200)
        yield trips
        socket.send(b"")
        process.wait(timeout=5)
    finally:
        context.destroy(linger=0)
        if process.poll() is None:
            process.kill()
            process.wait()
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    serve(sys.argv[1])
