"""Where a migration goes or comes from, by URI: ``unix:PATH``, ``tcp:HOST:PORT``, and ``fd:NAME`` or ``fd:NUMBER`` of a
connected stream socket.

Source: QEMU's ``-incoming`` and ``migrate``; ``qapi/migration.json``.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from protocols.transport.unix import ByteConnection
from protocols.transport.unix_listener import ByteListener
from vfio_model.errors import ConfigError, PeerLost

_ELSEWHERE: Final = frozenset(("exec", "file", "rdma", "vsock", "x-rdma"))
"""What QEMU migrates over, too."""
_WANTED: Final = "the destination answers: a connected stream socket is wanted"


class Listener(Protocol):
    """Accepts byte streams."""

    def fileno(self) -> int:
        """For a poller."""

    def accept(self, name: str = "client") -> ByteConnection | None:
        """The next connection, or None."""

    def close(self) -> None:
        """Harmless twice."""


@dataclass(frozen=True, slots=True)
class Uri:
    """A path; a host and a port; the name or the number of a descriptor."""

    kind: Literal["unix", "tcp", "fd"]
    where: str
    port: int = 0


class TcpListener:
    """On one address of this machine; port 0 takes a free one.

    :raise ConfigError: when it cannot be listened on.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            family, address = _resolve(host, port)
            self._sock = socket.create_server(address, family=family, backlog=1)
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


class GivenSocket:
    """A connection that is there already; it is accepted when something has come."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._accepted = sock, False

    def fileno(self) -> int:
        """For a poller."""
        return self._sock.fileno()

    def accept(self, name: str = "client") -> ByteConnection | None:
        """The connection, once. Its descriptor is another one: this one may still be polled."""
        if self._accepted:
            return None
        self._accepted = True
        return ByteConnection(self._sock.dup(), name)

    def close(self) -> None:
        """Harmless twice."""
        self._sock.close()


def parse(uri: str) -> Uri:
    """:raise ConfigError: when it is none, or of a kind that there is not."""
    kind, _, rest = uri.partition(":")
    if kind == "unix" and rest:
        return Uri("unix", rest)
    if kind == "fd" and rest:
        return Uri("fd", rest)
    host, _, port = rest.rpartition(":")
    if kind == "tcp" and port.isdecimal() and int(port) < 1 << 16:
        return Uri("tcp", host.removeprefix("[").removesuffix("]") or "localhost", int(port))
    if kind in _ELSEWHERE and rest:
        hint = "unix:PATH, tcp:HOST:PORT and fd:NAME of a socket are"
        raise ConfigError(f"'{uri}': migration over {kind}: is not supported", hint=hint)
    raise ConfigError(f"'{uri}' is not a valid migration URI")


def given_socket(fd: int) -> socket.socket:
    """The socket that descriptor ``fd`` is, and its owner from now on.

    :raise ConfigError: it is no connected stream socket; ``fd`` stays the caller's.
    """
    try:
        stream = socket.socket(fileno=fd)
    except OSError as error:
        what = "is not open" if error.errno == errno.EBADF else "is no socket"
        raise ConfigError(f"descriptor {fd} {what}", hint=_WANTED) from error
    try:
        stream.getpeername()
        connected = stream.type == socket.SOCK_STREAM
    except OSError:
        connected = False
    if not connected:
        stream.detach()
        raise ConfigError(f"descriptor {fd} is no connected stream socket", hint=_WANTED)
    return stream


def listen(uri: Uri) -> Listener:
    """For any but ``fd``. :raise ConfigError: when it cannot be listened there."""
    assert uri.kind != "fd", "whoever has the descriptors knows it"
    return ByteListener(uri.where) if uri.kind == "unix" else TcpListener(uri.where, uri.port)


def connect(uri: Uri, name: str) -> ByteConnection:
    """A connection to whoever listens at ``uri``, any but ``fd``; he is called ``name``. Over TCP it may be under way:
    that nobody is there is found out by sending or receiving.

    :raise PeerLost: when nobody listens.
    """
    assert uri.kind != "fd", "whoever has the descriptors knows it"
    if uri.kind == "unix":
        return ByteConnection.connect(uri.where, name)
    try:
        family, address = _resolve(uri.where, uri.port)
        sock = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise PeerLost(name, f"connecting: {error.strerror or error}") from error
    sock.setblocking(False)
    code = sock.connect_ex(address)
    if code not in (0, errno.EINPROGRESS):
        sock.close()
        raise PeerLost(name, f"connecting: {os.strerror(code)}")
    return ByteConnection(sock, name)


def _resolve(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """The first address, of IPv4 if there is one. :raise OSError: there is none."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda each: each[0] is not socket.AF_INET)
    return family, (str(address[0]), int(address[1]))
