"""vfio-user: layouts, negotiation, duplex commands, and what a peer may not do."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from protocols.transport import unix
from protocols.transport.vfio_user import VfioUserEndpoint, server_capabilities
from protocols.vfio_user.messages import (
    COMMANDS,
    Capabilities,
    ClockSetup,
    Command,
    DeviceInfo,
    DmaAccess,
    DmaMap,
    DmaUnmap,
    Empty,
    Extensions,
    Header,
    HeaderFlags,
    MigData,
    MigrationCapability,
    Payload,
    RegionAccess,
    RegionInfo,
    RegionWriteMulti,
    Role,
    SetIrqs,
    TranslateReply,
    TranslateRequest,
    TranslationEntry,
    TwinSocket,
    Version,
)
from protocols.vfio_user.state import TRANSITIONS, CommandReceived, ReplyReceived, State, Step, VfioUserState
from tests.protocols.fuzz import Fuzzer
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

OURS = Capabilities(max_msg_fds=16, extensions=Extensions(ats=True, clock=True, notifier=True))
QEMU = (
    b'{"capabilities":{"pgsizes":4096,"max_msg_fds":16,"max_dma_maps":65535,"max_data_xfer_size":1048576,'
    b'"migration":{"max_bitmap_size":268435456,"pgsize":4096},"write_multiple":true}}\0'
)


def feed(state: VfioUserState, data: bytes, fds: list[int] | None = None) -> CommandReceived | ReplyReceived:
    return state.receive(data[:16], data[16:], fds or [])


def negotiated(client: Capabilities = OURS, server: Capabilities = OURS) -> tuple[VfioUserState, VfioUserState]:
    left, right = VfioUserState(Role.CLIENT, client), VfioUserState(Role.SERVER, server)
    event = feed(right, left.version()[1])
    assert isinstance(event, CommandReceived)
    feed(left, right.accept(event))
    assert left.state is right.state is State.READY
    return left, right


def command(state: VfioUserState, data: bytes, fds: list[int] | None = None) -> CommandReceived:
    event = feed(state, data, fds)
    assert isinstance(event, CommandReceived)
    return event


@pytest.mark.parametrize("number", COMMANDS)
@pytest.mark.parametrize("side", ["request", "reply"])
def test_a_payload_comes_back_as_it_was(number: int, side: str) -> None:
    kind: type[Payload] = getattr(COMMANDS[number], side)
    for seed in range(20):
        raw = Fuzzer(seed).payload(kind)
        assert kind.unpack(raw).pack() == raw
        if kind is not Version:
            with pytest.raises(RemoteProtocolError):
                kind.unpack(raw[: kind.SIZE - 1] if kind.SIZE else b"x")


def test_sizes_are_those_of_the_document() -> None:
    sizes = {
        Command.DMA_MAP: 32,
        Command.DMA_UNMAP: 24,
        Command.DEVICE_GET_INFO: 16,
        Command.DEVICE_GET_REGION_INFO: 32,
    }
    sizes |= {
        Command.DEVICE_GET_IRQ_INFO: 16,
        Command.DEVICE_SET_IRQS: 20,
        Command.REGION_READ: 16,
        Command.DMA_READ: 16,
    }
    assert {number: COMMANDS[number].request.SIZE for number in sizes} == sizes


def test_qemus_proposal_is_understood() -> None:
    server = VfioUserState(Role.SERVER, OURS)
    body = struct.pack("=HH", 0, 0) + QEMU
    event = command(server, Header(1, 1, 16 + len(body), 0, 0).pack() + body)
    assert server.peer == Capabilities(max_msg_fds=16, write_multiple=True, migration=MigrationCapability())
    reply = server.accept(event)
    assert b'x-vfio-model":{}' in reply or b"x-vfio-model" not in reply
    assert server.state is State.READY and server.extensions == Extensions()
    with pytest.raises(LocalProtocolError, match="not negotiated"):
        server.command(Command.X_TRANSLATE, TranslateRequest(0, 4096))


@pytest.mark.parametrize(
    "kind",
    [
        Command.DMA_MAP,
        Command.DMA_UNMAP,
        Command.DEVICE_GET_INFO,
        Command.DEVICE_GET_REGION_INFO,
        Command.DEVICE_GET_REGION_IO_FDS,
        Command.DEVICE_GET_IRQ_INFO,
    ],
)
def test_what_follows_a_structure_that_may_grow_is_skipped(kind: Command) -> None:
    _, server = negotiated()
    request = COMMANDS[kind].request()
    body = request.pack() + b"\xff" * 4000
    event = server.receive(Header(1, kind, 16 + len(body), 0, 0).pack(), body, [7])
    assert isinstance(event, CommandReceived) and event.payload == request and event.fds == [7]
    body = request.pack()[:-1]
    with pytest.raises(RemoteProtocolError):
        server.receive(Header(1, kind, 16 + len(body), 0, 0).pack(), body, [])


def test_a_region_may_be_described_with_a_descriptor_for_each_area() -> None:
    client, _ = negotiated(client=Capabilities(max_msg_fds=16))
    number, _ = client.command(Command.DEVICE_GET_REGION_INFO, RegionInfo(argsz=4096))
    body = RegionInfo(argsz=40, caps=b"8 bytes.").pack()
    event = client.receive(Header(number, Command.DEVICE_GET_REGION_INFO, 56, 1, 0).pack(), body, [5, 6, 7])
    assert isinstance(event, ReplyReceived) and event.fds == [5, 6, 7]
    assert isinstance(event.payload, RegionInfo) and event.payload.caps == b"8 bytes."


def test_a_version_without_data_means_the_defaults() -> None:
    server = VfioUserState(Role.SERVER, OURS)
    command(server, Header(1, 1, 20, 0, 0).pack() + bytes(4))
    assert server.peer == Capabilities()
    assert server.peer.max_msg_fds == 1 and server.peer.max_data_xfer_size == 1 << 20


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0\0\0",
        b"\1\0\0\0",
        b"\0\0\0\0{",
        b"\0\0\0\0[]\0",
        b'\0\0\0\0{"capabilities":{"max_msg_fds":-1}}\0',
        b'\0\0\0\0{"capabilities":{"max_data_xfer_size":0}}\0',
        b'\0\0\0\0{"x":' + b"[" * 30000 + b"\0",
        b"\0\0\0\0\xff\xfe\0",
    ],
)
def test_a_bad_version_is_refused(body: bytes) -> None:
    server = VfioUserState(Role.SERVER, OURS)
    with pytest.raises(RemoteProtocolError):
        feed(server, Header(1, 1, 16 + len(body), 0, 0).pack() + body)


def test_only_common_extensions_are_spoken() -> None:
    client, server = negotiated(server=Capabilities(extensions=Extensions(ats=True)))
    assert client.extensions == server.extensions == Extensions(ats=True)
    with pytest.raises(LocalProtocolError, match="not negotiated"):
        client.command(Command.X_CLOCK, ClockSetup(0))
    raw = Header(9, Command.X_CLOCK, 24, 0, 0).pack() + bytes(8)
    assert command(server, raw).payload is None


def test_commands_cross_and_replies_find_their_commands() -> None:
    client, server = negotiated()
    region, read = client.command(Command.REGION_READ, RegionAccess(0x10, 0, 4))
    asked = command(server, read)
    nested, dma = server.command(Command.DMA_READ, DmaAccess(0x1000, 8))
    inner = command(client, dma)
    reply = feed(server, client.reply(inner, DmaAccess(0x1000, 8, b"12345678")))
    assert reply == ReplyReceived(nested, Command.DMA_READ, DmaAccess(0x1000, 8, b"12345678"), 0)
    answer = feed(client, server.reply(asked, RegionAccess(0x10, 0, 4, b"abcd")))
    assert isinstance(answer, ReplyReceived) and answer.id == region
    assert client.outstanding == server.outstanding == 0


def test_both_sides_may_use_the_same_id() -> None:
    client, server = negotiated()
    number, _ = client.command(Command.DEVICE_RESET)
    other, data = server.command(Command.DMA_WRITE, DmaAccess(0, 1, b"x"))
    server._outstanding[number] = server._outstanding.pop(other)
    header = Header.unpack(data[:16])
    event = command(client, Header(number, *(header.command, header.size, 0, 0)).pack() + data[16:])
    assert event.id == number


def test_an_error_reply_brings_its_errno() -> None:
    client, server = negotiated()
    _, data = client.command(Command.DMA_MAP, DmaMap(flags=3, size=4096))
    reply = feed(client, server.reply_error(command(server, data), 17))
    assert isinstance(reply, ReplyReceived) and reply.errno == 17 and reply.payload is None


def test_a_posted_write_wants_no_reply() -> None:
    client, server = negotiated()
    _, data = client.command(Command.REGION_WRITE, RegionAccess(0, 0, 2, b"ab"), no_reply=True)
    event = command(server, data)
    assert event.no_reply and client.outstanding == 0
    with pytest.raises(LocalProtocolError, match="wants no reply"):
        server.reply(event, RegionAccess(0, 0, 2))


def test_nothing_is_answered_twice() -> None:
    client, server = negotiated()
    event = command(server, client.command(Command.DEVICE_RESET)[1])
    server.reply(event)
    with pytest.raises(LocalProtocolError, match="or has one"):
        server.reply_error(event, 5)


def test_the_short_count_in_the_reply_to_a_dma_write_is_accepted() -> None:
    client, server = negotiated()
    number, data = server.command(Command.DMA_WRITE, DmaAccess(0x1000, 2, b"ab"))
    command(client, data)
    body = struct.pack("=QI", 0x1000, 2)
    reply = feed(server, Header(number, Command.DMA_WRITE, 28, 1, 0).pack() + body)
    assert isinstance(reply, ReplyReceived) and reply.payload == DmaAccess(0x1000, 2)


def test_translations_travel() -> None:
    client, server = negotiated()
    entries = [TranslationEntry(0x1000 * n, (1 << 52) + n, 0xFFF, 3) for n in range(3)]
    _, data = server.command(Command.X_TRANSLATE, TranslateRequest(0, 0x3000))
    reply = feed(server, client.reply(command(client, data), TranslateReply.of(entries)))
    assert isinstance(reply, ReplyReceived) and isinstance(reply.payload, TranslateReply)
    assert reply.payload.entries() == entries


def _raw(number: int, body: bytes = b"", flags: int = 0, ident: int = 77) -> bytes:
    return Header(ident, number, 16 + len(body), flags, 0).pack() + body


@pytest.mark.parametrize(
    ("raw", "fds"),
    [
        (_raw(Command.VERSION, bytes(4)), 0),
        (_raw(Command.DMA_READ, DmaAccess(0, 8).pack()), 0),
        (_raw(Command.DMA_MAP, bytes(31)), 0),
        (_raw(Command.DMA_MAP, bytes(32)), 17),
        (_raw(Command.DMA_UNMAP, bytes(24)), 17),
        (_raw(Command.DEVICE_RESET, b"x"), 0),
        (_raw(Command.REGION_WRITE, RegionAccess(0, 0, 4, b"abc").pack()), 0),
        (_raw(Command.REGION_READ, RegionAccess(0, 0, 4, b"abcd").pack()), 0),
        (_raw(Command.REGION_READ, RegionAccess(0, 0, (1 << 20) + 1).pack()), 0),
        (_raw(Command.DEVICE_SET_IRQS, SetIrqs(count=1).pack()), 17),
        (_raw(Command.X_NOTIFIER, bytes(8)), 0),
        (_raw(Command.DEVICE_RESET, flags=HeaderFlags.REPLY), 0),
        (_raw(Command.DEVICE_RESET, flags=2), 0),
        (_raw(Command.DEVICE_RESET)[:-1] + b"\0" * 5, 0),
    ],
)
def test_what_a_client_may_not_send(raw: bytes, fds: int) -> None:
    _, server = negotiated()
    with pytest.raises(RemoteProtocolError):
        feed(server, raw, list(range(fds)))


@pytest.mark.parametrize(
    ("ident", "number", "body"),
    [
        (1, Command.REGION_READ, RegionAccess(0, 0, 4, b"abcd").pack()),
        (0, Command.REGION_WRITE, RegionAccess(0, 0, 4).pack()),
        (0, Command.REGION_READ, RegionAccess(0, 0, 4, b"abc").pack()),
        (0, Command.REGION_READ, RegionAccess(0, 0, 5, b"abcde").pack()),
        (0, Command.REGION_READ, b""),
    ],
)
def test_a_reply_that_answers_no_command_or_another_one(ident: int, number: int, body: bytes) -> None:
    client, _ = negotiated()
    asked, _ = client.command(Command.REGION_READ, RegionAccess(0, 0, 4))
    with pytest.raises(RemoteProtocolError):
        feed(client, _raw(number, body, HeaderFlags.REPLY, (asked + ident) & 0xFFFF))


@pytest.mark.parametrize(
    ("number", "payload", "fds"),
    [
        (Command.DMA_READ, DmaAccess(0, 8), 0),
        (Command.REGION_WRITE, RegionAccess(0, 0, 8, b"x"), 0),
        (Command.REGION_READ, RegionAccess(0, 0, 9000), 0),
        (Command.REGION_READ, Empty(), 0),
        (Command.REGION_READ, RegionAccess(-1, 0, 4), 0),
        (Command.DMA_MAP, DmaMap(), 2),
        (Command.DEVICE_SET_IRQS, SetIrqs(), 2),
        (Command.VERSION, Version(), 0),
    ],
)
def test_our_own_mistakes_are_caught_before_they_are_sent(number: Command, payload: Payload, fds: int) -> None:
    client, _ = negotiated(server=Capabilities(max_data_xfer_size=8192))
    with pytest.raises(LocalProtocolError):
        client.command(number, payload, fds)


def test_a_reply_of_the_wrong_kind_is_our_mistake() -> None:
    client, server = negotiated()
    event = command(server, client.command(Command.DEVICE_GET_INFO, DeviceInfo())[1])
    for payload, fds in ((Empty(), 0), (DeviceInfo(), 1)):
        with pytest.raises(LocalProtocolError):
            server.reply(event, payload, fds)
    server.reply(event, DeviceInfo(16, 3, 9, 5))


def test_the_transition_table_reaches_every_state_and_closed_is_the_end() -> None:
    for table in TRANSITIONS.values():
        assert set(table.values()) == set(State) - {State.IDLE}
        assert {step for state, step in table if state is State.CLOSED} == {Step.CLOSE}


def test_every_id_in_use_is_skipped() -> None:
    client, _ = negotiated()
    ids = {client.command(Command.DEVICE_RESET)[0] for _ in range(1 << 16)}
    assert len(ids) == 1 << 16
    with pytest.raises(LocalProtocolError, match="65536"):
        client.command(Command.DEVICE_RESET)


class Conversation(RuleBasedStateMachine):
    """Two states with a queue of bytes in each direction, against an oracle: lists of what was asked and answered."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = negotiated()
        self.wire: tuple[list[bytes], list[bytes]] = ([], [])
        self.asked: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.open: tuple[list[CommandReceived], list[CommandReceived]] = ([], [])

    @rule(side=st.integers(0, 1), value=st.integers(0, 2**63))
    def ask(self, side: int, value: int) -> None:
        kind, payload = [
            (Command.DMA_UNMAP, DmaUnmap(address=value)),
            (Command.DMA_READ, DmaAccess(value, 4)),
        ][side]
        number, data = self.ends[side].command(kind, payload)
        assert number not in self.asked[side]
        self.asked[side][number] = value
        self.wire[side].append(data)

    @rule(side=st.integers(0, 1))
    def deliver(self, side: int) -> None:
        if not self.wire[1 - side]:
            return
        event = feed(self.ends[side], self.wire[1 - side].pop(0))
        if isinstance(event, CommandReceived):
            self.open[side].append(event)
        else:
            value = self.asked[side].pop(event.id)
            found = event.payload.address if isinstance(event.payload, DmaUnmap | DmaAccess) else value
            assert found == value

    @precondition(lambda self: any(self.open))
    @rule(side=st.integers(0, 1), which=st.integers(0, 100), fail=st.booleans())
    def answer(self, side: int, which: int, fail: bool) -> None:
        if not self.open[side]:
            return
        event = self.open[side].pop(which % len(self.open[side]))
        if fail:
            self.wire[side].append(self.ends[side].reply_error(event, 22))
        elif isinstance(event.payload, DmaAccess):
            self.wire[side].append(self.ends[side].reply(event, DmaAccess(event.payload.address, 4, b"data")))
        else:
            assert event.payload is not None
            self.wire[side].append(self.ends[side].reply(event, event.payload))

    def teardown(self) -> None:
        for side in (0, 1):
            assert self.ends[side].outstanding == len(self.asked[side])


