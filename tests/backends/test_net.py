from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.transport.loop import Loop
from protocols.transport.net import DatagramNet, open_datagram
from vfio_model.backends.net import QUEUE, FrameQueue, Hub
from vfio_model.backends.opening import open_net
from vfio_model.errors import ConfigError


class Card:
    """A device with ``buffers`` receive buffers."""

    def __init__(self, buffers: int = 1000) -> None:
        self.buffers = buffers
        self.frames: list[bytes] = []

    def on_frame(self, frame: bytes) -> bool:
        if not self.buffers:
            return False
        self.buffers -= 1
        self.frames.append(frame)
        return True


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture
def directory() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="vm-", dir="/tmp")
    yield Path(path)
    shutil.rmtree(path)


def run_until(loop: Loop, card: Card, count: int) -> None:
    for _ in range(1000):
        if len(card.frames) >= count:
            return
        loop.run_once(0.01)
    raise AssertionError(f"{len(card.frames)} of {count} frames have come")


def test_hub_repeats_to_every_other_port() -> None:
    hub, cards = Hub(), [Card() for _ in range(3)]
    ports = [hub.join(card.on_frame) for card in cards]
    ports[0].send(b"hello")
    assert [card.frames for card in cards] == [[], [b"hello"], [b"hello"]]
    ports[2].close()
    ports[2].close()
    ports[0].send(b"again")
    assert cards[1].frames == [b"hello", b"again"] and cards[2].frames == [b"hello"]
    assert len(hub) == 2


def test_frames_wait_in_order_for_buffers_and_the_newest_are_dropped() -> None:
    card = Card(buffers=0)
    queue = FrameQueue(card.on_frame)
    for number in range(QUEUE + 5):
        queue.offer(b"%d" % number)
    assert queue.dropped == 5 and card.frames == []
    card.buffers = 2
    queue.resume()
    assert card.frames == [b"0", b"1"]
    card.buffers = QUEUE
    queue.resume()
    assert card.frames == [b"%d" % number for number in range(QUEUE)]


def test_device_that_answers_while_it_receives_is_not_entered_twice() -> None:
    hub, seen = Hub(), []

    def echo(frame: bytes) -> bool:
        seen.append(len(frame))
        if len(frame) < 5:
            mine.send(frame + b"x")
        return True

    mine = hub.join(echo)
    other = hub.join(lambda frame: other.send(frame + b"y") is None)
    other.send(b"a")
    assert seen == [1, 3, 5]


def test_closed_queue_drops() -> None:
    card = Card()
    queue = FrameQueue(card.on_frame)
    queue.close()
    queue.offer(b"late")
    assert queue.dropped == 1 and card.frames == []


def test_udp_carries_frames_both_ways(loop: Loop) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        card = Card()
        text = f"udp:127.0.0.1:0@127.0.0.1:{peer.getsockname()[1]}"
        net = open_datagram(loop, text, lambda: FrameQueue(card.on_frame))
        net.send(b"out")
        data, address = peer.recvfrom(100)
        assert data == b"out"
        peer.sendto(b"", address)
        peer.sendto(b"in", address)
        run_until(loop, card, 1)
        assert card.frames == [b"in"]
        net.close()
        net.close()


def test_unix_sockets_find_each_other_in_any_order(loop: Loop, directory: Path) -> None:
    cards = [Card(), Card()]
    paths = [str(directory / "a"), str(directory / "b")]
    first = open_datagram(loop, f"unix:{paths[0]}@{paths[1]}", lambda: FrameQueue(cards[0].on_frame))
    first.send(b"nobody is there")
    second = open_datagram(loop, f"unix:{paths[1]}@{paths[0]}", lambda: FrameQueue(cards[1].on_frame))
    first.send(b"to b")
    second.send(b"to a")
    run_until(loop, cards[0], 1)
    run_until(loop, cards[1], 1)
    assert (cards[0].frames, cards[1].frames, first.dropped) == ([b"to a"], [b"to b"], 1)
    with pytest.raises(ConfigError):
        open_datagram(loop, f"unix:{paths[0]}@{paths[1]}", lambda: FrameQueue(cards[0].on_frame))
    first.close()
    second.close()
    assert os.listdir(directory) == []


def test_stale_socket_file_is_replaced(loop: Loop, directory: Path) -> None:
    path = str(directory / "a")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stale:
        stale.bind(path)
    open_datagram(loop, f"unix:{path}@{directory / 'b'}", lambda: FrameQueue(Card().on_frame)).close()


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_end_of_a_pair(loop: Loop, kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    card = Card()
    net = open_datagram(loop, f"fd:{theirs.detach()}", lambda: FrameQueue(card.on_frame))
    ours.send(b"in")
    run_until(loop, card, 1)
    net.send(b"out")
    assert ours.recv(100) == b"out"
    ours.close()
    loop.run_once(0.0)
    net.send(b"nobody")
    assert net.dropped == 1
    net.close()


def test_full_socket_drops_and_never_waits(loop: Loop) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    net = DatagramNet(loop, theirs, FrameQueue(Card().on_frame))
    for _ in range(5000):
        net.send(bytes(1500))
    assert net.dropped > 0
    net.close()
    ours.close()


@pytest.mark.parametrize(
    "text", ["tcp:a@b", "udp:127.0.0.1:1", "udp:x:y@z:w", "fd:x", "fd:0", "fd:999999", "unix:/nowhere/a@/nowhere/b"]
)
def test_what_is_no_network_is_refused(loop: Loop, text: str) -> None:
    with pytest.raises(ConfigError, match="netdev"):
        open_datagram(loop, text, lambda: FrameQueue(Card().on_frame))


def test_no_network_and_no_host_for_one() -> None:
    net = open_net(object(), "", Card().on_frame)
    net.send(b"lost")
    net.resume()
    net.close()
    with pytest.raises(ConfigError, match="cannot be opened here"):
        open_net(object(), "udp:127.0.0.1:1@127.0.0.1:2", Card().on_frame)
