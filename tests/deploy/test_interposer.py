"""The interposer as a real process between a client and a host that the test plays."""

from __future__ import annotations

import select
from collections.abc import Iterator

import msgspec
import pytest

from deploy import assemble, events, live
from deploy.launcher import DaemonSpec, Launcher, python
from deploy.link import CommandFailed, Link
from protocols.control.messages import Interpose, Reset, Status
from protocols.port.messages import REQUESTS, RESPONSES, Ioctl, Ping, Pong, Return
from protocols.transport.zmq import DealerClient, RouterServer
from vfio_model.uapi import vfio

SECONDS = 20


class Bench:
    """Client, interposer process, host."""

    def __init__(self, run: Launcher) -> None:
        self.run = run
        self.host = RouterServer(run.directory / assemble.PORT)
        self.client = DealerClient(run.directory / assemble.INTERPOSED_PORT)
        self.control = Link(run.directory, "interposer")

    def rules(self, *rules: dict[str, object]) -> None:
        self.control.ask(Interpose(msgspec.json.encode(rules)))

    def send(self, seq: int, iova: int = 0x3000) -> Ioctl:
        cmd = vfio.Ioctl.VFIO_IOMMU_UNMAP_DMA
        message = Ioctl(seq, seq + 100, 1, 2, cmd, 1, vfio.DmaUnmap(0, 0, iova, 4096).pack())
        self.client.send(REQUESTS.encode(message))
        return message

    def at_host(self) -> tuple[bytes, Ioctl | Ping]:
        peer, data = wait(self.host)
        return peer, REQUESTS.decode(data)

    def answer(self, peer: bytes, seq: int) -> None:
        self.host.send(peer, RESPONSES.encode(Return(seq, 0, 1, b"")))

    def back(self) -> object:
        return RESPONSES.decode(wait(self.client))

    def close(self) -> None:
        self.client.close()
        self.host.close()
        self.control.close()


def wait(socket):  # type: ignore[no-untyped-def]
    """The next message of a socket of ours."""
    poll = select.poll()
    poll.register(socket.fileno(), select.POLLIN)
    for _ in range(SECONDS * 20):
        if (received := socket.receive()) is not None:
            return received
        poll.poll(50)
    raise AssertionError("nothing came")


@pytest.fixture
def bench() -> Iterator[Bench]:
    with Launcher("interposer", live.connect) as run:
        rules = run.directory / "rules.json"
        rules.write_text("[]")
        argv = python("-m", "deploy.interposer", "--dir", str(run.directory), "--rules", str(rules))
        run.start([DaemonSpec("interposer", argv)])
        bench = Bench(run)
        yield bench
        bench.close()


def names(bench: Bench) -> list[str]:
    bench.control.ask(Status())
    return [record.event for record in events.read(bench.run.directory).records]


def test_without_rules_messages_and_answers_pass_unchanged(bench: Bench) -> None:
    sent = bench.send(1)
    peer, message = bench.at_host()
    assert message == sent
    bench.answer(peer, 1)
    assert bench.back() == Return(1, 0, 1, b"")
    bench.client.send(REQUESTS.encode(Ping(2)))
    peer, message = bench.at_host()
    assert message == Ping(2)
    bench.host.send(peer, RESPONSES.encode(Pong(2)))
    assert bench.back() == Pong(2)
    assert names(bench) == ["port_take", "port_forward"] * 2


def test_a_dropped_unmap_never_arrives_and_is_answered_as_done(bench: Bench) -> None:
    bench.rules({"action": "drop", "ioctl": "UNMAP_DMA", "iova": 0x3000})
    first = bench.send(1)
    assert bench.back() == Return(1, 0, 1, first.arg)
    bench.send(2)
    assert bench.at_host()[1].seq == 2
    dropped = [record for record in events.read(bench.run.directory).records if record.event == "port_drop"]
    assert [(record.cause, record.number("iova")) for record in dropped] in ([], [(101, 0x3000)])
    assert names(bench) == ["port_take", "port_drop", "port_take", "port_forward"]


def test_a_failed_message_gets_its_errno_and_a_doubled_one_a_single_answer(bench: Bench) -> None:
    bench.rules({"action": "fail", "errno": "ENOMEM"}, {"action": "duplicate", "nth": 2})
    bench.send(1)
    assert bench.back() == Return(1, 12, 0, b"")
    bench.send(2)
    for _ in range(2):
        peer, message = bench.at_host()
        assert message.seq == 2
        bench.answer(peer, 2)
    bench.send(3)
    peer, _ = bench.at_host()
    bench.answer(peer, 3)
    assert [bench.back(), bench.back()] == [Return(2, 0, 1, b""), Return(3, 0, 1, b"")]


def test_two_clients_are_two_peers_of_the_host(bench: Bench) -> None:
    other = DealerClient(bench.run.directory / assemble.INTERPOSED_PORT)
    try:
        bench.send(1)
        first, _ = bench.at_host()
        other.send(REQUESTS.encode(Ping(1)))
        second, _ = bench.at_host()
        assert first != second
    finally:
        other.close()


def test_wrong_rules_and_foreign_commands_are_refused_with_a_reason(bench: Bench) -> None:
    with pytest.raises(CommandFailed, match="action"):
        bench.rules({"action": "explode"})
    with pytest.raises(CommandFailed, match="Reset"):
        bench.control.ask(Reset())
