"""A bare peer on an AF_UNIX stream: it answers every request that it reads, of whose bytes it understands nothing.

The limit of what needs an answer over vfio-user: as many bytes each way and the same descriptors, one call of the
kernel to send and one to receive on either side. ``python -m deploy.bench.stream_echo FD REQUEST REPLY`` (the bytes of
each; ``fd`` behind them when descriptors come) serves the socket FD until its other end is closed.
"""

from __future__ import annotations

import array
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_CONTROL = socket.CMSG_SPACE(4)
_TIMEVAL = struct.Struct("@ll")
_ANSWER_SECONDS = 10
_WITH_FD = "fd"


def serve(sock: socket.socket, request: int, reply: bytes) -> None:
    """Answer ``request`` bytes with ``reply`` until EOF."""
    receive, send = sock.recv, sock.send
    while receive(request):
        send(reply)


def serve_descriptors(sock: socket.socket, request: int, reply: bytes) -> None:
    """As :func:`serve`; each request carries one descriptor, which is closed."""
    receive, send, close = sock.recvmsg, sock.send, os.close
    while True:
        data, ancillary, _, _ = receive(request, _CONTROL)
        if not data:
            return
        for _, _, rights in ancillary:
            close(int.from_bytes(rights, sys.byteorder))
        send(reply)


class Trips:
    """Round trips with the echo, which is process ``pid``. ``fd`` goes with each request."""

    def __init__(self, sock: socket.socket, pid: int, request: int, reply: int, fd: int | None) -> None:
        self._sock, self.pid, self._request, self._reply = sock, pid, bytes(request), reply
        self._rights = None if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]

    def once(self) -> None:
        """One. :raise BlockingIOError: the echo does not answer."""
        if self._rights is None:
            self._sock.send(self._request)
        else:
            self._sock.sendmsg([self._request], self._rights)
        self._sock.recv(self._reply)


@contextmanager
def echo(request: int, reply: int, fd: int | None = None) -> Iterator[Trips]:
    """An echo process for messages of so many bytes, warmed up; it is gone afterwards."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(_ANSWER_SECONDS, 0))
    arguments = [str(theirs.fileno()), str(request), str(reply), *([] if fd is None else [_WITH_FD])]
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "deploy.bench.stream_echo", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
        theirs.close()
        try:
            trips = Trips(ours, process.pid, request, reply, fd)
            for _ in range(200):
                trips.once()
            yield trips
        finally:
            ours.close()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _main(fd: str, request: str, reply: str, descriptors: str = "") -> None:
    answer = serve_descriptors if descriptors == _WITH_FD else serve
    with socket.socket(fileno=int(fd)) as sock:
        answer(sock, int(request), bytes(int(reply)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
