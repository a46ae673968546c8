"""AF_UNIX transports: descriptors arrive where they belong, none is lost, nothing blocks."""

from __future__ import annotations

import array
import contextlib
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.port import files
from protocols.transport import unix
from protocols.transport.channel import FdChannel
from protocols.transport.unix import ByteConnection, SeqpacketConnection, StreamConnection
from protocols.transport.unix_listener import ByteListener, SeqpacketListener, StreamListener
from vfio_model.errors import ConfigError, LocalProtocolError, PeerLost, RemoteProtocolError

pytestmark = pytest.mark.usefixtures("no_leak")


@pytest.fixture
def pair() -> Iterator[tuple[SeqpacketConnection, SeqpacketConnection]]:
    left, right = unix.seqpacket_pair()
    yield left, right
    left.close()
    right.close()


@pytest.fixture
def stream() -> Iterator[tuple[socket.socket, StreamConnection]]:
    """A raw socket on one side, ours on the other."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    connection = StreamConnection(b, "client")
    yield a, connection
    a.close()
    connection.close()


def frame(body: bytes, number: int = 1) -> bytes:
    return number.to_bytes(2, "little") + b"\x09\0" + (16 + len(body)).to_bytes(4, "little") + bytes(8) + body


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_a_packet_brings_its_descriptors_close_on_exec(pair: tuple[SeqpacketConnection, SeqpacketConnection]) -> None:
    left, right = pair
    read, write = os.pipe()
    left.send(b"one", [read, write])
    left.send(b"two")
    unix.close_fds([read, write])
    packet = right.receive()
    assert packet is not None and packet.data == b"one" and len(packet.fds) == 2
    assert not any(os.get_inheritable(fd) for fd in packet.fds)
    os.write(packet.fds[1], b"x")
    assert os.read(packet.fds[0], 1) == b"x"
    unix.close_fds(packet.fds)
    assert right.receive() == unix.Packet(b"two", [])
    assert right.receive() is None


def test_eof_is_peer_lost_after_what_was_sent(pair: tuple[SeqpacketConnection, SeqpacketConnection]) -> None:
    left, right = pair
    left.send(b"last")
    left.close()
    assert right.receive() == unix.Packet(b"last", [])
    with pytest.raises(PeerLost):
        right.receive()
    with pytest.raises(PeerLost):
        right.send(b"x")


def test_cut_off_descriptors_are_closed_and_an_error(
    pair: tuple[SeqpacketConnection, SeqpacketConnection], monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = pair
    monkeypatch.setattr(unix, "_CONTROL", socket.CMSG_SPACE(4))
    null = os.open("/dev/null", os.O_RDONLY)
    left.send(b"x", [null] * 5)
    os.close(null)
    with pytest.raises(RemoteProtocolError, match="cut off"):
        right.receive()


def test_a_packet_that_is_too_long_is_an_error(pair: tuple[SeqpacketConnection, SeqpacketConnection]) -> None:
    left, right = pair
    with pytest.raises(LocalProtocolError):
        left.send(bytes(unix.MAX_PACKET + 1))
    with pytest.raises(LocalProtocolError):
        left.send(b"")
    left._sock.send(bytes(unix.MAX_PACKET + 1))
    with pytest.raises(RemoteProtocolError):
        right.receive()


def test_what_does_not_fit_waits_in_order_with_its_descriptors(
    pair: tuple[SeqpacketConnection, SeqpacketConnection],
) -> None:
    left, right = pair
    null = os.open("/dev/null", os.O_RDONLY)
    sent = 0
    while not left.wants_write:
        left.send(sent.to_bytes(4, "little") + bytes(4000), [null])
        sent += 1
    left.send(sent.to_bytes(4, "little"), [null])
    os.close(null)
    got = 0
    while (packet := right.receive()) is not None:
        assert int.from_bytes(packet.data[:4], "little") == got and len(packet.fds) == 1
        unix.close_fds(packet.fds)
        got += 1
        left.flush()
    assert got == sent + 1 and not left.wants_write


def test_a_peer_that_never_reads_is_given_up(pair: tuple[SeqpacketConnection, SeqpacketConnection]) -> None:
    left, _ = pair
    null = os.open("/dev/null", os.O_RDONLY)
    with pytest.raises(PeerLost, match="unread"):
        for _ in range(10 * unix.MAX_OUTBOX):
            left.send(bytes(10_000), [null])
    os.close(null)


def test_the_listener_knows_who_connects(runtime: Path) -> None:
    listener = SeqpacketListener(runtime / "x.sock")
    assert listener.accept() is None
    client = SeqpacketConnection.connect(runtime / "x.sock")
    server = listener.accept()
    assert server is not None
    assert (server.peer().pid, server.peer().uid) == (os.getpid(), os.getuid())
    pidfd = server.open_pidfd()
    os.close(pidfd)
    for each in (client, server, listener):
        each.close()
        each.close()
    assert not (runtime / "x.sock").exists()
    with pytest.raises(PeerLost):
        SeqpacketConnection.connect(runtime / "x.sock")


def test_a_live_path_is_not_stolen_and_a_dead_one_is_replaced(runtime: Path) -> None:
    first = StreamListener(runtime / "x.sock")
    with pytest.raises(ConfigError, match="listens there"):
        StreamListener(runtime / "x.sock")
    first._sock.close()
    os.close(first._spare)
    StreamListener(runtime / "x.sock").close()


@pytest.mark.parametrize("name", ["disk.img", "disk.img~", "folder"])
def test_what_is_no_socket_is_not_replaced_by_one(runtime: Path, name: str) -> None:
    there = runtime / name
    if name == "folder":
        there.mkdir()
    else:
        there.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        StreamListener(runtime / name.removesuffix("~"))
    assert there.is_dir() or there.read_text() == "precious"


def test_a_path_that_is_too_long_says_so(runtime: Path) -> None:
    with pytest.raises(ConfigError, match="108 bytes, the kernel takes 107"):
        SeqpacketListener("/tmp/" + "x" * 103)


@pytest.mark.parametrize("cut", range(1, 24))
def test_a_frame_comes_whole_wherever_it_is_cut(stream: tuple[socket.socket, StreamConnection], cut: int) -> None:
    raw, connection = stream
    data = frame(b"12345678")
    null = os.open("/dev/null", os.O_RDONLY)
    send_fds(raw, data[:cut], [null])
    os.close(null)
    assert connection.receive() is None
    raw.send(data[cut:])
    got = connection.receive()
    assert got is not None and got.header + got.body == data and len(got.fds) == 1
    unix.close_fds(got.fds)


def test_glued_frames_keep_their_own_descriptors(stream: tuple[socket.socket, StreamConnection]) -> None:
    raw, connection = stream
    pipes = [os.pipe() for _ in range(3)]
    for number, (read, write) in enumerate(pipes):
        send_fds(raw, frame(bytes(number * 100), number), [read])
        os.close(write)
    for number, (read, _) in enumerate(pipes):
        got = connection.receive()
        assert got is not None and got.header[0] == number and len(got.body) == number * 100
        assert [os.fstat(fd).st_ino for fd in got.fds] == [os.fstat(read).st_ino]
        unix.close_fds([*got.fds, read])
    assert connection.receive() is None


def test_half_a_frame_leaves_no_descriptor_behind(stream: tuple[socket.socket, StreamConnection]) -> None:
    raw, connection = stream
    null = os.open("/dev/null", os.O_RDONLY)
    send_fds(raw, frame(b"12345678")[:20], [null])
    os.close(null)
    assert connection.receive() is None
    raw.close()
    with pytest.raises(PeerLost):
        connection.receive()


@pytest.mark.parametrize("size", [0, 15, unix.MAX_FRAME + 1, 0xFFFFFFFF])
def test_an_impossible_size_is_an_error(stream: tuple[socket.socket, StreamConnection], size: int) -> None:
    raw, connection = stream
    raw.send(b"\0\0\x09\0" + size.to_bytes(4, "little") + bytes(8))
    with pytest.raises(RemoteProtocolError, match="a frame of"):
        connection.receive()


def test_a_large_frame_is_sent_in_parts_and_arrives_whole() -> None:
    left, right = unix.stream_pair()
    null = os.open("/dev/null", os.O_RDONLY)
    data = frame(os.urandom(1 << 20))
    left.send(data, [null])
    left.send(frame(b"after"))
    os.close(null)
    assert left.wants_write
    frames: list[unix.Frame] = []
    while len(frames) < 2:
        got = right.receive()
        if got is not None:
            frames.append(got)
        left.flush()
    assert frames[0].header + frames[0].body == data and len(frames[0].fds) == 1
    assert frames[1].body == b"after" and frames[1].fds == []
    unix.close_fds(frames[0].fds)
    left.close()
    right.close()


def test_a_channel_closes_what_it_did_not_expect(pair: tuple[SeqpacketConnection, SeqpacketConnection]) -> None:
    raw, connection = pair
    channel = FdChannel(connection, files.REQUESTS, files.RESPONSES, files.fd_count)
    null = os.open("/dev/null", os.O_RDONLY)
    for data, fds in (
        (files.REQUESTS.encode(files.DeclareMemory(0, 1, "ram", 0, 1)), [null, null]),
        (files.REQUESTS.encode(files.OpenMm(0, "x")), [null]),
        (b"junk", [null]),
    ):
        raw.send(data, fds)
        with pytest.raises(RemoteProtocolError):
            channel.receive()
    os.close(null)
    with pytest.raises(LocalProtocolError, match="descriptors"):
        channel.send(files.DeviceFd(1, 2, "edu", 3), [])


def test_without_a_descriptor_left_who_connects_is_turned_away(runtime_dir: Path) -> None:
    listener = SeqpacketListener(runtime_dir / "s")
    turned_away = SeqpacketConnection.connect(runtime_dir / "s")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        assert listener.accept() is None
        assert listener.accept() is None, "and the queue is empty"
    finally:
        for fd in taken:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    with pytest.raises(PeerLost):
        turned_away.receive()
    later = SeqpacketConnection.connect(runtime_dir / "s")
    accepted = listener.accept()
    assert accepted is not None
    for each in (accepted, later, turned_away, listener):
        each.close()


def test_a_stream_of_bytes_ends_with_its_peer(runtime_dir: Path) -> None:
    listener = ByteListener(runtime_dir / "text")
    client = ByteConnection.connect(runtime_dir / "text")
    server = listener.accept()
    assert server is not None and listener.accept() is None
    assert server.receive() is None
    client.send(b"one")
    client.send(b"two")
    assert server.receive() == b"onetwo"
    client.close()
    with pytest.raises(PeerLost):
        server.receive()
    server.close()
    listener.close()
