"""Datagram sockets as networks (``vfio_model.backends.net.NetBackend``): one frame a datagram.

What QEMU's ``-netdev dgram`` speaks over UDP and AF_UNIX, so that a device here and a QEMU can share a cable; and the
end of a socket pair that somebody else made.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from protocols.transport.loop import Loop
from protocols.transport.unix import check_path
from vfio_model.errors import ConfigError

MAX_FRAME = 65536
"""Bytes of a frame: nothing larger fits a datagram."""
BURST = 64
"""Frames that are taken at one go, before others have their turn."""
_LOST = (BlockingIOError, ConnectionRefusedError, ConnectionResetError, FileNotFoundError)


class Frames(Protocol):
    """Where frames go: the queue in front of a device."""

    def offer(self, frame: bytes) -> None:
        """A frame has come."""

    def resume(self) -> None:
        """The device has buffers again."""

    def close(self) -> None:
        """No more."""


class DatagramNet:
    """``sock``, taken over and connected unless ``remote`` says where to send. ``remove``: its socket file."""

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        frames: Frames,
        *,
        remote: tuple[object, ...] | str | None = None,
        remove: str = "",
    ) -> None:
        sock.setblocking(False)
        self._loop, self._sock, self._frames, self._remote, self._remove = loop, sock, frames, remote, remove
        self.dropped = 0
        """Frames that could not be sent."""
        loop.register(self, self._readable)

    def fileno(self) -> int:
        """For a poller."""
        return self._sock.fileno()

    def _readable(self) -> None:
        for _ in range(BURST):
            try:
                frame = self._sock.recv(MAX_FRAME)
            except _LOST:
                return
            if frame:
                self._frames.offer(frame)
            elif self._sock.type == socket.SOCK_SEQPACKET:
                self._quiet()  # the other end has gone: the socket would be readable for ever
                return

    def _quiet(self) -> None:
        self._loop.unregister(self)

    def send(self, frame: bytes) -> None:
        """Send, or drop when nobody listens or the socket is full."""
        try:
            if self._remote is None:
                self._sock.send(frame)
            else:
                self._sock.sendto(frame, self._remote)
        except OSError:
            self.dropped += 1

    def resume(self) -> None:
        """See :class:`Frames`."""
        self._frames.resume()

    def close(self) -> None:
        """Harmless twice."""
        if self._sock.fileno() >= 0:
            self._quiet()
            self._sock.close()
            self._frames.close()
            if self._remove:
                with contextlib.suppress(OSError):
                    os.unlink(self._remove)


def open_datagram(loop: Loop, text: str, make_frames: Callable[[], Frames]) -> DatagramNet:
    """The network of ``udp:HOST:PORT@HOST:PORT``, ``unix:PATH@PATH`` (local first) or ``fd:N``.

    :raise ConfigError: when it is none of these, or cannot be opened.
    """
    kind, _, rest = text.partition(":")
    try:
        if kind == "fd":
            return DatagramNet(loop, _inherited(rest), make_frames())
        local, at, remote = rest.partition("@")
        if kind not in ("udp", "unix") or not at:
            raise ConfigError(f"{text!r} is no network", where="netdev", hint=_FORMS)
        if kind == "udp":
            return _udp(loop, local, remote, make_frames)
        return _unix(loop, check_path(local), check_path(remote), make_frames)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{text!r} cannot be opened: {error}", where="netdev", hint=_FORMS) from error


_FORMS = "udp:HOST:PORT@HOST:PORT, unix:PATH@PATH (local first), fd:N"


def _inherited(number: str) -> socket.socket:
    sock = socket.socket(fileno=int(number))
    if sock.type not in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
        sock.detach()
        raise OSError(errno.EPROTOTYPE, "not a datagram socket")
    return sock


def _udp(loop: Loop, local: str, remote: str, make_frames: Callable[[], Frames]) -> DatagramNet:
    host, _, port = remote.rpartition(":")
    family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
    here, _, here_port = local.rpartition(":")
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.bind((here.strip("[]"), int(here_port)))
        return DatagramNet(loop, sock, make_frames(), remote=address)
    except OSError:
        sock.close()
        raise


def _unix(loop: Loop, local: str, remote: str, make_frames: Callable[[], Frames]) -> DatagramNet:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        if Path(local).is_socket() and not _listened(local):
            os.unlink(local)
        sock.bind(local)
    except OSError:
        sock.close()
        raise
    return DatagramNet(loop, sock, make_frames(), remote=remote, remove=local)


def _listened(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True
