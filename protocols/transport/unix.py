"""AF_UNIX sockets that carry descriptors.

SEQPACKET (:class:`SeqpacketConnection`): one send is one message with its descriptors. It
is the open file of the port; SO_PEERCRED and a pidfd say who is there, EOF is ``release()``. STREAM
(:class:`StreamConnection`): vfio-user's framing, the header read by a recvmsg of exactly 16 bytes with a control buffer
and the body after it, because a larger recvmsg glues messages together and gives descriptors to the wrong one. Plain
bytes without descriptors, for text protocols: :class:`ByteConnection`.

Everything is non-blocking. What cannot be sent at once waits in a bounded outbox that :meth:`flush` empties when the
socket is writable. No descriptor is ever lost: what arrives truncated or with a broken message is closed here.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
import struct
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from protocols.transport.halt_polling import HaltPoll
from vfio_model.errors import ConfigError, LocalProtocolError, PeerLost, RemoteProtocolError

SCM_MAX_FD = 253
MAX_SUN_PATH = 107
MAX_PACKET = 256 << 10
"""Bytes of one SEQPACKET message."""
MAX_OUTBOX = 1024
"""Messages that wait for a peer which does not read; one more and it is cut off."""
CONGESTED_MESSAGES, CONGESTED_BYTES = MAX_OUTBOX // 2, 8 << 20
"""What waits for a peer whose further requests had better wait, too."""
SO_PEERPIDFD = 77
"""include/uapi/asm-generic/socket.h, Linux 6.5: the peer's pidfd without a race."""

ATTENTION_US = 1000
"""How long a stream that was just spoken on may be waited for alone."""
_TIMEVAL = struct.Struct("@ll")
_UCRED = struct.Struct("=iII")
_CONTROL = socket.CMSG_SPACE(SCM_MAX_FD * 4)
_RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC) | int(socket.MSG_DONTWAIT)
_WAIT_FLAGS = int(socket.MSG_CMSG_CLOEXEC)
_SEND_FLAGS = int(socket.MSG_NOSIGNAL) | int(socket.MSG_DONTWAIT)
# As plain numbers: the members of socket's IntFlag cost a microsecond for each "and".
_CUT_DATA, _CUT_CONTROL, _DONTWAIT = int(socket.MSG_TRUNC), int(socket.MSG_CTRUNC), int(socket.MSG_DONTWAIT)
_GONE = (BrokenPipeError, ConnectionResetError, ConnectionAbortedError)


def check_path(path: str | os.PathLike[str]) -> str:
    """``path``, when it fits a sockaddr_un.

    :raise ConfigError: when it is longer than 107 bytes.
    """
    text = os.fspath(path)
    size = len(os.fsencode(text))
    if size > MAX_SUN_PATH:
        raise ConfigError(
            f"the socket path has {size} bytes, the kernel takes {MAX_SUN_PATH}",
            where=text,
            hint="use a short runtime directory",
        )
    return text