TestConversation = Conversation.TestCase


@given(st.binary(min_size=16, max_size=16), st.binary(max_size=64))
def test_no_frame_whatever_brings_another_exception(header: bytes, body: bytes) -> None:
    _, server = negotiated()
    header = header[:4] + struct.pack("=I", 16 + len(body)) + header[8:]
    try:
        server.receive(header, body, [])
    except RemoteProtocolError:
        return


@pytest.fixture
def endpoints() -> Iterator[tuple[VfioUserEndpoint, VfioUserEndpoint]]:
    left, right = unix.stream_pair("client", "server")
    client, server = VfioUserEndpoint(left, Role.CLIENT, OURS), VfioUserEndpoint(right, Role.SERVER, OURS)
    client.version()
    event = server.receive()
    assert isinstance(event, CommandReceived)
    server.accept(event)
    client.receive()
    assert client.ready and server.ready
    yield client, server
    client.close()
    server.close()


@pytest.mark.usefixtures("no_leak")
def test_endpoints_carry_descriptors_and_close_those_of_unknown_commands(
    endpoints: tuple[VfioUserEndpoint, VfioUserEndpoint],
) -> None:
    client, server = endpoints
    null = os.open("/dev/null", os.O_RDONLY)
    client.command(Command.DMA_MAP, DmaMap(size=4096), [null])
    event = server.receive()
    assert isinstance(event, CommandReceived) and len(event.fds) == 1
    unix.close_fds(event.fds)
    server.reply(event)
    client.stream.send(_raw(200), [null])
    client.stream.send(_raw(Command.DMA_UNMAP, bytes(24)), [null] * 17)
    os.close(null)
    with pytest.raises(RemoteProtocolError):
        server.receive()
    reply = client.receive()
    assert isinstance(reply, ReplyReceived) and reply.command == Command.DMA_MAP
    with pytest.raises(RemoteProtocolError, match="not asked"):
        client.receive()


