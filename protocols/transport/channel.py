"""Sockets that speak messages: a codec over a connection, descriptors counted.

:class:`FdChannel` is a SEQPACKET connection on which every message has a known number of descriptors; a message that
does not decode, or bears another number, closes what came with it. :class:`RouterChannel` and :class:`DealerChannel`
are the ZeroMQ ends; the router refuses a peer whose message does not decode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import zmq

from protocols.codec import Codec
from protocols.transport.unix import SeqpacketConnection, close_fds
from protocols.transport.zmq import DealerClient, RouterServer, Sent
from vfio_model.errors import LocalProtocolError, RemoteProtocolError

In = TypeVar("In")
Out = TypeVar("Out")


def no_fds(message: object) -> int:
    """For a channel on which nothing carries descriptors."""
    return 0


class FdChannel(Generic[In, Out]):
    """``In`` messages are received, ``Out`` messages sent; ``fd_count`` says how many descriptors a message has."""

    def __init__(
        self,
        connection: SeqpacketConnection,
        incoming: Codec[In],
        outgoing: Codec[Out],
        fd_count: Callable[[In | Out], int] = no_fds,
    ) -> None:
        self.connection, self._in, self._out, self._fd_count = connection, incoming, outgoing, fd_count

    @property
    def name(self) -> str:
        """Who is at the other end."""
        return self.connection.name

    @name.setter
    def name(self, name: str) -> None:
        self.connection.name = name

    @property
    def wants_write(self) -> bool:
        """Whether messages wait for the socket to become writable."""
        return self.connection.wants_write

    def fileno(self) -> int:
        """For a poller."""
        return self.connection.fileno()

    def receive(self) -> tuple[In, list[int]] | None:
        """The next message and its descriptors, now the caller's; None when there is none yet.

        :raise PeerLost: at EOF.
        :raise RemoteProtocolError: when it is not a message of this channel, or not with its number of descriptors.
        """
        packet = self.connection.receive()
        if packet is None:
            return None
        try:
            message = self._in.decode(packet.data)
            expected = self._fd_count(message)
            if len(packet.fds) != expected:
                what = type(message).__name__
                raise RemoteProtocolError(f"{self.name}: {what} with {len(packet.fds)} descriptors, not {expected}")
        except RemoteProtocolError:
            close_fds(packet.fds)
            raise
        return message, packet.fds

    def send(self, message: Out, fds: list[int] | tuple[int, ...] = ()) -> None:
        """Send ``message``; ``fds`` stay the caller's.

        :raise PeerLost: when the peer is gone or does not read.
        """
        if len(fds) != self._fd_count(message):
            raise LocalProtocolError(f"{type(message).__name__} to {self.name} with {len(fds)} descriptors")
        self.connection.send(self._out.encode(message), fds)

    def flush(self) -> bool:
        """Send what waits; True when nothing is left.

        :raise PeerLost: when the peer is gone.
        """
        return self.connection.flush()

    def close(self) -> None:
        """Close the connection. Harmless twice."""
        self.connection.close()


class RouterChannel(Generic[In, Out]):
    """The serving end of ZeroMQ messages. ``refusal`` makes the message that a peer is refused with."""

    def __init__(
        self, server: RouterServer, incoming: Codec[In], outgoing: Codec[Out], refusal: Callable[[str], Out]
    ) -> None:
        self.server, self._in, self._out, self._refusal = server, incoming, outgoing, refusal

    def fileno(self) -> int:
        """For a poller; only a hint, see :mod:`protocols.transport.zmq`."""
        return self.server.fileno()

    @property
    def zmq_socket(self) -> zmq.Socket[bytes]:
        """For ``zmq_poll``, which knows whether there is a message."""
        return self.server.zmq_socket

    def receive(self) -> tuple[bytes, In] | None:
        """The next (peer, message), or None; peers that send anything else are refused on the way."""
        while (received := self.server.receive()) is not None:
            peer, data = received
            try:
                return peer, self._in.decode(data)
            except RemoteProtocolError as error:
                self.refuse(peer, str(error))
        return None

    def send(self, peer: bytes, message: Out) -> Sent:
        """Queue ``message`` for ``peer``; the caller looks at what became of it."""
        return self.server.send(peer, self._out.encode(message))

    def refuse(self, peer: bytes, reason: str) -> None:
        """Tell ``peer`` why once, and ignore it from now on."""
        self.server.refuse(peer, self._out.encode(self._refusal(reason[:1000])))

    def close(self) -> None:
        """Harmless twice."""
        self.server.close()


class DealerChannel(Generic[In, Out]):
    """The asking end of ZeroMQ messages."""

    def __init__(self, client: DealerClient, incoming: Codec[In], outgoing: Codec[Out]) -> None:
        self.client, self._in, self._out = client, incoming, outgoing

    def fileno(self) -> int:
        """For a poller; only a hint, see :mod:`protocols.transport.zmq`."""
        return self.client.fileno()

    @property
    def zmq_socket(self) -> zmq.Socket[bytes]:
        """For ``zmq_poll``, which knows whether there is a message."""
        return self.client.zmq_socket

    def receive(self) -> In | None:
        """The next message, or None.

        :raise RemoteProtocolError: when the server sent something else.
        """
        data = self.client.receive()
        return None if data is None else self._in.decode(data)

    def send(self, message: Out) -> Sent:
        """Queue ``message``."""
        return self.client.send(self._out.encode(message))

    def close(self) -> None:
        """Harmless twice."""
        self.client.close()
