"""QMP's commands around migration: its capabilities, its parameters, and asking for one."""

from __future__ import annotations

from typing import cast

from protocols.monitor.commands import MIGRATION_CAPABILITIES, MIGRATION_PARAMETERS
from protocols.monitor.messages import CommandFailed


class MigrationCommands:
    """What was set is kept for the next migration."""

    def __init__(self) -> None:
        self.capabilities = dict.fromkeys(MIGRATION_CAPABILITIES, False)
        self.parameters: dict[str, int] = dict(MIGRATION_PARAMETERS)

    def migrate(self, arguments: dict[str, object]) -> object:
        """:raise CommandFailed: always, in this version."""
        if "uri" not in arguments and "channels" not in arguments:
            raise CommandFailed("need either 'uri' or 'channels' argument")
        raise CommandFailed("Migration is not supported by this machine")

    def incoming(self, arguments: dict[str, object]) -> object:
        """:raise CommandFailed: nobody waits for a migration."""
        raise CommandFailed("'-incoming' was not specified on the command line")

    def cancel(self, arguments: dict[str, object]) -> object:
        """Harmless when none is under way."""
        return {}

    def status(self, arguments: dict[str, object]) -> object:
        """Of the last migration; empty when there was none."""
        return {}

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
