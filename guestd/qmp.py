"""Monitors of this process: QMP, or a person's, on AF_UNIX streams that it connects to or listens on.

Commands run at the top level of the loop, one a turn, in the order in which they came. A command that waits (for the
host, say) serves what is served in every wait; other monitors, and other commands, wait for it. A client that does not
read its answers is not read from either, until it does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from guestd.config import MonitorConfig
from guestd.hmp import PROMPT, banner
from guestd.qmp_commands import MonitorCommands
from protocols.monitor.commands import COMMANDS
from protocols.monitor.messages import CommandFailed
from protocols.monitor.state import MonitorState
from protocols.transport.loop import Loop
from protocols.transport.unix import ByteConnection, close_fds
from protocols.transport.unix_listener import ByteListener
from vfio_model.errors import ConfigError, PeerLost

PATIENCE_NS: Final = 5_000_000
"""After this a client that does not read is looked at again."""
MAX_LINE: Final = 4096
"""Bytes of a person's line."""


class Session(Protocol):
    """What is spoken with one client."""

    fds: deque[int] | None
    """Where descriptors go that the client passes; None: it cannot."""

    def opening(self) -> bytes:
        """To be sent first."""

    def feed(self, data: bytes) -> None:
        """Take what the client sent."""

    def step(self) -> bytes | None:
        """Carry out one thing that was asked for: what is to be sent; None when there is nothing to do."""

    def event(self, name: str, data: dict[str, object], wall_ns: int) -> bytes:
        """An event as it is to be sent, or nothing."""


class QmpSession:
    """QMP."""

    def __init__(self, commands: MonitorCommands) -> None:
        self._commands = commands
        self._state = MonitorState(COMMANDS, commands.version)
        self.fds: deque[int] | None = deque()

    def opening(self) -> bytes:
        """The greeting."""
        return self._state.greeting()

    def feed(self, data: bytes) -> None:
        """Take JSON."""
        self._state.feed(data)

    def step(self) -> bytes | None:
        """One command."""
        found = self._state.next()
        if found is None or isinstance(found, bytes):
            return found
        self._commands.migration.descriptors.passed = self.fds or deque()
        try:
            return self._state.reply(found, self._commands.run(found.name, found.arguments))
        except CommandFailed as error:
            return self._state.fail(found, error)

    def event(self, name: str, data: dict[str, object], wall_ns: int) -> bytes:
        """After the negotiation."""
        return self._state.event(name, data, wall_ns)


class HumanSession:
    """A person's lines."""

    def __init__(self, commands: MonitorCommands) -> None:
        self._commands = commands
        self.fds: deque[int] | None = None
        self._begun = b""
        self._lines: deque[bytes] = deque()

    def opening(self) -> bytes:
        """Who answers, and the prompt."""
        return banner(self._commands.version)

    def feed(self, data: bytes) -> None:
        """Take lines; what is too long for one is dropped."""
        *lines, begun = (self._begun + data).split(b"\n")
        self._lines.extend(line[:MAX_LINE] for line in lines)
        self._begun = begun[:MAX_LINE]

    def step(self) -> bytes | None:
        """One line."""
        if not self._lines:
            return None
        return self._commands.human(self._lines.popleft().decode(errors="replace")).encode() + PROMPT

    def event(self, name: str, data: dict[str, object], wall_ns: int) -> bytes:
        """A person is not told."""
        return b""


class _Client:
    """One connection."""

    def __init__(self, connection: ByteConnection, session: Session, loop: Loop, closed: Callable[[], None]) -> None:
        self._connection, self._session, self._loop, self._closed = connection, session, loop, closed
        connection.fds = session.fds
        self._busy = False
        """Whether a step is due by itself: its input has been read, or the client does not read."""
        loop.register(connection, self._readable)
        self.send(session.opening())

    def send(self, data: bytes) -> None:
        """Send ``data``; who is gone or reads nothing for too long is left."""
        try:
            if data:
                self._connection.send(data)
        except PeerLost:
            self._loop.call_soon(self.close)

    def event(self, name: str, data: dict[str, object], wall_ns: int) -> None:
        """Tell the client of an event."""
        if not self._connection.closed:
            self.send(self._session.event(name, data, wall_ns))

    def _readable(self) -> None:
        try:
            data = self._connection.receive()
        except PeerLost:
            self.close()
            return
        if data:
            self._session.feed(data)
            self._work()

    def _work(self) -> None:
        """One step; while there are more, nothing is read."""
        if self._connection.closed:
            return
        answer = b"" if self._connection.wants_write else self._session.step()
        if answer is None:
            if self._busy:
                self._busy = False
                self._loop.register(self._connection, self._readable)
            return
        if not self._busy:
            self._busy = True
            self._loop.unregister(self._connection)
        self.send(answer)
        self._later()

    def _later(self) -> None:
        if not self._connection.wants_write:
            self._loop.call_soon(self._work)
            return
        try:
            self._connection.flush()
        except PeerLost:
            self._loop.call_soon(self.close)
            return
        self._loop.call_later(PATIENCE_NS, self._work)

    def close(self) -> None:
        """Harmless twice."""
        if not self._connection.closed:
            self._loop.unregister(self._connection)
            self._connection.close()
            close_fds(list(self._session.fds or ()))
            self._closed()


class Monitors:
    """Every monitor of the process."""

    def __init__(self, commands: MonitorCommands, loop: Loop) -> None:
        self._commands, self._loop = commands, loop
        self._clients: list[_Client] = []
        self._listeners: list[ByteListener] = []
        commands.operations.subscribers.append(self._event)

    def start(self, endpoint: MonitorConfig) -> None:
        """Connect, or listen.

        :raise ConfigError: when nobody listens there, or one cannot.
        """
        if not endpoint.server:
            try:
                self._serve(ByteConnection.connect(endpoint.path, "monitor"), endpoint)
            except PeerLost as error:
                raise ConfigError(str(error), where=f"monitor {endpoint.path}") from error
            return
        listener = ByteListener(endpoint.path)
        self._listeners.append(listener)

        def accept() -> None:
            connection = listener.accept("monitor")
            if connection is not None:
                self._serve(connection, endpoint)

        self._loop.register(listener, accept)

    def _serve(self, connection: ByteConnection, endpoint: MonitorConfig) -> None:
        kind = QmpSession if endpoint.mode == "control" else HumanSession
        client = _Client(connection, kind(self._commands), self._loop, lambda: self._clients.remove(client))
        self._clients.append(client)

    def _event(self, name: str, data: dict[str, object], wall_ns: int) -> None:
        for client in list(self._clients):
            client.event(name, data, wall_ns)

    def close(self) -> None:
        """Close every socket. Harmless twice."""
        for listener in self._listeners:
            self._loop.unregister(listener)
            listener.close()
        self._listeners.clear()
        for client in list(self._clients):
            client.close()
