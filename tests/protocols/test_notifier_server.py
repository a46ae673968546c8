"""The hub on real sockets, with real descriptors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from protocols.notifier.messages import (
    FROM_HUB,
    ROUTER_FROM_HUB,
    ROUTER_TO_HUB,
    TO_HUB,
    Ack,
    Announce,
    Attach,
    Attached,
    Flush,
    FlushDone,
    FromHub,
    Invalidate,
    LaneAdd,
    LaneReady,
    LaneRemove,
    Publish,
    Record,
    Refused,
    RouterFromHub,
    RouterToHub,
    Subscribe,
    SubscribeByMessage,
    Subscribed,
    Ticket,
    ToHub,
    Want,
    Wanted,
    fd_count,
)
from protocols.transport import shm, unix
from protocols.transport.channel import DealerChannel, FdChannel
from protocols.transport.loop import Loop
from protocols.transport.notifier import NotifierServer
from protocols.transport.unix import SeqpacketConnection
from protocols.transport.zmq import DealerClient

T = TypeVar("T")
Client = FdChannel[FromHub, ToHub]


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


@pytest.fixture
def server(loop: Loop, runtime: Path) -> Iterator[NotifierServer]:
    made = NotifierServer(loop, runtime, served=True)
    yield made
    made.close()


def client(runtime: Path) -> Client:
    return FdChannel(SeqpacketConnection.connect(runtime / "notifier.sock", "notifier"), FROM_HUB, TO_HUB, fd_count)


def get(loop: Loop, source: Callable[[], T | None]) -> T:
    """What ``source`` gives at last, while the server is served."""
    found: list[T] = []

    def look() -> bool:
        if not found and (value := source()) is not None:
            found.append(value)
        if not found:
            loop.call_later(200_000, lambda: None, served=True)
        return bool(found)

    loop.serve_until(look, 10, "notifier", "a message")
    return found[0]


@pytest.mark.usefixtures("no_leak")
def test_a_ring_subscriber_shares_memory_with_the_publisher(loop: Loop, runtime: Path, server: NotifierServer) -> None:
    guest, device = client(runtime), client(runtime)
    ring, lanes = shm.create_memory("ring", 4096), shm.create_memory("lanes", 1088)
    guest.send(Announce("guest", [5]), [ring.fd])
    assert get(loop, guest.receive) == (Want(1, False), [])
    device.send(Subscribe("edu0", [5]), [lanes.fd])
    message, (lane_fd, pidfd) = get(loop, guest.receive)
    assert message == LaneAdd(1, "edu0", os.getpid(), [5])
    os.close(pidfd)
    guest.send(LaneReady(1))
    message, (ring_fd,) = get(loop, device.receive)
    assert message == Subscribed(1)
    with shm.map_memory(ring_fd) as seen_ring, shm.map_memory(lane_fd) as seen_lanes:
        ring.words[8], lanes.words[8] = 17, 3
        assert (seen_ring.words[8], seen_lanes.words[8]) == (17, 3)
    device.close()
    assert get(loop, guest.receive) == (LaneRemove(1), [])
    for each in (guest, ring, lanes):
        each.close()
    server.close()
    loop.close()


def test_a_message_subscriber_acknowledges_and_a_flush_waits_for_it(
    loop: Loop, runtime: Path, server: NotifierServer
) -> None:
    guest, device = client(runtime), client(runtime)
    ring = shm.create_memory("ring", 4096)
    guest.send(Announce("guest", [5]), [ring.fd])
    assert get(loop, guest.receive)[0] == Want(1, False)
    device.send(SubscribeByMessage("remote0", [5], 64))
    ticket, _ = get(loop, device.receive)
    assert isinstance(ticket, Ticket)
    router: DealerChannel[RouterFromHub, RouterToHub] = DealerChannel(
        DealerClient(runtime / "notifier.zmq"), ROUTER_FROM_HUB, ROUTER_TO_HUB
    )
    router.send(Attach(ticket.ticket))
    assert get(loop, guest.receive)[0] == Want(2, True)
    guest.send(Wanted(2))
    assert get(loop, router.receive) == Attached(1)
    records = [Record(5, page << 12, (page << 12) + 0xFFF, 0) for page in range(500)]
    guest.send(Publish(9, records))
    guest.send(Flush(1, 10_000_000_000))
    for number, record in enumerate(records, 1):
        assert get(loop, router.receive) == Invalidate(number, 9, record)
        if number % 32 == 0:
            router.send(Ack(number))
    assert guest.receive() is None
    router.send(Ack(500))
    assert get(loop, guest.receive)[0] == FlushDone(1, [])
    for each in (router, guest, device, ring):
        each.close()


@pytest.mark.usefixtures("no_leak")
def test_a_peer_that_breaks_the_protocol_loses_its_connection_and_nobody_else_notices(
    loop: Loop, runtime: Path, server: NotifierServer
) -> None:
    guest, bad = client(runtime), client(runtime)
    ring = shm.create_memory("ring", 4096)
    guest.send(Announce("guest", [5]), [ring.fd])
    assert get(loop, guest.receive)[0] == Want(1, False)
    bad.connection.send(b"junk", [ring.fd])
    refused, _ = get(loop, bad.receive)
    assert isinstance(refused, Refused) and "to the notifier" in refused.reason
    guest.send(Flush(3, 0))
    assert get(loop, guest.receive)[0] == FlushDone(3, [])
    assert unix.Peer(os.getpid(), os.getuid(), os.getgid()) == guest.connection.peer()
    for each in (guest, bad, ring):
        each.close()
    server.close()
    loop.close()
