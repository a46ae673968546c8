"""What is fuzzed: each target takes bytes and must come back, whatever they are.

A peer's bytes may end in :class:`RemoteProtocolError` and nothing else; whatever the state has let through can be
answered or refused, and what it then says is understood by a state of the other side.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable, Iterator

from hostd.remote_server import RemoteServer
from protocols.transport.unix import StreamConnection, stream_pair
from protocols.transport.vfio_user import server_capabilities
from protocols.vfio_user.messages import (
    COMMANDS,
    HEADER_SIZE,
    Command,
    Empty,
    Extensions,
    Header,
    NotifierSetup,
    Payload,
    Role,
)
from protocols.vfio_user.state import CommandReceived, ReplyReceived, VfioUserState
from tests.hostd.probe_device import ProbeDevice
from vfio_model.errors import LocalProtocolError, PeerLost, RemoteProtocolError
from vfio_model.trace import NULL_TRACE

OURS = server_capabilities(Extensions(ats=True, clock=True, notifier=True, iommu=True))
_SMALL = struct.Struct("=BBHB")
"""Of a frame in the fuzzer's bytes: command, flags, length of the body, descriptors."""


def frames(data: bytes) -> Iterator[tuple[int, int, bytes, int]]:
    """(command, flags, body, descriptors), as many as ``data`` has."""
    at = 0
    while at + _SMALL.size <= len(data):
        command, flags, length, fds = _SMALL.unpack_from(data, at)
        at += _SMALL.size
        length %= 2048
        yield (command if command < 32 else 0x8000 | command & 3), flags, data[at : at + length], fds % 20
        at += length


REQUESTS: dict[int, Payload] = {Command.X_NOTIFIER: NotifierSetup(0, b"path")}
"""Those that cannot be empty."""


def codec(data: bytes) -> None:
    """Every payload's decoder; what it takes comes back as it was."""
    for spec in COMMANDS.values():
        for kind in (spec.request, spec.reply):
            try:
                payload = kind.unpack(data)
            except RemoteProtocolError:
                continue
            again = kind.unpack(payload.pack())
            assert again == payload, f"{kind.__name__} comes back as another"


def server(data: bytes) -> None:
    """A server's state and what a client may send it, after a good VERSION if the first byte is odd."""
    state, judge = VfioUserState(Role.SERVER, OURS), VfioUserState(Role.CLIENT, OURS)
    if data[:1] and data[0] & 1:
        _shake_hands(judge, state)
    for command, flags, body, fds in frames(data[1:]):
        header = Header(7, command, HEADER_SIZE + len(body), flags & 0x3F, 0).pack()
        try:
            event = state.receive(header, body, list(range(fds)), twin=bool(flags & 0x80))
        except RemoteProtocolError:
            return
        _answer(state, event)


def client(data: bytes) -> None:
    """A client's state, which has asked for everything, and what a server may send it."""
    state, other = VfioUserState(Role.CLIENT, OURS), VfioUserState(Role.SERVER, OURS)
    _shake_hands(state, other)
    for command, spec in COMMANDS.items():
        if spec.sender is Role.CLIENT and command is not Command.VERSION:
            state.command(Command(command), REQUESTS.get(command, spec.request()))
    for number, (command, flags, body, fds) in enumerate(frames(data)):
        header = Header(number, command, HEADER_SIZE + len(body), flags & 0x3F, 5).pack()
        try:
            event = state.receive(header, body, list(range(fds)), twin=bool(flags & 0x80))
        except RemoteProtocolError:
            return
        _answer(state, event)


def device(data: bytes) -> None:
    """A whole server with a device: it goes on, and serves the next client."""
    with contextlib.redirect_stderr(io.StringIO()):
        _device(data)


def _device(data: bytes) -> None:
    served = RemoteServer(ProbeDevice, "fuzz", NULL_TRACE)
    try:
        ours, theirs = stream_pair()
        served.serve(theirs)
        keeper, kept = stream_pair()
        served.serve(kept)  # the server ends with its last client
        _say(served, ours, _hello())
        try:
            for command, flags, body, _ in frames(data):
                _say(served, ours, Header(7, command, HEADER_SIZE + len(body), flags & 0x3F, 0).pack() + body)
                ours.receive()
        except PeerLost:
            pass
        ours.close()
        _turn(served)
        _say(served, keeper, _hello())
        _say(served, keeper, Header(1, Command.DEVICE_RESET, HEADER_SIZE, 0, 0).pack())
        answers = [keeper.receive(), keeper.receive()]
        assert all(frame is not None for frame in answers), "the next client is served"
        keeper.close()
    finally:
        served.close()


TARGETS: dict[str, Callable[[bytes], None]] = {"codec": codec, "server": server, "client": client, "device": device}


def _shake_hands(client_state: VfioUserState, server_state: VfioUserState) -> None:
    _, hello = client_state.version()
    event = server_state.receive(hello[:HEADER_SIZE], hello[HEADER_SIZE:], [])
    assert isinstance(event, CommandReceived)
    answer = server_state.accept(event)
    client_state.receive(answer[:HEADER_SIZE], answer[HEADER_SIZE:], [0] * server_state.twin)


def _answer(state: VfioUserState, event: CommandReceived | ReplyReceived) -> None:
    """Whatever was let through can be answered, or refused."""
    if not isinstance(event, CommandReceived) or event.no_reply:
        return
    if event.command == Command.VERSION:
        state.accept(event)
        return
    spec = COMMANDS.get(event.command)
    reply: Payload = Empty() if spec is None else spec.reply()
    try:
        state.reply(event, reply)
    except LocalProtocolError:
        state.reply_error(event, 5)


def _hello() -> bytes:
    return VfioUserState(Role.CLIENT, OURS_WITHOUT_TWIN).version()[1]


OURS_WITHOUT_TWIN = server_capabilities(Extensions(ats=False, clock=True, notifier=True), twin=False)


def _say(served: RemoteServer, stream: StreamConnection, data: bytes) -> None:
    stream.send(data)
    _turn(served)


def _turn(served: RemoteServer) -> None:
    for _ in range(3):
        served.let_work()
        served.loop.run_once(0.0)
