"""The monitor for a person (HMP): lines of words, text back. Its commands are QMP's; ``info`` prints what QMP returns
as objects, and more (``windows``, ``iommu`` and ``locked_vm`` are this project's own).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Final, Protocol

from guestd import hmp_info, hmp_mtree
from guestd.operations import Operations
from guestd.option_syntax import size
from protocols.monitor.commands import MIGRATION_CAPABILITIES, MIGRATION_PARAMETERS
from protocols.monitor.messages import QEMU_VERSION, CommandFailed
from vfio_model.errors import ConfigError

PROMPT: Final = b"(qemu) "
_STATES: Final = {"running": "running", "inmigrate": "paused (inmigrate)", "internal-error": "paused (internal-error)"}


class Qmp(Protocol):
    """Carries out a QMP command. :raise CommandFailed: when it cannot be."""

    def __call__(self, name: str, arguments: dict[str, object]) -> object: ...


class DeviceAdd(Protocol):
    """``device_add`` with values as words."""

    def __call__(self, given: dict[str, object], *, text: bool) -> object: ...


Info = Callable[[list[str]], list[str]]


def banner(version: str) -> bytes:
    """What a person reads first; ``version`` of this program."""
    return f"QEMU {_number()} monitor (vfio-model {version}) - type 'help' for more information\r\n".encode() + PROMPT


def _number() -> str:
    return ".".join(str(part) for part in QEMU_VERSION.values())


class _Wrong(Exception):
    """The line cannot be understood: what a person is told."""


class HumanMonitor:
    """Runs lines. ``qmp`` carries out what both monitors know."""

    def __init__(self, operations: Operations, qmp: Qmp, device_add: DeviceAdd, version: str) -> None:
        self._operations, self._qmp, self._version = operations, qmp, version
        guest, self._device_add = operations.guest, device_add
        self._info: dict[str, tuple[Info, str, str]] = {
            "locked_vm": (lambda _: hmp_info.locked_vm(guest, operations.loop), "", "show the memory the host locked"),
            "migrate": (lambda _: self._migrate(), "", "show migration status"),
            "mtree": (self._mtree, "-f", "show memory tree (-f: dump flat view for address spaces)"),
            "name": (lambda _: [guest.config.name], "", "show the current VM name"),
            "pci": (lambda _: hmp_info.pci(guest), "", "show PCI info"),
            "qtree": (lambda _: hmp_info.qtree(guest), "", "show device tree"),
            "status": (lambda _: [self._status()], "", "show the current VM status (running|paused)"),
            "uuid": (lambda _: [guest.config.uuid], "", "show the current VM UUID"),
            "version": (lambda _: [f"{_number()}vfio-model {version}"], "", "show the version of QEMU"),
        }
        self._info |= {subject: (_unasked(lines), "", what) for subject, (lines, what) in guest.board.info().items()}
        self._commands: dict[str, tuple[Callable[[list[str]], list[str]], str, str]] = {
            "cont": (self._plain("cont"), "", "resume emulation"),
            "device_add": (self._add, "driver[,prop=value][,...]", "add device, like -device on the command line"),
            "device_del": (self._delete, "device", "remove device"),
            "help": (self._help, "[cmd]", "show the help"),
            "info": (self._about, "[subcommand]", "show various information about the system state"),
            "migrate": (self._migrate_to, "uri", "migrate to URI"),
            "migrate_cancel": (self._plain("migrate_cancel"), "", "cancel the current VM migration"),
            "migrate_incoming": (self._migrate_from, "uri", "continue an incoming migration from an -incoming defer"),
            "migrate_set_capability": (self._capability, "capability state", "enable/disable a migration capability"),
            "migrate_set_parameter": (self._parameter, "parameter value", "set a parameter of migration"),
            "quit": (self._plain("quit"), "", "quit the emulator"),
            "stop": (self._plain("stop"), "", "stop emulation"),
            "system_powerdown": (self._plain("system_powerdown"), "", "send system power down event"),
            "system_reset": (self._plain("system_reset"), "", "reset the system"),
        }
        self._short = {"c": "cont", "q": "quit", "s": "stop", "?": "help"}

    def run(self, line: str) -> str:
        """What ``line`` answers, with line ends as a terminal wants them."""
        try:
            lines = self._run(line)
        except _Wrong as error:
            lines = [str(error)]
        except CommandFailed as error:
            lines = [f"Error: {error.reason}"]
        return "".join(f"{each}\r\n" for each in lines)

    def _run(self, line: str) -> list[str]:
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise _Wrong(f"{line.strip()[:80]}: {error}") from None
        if not words:
            return []
        name = self._short.get(words[0], words[0])
        if name not in self._commands:
            raise _Wrong(f"unknown command: '{words[0]}'")
        command, takes, _ = self._commands[name]
        if len(words) > 1 and not takes:
            raise _extraneous(name, name)
        return command(words[1:])

    def _plain(self, name: str) -> Callable[[list[str]], list[str]]:
        def run(_: list[str]) -> list[str]:
            self._qmp(name, {})
            return []

        return run

    # -- commands ------------------------------------------------------------------------------------------------

    def _help(self, words: list[str]) -> list[str]:
        if words[:1] == ["info"]:
            return self._list_info()
        return [f"{name} {takes} -- {what}" for name, (_, takes, what) in self._commands.items()]

    def _list_info(self) -> list[str]:
        return [f"info {name} {takes} -- {what}" for name, (_, takes, what) in sorted(self._info.items())]

    def _about(self, words: list[str]) -> list[str]:
        if not words:
            return self._list_info()
        subject, *rest = words
        if subject not in self._info:
            raise _Wrong(f"unknown command: 'info {subject}'")
        show, takes, _ = self._info[subject]
        for word in rest:
            if word.startswith("-") and word != takes:
                raise _Wrong(f'{subject}: unsupported option {word}\r\nTry "help info {subject}" for more information')
            if not word.startswith("-"):
                raise _extraneous(subject, f"info {subject}")
        return show(rest)

    def _add(self, words: list[str]) -> list[str]:
        driver, *options = ",".join(words).split(",")
        given: dict[str, object] = {"driver": driver}
        for option in options:
            name, _, value = option.partition("=")
            given[name] = value
        self._device_add(given, text=True)
        return []

    def _delete(self, words: list[str]) -> list[str]:
        if len(words) != 1:
            raise _Wrong('device_del: string expected\r\nTry "help device_del" for more information')
        self._qmp("device_del", {"id": words[0]})
        return []

    def _migrate_to(self, words: list[str]) -> list[str]:
        self._qmp("migrate", {"uri": words[-1]} if words else {})
        return []

    def _migrate_from(self, words: list[str]) -> list[str]:
        self._qmp("migrate-incoming", {"uri": words[-1]} if words else {})
        return []

    def _capability(self, words: list[str]) -> list[str]:
        name, state = _two("migrate_set_capability", words)
        if name not in MIGRATION_CAPABILITIES:
            raise CommandFailed(f"Parameter 'capability' does not accept value '{name}'")
        if state not in ("on", "off"):
            raise _Wrong(f"migrate_set_capability: expected 'on' or 'off', not '{state}'")
        self._qmp("migrate-set-capabilities", {"capabilities": [{"capability": name, "state": state == "on"}]})
        return []

    def _parameter(self, words: list[str]) -> list[str]:
        """A bandwidth without a suffix is in MiB a second, as QEMU has it."""
        name, value = _two("migrate_set_parameter", words)
        if name not in MIGRATION_PARAMETERS:
            raise CommandFailed(f"Parameter 'parameter' does not accept value '{name}'")
        try:
            number = size(name, value, shift=20 if name == "max-bandwidth" else 0)
        except ConfigError as error:
            raise CommandFailed(str(error)) from error
        self._qmp("migrate-set-parameters", {name: number})
        return []

    # -- info ----------------------------------------------------------------------------------------------------

    def _status(self) -> str:
        state = str(self._operations.state)
        return f"VM status: {_STATES.get(state, 'paused' if state == 'paused' else f'paused ({state})')}"

    def _mtree(self, words: list[str]) -> list[str]:
        guest = self._operations.guest
        return hmp_mtree.flat(guest) if "-f" in words else hmp_mtree.mtree(guest)

    def _migrate(self) -> list[str]:
        status = self._qmp("query-migrate", {})
        assert isinstance(status, dict), "an object"
        return [f"{name}: {value}" for name, value in status.items()]


def _unasked(lines: Callable[[], list[str]]) -> Info:
    return lambda _: lines()


def _two(command: str, words: list[str]) -> tuple[str, str]:
    if len(words) != 2:
        raise _Wrong(f'{command}: two words expected\r\nTry "help {command}" for more information')
    return words[0], words[1]


def _extraneous(name: str, topic: str) -> _Wrong:
    return _Wrong(f'{name}: extraneous characters at the end of line\r\nTry "help {topic}" for more information')
