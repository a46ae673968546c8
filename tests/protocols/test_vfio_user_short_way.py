"""The short way of vfio-user's commonest requests leads where the ordinary one does."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.vfio_user.messages import (
    COMMANDS,
    HEADER,
    HEADER_SIZE,
    Capabilities,
    Command,
    DmaMap,
    DmaUnmap,
    Empty,
    HeaderFlags,
    Payload,
    RegionAccess,
    Role,
)
from protocols.vfio_user.short_way import plain_answer, plain_refusal, plain_request
from protocols.vfio_user.state import CommandReceived, ReplyReceived, VfioUserState
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

MAX_DATA = 1 << 12
ABLE = Capabilities(max_msg_fds=16, max_data_xfer_size=MAX_DATA)
SHORT = (Command.REGION_READ, Command.REGION_WRITE, Command.DMA_MAP, Command.DMA_UNMAP)
READ = int(Command.REGION_READ)


def negotiated() -> tuple[VfioUserState, VfioUserState]:
    client, server = VfioUserState(Role.CLIENT, ABLE), VfioUserState(Role.SERVER, ABLE)
    event = receive(server, client.version()[1])
    assert isinstance(event, CommandReceived)
    receive(client, server.accept(event))
    return client, server


def receive(state: VfioUserState, frame: bytes, fds: int = 0) -> CommandReceived | ReplyReceived:
    return state.receive(frame[:HEADER_SIZE], frame[HEADER_SIZE:], list(range(fds)))


def request(frame: bytes, fds: int = 0) -> tuple[int, int, tuple[int, ...]] | None:
    return plain_request(frame[:HEADER_SIZE], frame[HEADER_SIZE:], fds, MAX_DATA)


def framed(number: int, command: int, flags: int, error: int, body: bytes) -> bytes:
    return HEADER.pack(number, command, HEADER_SIZE + len(body), flags, error) + body


@given(
    st.sampled_from(SHORT) | st.integers(0, 20),
    st.sampled_from([0, int(HeaderFlags.NO_REPLY), 1, 0x30]) | st.integers(0, 0xFF),
    st.sampled_from([0, 16, 20, 24, 32, 36]).flatmap(lambda size: st.binary(min_size=size, max_size=size))
    | st.builds(
        lambda offset, count, data: RegionAccess(offset, 7, count, data).pack(),
        st.integers(0, 1 << 63),
        st.integers(0, MAX_DATA + 1),
        st.binary(max_size=8),
    ),
    st.integers(0, 3),
)
def test_what_goes_the_short_way_says_the_same_on_the_ordinary_one(
    command: int, flags: int, body: bytes, fds: int
) -> None:
    frame = framed(3, command, flags, 0, body)
    plain = request(frame, fds)
    if plain is None:
        return
    event = receive(negotiated()[1], frame, fds)
    assert isinstance(event, CommandReceived) and event.payload is not None
    assert (event.id, event.command) == plain[:2]
    assert event.no_reply is (command == Command.REGION_WRITE)
    values = event.payload.FORMAT.unpack_from(event.payload.pack())
    assert values == plain[2] and body == event.payload.pack()


@pytest.mark.parametrize(
    ("command", "payload", "fds", "no_reply"),
    [
        (Command.REGION_READ, RegionAccess(0x10, 7, 4), 0, False),
        (Command.REGION_WRITE, RegionAccess(0x10, 7, 2, b"ab"), 0, True),
        (Command.DMA_MAP, DmaMap(flags=3, address=0x1000, size=0x1000), 0, False),
        (Command.DMA_MAP, DmaMap(flags=3, address=0x1000, size=0x1000), 1, False),
        (Command.DMA_UNMAP, DmaUnmap(address=0x1000, size=0x1000), 0, False),
    ],
)
def test_the_usual_requests_go_the_short_way(command: Command, payload: Payload, fds: int, no_reply: bool) -> None:
    client, _ = negotiated()
    number, frame = client.command(command, payload, fds, no_reply=no_reply)
    plain = request(frame, fds)
    assert plain is not None and plain[:2] == (number, command)


@pytest.mark.parametrize(
    ("frame", "fds"),
    [
        (framed(1, Command.REGION_WRITE, 0, 0, RegionAccess(0, 7, 2, b"ab").pack()), 0),
        (framed(1, READ, int(HeaderFlags.NO_REPLY), 0, RegionAccess(0, 7, 2).pack()), 0),
        (framed(1, READ, 0, 0, RegionAccess(0, 7, MAX_DATA + 1).pack()), 0),
        (framed(1, READ, 0, 0, RegionAccess(0, 7, 2).pack()), 1),
        (framed(1, READ, 0, 0, RegionAccess(0, 7, 2, b"ab").pack()), 0),
        (framed(1, READ, 0, 0, b"short"), 0),
        (framed(1, Command.DMA_MAP, 0, 0, DmaMap(size=4096).pack()), 2),
        (framed(1, Command.DMA_MAP, 0, 0, DmaMap(size=4096).pack() + b"more"), 1),
        (framed(1, Command.DMA_UNMAP, 0, 0, DmaUnmap(size=4096).pack()), 1),
        (framed(1, Command.DEVICE_RESET, 0, 0, b""), 0),
    ],
)
def test_what_is_unusual_goes_the_ordinary_way(frame: bytes, fds: int) -> None:
    assert request(frame, fds) is None


@pytest.mark.parametrize(
    ("command", "payload", "reply", "body"),
    [
        (
            Command.REGION_READ,
            RegionAccess(8, 7, 2),
            RegionAccess(8, 7, 2, b"ab"),
            RegionAccess(8, 7, 2).pack() + b"ab",
        ),
        (Command.DMA_MAP, DmaMap(flags=3, size=4096), Empty(), b""),
        (Command.DMA_UNMAP, DmaUnmap(size=4096), DmaUnmap(size=4096), DmaUnmap(size=4096).pack()),
    ],
)
def test_a_short_answer_is_the_ordinary_one(command: Command, payload: Payload, reply: Payload, body: bytes) -> None:
    client, server = negotiated()
    number, frame = client.command(command, payload)
    event, plain = receive(server, frame), request(frame)
    assert isinstance(event, CommandReceived) and plain is not None
    assert plain_answer(plain, body) == server.reply(event, reply)
    assert receive(client, plain_answer(plain, body)) == ReplyReceived(number, command, reply, 0)


def test_a_short_refusal_brings_its_errno() -> None:
    client, _ = negotiated()
    number, frame = client.command(Command.DMA_UNMAP, DmaUnmap(size=4096))
    plain = request(frame)
    assert plain is not None
    answer = receive(client, plain_refusal(plain, errno.EINVAL))
    assert answer == ReplyReceived(number, Command.DMA_UNMAP, None, errno.EINVAL)


def test_a_read_of_the_short_way_is_the_ordinary_one() -> None:
    (one, _), (other, _) = negotiated(), negotiated()
    assert one.read(7, 0x10, 4) == other.command(Command.REGION_READ, RegionAccess(0x10, 7, 4))
    assert one.outstanding == 1


def test_a_read_that_may_not_be_sent_is_our_mistake() -> None:
    client, server = negotiated()
    for state, count in ((client, MAX_DATA + 1), (server, 4), (VfioUserState(Role.CLIENT, ABLE), 4)):
        with pytest.raises(LocalProtocolError):
            state.read(7, 0, count)


@given(
    st.sampled_from([0, 1]),
    st.sampled_from([READ, int(Command.REGION_WRITE)]),
    st.sampled_from([int(HeaderFlags.REPLY), int(HeaderFlags.REPLY | HeaderFlags.ERROR), 0]) | st.integers(0, 0x3F),
    st.builds(
        lambda offset, count, data: RegionAccess(offset, 7, count, data).pack(),
        st.sampled_from([0, 0x10]),
        st.integers(0, 5),
        st.binary(max_size=5),
    )
    | st.binary(max_size=24),
)
def test_data_of_the_short_way_are_those_of_the_ordinary_one(past: int, command: int, flags: int, body: bytes) -> None:
    (one, _), (other, _) = negotiated(), negotiated()
    number, _ = one.read(7, 0x10, 4)
    other.command(Command.REGION_READ, RegionAccess(0x10, 7, 4))
    frame = framed(number + past, command, flags, 0, body)
    data = one.read_data(number, 4, frame[:HEADER_SIZE], frame[HEADER_SIZE:])
    try:
        event = receive(other, frame)
    except RemoteProtocolError:
        event = None
    if data is None:
        assert one.outstanding == 1, "the ordinary way finds the question"
        whole = isinstance(event, ReplyReceived) and isinstance(event.payload, RegionAccess)
        assert not whole or event.payload.count != 4, "an answer of all the data goes the short way"
    else:
        assert isinstance(event, ReplyReceived) and isinstance(event.payload, RegionAccess)
        assert data == event.payload.data and one.outstanding == other.outstanding == 0


def test_every_short_request_is_a_clients() -> None:
    assert all(COMMANDS[command].sender is Role.CLIENT for command in SHORT)