def close_fds(fds: list[int] | tuple[int, ...]) -> None:
    """Close all of ``fds``."""
    for fd in fds:
        os.close(fd)


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end (SO_PEERCRED); for a socketpair, who made it."""

    pid: int
    uid: int
    gid: int


@dataclass(slots=True)
class Packet:
    """One message and its descriptors, which the receiver now owns."""

    data: bytes
    fds: list[int] = field(default_factory=list)


def _received_fds(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    if not ancillary:
        return []
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return fds.tolist()


def _rights(fds: list[int] | tuple[int, ...]) -> list[tuple[int, int, bytes]]:
    if not fds:
        return []
    if len(fds) > SCM_MAX_FD:
        raise LocalProtocolError(f"{len(fds)} descriptors in one message, the kernel takes {SCM_MAX_FD}")
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())]


class _Connection:
    """What both kinds share: identity, outbox, closing."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        sock.setblocking(False)
        self._sock, self.name = sock, name
        self._outbox: deque[tuple[memoryview, list[int]]] = deque()

    def fileno(self) -> int:
        """For a poller; -1 when closed."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._sock.fileno() < 0

    @property
    def wants_write(self) -> bool:
        """Whether :meth:`flush` should be called when the socket becomes writable."""
        return bool(self._outbox)

    @property
    def unsent(self) -> int:
        """Bytes that wait for :meth:`flush`."""
        return sum(len(data) for data, _ in self._outbox)

    @property
    def congested(self) -> bool:
        """Whether so much waits for the peer that nothing should be done that makes it more."""
        return len(self._outbox) >= CONGESTED_MESSAGES or (bool(self._outbox) and self.unsent >= CONGESTED_BYTES)

    def peer(self) -> Peer:
        """Credentials of the other end at the time it connected."""
        raw = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        return Peer(*_UCRED.unpack(raw))

    def open_pidfd(self) -> int:
        """A new pidfd of the other end, owned by the caller.

        :raise PeerLost: when that process is gone already.
        """
        try:
            return self._sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise PeerLost(self.name, "opening its pidfd") from error
        try:
            return os.pidfd_open(self.peer().pid)
        except OSError as error:
            raise PeerLost(self.name, "opening its pidfd") from error

    def send(self, data: bytes | bytearray | memoryview, fds: list[int] | tuple[int, ...] = ()) -> None:
        """Send one message; ``fds`` stay the caller's and may be closed at once.

        :raise PeerLost: when nobody reads any more, or the outbox is full.
        """
        if self._outbox:
            self._queue(memoryview(bytes(data)), fds)
            return
        sent = self._send_now(data, fds)
        if sent < len(data):
            self._queue(memoryview(bytes(data))[sent:], () if sent else fds)

    def _send_now(self, data: bytes | bytearray | memoryview, fds: list[int] | tuple[int, ...]) -> int:
        """Bytes sent; 0 when the socket is full (the descriptors go with the first byte)."""
        try:
            return self._sock.sendmsg([data], _rights(fds), _SEND_FLAGS) if fds else self._sock.send(data, _SEND_FLAGS)
        except BlockingIOError:
            return 0
        except _GONE as error:
            raise PeerLost(self.name, "sending") from error
        except OSError as error:
            if error.errno == errno.EMSGSIZE:
                raise LocalProtocolError(f"{len(data)} bytes do not fit a message to {self.name}") from error
            raise PeerLost(self.name, f"sending ({error.strerror})") from error

    def _queue(self, data: memoryview, fds: list[int] | tuple[int, ...]) -> None:
        if len(self._outbox) >= MAX_OUTBOX:
            raise PeerLost(self.name, f"it left {MAX_OUTBOX} messages unread")
        self._outbox.append((data, [os.dup(fd) for fd in fds]))

    def flush(self) -> bool:
        """Send what waits; True when nothing is left.

        :raise PeerLost: when nobody reads any more.
        """
        while self._outbox:
            data, fds = self._outbox[0]
            sent = self._send_now(data, fds)
            if sent == 0:
                return False
            close_fds(fds)
            if sent < len(data):
                self._outbox[0] = (data[sent:], [])
            else:
                self._outbox.popleft()
        return True

    def end_sending(self) -> None:
        """Let the peer see EOF after what was sent, and go on receiving. Harmless when it is gone."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket and drop what waits. Harmless twice."""
        self._sock.close()
        while self._outbox:
            close_fds(self._outbox.popleft()[1])


