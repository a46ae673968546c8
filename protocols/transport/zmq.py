"""ZeroMQ request sockets over ipc: a ROUTER that serves, a DEALER that asks.

What ZeroMQ does silently is made visible: ``router_mandatory`` turns a message to an unknown peer into
:data:`Sent.UNREACHABLE` and a full queue into :data:`Sent.AGAIN`; linger is 0, so that closing never hangs; a role lock
is taken before the bind, because a second bind steals the path. A peer that broke the protocol is told once and ignored
from then on.

The descriptor of a ZeroMQ socket is edge-triggered and only *hints*; ``zmq_poll`` on the socket itself knows
(:class:`protocols.transport.loop.Loop`). A socket must not survive a fork. Source: zmq_socket(3), zmq_poll(3).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from enum import Enum

import zmq
from zmq.backend import Socket

from protocols.transport.runtime import RoleLock, check_private
from protocols.transport.unix import MAX_SUN_PATH
from vfio_model.errors import ConfigError

MAX_MESSAGE = (1 << 20) + 65536
"""Bytes; libzmq cuts off a peer that sends more."""
MAX_IGNORED = 4096
"""Refused peers remembered at a time."""
DEFAULT_HWM = 1000
_RCVMORE = int(zmq.RCVMORE)
_send = Socket.send
"""What ``zmq.Socket.send`` calls when it has looked for the arguments of draft sockets."""
_NOBLOCK, _NOBLOCK_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)


class Sent(Enum):
    """What became of a message."""

    OK = "queued"
    AGAIN = "the peer's queue is full"
    UNREACHABLE = "no such peer"


def ipc_address(path: str | os.PathLike[str]) -> str:
    """The ZeroMQ address of a socket path.

    :raise ConfigError: when the path is longer than 107 bytes.
    """
    text = os.fspath(path)
    size = len(os.fsencode(text))
    if size > MAX_SUN_PATH:
        raise ConfigError(
            f"the socket path has {size} bytes, the kernel takes {MAX_SUN_PATH}",
            where=text,
            hint="use a short runtime directory",
        )
    return f"ipc://{text}"


class _Socket:
    def __init__(self, kind: int, path: str | os.PathLike[str], hwm: int) -> None:
        self.path = os.fspath(path)
        self.address = ipc_address(path)
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(kind)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, hwm)
        self._socket.setsockopt(zmq.RCVHWM, hwm)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)

    @property
    def zmq_socket(self) -> zmq.Socket[bytes]:
        """For ``zmq_poll``, which knows whether there is a message."""
        return self._socket

    def fileno(self) -> int:
        """The edge-triggered hint, for a poller that tries :meth:`receive` before it waits."""
        return int(self._socket.getsockopt(zmq.FD))

    def _last(self) -> bytes | None:
        """The next frame, if it is the last of its message; None: it was not, and all of that message is dropped.

        :raise zmq.Again: there is none.
        """
        frame = self._socket.recv(_NOBLOCK, False)
        if not frame.more:
            return frame.bytes
        while self._socket.get(_RCVMORE):
            self._socket.recv(_NOBLOCK)
        return None

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._socket.closed

    def close(self) -> None:
        """Drop what is queued and close. Harmless twice."""
        self._socket.close(linger=0)


class RouterServer(_Socket):
    """Serves ``path`` in a private directory. ``lock`` is the role's; without one the path gets a lock of its own.

    :raise ConfigError: when the directory is not private, the path too long, or another process serves it.
    """

    def __init__(self, path: str | os.PathLike[str], *, lock: RoleLock | None = None, hwm: int = DEFAULT_HWM) -> None:
        directory, name = os.path.split(os.fspath(path))
        ipc_address(path)
        check_private(directory or ".")
        self._own_lock = RoleLock(directory or ".", name) if lock is None else None
        super().__init__(zmq.ROUTER, path, hwm)
        self._ignored: OrderedDict[bytes, None] = OrderedDict()
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            self._socket.bind(self.address)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot listen: {error}", where=self.path) from error

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next (peer, message), or None. Peers that were refused are skipped; so is what is not one frame."""
        receive = self._socket.recv
        while True:
            try:
                peer = receive(_NOBLOCK)
            except zmq.Again:
                return None
            data = self._last()  # a ROUTER puts the peer before what it sent, which is at least one frame
            if peer in self._ignored:
                continue
            if data is not None:
                return peer, data
            self._ignore(peer)

    def send(self, peer: bytes, data: bytes) -> Sent:
        """Queue ``data`` for ``peer``; never blocks, never drops silently."""
        try:
            _send(self._socket, peer, _NOBLOCK_MORE)
            _send(self._socket, data, _NOBLOCK)
        except zmq.Again:
            return Sent.AGAIN
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return Sent.UNREACHABLE
            raise
        return Sent.OK

    def refuse(self, peer: bytes, data: bytes) -> None:
        """Send ``data`` (an encoded refusal) once, and ignore ``peer`` from now on."""
        if peer not in self._ignored:
            self.send(peer, data)
            self._ignore(peer)

    def _ignore(self, peer: bytes) -> None:
        self._ignored[peer] = None
        if len(self._ignored) > MAX_IGNORED:
            self._ignored.popitem(last=False)

    def close(self) -> None:
        """Also removes the socket file and gives up a lock of its own."""
        if self.closed:
            return
        super().close()
        if os.path.exists(self.path):
            os.unlink(self.path)
        if self._own_lock is not None:
            self._own_lock.close()


class DealerClient(_Socket):
    """Asks a :class:`RouterServer`. Connecting succeeds even when nobody serves yet; a deadline of the caller tells."""

    def __init__(self, path: str | os.PathLike[str], *, hwm: int = DEFAULT_HWM) -> None:
        super().__init__(zmq.DEALER, path, hwm)
        self._socket.connect(self.address)

    def send(self, data: bytes) -> Sent:
        """Queue one message; :data:`Sent.AGAIN` when too many wait."""
        try:
            _send(self._socket, data, _NOBLOCK)
        except zmq.Again:
            return Sent.AGAIN
        return Sent.OK

    def receive(self) -> bytes | None:
        """The next message, or None. What is not one frame is skipped: a ROUTER of ours never sends it."""
        while True:
            try:
                data = self._last()
            except zmq.Again:
                return None
            if data is not None:
                return data
