"""QMP's commands around migration: its capabilities, its parameters, and asking for one."""

from __future__ import annotations

from typing import cast

from guestd.descriptors import Descriptors
from guestd.migration_source import Connect, Outgoing
from guestd.migration_target import Incoming
from guestd.operations import Operations, RunState
from protocols.monitor.commands import MIGRATION_CAPABILITIES, MIGRATION_PARAMETERS
from protocols.monitor.messages import CommandFailed
from protocols.transport.unix import ByteConnection
from protocols.transport.uri import GivenSocket, Listener, connect, listen, parse
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.trace import NULL_TRACE, Trace


class MigrationCommands:
    """What was set is kept for the next migration. There is one at a time, and what became of the last one is kept."""

    def __init__(self, operations: Operations, trace: Trace = NULL_TRACE) -> None:
        self._operations, self._trace = operations, trace
        self.capabilities = dict.fromkeys(MIGRATION_CAPABILITIES, False)
        self.parameters: dict[str, int] = dict(MIGRATION_PARAMETERS)
        self._outgoing: Outgoing | None = None
        self._incoming: Incoming | None = None
        self._deferred = False
        self.descriptors = Descriptors()
        operations.migrating = lambda: self._outgoing is not None and self._outgoing.progress.under_way

    def expect(self, uri: str) -> None:
        """``-incoming``: wait for a machine there, or with ``defer`` for who says where.

        :raise ConfigError, VMStateError: it cannot come.
        """
        if uri == "defer":
            self._deferred = True
        else:
            self._incoming = Incoming(self._operations, self, self._trace, lambda: self._listen(uri))

    def migrate(self, arguments: dict[str, object]) -> object:
        """Begin, and return.

        :raise CommandFailed: another one is under way, or this machine cannot be migrated.
        """
        uri = _uri(arguments)
        state = self._operations.state
        if self._operations.migrating():
            raise CommandFailed("There's a migration process in progress")
        if state is RunState.INMIGRATE:
            raise CommandFailed("Guest is waiting for an incoming migration")
        if state is RunState.POSTMIGRATE:
            raise CommandFailed("Can't migrate the vm that was paused due to previous migration")
        self._operations.check()
        attempt = Outgoing(self._operations, self, self._trace, self._to(uri))
        attempt.start()
        self._outgoing, self._incoming = attempt, None
        return {}

    def incoming(self, arguments: dict[str, object]) -> object:
        """Say where the machine that was deferred comes from.

        :raise CommandFailed: nobody waits for a migration.
        """
        if not self._deferred:
            known = self._incoming is not None
            what = "The incoming migration has already been started"
            raise CommandFailed(what if known else "'-incoming' was not specified on the command line")
        uri, exits = str(arguments.get("uri", "")), bool(arguments.get("exit-on-error", True))
        self._incoming = Incoming(self._operations, self, self._trace, lambda: self._listen(uri), exit_on_error=exits)
        self._deferred = False
        return {}

    def _to(self, uri: str) -> Connect:
        """How to connect there. :raise ConfigError: ``uri`` is none, or there is no such descriptor."""
        where, name = parse(uri), "the destination"
        if where.kind == "fd":
            given = ByteConnection(self.descriptors.take(where.where), name)
            return lambda: given

        def begin() -> ByteConnection:
            try:
                return connect(where, name)
            except PeerLost as error:
                why = error.doing.rpartition(": ")[2]
                raise ConfigError(f"Failed to connect to '{uri}': {why}") from error

        return begin

    def _listen(self, uri: str) -> Listener:
        """:raise ConfigError: ``uri`` is none, or one cannot listen there."""
        where = parse(uri)
        return GivenSocket(self.descriptors.take(where.where)) if where.kind == "fd" else listen(where)

    def cancel(self, arguments: dict[str, object]) -> object:
        """Harmless when none is under way."""
        if self._outgoing is not None:
            self._outgoing.cancel()
        return {}

    def status(self, arguments: dict[str, object]) -> object:
        """Of the last migration; empty when there was none."""
        last = self._outgoing or self._incoming
        return {} if last is None else last.info()

    def close(self) -> None:
        """End what is under way. Harmless twice."""
        self.cancel({})
        if self._incoming is not None:
            self._incoming.close()
        self.descriptors.close()

    def set_capabilities(self, arguments: dict[str, object]) -> object:
        """Switch each that is named."""
        for each in cast("list[dict[str, object]]", arguments["capabilities"]):
            self.capabilities[str(each["capability"])] = bool(each["state"])
        return {}

    def query_capabilities(self, arguments: dict[str, object]) -> object:
        """All of them."""
        return [{"capability": name, "state": state} for name, state in self.capabilities.items()]

    def set_parameters(self, arguments: dict[str, object]) -> object:
        """Set each that is given."""
        self.parameters |= cast("dict[str, int]", arguments)
        return {}

    def query_parameters(self, arguments: dict[str, object]) -> object:
        """All of them."""
        return dict(self.parameters)


def _uri(arguments: dict[str, object]) -> str:
    """:raise CommandFailed: neither a URI nor the one channel that there may be."""
    if "uri" in arguments:
        return str(arguments["uri"])
    for channel in cast("list[dict[str, object]]", arguments.get("channels", [])):
        address = channel.get("addr")
        if isinstance(address, dict) and address.get("transport") == "socket":
            if address.get("type") == "unix":
                return f"unix:{address.get('path')}"
            if address.get("type") == "inet":
                return f"tcp:{address.get('host')}:{address.get('port')}"
            if address.get("type") == "fd":
                return f"fd:{address.get('str')}"
    raise CommandFailed("need either 'uri' or 'channels' argument")