# -- what VERSION settles --------------------------------------------------------------------------------------------


def said_in(frame: bytes) -> dict[str, object]:
    """The capabilities in a VERSION."""
    said: dict[str, object] = json.loads(frame[20:].rstrip(b"\0"))["capabilities"]
    return said


def proposal(text: bytes, minor: int = 0) -> tuple[VfioUserState, CommandReceived]:
    server = VfioUserState(Role.SERVER, server_capabilities(Extensions(clock=True)))
    body = struct.pack("=HH", 0, minor) + text
    return server, command(server, Header(1, 1, 16 + len(body), 0, 0).pack() + body)


def test_a_server_says_no_more_than_the_client_proposed() -> None:
    server, event = proposal(b'{"capabilities":{"max_msg_fds":8,"max_dma_maps":10,"pgsizes":4096}}\0', minor=3)
    reply = server.accept(event)
    assert said_in(reply) == {"max_msg_fds": 16, "max_dma_maps": 10, "pgsizes": 4096}
    assert struct.unpack_from("=HH", reply, 16) == (0, 0), "a minor version that both have"
    server, event = proposal(QEMU)
    assert said_in(server.accept(event)) == {
        "max_msg_fds": 16,
        "max_data_xfer_size": 1 << 20,
        "max_dma_maps": 65535,
        "pgsizes": 4096,
        "write_multiple": True,
        "migration": {"pgsize": 4096, "max_bitmap_size": 256 << 20},
    }
    assert server.write_multiple and not server.twin


