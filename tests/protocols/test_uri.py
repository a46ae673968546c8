"""Where migrations go and come from."""

from __future__ import annotations

import os
import select
import socket
from pathlib import Path

import pytest

from protocols.transport.unix import ByteConnection
from protocols.transport.uri import GivenSocket, TcpListener, Uri, connect, given_socket, listen, parse
from vfio_model.errors import ConfigError, PeerLost


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("unix:/a/b", Uri("unix", "/a/b")),
        ("tcp:127.0.0.1:4444", Uri("tcp", "127.0.0.1", 4444)),
        ("tcp::4444", Uri("tcp", "localhost", 4444)),
        ("tcp:[::1]:4444", Uri("tcp", "::1", 4444)),
        ("fd:stream", Uri("fd", "stream")),
    ],
)
def test_uris(uri: str, found: Uri) -> None:
    assert parse(uri) == found


@pytest.mark.parametrize("uri", ["", "unix:", "tcp:host", "tcp:host:65536", "tcp:host:-1", "fd:", "exec:", "/a/b"])
def test_what_is_no_uri(uri: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid migration URI"):
        parse(uri)


@pytest.mark.parametrize("uri", ["exec:cat", "file:/a", "rdma:host:1", "vsock:1:2"])
def test_other_ways_of_qemu_are_named_with_those_that_there_are(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"is not supported \(unix:PATH, tcp:HOST:PORT and fd:NAME of a socket are\)"):
        parse(uri)


def test_a_descriptor_has_to_be_a_connected_stream_socket(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    with given_socket(left.detach()) as stream:
        stream.send(b"there")
        assert right.recv(5) == b"there"
    right.close()
    with pytest.raises(ConfigError, match="is not open"):
        given_socket(1 << 20)
    loose, packets = socket.socket(socket.AF_UNIX), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (tmp_path / "file").open("w") as file:
        for fd, why in ((file.fileno(), "no socket"), (loose.fileno(), "stream"), (packets[0].fileno(), "stream")):
            with pytest.raises(ConfigError, match=why):
                given_socket(fd)
            os.fstat(fd)
    for each in (loose, *packets):
        each.close()


def test_a_given_connection_is_accepted_once(tmp_path: Path) -> None:
    left, right = socket.socketpair()
    listener = GivenSocket(left)
    right.send(b"there")
    _readable(listener.fileno())
    connection = listener.accept("source")
    assert connection is not None and connection.receive() == b"there" and listener.accept() is None
    listener.close()
    connection.close()
    right.close()


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_bytes_go_both_ways(tmp_path: Path, kind: str) -> None:
    path = Uri("unix", f"{tmp_path}/sock")
    listener = listen(path) if kind == "unix" else TcpListener("127.0.0.1", 0)
    uri = Uri("tcp", "127.0.0.1", listener.port) if isinstance(listener, TcpListener) else path
    assert listener.accept() is None
    left = connect(uri, "right")
    _readable(listener.fileno())
    right = listener.accept("left")
    assert right is not None
    for one, other, data in ((left, right, b"there"), (right, left, b"back")):
        one.send(data)
        assert _read(other) == data
    left.close()
    with pytest.raises(PeerLost):
        _read(right)
    right.close()
    listener.close()
    with pytest.raises(PeerLost, match="connecting.*refused" if kind == "tcp" else "connecting"):
        nobody = connect(uri, "nobody")
        try:
            _read(nobody)
        finally:
            nobody.close()


def _readable(fd: int) -> None:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    assert poll.poll(10_000)


def _read(connection: ByteConnection) -> bytes:
    _readable(connection.fileno())
    data = connection.receive()
    assert data is not None
    return data


def test_an_address_that_is_taken_is_said() -> None:
    first = TcpListener("127.0.0.1", 0)
    with pytest.raises(ConfigError, match="cannot listen"):
        listen(Uri("tcp", "127.0.0.1", first.port))
    first.close()
