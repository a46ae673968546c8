"""vfio-user's protocol state, without I/O: bytes in, events out; calls in, bytes out.

Both sides may send commands at any time (the device asks for DMA, translations); ids belong to the sender, replies may
come while other commands are in between. A state object therefore serves nested commands by construction: whoever waits
for a reply keeps feeding frames and handles the commands it gets.

::

    client:  idle ──send VERSION──▶ negotiating ──receive its reply──▶ ready
    server:  idle ──receive VERSION──▶ negotiating ──send the reply──▶ ready        any ──▶ closed

:data:`TRANSITIONS` is that picture as data. Descriptors are opaque numbers here: those of an event belong to whoever
takes the event, those of a refused frame to the caller, who closes them. Source: QEMU ``docs/interop/vfio-user.rst``.
"""

from __future__ import annotations

import errno
from enum import Enum

from msgspec import Struct

from protocols.vfio_user.bodies import (
    CHECKED_REPLIES,
    CHECKED_REQUESTS,
    MAX_CAPS,
    check_reply,
    check_request,
    known_part,
    unpack_reply,
)
from protocols.vfio_user.iommu_messages import MAX_TRANSLATIONS
from protocols.vfio_user.messages import (
    COMMANDS,
    HEADER,
    HEADER_SIZE,
    Capabilities,
    Command,
    CommandSpec,
    Empty,
    Extensions,
    HeaderFlags,
    Payload,
    RegionAccess,
    Role,
    Version,
    command_name,
)
from protocols.vfio_user.short_way import plain_data, plain_read
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

MAX_UNANSWERED = 4096
"""Commands of the peer that wait for our reply; a peer that sends more is cut off."""
MINOR = 0
"""The newest minor version that is spoken here; all older ones are, too."""


class State(Enum):
    """Where a connection is."""

    IDLE = "idle"
    NEGOTIATING = "negotiating"
    READY = "ready"
    CLOSED = "closed"


class Step(Enum):
    """What moves it."""

    SEND_VERSION = "send VERSION"
    RECEIVE_VERSION = "receive VERSION"
    SEND_VERSION_REPLY = "send VERSION reply"
    RECEIVE_VERSION_REPLY = "receive VERSION reply"
    SEND_COMMAND = "send a command"
    RECEIVE_COMMAND = "receive a command"
    SEND_REPLY = "send a reply"
    RECEIVE_REPLY = "receive a reply"
    CLOSE = "close"


_ANY_TIME = {
    (State.READY, step): State.READY
    for step in (Step.SEND_COMMAND, Step.RECEIVE_COMMAND, Step.SEND_REPLY, Step.RECEIVE_REPLY)
} | {(state, Step.CLOSE): State.CLOSED for state in State}

TRANSITIONS: dict[Role, dict[tuple[State, Step], State]] = {
    Role.CLIENT: {
        (State.IDLE, Step.SEND_VERSION): State.NEGOTIATING,
        (State.NEGOTIATING, Step.RECEIVE_VERSION_REPLY): State.READY,
        **_ANY_TIME,
    },
    Role.SERVER: {
        (State.IDLE, Step.RECEIVE_VERSION): State.NEGOTIATING,
        (State.NEGOTIATING, Step.SEND_VERSION_REPLY): State.READY,
        **_ANY_TIME,
    },
}


_STEADY = (Step.SEND_COMMAND, Step.RECEIVE_COMMAND, Step.SEND_REPLY, Step.RECEIVE_REPLY)
"""Steps that leave a ready connection as it is, in both tables: the common case, without a look-up."""
assert all(table[State.READY, step] is State.READY for table in TRANSITIONS.values() for step in _STEADY)
# Members of an enumeration cost 0.2 us each time that they are looked up in their class.
_READY, _VERSION, _WRITE_MULTI = State.READY, Command.VERSION, Command.REGION_WRITE_MULTI
_READ = Command.REGION_READ
_SEND_COMMAND, _RECEIVE_COMMAND, _SEND_REPLY, _RECEIVE_REPLY = _STEADY
_SERVER = Role.SERVER
_REPLY, _NO_REPLY, _ERROR = int(HeaderFlags.REPLY), int(HeaderFlags.NO_REPLY), int(HeaderFlags.ERROR)
_TYPE_MASK = int(HeaderFlags.TYPE_MASK)