class SeqpacketConnection(_Connection):
    """One open file: whole messages, each with its descriptors."""

    def __init__(self, sock: socket.socket, name: str = "peer") -> None:
        super().__init__(sock, name)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MAX_PACKET)
        self._buffer = bytearray(MAX_PACKET)

    @classmethod
    def connect(cls, path: str | os.PathLike[str], name: str = "peer") -> SeqpacketConnection:
        """Connect to a listener.

        :raise PeerLost: when nobody listens there.
        """
        return cls(_connect(path, socket.SOCK_SEQPACKET, name), name)

    def send(self, data: bytes | bytearray | memoryview, fds: list[int] | tuple[int, ...] = ()) -> None:
        """As the base's; an empty message would look like EOF and is refused."""
        if not 0 < len(data) <= MAX_PACKET:
            raise LocalProtocolError(f"a message of {len(data)} bytes to {self.name}: 1 to {MAX_PACKET} can be sent")
        super().send(data, fds)

    def receive(self) -> Packet | None:
        """The next message, or None when there is none yet. The caller owns its descriptors.

        :raise PeerLost: at EOF.
        :raise RemoteProtocolError: when data or descriptors were cut off; those that came are closed.
        """
        try:
            size, ancillary, flags, _ = self._sock.recvmsg_into([self._buffer], _CONTROL, _RECEIVE_FLAGS)
        except BlockingIOError:
            return None
        except _GONE as error:
            raise PeerLost(self.name, "receiving") from error
        fds = _received_fds(ancillary)
        if flags & (_CUT_DATA | _CUT_CONTROL):
            close_fds(fds)
            raise RemoteProtocolError(f"{self.name}: message or descriptors too many: they were cut off")
        if size == 0:
            close_fds(fds)
            raise PeerLost(self.name, "receiving")
        return Packet(bytes(self._buffer[:size]), fds)


HEADER_SIZE = 16
_HEADER_LENGTH = struct.Struct("=4xI8x")
MAX_FRAME = (1 << 20) + 4096
"""Bytes of one vfio-user message: the negotiated 1 MiB of data and the fixed part of the longest command."""


@dataclass(slots=True)
class Frame:
    """One vfio-user message: 16 bytes of header, the body, the descriptors, which the receiver now owns."""

    header: bytes
    body: bytes
    fds: list[int] = field(default_factory=list)
    short: bool = False
    """Whether descriptors were lost because this process has no room for more."""


