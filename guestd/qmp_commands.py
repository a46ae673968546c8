"""Who carries out the commands of :data:`protocols.monitor.commands.COMMANDS`, for QMP and for the control socket."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Final

from guestd.config import ANONYMOUS
from guestd.device_options import device_config
from guestd.hmp import HumanMonitor
from guestd.operations import Operations, RunState
from guestd.qmp_migration import MigrationCommands
from guestd.qmp_pci import query_pci
from guestd.qmp_qom import list_types, qom_get, qom_list
from protocols.monitor.commands import COMMANDS
from protocols.monitor.messages import CommandFailed, version_document
from protocols.monitor.schema import check
from vfio_model.errors import ConfigError, InternalGuestError, VfioModelError
from vfio_model.trace import NULL_TRACE, Trace

Arguments = dict[str, object]
Handler = Callable[[Arguments], object]
LINGER_NS: Final = 50_000_000
"""Between the answer to ``quit`` and the end: a client (qmp-shell) that sees the socket close before it has finished
with the answer takes it for a crash.
"""


class MonitorCommands:
    """One handler for each command; ``version`` is this program's."""

    def __init__(self, operations: Operations, version: str, trace: Trace = NULL_TRACE) -> None:
        self.operations, self.version = operations, version
        self.migration = MigrationCommands(operations, trace)
        self._guest = operations.guest
        self._human = HumanMonitor(operations, self.run, self._device_add_text, version)
        self._anonymous = itertools.count(sum(name.startswith(ANONYMOUS) for name in self._guest.devices))
        migration = self.migration
        self.handlers: dict[str, Handler] = {
            "query-version": lambda _: version_document(version),
            "query-commands": lambda _: [{"name": name} for name in COMMANDS],
            "query-status": self._status,
            "query-name": lambda _: {"name": name} if (name := self._guest.config.name) else {},
            "query-uuid": lambda _: {"UUID": self._guest.config.uuid},
            "query-target": lambda _: {"arch": self._guest.board.ARCH},
            "query-kvm": lambda _: dict.fromkeys(("enabled", "present"), self._guest.board.kvm),
            "query-cpus-fast": lambda _: [],  # the machine has none
            "query-pci": lambda _: query_pci(self._guest),
            "qom-list-types": self._list_types,
            "qom-list": lambda given: qom_list(self._guest, str(given["path"])),
            "qom-get": lambda given: qom_get(self._guest, str(given["path"]), str(given["property"])),
            "device_add": lambda given: self._device_add(given, text=False),
            "device_del": self._device_del,
            "stop": self._stop,
            "cont": self._cont,
            "system_reset": self._reset,
            "system_powerdown": self._powerdown,
            "quit": self._quit,
            "getfd": migration.descriptors.getfd,
            "closefd": migration.descriptors.closefd,
            "migrate": migration.migrate,
            "migrate-incoming": migration.incoming,
            "migrate_cancel": migration.cancel,
            "query-migrate": migration.status,
            "migrate-set-capabilities": migration.set_capabilities,
            "query-migrate-capabilities": migration.query_capabilities,
            "migrate-set-parameters": migration.set_parameters,
            "query-migrate-parameters": migration.query_parameters,
            "human-monitor-command": self._human_command,
        }

    def run(self, name: str, arguments: Arguments) -> object:
        """What ``name`` returns, with checked arguments.

        :raise CommandFailed: when it cannot be carried out.
        """
        return self._guarded(lambda: self.handlers[name](arguments))

    def _guarded(self, call: Callable[[], object]) -> object:
        try:
            return call()
        except CommandFailed:
            raise
        except InternalGuestError as error:
            self.operations.fail(error)
            raise CommandFailed(str(error)) from error
        except (VfioModelError, OSError, OverflowError, MemoryError) as error:
            raise CommandFailed(str(error)) from error

    def ask(self, name: str, arguments: Arguments) -> object:
        """As :meth:`run`, for who has not looked at the table."""
        if name not in self.handlers:
            raise CommandFailed(f"The command {name} has not been found", "CommandNotFound")
        return self.run(name, check(COMMANDS[name], arguments))

    def human(self, line: str) -> str:
        """What a person's ``line`` answers, with line ends as a terminal wants them."""
        return self._human.run(line)

    def _human_command(self, given: Arguments) -> object:
        if given.get("cpu-index", 0) != 0:
            raise CommandFailed("Parameter 'cpu-index' expects a CPU number")
        return self.human(str(given["command-line"]))

    def _status(self, _: Arguments) -> object:
        return {"status": str(self.operations.state), "running": self.operations.running}

    def _list_types(self, given: Arguments) -> object:
        implements = given.get("implements")
        return list_types(self._guest, None if implements is None else str(implements), bool(given.get("abstract")))

    # -- what changes something ----------------------------------------------------------------------------------

    def _device_add_text(self, given: Arguments, *, text: bool) -> object:
        return self._guarded(lambda: self._device_add(given, text=text))

    def _device_add(self, given: Arguments, *, text: bool) -> object:
        guest = self._guest
        guest.board.check_plug(given, guest.devices)
        name = f"{ANONYMOUS}{next(self._anonymous)}]"
        config = device_config(
            given, guest.board.places(guest.devices), guest.devices, anonymous=name, text=text, plugged=True
        )
        self.operations.add_device(config)
        return {}

    def _device_del(self, given: Arguments) -> object:
        self._guest.board.check_own(str(given["id"]))
        try:
            name = self.operations.find_device(str(given["id"]))
        except ConfigError:
            raise CommandFailed(f"Device '{given['id']}' not found", "DeviceNotFound") from None
        self.operations.remove_device(name)
        return {}

    def _stop(self, _: Arguments) -> object:
        self.operations.stop()
        return {}

    def _cont(self, _: Arguments) -> object:
        if self.operations.state is RunState.INTERNAL_ERROR:
            raise CommandFailed("Resetting the Virtual Machine is required")
        self.operations.cont()
        return {}

    def _reset(self, _: Arguments) -> object:
        self.operations.reset()
        return {}

    def _powerdown(self, _: Arguments) -> object:
        self.operations.powerdown()
        return {}

    def _quit(self, _: Arguments) -> object:
        self.operations.quit(linger_ns=LINGER_NS)
        return {}