@pytest.mark.parametrize("both", [True, False])
def test_a_second_socket_is_for_two_who_want_it(both: bool) -> None:
    wishes = Capabilities(max_msg_fds=16, twin_socket=TwinSocket(both))
    client, server = negotiated(client=wishes, server=server_capabilities(Extensions()))
    assert client.twin is server.twin is both
    if not both:
        return
    _, asked = server.command(Command.DMA_READ, DmaAccess(0, 8))
    with pytest.raises(RemoteProtocolError, match="wrong one"):
        client.receive(asked[:16], asked[16:], [], twin=False)
    event = client.receive(asked[:16], asked[16:], [], twin=True)
    assert isinstance(event, CommandReceived) and event.twin
    answer = client.reply(event, DmaAccess(0, 8, bytes(8)))
    with pytest.raises(RemoteProtocolError, match="wrong one"):
        server.receive(answer[:16], answer[16:], [], twin=False)
    server.receive(answer[:16], answer[16:], [], twin=True)


def test_a_second_socket_that_nobody_asked_for_is_refused() -> None:
    client = VfioUserState(Role.CLIENT, OURS)
    client.version()
    body = struct.pack("=HH", 0, 0) + b'{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}\0'
    with pytest.raises(RemoteProtocolError, match="second socket"):
        feed(client, Header(0, 1, 16 + len(body), 1, 0).pack() + body, [3])