class StreamConnection(_Connection):
    """A vfio-user stream: whole frames in, whole frames out; one sendmsg each."""

    def __init__(self, sock: socket.socket, name: str = "peer", *, max_frame: int = MAX_FRAME) -> None:
        super().__init__(sock, name)
        self.max_frame = max_frame
        readable = select.poll()
        readable.register(sock, select.POLLIN)
        self._soon = HaltPoll(partial(readable.poll, 0))
        self._header = b""
        self._fds: list[int] = []
        self._short = False
        self._parts: list[bytes] = []
        self._missing = 0
        """Bytes of the body that have still to come, once the header is there."""

    @classmethod
    def connect(cls, path: str | os.PathLike[str], name: str = "peer") -> StreamConnection:
        """Connect to a vfio-user server.

        :raise PeerLost: when nobody listens there.
        """
        return cls(_connect(path, socket.SOCK_STREAM, name), name)

    def attend(self) -> None:
        """Let :meth:`receive` wait, for at most :data:`ATTENTION_US`, when it is told to."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(0, ATTENTION_US))
        os.set_blocking(self._sock.fileno(), True)  # everything else says MSG_DONTWAIT

    def receive(self, *, wait: bool = False) -> Frame | None:
        """The next whole frame, or None when it has not all come yet; ``wait`` gives it a moment (see :meth:`attend`).

        :raise PeerLost: at EOF.
        :raise RemoteProtocolError: when the size in the header is impossible, or there are too many descriptors.
        """
        header, body = self._header, b""
        try:
            if len(header) < HEADER_SIZE:
                header = self._read_header(header, _WAIT_FLAGS if wait and not self._soon() else _RECEIVE_FLAGS)
                (size,) = _HEADER_LENGTH.unpack(header)
                if not HEADER_SIZE <= size <= self.max_frame:
                    raise RemoteProtocolError(
                        f"{self.name}: a frame of {size} bytes, {HEADER_SIZE} to {self.max_frame} are allowed"
                    )
                self._missing = size - HEADER_SIZE
            missing = self._missing
            if missing:
                body = self._sock.recv(missing, _DONTWAIT)
                if len(body) < missing or self._parts:
                    body = self._read_rest(body)
        except BlockingIOError:
            return None
        except _GONE as error:
            raise PeerLost(self.name, "receiving") from error
        frame = Frame(header, body, self._fds, self._short)
        self._header, self._fds, self._short, self._missing = b"", [], False, 0
        return frame

    def _read_header(self, header: bytes, receive_flags: int) -> bytes:
        """All of it, of which ``header`` has come before. :raise BlockingIOError: there is not all of it yet."""
        while (missing := HEADER_SIZE - len(header)) > 0:
            data, ancillary, flags, _ = self._sock.recvmsg(missing, _CONTROL, receive_flags)
            if ancillary:
                self._fds += _received_fds(ancillary)
                if len(self._fds) > SCM_MAX_FD:
                    raise RemoteProtocolError(f"{self.name}: more descriptors than one message has")
            if flags & _CUT_CONTROL:
                self._short = True
            if not data:
                raise PeerLost(self.name, "receiving")
            header = self._header = header + data
        return header

    def _read_rest(self, data: bytes) -> bytes:
        """The body of which ``data`` has come just now. :raise BlockingIOError: there is not all of it yet."""
        while True:
            if not data:
                raise PeerLost(self.name, "receiving")
            self._parts.append(data)
            self._missing -= len(data)
            if not self._missing:
                break
            data = self._sock.recv(self._missing, _DONTWAIT)
        body = b"".join(self._parts)
        self._parts.clear()
        return body

    def close(self) -> None:
        """Also closes the descriptors of a frame that never became whole."""
        super().close()
        close_fds(self._fds)
        self._fds = []


MAX_READ = 64 << 10
"""Bytes that :meth:`ByteConnection.receive` takes at once."""


class ByteConnection(_Connection):
    """A stream of bytes: lines, JSON. Whoever reads finds the ends of messages itself."""

    def __init__(self, sock: socket.socket, name: str = "peer") -> None:
        super().__init__(sock, name)
        self.fds: deque[int] | None = None
        """Where descriptors go that come with the bytes, oldest first; None: they are not taken."""

    @classmethod
    def connect(cls, path: str | os.PathLike[str], name: str = "peer") -> ByteConnection:
        """Connect to a listener.

        :raise PeerLost: when nobody listens there.
        """
        return cls(_connect(path, socket.SOCK_STREAM, name), name)

    def receive(self) -> bytes | None:
        """What has come, at most 64 KiB of it, or None when there is nothing.

        :raise PeerLost: at EOF.
        """
        try:
            data = self._receive()
        except BlockingIOError:
            return None
        except _GONE as error:
            raise PeerLost(self.name, "receiving") from error
        except OSError as error:  # of a connection that never came about
            raise PeerLost(self.name, f"connecting: {error.strerror}") from error
        if not data:
            raise PeerLost(self.name, "receiving")
        return data

    def _receive(self) -> bytes:
        if self.fds is None:
            return self._sock.recv(MAX_READ, _DONTWAIT)
        data, ancillary, _, _ = self._sock.recvmsg(MAX_READ, _CONTROL, _RECEIVE_FLAGS)
        self.fds.extend(_received_fds(ancillary))
        return data


def _connect(path: str | os.PathLike[str], kind: socket.SocketKind, name: str) -> socket.socket:
    text = check_path(path)
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.setblocking(False)
    try:
        sock.connect(text)
    except OSError as error:
        sock.close()
        raise PeerLost(name, f"connecting to {text}: {error.strerror}") from error
    return sock


def seqpacket_pair(left: str = "left", right: str = "right") -> tuple[SeqpacketConnection, SeqpacketConnection]:
    """Two connected ends; each is named after what is at the *other* end."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return SeqpacketConnection(a, right), SeqpacketConnection(b, left)


def stream_pair(left: str = "left", right: str = "right") -> tuple[StreamConnection, StreamConnection]:
    """Two connected stream ends, named as those of :func:`seqpacket_pair`."""
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return StreamConnection(a, right), StreamConnection(b, left)
