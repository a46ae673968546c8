"""A vfio-user connection: the protocol state over a stream socket, descriptors kept track of.

Used by both sides. Whoever waits for a reply registers the endpoint as *served* and handles the commands that come
meanwhile: a side that only waits for its own answer deadlocks (raising an interrupt makes QEMU unmap BARs, a DMA
message comes back, …).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from protocols.transport.unix import Frame, StreamConnection, close_fds
from protocols.vfio_user.messages import (
    Capabilities,
    Command,
    Empty,
    Extensions,
    MigrationCapability,
    Payload,
    Role,
    TwinSocket,
)
from protocols.vfio_user.short_way import PlainRequest, plain_request
from protocols.vfio_user.state import CommandReceived, Event, ReplyReceived, State, VfioUserState
from vfio_model.errors import RemoteProtocolError

MAX_MSG_FDS = 16
"""Descriptors in one message that our endpoints take, as QEMU proposes."""
_VERSION, _SERVER = Command.VERSION, Role.SERVER
"""Members of an enumeration cost 0.2 us each time that they are looked up in their class."""
Plain = Callable[[PlainRequest, bytes, list[int]], bool]
"""Carries a request out and answers it; with it go its body and its descriptors, taken over. Whether to wait for more.
"""


class VfioUserEndpoint:
    """One end of a connection. The stream is its own from now on."""

    def __init__(self, stream: StreamConnection, role: Role, capabilities: Capabilities) -> None:
        self.stream = stream
        self.twin: StreamConnection | None = None
        """The second socket, once negotiated: a source of its own, whose frames :meth:`receive` returns, too."""
        self.state = VfioUserState(role, capabilities)
        stream.max_frame = self.state.max_frame

    @property
    def name(self) -> str:
        """Who is at the other end."""
        return self.stream.name

    @property
    def ready(self) -> bool:
        """Whether VERSION is done."""
        return self.state.state is State.READY

    @property
    def wants_write(self) -> bool:
        """Whether bytes wait for the socket to become writable."""
        return self.stream.wants_write

    @property
    def congested(self) -> bool:
        """Whether a server leaves further commands in the socket: their client does not take the answers that there
        are. A client that sends many at once is slowed down, not cut off.
        """
        return self.stream.congested and self.state.role is _SERVER

    def fileno(self) -> int:
        """For a poller."""
        return self.stream.fileno()

    def flush(self) -> bool:
        """Send what waits; True when nothing is left.

        :raise PeerLost: when the peer is gone.
        """
        return self.stream.flush()

    def receive(self, *, wait: bool = False, plain: Plain | None = None) -> Event | None:
        """The next event, whose descriptors are the caller's; None when no whole frame is there. ``wait``: give it a
        moment. A request that goes the short way is handed to ``plain`` and is no event; the answer says whether to go
        on and wait for more.

        A command that is unknown or not negotiated is answered here with ENOTSUP, and with EMFILE one for whose
        descriptors this process has no room.

        :raise PeerLost: at EOF.
        :raise RemoteProtocolError: when the peer broke the protocol; the caller closes the endpoint.
        """
        state = self.state
        while True:
            twin = self.twin
            frame = self.stream.receive(wait=wait)
            if plain is not None and frame is not None and state.serving and not frame.short:
                max_data = state.capabilities.max_data_xfer_size
                request = plain_request(frame.header, frame.body, len(frame.fds), max_data)
                if request is not None:
                    wait = plain(request, frame.body, frame.fds)
                    if not wait:
                        return None
                    continue
            if frame is None and twin is not None and not twin.closed:
                frame = twin.receive()
            else:
                twin = None
            if frame is None:
                return None
            event = self._event(frame, twin is not None)
            if event is not None:
                return event

    def _event(self, frame: Frame, twin: bool) -> Event | None:
        """What ``frame`` is; None when it is answered here."""
        try:
            event = self.state.receive(frame.header, frame.body, frame.fds, twin=twin)
            if isinstance(event, ReplyReceived) and event.command == _VERSION:
                self._adopt(event)
        except RemoteProtocolError:
            close_fds(frame.fds)
            raise
        if isinstance(event, CommandReceived) and (frame.short or event.payload is None):
            close_fds(event.fds)
            self.reply_error(event, errno.EMFILE if frame.short else errno.ENOTSUP)
            return None
        if frame.short:
            close_fds(event.fds)
            raise RemoteProtocolError(f"{self.name}: no room here for the descriptors of its answer")
        return event

    def _adopt(self, event: ReplyReceived) -> None:
        """Take the second socket that came with the server's VERSION. :raise RemoteProtocolError: there is none."""
        if not self.state.twin:
            return
        agreed = self.state.peer.twin_socket
        index = None if agreed is None else agreed.fd_index
        if index is None or index >= len(event.fds):
            raise RemoteProtocolError(f"{self.name}: a second socket without its descriptor")
        try:
            sock = socket.socket(fileno=event.fds[index])
        except OSError as error:
            raise RemoteProtocolError(f"{self.name}: the second socket is none") from error
        del event.fds[index]
        self._open_twin(sock)

    def _open_twin(self, sock: socket.socket) -> None:
        self.twin = StreamConnection(sock, self.name)
        self.twin.max_frame = self.state.max_frame

    def command(
        self,
        command: Command,
        payload: Payload = Empty(),
        fds: list[int] | tuple[int, ...] = (),
        *,
        no_reply: bool = False,
    ) -> int:
        """Send a command; its reply will bear the id that is returned. ``fds`` stay the caller's.

        :raise PeerLost: when the peer is gone.
        """
        number, data = self.state.command(command, payload, len(fds), no_reply=no_reply)
        twin = self.twin if self.state.role is _SERVER else None
        (twin or self.stream).send(data, fds)
        return number

    def read(self, region: int, offset: int, count: int) -> int:
        """As :meth:`command` with a client's REGION_READ, the short way; :meth:`receive_data` may have its answer."""
        number, data = self.state.read(region, offset, count)
        self.stream.send(data)
        return number

    def receive_data(self, number: int, count: int) -> bytes | Event | None:
        """As :meth:`receive`, for who expects the answer to the :meth:`read` of ``count`` bytes with id ``number``: of
        one that is as it should be, its data alone.
        """
        frame = self.stream.receive()
        if frame is None:
            return self.receive()
        data = None
        if not frame.fds and not frame.short:
            data = self.state.read_data(number, count, frame.header, frame.body)
        return self._event(frame, False) if data is None else data

    def version(self) -> int:
        """Send the client's VERSION."""
        number, data = self.state.version()
        self.stream.send(data)
        return number

    def accept(self, event: CommandReceived) -> None:
        """Answer VERSION as a server; opens the second socket if both sides want one."""
        data = self.state.accept(event)
        if not self.state.twin:
            self.stream.send(data)
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._open_twin(ours)
        with theirs:
            self.stream.send(data, (theirs.fileno(),))

    def reply(self, event: CommandReceived, payload: Payload = Empty(), fds: list[int] | tuple[int, ...] = ()) -> None:
        """Answer ``event``; nothing is sent when it wants no reply. ``fds`` stay the caller's.

        :raise PeerLost: when the peer is gone.
        """
        if not event.no_reply:
            self._of(event).send(self.state.reply(event, payload, len(fds)), fds)

    def _of(self, event: CommandReceived) -> StreamConnection:
        assert not event.twin or self.twin is not None, "it came on the second socket"
        return self.twin if event.twin and self.twin is not None else self.stream

    def reply_error(self, event: CommandReceived, number: int) -> None:
        """Answer ``event`` with errno ``number``; nothing is sent when it wants no reply."""
        if not event.no_reply:
            self._of(event).send(self.state.reply_error(event, number))

    def close(self) -> None:
        """Close the stream, and the second one. Harmless twice."""
        self.state.close()
        self.stream.close()
        if self.twin is not None:
            self.twin.close()


def server_capabilities(extensions: Extensions, *, twin: bool = True) -> Capabilities:
    """What our servers can do. ``twin``: whether they open a second socket for a client that wants one."""
    return Capabilities(
        max_msg_fds=MAX_MSG_FDS,
        write_multiple=True,
        migration=MigrationCapability(),
        twin_socket=TwinSocket(twin),
        extensions=extensions,
    )


def connect(path: str, name: str, capabilities: Capabilities) -> VfioUserEndpoint:
    """A client's endpoint; VERSION is still to be sent.

    :raise PeerLost: when nobody listens at ``path``.
    """
    return VfioUserEndpoint(StreamConnection.connect(path, name), Role.CLIENT, capabilities)