class CommandReceived(Struct):
    """The peer's command, to be answered by :meth:`VfioUserState.reply` unless ``no_reply``.

    ``payload`` is None for a command that this side does not know or has not negotiated: answer ENOTSUP.
    """

    serial: int
    id: int
    command: int
    payload: Payload | None
    no_reply: bool
    fds: list[int] = []
    twin: bool = False
    """Whether it came on the second socket, as its answer must."""


class ReplyReceived(Struct):
    """The answer to our command ``id``; with ``errno`` not 0 it failed and ``payload`` is None."""

    id: int
    command: int
    payload: Payload | None
    errno: int
    fds: list[int] = []


Event = CommandReceived | ReplyReceived


class VfioUserState:
    """One end of one connection. ``capabilities`` are ours; :attr:`peer` the peer's, once known."""

    def __init__(self, role: Role, capabilities: Capabilities) -> None:
        self.role, self.capabilities = role, capabilities
        self.state = State.IDLE
        self.peer = Capabilities()
        self.extensions = Extensions()
        self.write_multiple = False
        """Whether REGION_WRITE_MULTI may be used."""
        self.twin = False
        """Whether the server's commands and their replies travel on a second socket."""
        self._outstanding: dict[int, tuple[Command, Payload]] = {}
        self._unanswered: dict[int, CommandReceived] = {}
        self._next_id = 0
        self._next_serial = 0

    @property
    def outstanding(self) -> int:
        """Commands of ours that wait for a reply."""
        return len(self._outstanding)

    @property
    def max_frame(self) -> int:
        """Bytes of the longest frame that the peer may send."""
        return HEADER_SIZE + 64 + max(self.capabilities.max_data_xfer_size, MAX_CAPS, 32 * MAX_TRANSLATIONS)

    def _step(self, step: Step, error: type[LocalProtocolError | RemoteProtocolError]) -> None:
        if self.state is _READY and step in _STEADY:
            return
        after = TRANSITIONS[self.role].get((self.state, step))
        if after is None:
            raise error(f"{self.role.value} cannot {step.value} while {self.state.value}")
        self.state = after

    # ----------------------------------------------------------------------------------------------------- sending

    def command(
        self, command: Command, payload: Payload = Empty(), fds: int = 0, *, no_reply: bool = False
    ) -> tuple[int, bytes]:
        """The id and the bytes of a command of ours, which travels with ``fds`` descriptors.

        :raise LocalProtocolError: when it is not ours to send, not negotiated, or too large for the peer.
        """
        spec = COMMANDS[command]
        if spec.sender is not self.role or type(payload) is not spec.request:
            raise LocalProtocolError(f"{command_name(command)} with {type(payload).__name__} from a {self.role.value}")
        if spec.extension and not getattr(self.extensions, spec.extension):
            raise LocalProtocolError(f"{command_name(command)} is not negotiated")
        if command is _WRITE_MULTI and not self.write_multiple:
            raise LocalProtocolError(f"{command_name(command)} is not negotiated")
        if command is _VERSION and no_reply:
            raise LocalProtocolError("VERSION needs its reply")
        if fds and fds > min(spec.fds, max(self.peer.max_msg_fds, 1)):
            raise LocalProtocolError(f"{command_name(command)} with {fds} descriptors: the peer takes fewer")
        if spec.request in CHECKED_REQUESTS:
            check_request(command, payload, self.peer.max_data_xfer_size, LocalProtocolError)
        if self.state is not _READY or command is _VERSION:
            self._step(Step.SEND_VERSION if command is _VERSION else _SEND_COMMAND, LocalProtocolError)
        number = self._free_id()
        if not no_reply:
            self._outstanding[number] = (command, payload)
        return number, _frame(number, command, _NO_REPLY if no_reply else 0, 0, payload.pack())

    def read(self, region: int, offset: int, count: int) -> tuple[int, bytes]:
        """As :meth:`command` with a client's REGION_READ, the short way."""
        request = RegionAccess(offset, region, count)
        if self.role is _SERVER or count > self.peer.max_data_xfer_size or self.state is not _READY:
            return self.command(_READ, request)
        number = self._free_id()
        self._outstanding[number] = (_READ, request)
        return number, plain_read(number, region, offset, count)

    def read_data(self, number: int, count: int, header: bytes, body: bytes) -> bytes | None:
        """What :meth:`read` asked for as ``number``, when this frame without descriptors is the answer and nothing
        about it is unusual; None: it goes the ordinary way.
        """
        if number not in self._outstanding or (data := plain_data(number, count, header, body)) is None:
            return None
        del self._outstanding[number]
        return data

    def _free_id(self) -> int:
        if len(self._outstanding) >= 1 << 16:
            raise LocalProtocolError("65536 commands wait for a reply")
        number = self._next_id
        while number in self._outstanding:
            number = (number + 1) & 0xFFFF
        self._next_id = (number + 1) & 0xFFFF
        return number

    def version(self) -> tuple[int, bytes]:
        """The client's first command."""
        return self.command(Command.VERSION, Version(0, MINOR, self.capabilities))

    def accept(self, event: CommandReceived) -> bytes:
        """The server's answer to VERSION: our capabilities as far as the client named them, of what both must have that
        which both have. When :attr:`twin` holds afterwards, the client's end of the second socket goes with it.
        """
        proposal = event.payload
        assert isinstance(proposal, Version), "the state has seen VERSION"
        common = self.capabilities.common(self.peer)
        self.twin, self.write_multiple = common.twin, common.write_multiple
        answer = Version(0, min(proposal.minor, MINOR), common, proposal.named)
        return self.reply(event, answer, int(self.twin))

    def reply(self, event: CommandReceived, payload: Payload = Empty(), fds: int = 0) -> bytes:
        """The bytes of the answer to ``event``.

        :raise LocalProtocolError: when it wants none, has one, or this is not what belongs in it.
        """
        spec = COMMANDS.get(event.command)
        if spec is None or type(payload) is not spec.reply or fds > spec.reply_fds:
            raise LocalProtocolError(f"{type(payload).__name__} does not answer {command_name(event.command)}")
        if fds and fds > max(self.peer.max_msg_fds, 1):
            raise LocalProtocolError(f"{fds} descriptors: the peer takes {self.peer.max_msg_fds}")
        if event.payload is not None:
            check_reply(event.payload, payload, LocalProtocolError)
        self._answered(event)
        return _frame(event.id, event.command, _REPLY, 0, payload.pack())

    def reply_error(self, event: CommandReceived, number: int) -> bytes:
        """The bytes of a failure with errno ``number``; a refused VERSION ends the connection."""
        self._answered(event)
        if event.command == Command.VERSION:
            self.state = State.CLOSED
        return _frame(event.id, event.command, _REPLY | _ERROR, number or errno.EIO, b"")

    def _answered(self, event: CommandReceived) -> None:
        if self._unanswered.get(event.serial) is not event:
            raise LocalProtocolError(f"{command_name(event.command)} {event.id} wants no reply, or has one")
        version = event.command == _VERSION
        self._step(Step.SEND_VERSION_REPLY if version else _SEND_REPLY, LocalProtocolError)
        del self._unanswered[event.serial]

    def close(self) -> None:
        """Nothing is sent or accepted from now on."""
        self._step(Step.CLOSE, LocalProtocolError)
        self._outstanding.clear()
        self._unanswered.clear()

    # --------------------------------------------------------------------------------------------------- receiving

    def receive(self, header: bytes, body: bytes, fds: list[int], *, twin: bool = False) -> Event:
        """The event in one frame of the peer's, which came on the ``twin`` socket or the first one; its descriptors go
        with it.

        :raise RemoteProtocolError: when the frame is not allowed. The caller closes ``fds`` and the connection.
        """
        number, command, size, flags, error = HEADER.unpack(header)
        if size != HEADER_SIZE + len(body):
            raise RemoteProtocolError(f"a frame of {HEADER_SIZE + len(body)} bytes says {size}")
        kind = flags & _TYPE_MASK
        if self.twin and kind <= _REPLY and (kind == _REPLY) is not (twin is (self.role is _SERVER)):
            raise RemoteProtocolError(f"{command_name(command)} on the wrong one of two sockets")
        if kind == _REPLY:
            return self._receive_reply(number, command, (error or errno.EIO) if flags & _ERROR else 0, body, fds)
        if kind != 0:
            raise RemoteProtocolError(f"message type {kind}")
        return self._receive_command(number, command, bool(flags & _NO_REPLY), body, fds, twin)

    @property
    def serving(self) -> bool:
        """Whether a client's requests may be carried out: those that go the short way, too."""
        return self.state is _READY and self.role is _SERVER

    def _receive_command(
        self, number: int, command: int, no_reply: bool, body: bytes, fds: list[int], twin: bool
    ) -> CommandReceived:
        version = command == _VERSION
        self._step(Step.RECEIVE_VERSION if version else _RECEIVE_COMMAND, RemoteProtocolError)
        spec = self._known(command)
        payload = None if spec is None else self._request(spec, command, body, len(fds))
        if version:
            self._propose(payload, no_reply)
        self._next_serial += 1
        event = CommandReceived(self._next_serial, number, command, payload, no_reply, fds, twin)
        if not no_reply:
            if len(self._unanswered) >= MAX_UNANSWERED:
                raise RemoteProtocolError(f"{MAX_UNANSWERED} commands wait already")
            self._unanswered[event.serial] = event
        return event

    def _known(self, command: int) -> CommandSpec | None:
        spec = COMMANDS.get(command)
        if spec is None or (spec.extension and not getattr(self.extensions, spec.extension)):
            return None
        if command == _WRITE_MULTI and not self.write_multiple:
            return None
        if spec.sender is self.role:
            raise RemoteProtocolError(f"{command_name(command)} from a {self.role.other.value}")
        return spec

    def _request(self, spec: CommandSpec, command: int, body: bytes, fds: int) -> Payload:
        if fds and fds > (0 if command == _VERSION else self.capabilities.max_msg_fds):
            raise RemoteProtocolError(f"{command_name(command)} with {fds} descriptors")
        payload = spec.request.unpack(known_part(spec.request, body))
        check_request(command, payload, self.capabilities.max_data_xfer_size, RemoteProtocolError)
        return payload

    def _propose(self, payload: Payload | None, no_reply: bool) -> None:
        assert isinstance(payload, Version), "VERSION is always known"
        if no_reply or payload.major != 0:
            raise RemoteProtocolError(f"version {payload.major}.{payload.minor} is proposed, 0.x is spoken here")
        self.peer = payload.capabilities
        self.extensions = self.capabilities.extensions.both(self.peer.extensions)

    def _receive_reply(self, number: int, command: int, error: int, body: bytes, fds: list[int]) -> ReplyReceived:
        version = command == _VERSION
        step = Step.RECEIVE_VERSION_REPLY if version else _RECEIVE_REPLY
        if (self.state is not _READY or version) and (self.state, step) not in TRANSITIONS[self.role]:
            raise RemoteProtocolError(f"a reply to {command_name(command)} while {self.state.value}")
        asked = self._outstanding.get(number)
        if asked is None or asked[0] != command:
            raise RemoteProtocolError(f"a reply to {command_name(command)} {number}, which was not asked")
        spec = COMMANDS[command]
        if fds and len(fds) > min(spec.reply_fds, self.capabilities.max_msg_fds):
            raise RemoteProtocolError(f"a reply to {command_name(command)} with {len(fds)} descriptors")
        payload = None if error else unpack_reply(spec.reply, body)
        if payload is not None and spec.reply in CHECKED_REPLIES:
            check_reply(asked[1], payload, RemoteProtocolError)
        if version:
            self._agree(payload)
        del self._outstanding[number]
        return ReplyReceived(number, asked[0], payload, error, fds)

    def _agree(self, payload: Payload | None) -> None:
        if not isinstance(payload, Version) or payload.major != 0 or payload.minor > MINOR:
            raise RemoteProtocolError(f"the server does not speak version 0.{MINOR} or an older one")
        agreed = payload.capabilities
        if agreed.twin and not self.capabilities.twin:
            raise RemoteProtocolError("the server opens a second socket that was not asked for")
        self._step(Step.RECEIVE_VERSION_REPLY, RemoteProtocolError)
        self.peer = agreed
        self.twin = agreed.twin
        self.write_multiple = self.capabilities.write_multiple and agreed.write_multiple
        self.extensions = self.capabilities.extensions.both(self.peer.extensions)


def _frame(number: int, command: int, flags: int, error: int, body: bytes) -> bytes:
    return HEADER.pack(number, command, HEADER_SIZE + len(body), flags, error) + body