def test_state_data_that_is_padded_to_what_was_asked_for_is_cut() -> None:
    client, _ = negotiated()
    number, _ = client.command(Command.MIG_DATA_READ, MigData(size=64))
    body = struct.pack("=II", 12, 4) + b"data" + bytes(60)
    event = feed(client, Header(number, Command.MIG_DATA_READ, 16 + len(body), 1, 0).pack() + body)
    assert isinstance(event, ReplyReceived) and event.payload == MigData(12, 4, b"data")


def test_many_writes_need_to_be_negotiated() -> None:
    writes = RegionWriteMulti.of([RegionAccess(8, 2, 4, b"four"), RegionAccess(0, 0, 8, b"eighteen")])
    assert RegionWriteMulti.unpack(writes.pack()).writes() == [
        RegionAccess(8, 2, 4, b"four"),
        RegionAccess(0, 0, 8, b"eighteen"),
    ]
    client, server = negotiated()
    with pytest.raises(LocalProtocolError):
        client.command(Command.REGION_WRITE_MULTI, writes)
    body = writes.pack()
    assert command(server, Header(1, 15, 16 + len(body), 0, 0).pack() + body).payload is None
    with pytest.raises(LocalProtocolError):
        RegionWriteMulti.of([RegionAccess(0, 0, 9, bytes(9))])
