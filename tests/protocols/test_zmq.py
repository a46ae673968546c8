"""ZeroMQ sockets: no silent drops, no stolen paths, one refusal for each peer that breaks the protocol."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
import zmq

from protocols.port import messages
from protocols.transport.channel import DealerChannel, RouterChannel
from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock, check_private
from protocols.transport.zmq import DealerClient, RouterServer, Sent, ipc_address
from vfio_model.errors import ConfigError, RemoteProtocolError

T = TypeVar("T")
Server = RouterChannel[messages.Request, messages.Response]
Client = DealerChannel[messages.Response, messages.Request]


@pytest.fixture
def server(runtime: Path) -> Iterator[Server]:
    channel: Server = RouterChannel(
        RouterServer(runtime / "hostd.zmq"), messages.REQUESTS, messages.RESPONSES, messages.Refused
    )
    yield channel
    channel.close()
    channel.close()


@pytest.fixture
def client(runtime: Path) -> Iterator[Client]:
    channel: Client = DealerChannel(DealerClient(runtime / "hostd.zmq"), messages.RESPONSES, messages.REQUESTS)
    yield channel
    channel.close()
    channel.close()


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def wait(loop: Loop, channel: Server | Client, get: Callable[[], T | None]) -> T:
    """What ``get`` gives at last."""
    found: list[T] = []

    def look() -> None:
        if (value := get()) is not None:
            found.append(value)

    loop.register(channel, look, served=True)
    try:
        look()
        loop.serve_until(lambda: bool(found), 10, "the other side", "a message")
    finally:
        loop.unregister(channel)
    return found[0]


def test_a_request_is_answered(loop: Loop, server: Server, client: Client) -> None:
    client.send(messages.Ping(5))
    peer, request = wait(loop, server, server.receive)
    assert request == messages.Ping(5)
    assert server.send(peer, messages.Pong(5)) is Sent.OK
    assert wait(loop, client, client.receive) == messages.Pong(5)
    assert client.receive() is None and server.receive() is None


def test_a_peer_that_breaks_the_protocol_is_told_once_and_then_ignored(
    loop: Loop, runtime: Path, server: Server, client: Client
) -> None:
    for _ in range(3):
        client.client.send(b"junk")
    client.send(messages.Ping(1))
    other: Client = DealerChannel(DealerClient(runtime / "hostd.zmq"), messages.RESPONSES, messages.REQUESTS)
    other.send(messages.Ping(2))
    _, request = wait(loop, server, server.receive)
    assert request == messages.Ping(2)
    refusal = wait(loop, client, client.receive)
    assert isinstance(refusal, messages.Refused) and "port request" in refusal.reason
    other.send(messages.Ping(3))
    assert wait(loop, server, server.receive)[1] == messages.Ping(3)
    assert client.receive() is None
    other.close()


def test_a_client_that_sends_several_frames_is_ignored(loop: Loop, server: Server, client: Client) -> None:
    client.client._socket.send_multipart([b"a", b"b"])
    client.send(messages.Ping(1))
    other: Client = DealerChannel(DealerClient(client.client.path), messages.RESPONSES, messages.REQUESTS)
    other.send(messages.Ping(2))
    assert wait(loop, server, server.receive)[1] == messages.Ping(2)
    other.close()


def test_junk_from_a_server_is_an_error_at_the_client(loop: Loop, server: Server, client: Client) -> None:
    client.send(messages.Ping(1))
    peer, _ = wait(loop, server, server.receive)
    server.server.send(peer, b"junk")
    with pytest.raises(RemoteProtocolError):
        wait(loop, client, client.receive)


def test_an_unknown_peer_and_a_full_queue_are_reported(loop: Loop, runtime: Path) -> None:
    server = RouterServer(runtime / "small.zmq", hwm=2)
    assert server.send(b"nobody", b"x") is Sent.UNREACHABLE
    client = DealerClient(runtime / "small.zmq", hwm=2)
    client.send(b"hello")
    found: list[tuple[bytes, bytes]] = []

    def look() -> None:
        if (received := server.receive()) is not None:
            found.append(received)

    loop.register(server, look, served=True)
    loop.serve_until(lambda: bool(found), 10, "client", "hello")
    loop.unregister(server)
    results = {server.send(found[0][0], bytes(1 << 20)) for _ in range(50)}
    assert Sent.AGAIN in results
    client.close()
    server.close()


def test_a_second_server_does_not_steal_the_path(runtime: Path) -> None:
    first = RouterServer(runtime / "x.zmq")
    with pytest.raises(ConfigError, match="already running"):
        RouterServer(runtime / "x.zmq")
    first.close()
    RouterServer(runtime / "x.zmq").close()


def test_one_role_lock_covers_several_sockets(runtime: Path) -> None:
    lock = RoleLock(runtime, "hostd")
    servers = [RouterServer(runtime / name, lock=lock) for name in ("hostd.zmq", "hostd.ctl")]
    with pytest.raises(ConfigError, match="hostd is already running"):
        RoleLock(runtime, "hostd")
    for server in servers:
        server.close()
    lock.close()
    lock.close()
    RoleLock(runtime, "hostd").close()


def test_a_directory_that_others_can_enter_is_refused(runtime: Path) -> None:
    os.chmod(runtime, 0o755)
    with pytest.raises(ConfigError, match="mode 755 lets others in"):
        RouterServer(runtime / "x.zmq")
    with pytest.raises(ConfigError, match="no runtime directory"):
        check_private(runtime / "missing")


def test_a_path_that_is_too_long_says_so() -> None:
    with pytest.raises(ConfigError, match="the kernel takes 107"):
        ipc_address("/tmp/" + "x" * 103)


def test_every_socket_gives_its_descriptors_back(loop: Loop, runtime: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    def once() -> None:
        server = RouterServer(runtime / "x.zmq")
        client = DealerClient(runtime / "x.zmq")
        client.send(b"x")
        found: list[object] = []
        loop.register(server, lambda: found.append(server.receive()), served=True)
        loop.serve_until(lambda: bool(found), 10, "client", "x")
        loop.unregister(server)
        client.close()
        server.close()

    once()
    zmq.Context.instance()
    before = count()
    for _ in range(5):
        once()
    loop.serve_until(lambda: count() <= before, 10, "libzmq's reaper", "closing")


def test_a_descriptor_that_wakes_alone_is_told_from_one_beside_a_message(
    loop: Loop, server: Server, client: Client
) -> None:
    bell = EventFd()
    loop.register(server, lambda: None, served=True)
    loop.register(bell, bell.drain, served=True)
    assert not loop.wakes_fd(bell.fd, 1)
    bell.ring()
    assert loop.wakes_fd(bell.fd, 1)
    client.send(messages.Ping(5))
    assert server.zmq_socket.poll(10_000)
    assert not loop.wakes_fd(bell.fd, 1)
    loop.unregister(bell)
    loop.unregister(server)
    bell.close()
