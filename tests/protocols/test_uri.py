"""Where migrations go and come from."""

from __future__ import annotations

import select
from pathlib import Path

import pytest

from protocols.transport.unix import ByteConnection
from protocols.transport.uri import TcpListener, connect, listen, parse
from vfio_model.errors import ConfigError, PeerLost


@pytest.mark.parametrize(
    ("uri", "found"),
    [
        ("unix:/a/b", ("unix", "/a/b", 0)),
        ("tcp:127.0.0.1:4444", ("tcp", "127.0.0.1", 4444)),
        ("tcp::4444", ("tcp", "localhost", 4444)),
    ],
)
def test_uris(uri: str, found: tuple[str, str, int]) -> None:
    assert parse(uri) == found


@pytest.mark.parametrize("uri", ["", "unix:", "tcp:host", "tcp:host:65536", "tcp:host:-1", "exec:cat", "/a/b"])
def test_what_is_no_uri(uri: str) -> None:
    for act in (parse, listen, lambda uri: connect(uri, "nobody")):
        with pytest.raises(ConfigError, match="is not a valid migration URI"):
            act(uri)  # type: ignore[operator]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_bytes_go_both_ways(tmp_path: Path, kind: str) -> None:
    listener = listen(f"unix:{tmp_path}/sock") if kind == "unix" else TcpListener("127.0.0.1", 0)
    uri = f"tcp:127.0.0.1:{listener.port}" if isinstance(listener, TcpListener) else f"unix:{tmp_path}/sock"
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
    with pytest.raises(PeerLost, match="connecting"):
        connect(uri, "nobody")


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
        listen(f"tcp:127.0.0.1:{first.port}")
    first.close()
