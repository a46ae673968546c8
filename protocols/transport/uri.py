"""Where a migration goes or comes from, by URI: ``unix:PATH``, ``tcp:HOST:PORT``.

Source: QEMU's ``-incoming`` and ``migrate``.
"""

from __future__ import annotations

import socket
from typing import Protocol

from protocols.transport.unix import ByteConnection, ByteListener
from vfio_model.errors import ConfigError, PeerLost

CONNECT_SECONDS = 5.0


class Listener(Protocol):
    """Accepts byte streams."""

    def fileno(self) -> int:
        """For a poller."""

    def accept(self, name: str = "client") -> ByteConnection | None:
        """The next connection, or None."""

    def close(self) -> None:
        """Harmless twice."""


class TcpListener:
    """On one address of this machine; port 0 takes a free one.

    :raise ConfigError: when it cannot be listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            self._sock = socket.create_server((host, port), backlog=1)
        except OSError as error:
            raise ConfigError(f"cannot listen: {error.strerror or error}", where=f"tcp:{host}:{port}") from error
        self._sock.setblocking(False)

    @property
    def port(self) -> int:
        """The port that it has."""
        port: int = self._sock.getsockname()[1]
        return port

    def fileno(self) -> int:
        """For a poller."""
        return self._sock.fileno()

    def accept(self, name: str = "client") -> ByteConnection | None:
        """The next connection, or None."""
        try:
            return ByteConnection(self._sock.accept()[0], name)
        except (BlockingIOError, ConnectionAbortedError):
            return None

    def close(self) -> None:
        """Stop listening. Harmless twice."""
        self._sock.close()


def parse(uri: str) -> tuple[str, str, int]:
    """("unix", path, 0) or ("tcp", host, port).

    :raise ConfigError: for anything else.
    """
    kind, _, rest = uri.partition(":")
    if kind == "unix" and rest:
        return "unix", rest, 0
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and port.isdecimal() and int(port) < 1 << 16:
        return "tcp", host or "localhost", int(port)
    raise ConfigError(f"'{uri}' is not a valid migration URI")


def listen(uri: str) -> Listener:
    """:raise ConfigError: when ``uri`` is none, or cannot be listened on."""
    kind, where, port = parse(uri)
    return ByteListener(where) if kind == "unix" else TcpListener(where, port)


def connect(uri: str, name: str) -> ByteConnection:
    """A connection to whoever listens at ``uri``; he is called ``name``.

    :raise ConfigError: when ``uri`` is none. :raise PeerLost: when nobody listens.
    """
    kind, where, port = parse(uri)
    if kind == "unix":
        return ByteConnection.connect(where, name)
    try:
        return ByteConnection(socket.create_connection((where, port), timeout=CONNECT_SECONDS), name)
    except OSError as error:
        raise PeerLost(name, f"connecting to {uri}: {error.strerror or error}") from error
