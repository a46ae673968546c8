"""Where AF_UNIX connections begin: a path that is listened at.

A socket file that nobody serves any more is replaced; a live one is not stolen.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Self

from protocols.transport.unix import (
    MAX_SUN_PATH,
    ByteConnection,
    SeqpacketConnection,
    StreamConnection,
    check_path,
)
from vfio_model.errors import ConfigError


class _Listener:
    """A bound path. A socket file that nobody serves any more is replaced; a live one is not stolen.

    The file appears when one can connect to it: it is bound under another name, and gets this one once it listens.
    When this process has no descriptor left, whoever connects is turned away: a spare one is kept for that.
    """

    kind: socket.SocketKind

    def __init__(self, path: str | os.PathLike[str], backlog: int = 64) -> None:
        self.path = check_path(path)
        _remove_stale(self.path, self.kind)
        self._sock = socket.socket(socket.AF_UNIX, self.kind)
        nascent = f"{self.path}~"
        try:
            Path(nascent).unlink(missing_ok=True)
            self._sock.bind(nascent if len(os.fsencode(nascent)) <= MAX_SUN_PATH else self.path)
            self._sock.listen(backlog)
            if os.path.exists(nascent):
                os.link(nascent, self.path)  # not rename: it would replace the file of one who was faster
                os.unlink(nascent)
        except OSError as error:
            self._sock.close()
            raise ConfigError(f"cannot listen: {error.strerror}", where=self.path) from error
        self._ready()

    @classmethod
    def adopt(cls, sock: socket.socket) -> Self:
        """Take a socket over that listens already; its file, if it has one, is not removed at the end."""
        self = cls.__new__(cls)
        self.path, self._sock = "", sock
        self._ready()
        return self

    def _ready(self) -> None:
        self._sock.setblocking(False)
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        """For a poller."""
        return self._sock.fileno()

    def _accept(self) -> socket.socket | None:
        try:
            return self._sock.accept()[0]
        except (BlockingIOError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
        self._turn_away()
        return None

    def _turn_away(self) -> None:
        """Else it would stay in the queue, and the socket readable."""
        if self._spare < 0:
            return
        os.close(self._spare)
        self._spare = -1
        with contextlib.suppress(OSError):
            self._sock.accept()[0].close()
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        """Stop listening and remove the socket file. Harmless twice."""
        if self._sock.fileno() >= 0:
            self._sock.close()
            if self._spare >= 0:
                os.close(self._spare)
            if self.path:
                Path(self.path).unlink(missing_ok=True)


def _remove_stale(path: str, kind: socket.SocketKind) -> None:
    for there in (path, f"{path}~"):
        if os.path.exists(there) and not stat.S_ISSOCK(os.stat(there).st_mode):
            raise ConfigError("something that is no socket is there", where=there, hint="nothing of yours is replaced")
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, kind) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except OSError as error:
            raise ConfigError(f"something else is there ({error.strerror})", where=path) from error
    raise ConfigError("another process listens there", where=path, hint="stop it, or use another directory")


class SeqpacketListener(_Listener):
    """Where open files begin."""

    kind = socket.SOCK_SEQPACKET

    def accept(self, name: str = "client") -> SeqpacketConnection | None:
        """The next connection, or None."""
        sock = self._accept()
        return None if sock is None else SeqpacketConnection(sock, name)


class StreamListener(_Listener):
    """Where vfio-user clients connect."""

    kind = socket.SOCK_STREAM

    def accept(self, name: str = "client") -> StreamConnection | None:
        """The next connection, or None."""
        sock = self._accept()
        return None if sock is None else StreamConnection(sock, name)


class ByteListener(_Listener):
    """Where clients of a text protocol connect."""

    kind = socket.SOCK_STREAM

    def accept(self, name: str = "client") -> ByteConnection | None:
        """The next connection, or None."""
        sock = self._accept()
        return None if sock is None else ByteConnection(sock, name)
