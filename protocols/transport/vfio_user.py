"""A vfio-user connection: the protocol state over a stream socket, descriptors kept track of.

Used by both sides. Whoever waits for a reply registers the endpoint as *served* and handles the commands that come
meanwhile: a side that only waits for its own answer deadlocks (raising an interrupt makes QEMU unmap BARs, a DMA
message comes back, …).
"""

from __future__ import annotations

import errno

from protocols.transport.unix import StreamConnection, close_fds
from protocols.vfio_user.messages import Capabilities, Command, Empty, Payload, Role
from protocols.vfio_user.state import CommandReceived, Event, State, VfioUserState
from vfio_model.errors import RemoteProtocolError

MAX_MSG_FDS = 16
"""Descriptors in one message that our endpoints take, as QEMU proposes."""


class VfioUserEndpoint:
    """One end of a connection. The stream is its own from now on."""

    def __init__(self, stream: StreamConnection, role: Role, capabilities: Capabilities) -> None:
        self.stream = stream
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

    def fileno(self) -> int:
        """For a poller."""
        return self.stream.fileno()

    def flush(self) -> bool:
        """Send what waits; True when nothing is left.

        :raise PeerLost: when the peer is gone.
        """
        return self.stream.flush()

    def receive(self) -> Event | None:
        """The next event, whose descriptors are the caller's; None when no whole frame is there.

        A command that is unknown or not negotiated is answered here with ENOTSUP.

        :raise PeerLost: at EOF.
        :raise RemoteProtocolError: when the peer broke the protocol; the caller closes the endpoint.
        """
        while (frame := self.stream.receive()) is not None:
            try:
                event = self.state.receive(frame.header, frame.body, frame.fds)
            except RemoteProtocolError:
                close_fds(frame.fds)
                raise
            if not isinstance(event, CommandReceived) or event.payload is not None:
                return event
            close_fds(event.fds)
            self.reply_error(event, errno.ENOTSUP)
        return None

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
        self.stream.send(data, fds)
        return number

    def version(self) -> int:
        """Send the client's VERSION."""
        number, data = self.state.version()
        self.stream.send(data)
        return number

    def accept(self, event: CommandReceived) -> None:
        """Answer VERSION as a server."""
        self.stream.send(self.state.accept(event))

    def reply(self, event: CommandReceived, payload: Payload = Empty(), fds: list[int] | tuple[int, ...] = ()) -> None:
        """Answer ``event``; nothing is sent when it wants no reply. ``fds`` stay the caller's.

        :raise PeerLost: when the peer is gone.
        """
        if not event.no_reply:
            self.stream.send(self.state.reply(event, payload, len(fds)), fds)

    def reply_error(self, event: CommandReceived, number: int) -> None:
        """Answer ``event`` with errno ``number``; nothing is sent when it wants no reply."""
        if not event.no_reply:
            self.stream.send(self.state.reply_error(event, number))

    def close(self) -> None:
        """Close the stream. Harmless twice."""
        self.state.close()
        self.stream.close()


def connect(path: str, name: str, capabilities: Capabilities) -> VfioUserEndpoint:
    """A client's endpoint; VERSION is still to be sent.

    :raise PeerLost: when nobody listens at ``path``.
    """
    return VfioUserEndpoint(StreamConnection.connect(path, name), Role.CLIENT, capabilities)
