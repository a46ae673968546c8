"""A QMP server for one client, without I/O.

::

                 greeting
    (connected) ──────────► NEGOTIATING ──qmp_capabilities──► COMMANDS
                             every other command:              every command but qmp_capabilities;
                             CommandNotFound                   events

Nothing that a client sends ends its connection: what is not understood is answered by an error, and the next object
is a command again.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto

from protocols.monitor import messages
from protocols.monitor.json_stream import JsonStream, Malformed
from protocols.monitor.messages import Command, CommandFailed
from protocols.monitor.schema import Struct, check

NEGOTIATE = "qmp_capabilities"
_MEMBERS = ("execute", "arguments", "id")


class Phase(Enum):
    """See the module's head."""

    NEGOTIATING = auto()
    COMMANDS = auto()


class MonitorState:
    """``commands``: the table of what may be asked for. ``version`` of this program goes into the greeting."""

    def __init__(self, commands: Mapping[str, Struct], version: str) -> None:
        self.phase = Phase.NEGOTIATING
        self._commands, self._version = commands, version
        self._stream = JsonStream()

    def greeting(self) -> bytes:
        """To be sent first."""
        return messages.greeting(self._version)

    def feed(self, data: bytes) -> None:
        """Take what the client sent."""
        self._stream.feed(data)

    def next(self) -> Command | bytes | None:
        """What comes next of what was sent: a command to be carried out and then answered, or what is to be sent
        without further ado; None when that was all.
        """
        found = self._stream.next()
        if found is None:
            return None
        if isinstance(found, Malformed):
            return messages.failure(CommandFailed(found.reason), {})
        given: dict[str, object] = {}
        if isinstance(found.value, dict) and "id" in found.value:
            given["id"] = found.value["id"]
        try:
            command = self._command(found.value, given)
        except CommandFailed as error:
            return messages.failure(error, given)
        if command.name == NEGOTIATE:
            self.phase = Phase.COMMANDS
            return messages.success({}, given)
        return command

    def _command(self, value: object, given: dict[str, object]) -> Command:
        name, arguments = _members(value)
        if self.phase is Phase.NEGOTIATING and name != NEGOTIATE:
            raise CommandFailed(f"Expecting capabilities negotiation with '{NEGOTIATE}'", "CommandNotFound")
        if self.phase is Phase.COMMANDS and name == NEGOTIATE:
            check(self._commands[name], arguments)
            raise CommandFailed("Capabilities negotiation is already complete, command ignored", "CommandNotFound")
        if name not in self._commands:
            raise CommandFailed(f"The command {name} has not been found", "CommandNotFound")
        return Command(name, check(self._commands[name], arguments), given)

    def reply(self, command: Command, value: object) -> bytes:
        """The answer to ``command``, which was carried out."""
        return messages.success(value, command.given)

    def fail(self, command: Command, error: CommandFailed) -> bytes:
        """The answer to ``command``, which was not."""
        return messages.failure(error, command.given)

    def event(self, name: str, data: dict[str, object], wall_ns: int) -> bytes:
        """An event for this client; empty before the negotiation."""
        return messages.event(name, data, wall_ns) if self.phase is Phase.COMMANDS else b""


def _members(value: object) -> tuple[str, dict[str, object]]:
    """The name and the arguments of a command.

    :raise CommandFailed: when ``value`` is none.
    """
    if not isinstance(value, dict):
        raise CommandFailed("QMP input must be a JSON object")
    name: object = None
    arguments: object = {}
    for member, content in value.items():
        if member not in _MEMBERS:
            raise CommandFailed(f"QMP input member '{member}' is unexpected")
        if member == "execute":
            name = content
            if not isinstance(content, str):
                raise CommandFailed("QMP input member 'execute' must be a string")
        elif member == "arguments":
            arguments = content
            if not isinstance(content, dict):
                raise CommandFailed("QMP input member 'arguments' must be an object")
    if name is None:
        raise CommandFailed("QMP input lacks member 'execute'")
    assert isinstance(name, str) and isinstance(arguments, dict), "looked at above"
    return name, arguments
