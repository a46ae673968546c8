"""Who sends fuzz to a live socket, one for each kind of socket: what passes is counted, what does not must be noticed.

A message that does not pass framing and schema must cost the sender its connection (EOF, or one Refused); a sender that
has lost it connects again. One that passes is answered, refused, or costs the connection as well: nobody else may
notice, and that is the test's business.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocols.transport.kernel import EventFd
from protocols.transport.shm import create_memory
from protocols.transport.unix import SeqpacketConnection, close_fds
from protocols.transport.zmq import DealerClient
from protocols.vfio_user.messages import HEADER_SIZE, Capabilities, Role
from protocols.vfio_user.state import CommandReceived, VfioUserState
from tests.processes.rig import SECONDS
from tests.protocols.fuzz import FuzzChannel, Fuzzer
from vfio_model.errors import LocalProtocolError, PeerLost, RemoteProtocolError

Change = Callable[[Any], Any]
"""Puts handles that exist into a message that passes; None leaves it out."""


@dataclass
class Tally:
    """What was sent to one socket."""

    sent: int = 0
    passed: int = 0
    lost: int = 0
    """Connections that it cost, refusals among them."""


class Descriptors:
    """What a peer may send along: sealed and unsealed memory, files, doorbells, sockets."""

    def __init__(self, fuzzer: Fuzzer) -> None:
        self._random = fuzzer.random
        self._memory = [create_memory(f"fuzz-{size}", size) for size in (8, 4096, 65536, 1 << 20)]
        self._event = EventFd()
        self._pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._loose = os.memfd_create("loose")
        self._file = os.open(tempfile.gettempdir(), os.O_TMPFILE | os.O_RDWR)
        self._null = os.open(os.devnull, os.O_RDWR)

    def some(self, count: int) -> list[int]:
        """``count`` of them; they stay ours."""
        memory = [memory.fd for memory in self._memory]
        others = [self._event.fd, self._pair[0].fileno(), self._loose, self._file, self._null]
        return [self._random.choice(memory + others) for _ in range(count)]

    def close(self) -> None:
        """All of them."""
        for memory in self._memory:
            memory.close()
        self._event.close()
        for end in self._pair:
            end.close()
        close_fds([self._loose, self._file, self._null])


def wait_readable(source: Any) -> None:
    """Until something, or the end, can be read."""
    poll = select.poll()
    poll.register(source, select.POLLIN)
    assert poll.poll(SECONDS * 1000), "neither an answer nor the end of the connection came"


# -- ZeroMQ ----------------------------------------------------------------------------------------------------------


class ZmqSender:
    """Sends to the ROUTER at ``path``."""

    def __init__(
        self, path: Path, channel: FuzzChannel, replies: Any, change: Change = lambda message: message
    ) -> None:
        self._path, self._codec, self._replies, self._change = path, channel.codec, replies, change
        self.tally = Tally()
        self._client = DealerClient(path)

    def send(self, data: bytes, _fds: int) -> None:
        """One message; waits for the refusal when it must come."""
        try:
            message = self._change(self._codec.decode(data))
        except RemoteProtocolError:
            self.tally.sent += 1
            self._client.send(data)
            self._until_refused()
            return
        if message is None:
            return
        self.tally.sent += 1
        self.tally.passed += 1
        self._client.send(self._codec.encode(message))
        while (answer := self._client.receive()) is not None:
            if self._is_refusal(answer):
                self._renew()
                return

    def _until_refused(self) -> None:
        while (answer := self._client.receive()) is None or not self._is_refusal(answer):
            if answer is None:
                poll = select.poll()
                poll.register(self._client.fileno(), select.POLLIN)
                assert poll.poll(SECONDS * 1000) or self._client.readable(), f"{self._path.name} refused nobody"
        self._renew()

    def _is_refusal(self, answer: bytes) -> bool:
        return type(self._replies.decode(answer)).__name__ == "Refused"

    def _renew(self) -> None:
        self.tally.lost += 1
        self._client.close()
        self._client = DealerClient(self._path)

    def close(self) -> None:
        """Leave with a message that nobody understands: who stands in between is rid of us then, too."""
        self._client.send(b"\xc1")
        self._until_refused()
        self._client.close()


# -- SEQPACKET -------------------------------------------------------------------------------------------------------


class PacketSender:
    """Sends to the SEQPACKET listener at ``path``. ``prelude`` says what a new connection begins with, if anything;
    what is answered to it is given to ``learn``.
    """

    def __init__(
        self,
        path: Path,
        channel: FuzzChannel,
        fuzzer: Fuzzer,
        replies: Any,
        *,
        prelude: Callable[[], Any] = lambda: None,
        learn: Callable[[Any], None] = lambda answer: None,
        change: Change = lambda message: message,
    ) -> None:
        self._path, self._channel, self._random, self._replies = path, channel, fuzzer.random, replies
        self._prelude, self._learn, self._change = prelude, learn, change
        self._fds = Descriptors(fuzzer)
        self.tally = Tally()
        self._connect()

    def _connect(self) -> None:
        self._connection = SeqpacketConnection.connect(self._path, self._path.name)
        first = self._prelude()
        if first is not None:
            self._connection.send(self._channel.codec.encode(first))
            wait_readable(self._connection)
            packet = self._connection.receive()
            assert packet is not None
            close_fds(packet.fds)
            self._learn(self._replies.decode(packet.data))

    def send(self, data: bytes, fds: int) -> None:
        """One message with so many descriptors; waits for EOF when it must come."""
        good = False
        try:
            message = self._change(self._channel.codec.decode(data))
            good = fds == (self._channel.fds(message) if self._channel.fds else 0)
            data = self._channel.codec.encode(message)
        except RemoteProtocolError:
            pass
        self.tally.sent += 1
        self.tally.passed += good
        try:
            self._connection.send(data, self._fds.some(fds))
            self._drain(to_the_end=not good)
        except LocalProtocolError:
            self.tally.sent -= 1  # the kernel would not have carried it
        except PeerLost:
            self.tally.lost += 1
            self._connection.close()
            self._connect()
            return
        if self._random.random() < 0.1:  # leave in between, with whatever is open
            self._connection.close()
            self._connect()

    def _drain(self, *, to_the_end: bool) -> None:
        while True:
            if to_the_end:
                wait_readable(self._connection)
            packet = self._connection.receive()
            if packet is None:
                return
            close_fds(packet.fds)

    def close(self) -> None:
        """EOF."""
        self._connection.close()
        self._fds.close()


# -- vfio-user -------------------------------------------------------------------------------------------------------


class VfioUserSender:
    """Sends frames to the vfio-user server at ``path``; a state machine of our own says what passes."""

    def __init__(self, path: Path, fuzzer: Fuzzer, frames: Callable[[], Iterator[tuple[bytes, int]]]) -> None:
        self._path, self._frames = path, frames
        self._fds = Descriptors(fuzzer)
        self.tally = Tally()
        self._socket: socket.socket | None = None

    def send_many(self, count: int) -> None:
        """So many frames, over as many connections as it takes."""
        while self.tally.sent < count:
            self._connect()
            try:
                for frame, fds in self._frames():
                    if self.tally.sent >= count or not self._send(frame, fds):
                        break
            except OSError as error:
                assert error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN), error
                self.tally.lost += 1

    def _connect(self) -> None:
        self.close_stream()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(self._path))
        self._state = VfioUserState(Role.SERVER, Capabilities(max_msg_fds=16))

    def _send(self, frame: bytes, fds: int) -> bool:
        """Whether the connection is still good."""
        assert self._socket is not None
        if len(frame) < HEADER_SIZE:
            return True
        self.tally.sent += 1
        passed = self._passes(frame, fds)
        self.tally.passed += passed
        socket.send_fds(self._socket, [frame], self._fds.some(fds))
        if passed:
            self._read_what_is_there()
            return True
        self._socket.shutdown(socket.SHUT_WR)
        while self._socket.recv(1 << 16):
            pass
        self.tally.lost += 1
        return False

    def _passes(self, frame: bytes, fds: int) -> bool:
        if struct.unpack_from("=4xI", frame)[0] != len(frame):
            return False
        try:
            event = self._state.receive(frame[:HEADER_SIZE], frame[HEADER_SIZE:], list(range(100, 100 + fds)))
        except RemoteProtocolError:
            return False
        assert isinstance(event, CommandReceived)
        if event.command == 1:
            self._state.accept(event)
        elif not event.no_reply:
            self._state.reply_error(event, 5)
        return True

    def _read_what_is_there(self) -> None:
        assert self._socket is not None
        while True:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            if not poll.poll(0):
                return
            data, fds, _, _ = socket.recv_fds(self._socket, 1 << 16, 64)
            close_fds(fds)
            if not data:
                raise BrokenPipeError(errno.EPIPE, "EOF")

    def close_stream(self) -> None:
        """EOF."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def close(self) -> None:
        """Everything."""
        self.close_stream()
        self._fds.close()
