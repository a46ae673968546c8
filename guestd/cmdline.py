"""QEMU's command line, as far as these machines go, as a :class:`~guestd.config.GuestConfig`. What is a pseries' or a
q35's own is read by :mod:`.cmdline_pseries` and :mod:`.cmdline_q35`.

Options are QEMU's, with one dash or two, in its syntax and with its messages (``qemu-options.hx``). What has no meaning
without a CPU or a screen (``-cpu``, ``-vga``, …) is accepted and has none; what is not known at all is an error. Not
QEMU's:

``-runtime-dir DIR``
    where sockets, lock and event log live; with a host for assigned devices it is the host's (``hostd --dir``).
``-host-dir DIR``
    the host's directory, where it is another: a second guest of the same host has a runtime directory of its own.
``-machine ddw=, pgsz=, dma_win_addr=, dma_win_size=, dma64_win_addr=``
    of a pseries: properties of every PHB, as ``-global spapr-pci-host-bridge.ddw=off`` gives them in QEMU too.
``-machine multitce=, kvm-tce=, quirks=``
    the hypercalls for many TCEs; TCE tables that live with the host; differences from QEMU to give up (names with
    ``+`` between them).
``-device intel-iommu,quirks=,nested=,invalidation=``
    what the unit does as QEMU does and not as the specification says; nested translation; when its queue waits.
``-device vfio-pci,group=N``
    the IOMMU group, which QEMU finds in sysfs.
``-device vfio-user-pci,socket=PATH,dma=shared|mapped|message,reconnect-ms=MS``
    a remote device; it gets guest RAM mapped when the machine's memory backend is shared.
``-device NAME,drive=…,netdev=…``
    besides names of ``-drive``, ``-blockdev``, ``-netdev`` what ``vfio_model.backends.opening`` knows: ``mem:64M``.

Guest RAM is always a sealed memfd. What a memory backend says about pages is what the host is told of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from guestd import cmdline_devices as devices
from guestd.cmdline_backends import BackendNames
from guestd.cmdline_devices import Globals, MachineWords
from guestd.cmdline_help import ACCELERATORS, OPTIONS, HelpWanted, topic
from guestd.cmdline_inert import READERS, hotplug_memory, smp
from guestd.cmdline_pseries import PseriesWords
from guestd.cmdline_q35 import Q35Words
from guestd.config import GuestConfig, MonitorConfig, QtestConfig
from guestd.option_syntax import identifier, only, options, size, split, switch
from guestd.text_trace import read_patterns
from protocols.transport import uri as migration_uri
from vfio_model.errors import ConfigError

DEFAULT_RAM: Final = 512 << 20
_MEBI: Final = 20
_SOCKET: Final = frozenset(("path", "server", "wait", "nodelay", "reconnect", "reconnect-ms", "mux", "logfile"))
ARCHES: Final[dict[str, type[MachineWords]]] = {kind.ARCH: kind for kind in (PseriesWords, Q35Words)}
"""What a binary's name ends in, and what it reads."""
_ONE_RAM: Final = "Machine memory size does not match the size of the memory backend"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A socket chardev: to connect to, or to listen on. Without a path: ``null``."""

    path: str
    server: bool = False


@dataclass(frozen=True, slots=True)
class Invocation:
    """What a command line asks for."""

    config: GuestConfig
    directory: Path | None = None
    """None: one of its own."""
    realtime: bool = True
    patterns: tuple[str, ...] = ()
    log: str = ""
    warnings: tuple[str, ...] = ()
    exit_with_parent: bool = False


@dataclass
class _Seen:
    """What the options so far said."""

    machine: dict[str, object] = field(default_factory=dict)
    ram: int = 0
    backends: dict[str, devices.MemoryBackend] = field(default_factory=dict)
    devices: list[devices.DeviceWords] = field(default_factory=list)
    globals: Globals = field(default_factory=Globals)
    names: BackendNames = field(default_factory=BackendNames)
    chardevs: dict[str, Endpoint] = field(default_factory=dict)
    monitors: list[tuple[str, str, str]] = field(default_factory=list)
    """(option, chardev, mode)"""
    accelerator: str = ""
    qtest: str = ""
    qtest_log: str = ""
    patterns: list[str] = field(default_factory=list)
    log: str = ""
    directory: str = ""
    host: str = ""
    name: str = ""
    uuid: str = ""
    incoming: str = ""
    exit_with_parent: bool = False
    paused: bool = False


def parse(words: Sequence[str], arch: str = PseriesWords.ARCH) -> Invocation:
    """What ``words``, the command line without the program, ask of the binary for ``arch``, one of :data:`ARCHES`.

    :raise ConfigError: for what QEMU would refuse, too. :raise HelpWanted: they ask for help.
    """
    reader = _Reader(ARCHES[arch]())
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name = word[2:] if word.startswith("--") else word[1:]
        if not word.startswith("-") or word == "-":
            raise ConfigError(f"Could not open '{word}': this machine has no disks", where=word)
        if name not in OPTIONS:
            raise ConfigError("invalid option", where=word)
        value = ""
        if OPTIONS[name].argument:
            if not rest:
                raise ConfigError("requires an argument", where=word)
            value = rest.pop(0)
        with_value = f"{word} {value}".strip()
        _named(with_value, lambda name=name, value=value: reader.take(name, value))  # type: ignore[misc]
    return reader.finish()


def _named(where: str, act: Callable[[], None]) -> None:
    """Run ``act``; errors say ``where``."""
    try:
        act()
    except (ConfigError, ValueError, msgspec.ValidationError) as error:
        if isinstance(error, ConfigError) and error.where:
            raise
        raise ConfigError(str(error), where=where) from error


class _Reader:
    """One handler for each option that has a meaning."""

    def __init__(self, machine: MachineWords) -> None:
        self._words = machine
        self.seen = _Seen()
        seen = self.seen
        seen.globals.check = machine.check_global
        self._handlers: dict[str, Callable[[str], None]] = {
            "machine": self._machine,
            "accel": self._accel,
            "m": self._memory,
            "object": self._object,
            "device": self._device,
            "global": seen.globals.add,
            "netdev": seen.names.netdev,
            "drive": seen.names.drive,
            "blockdev": seen.names.blockdev,
            "chardev": self._chardev,
            "mon": self._mon,
            "monitor": lambda value: self._monitor("monitor", value, "readline"),
            "qmp": lambda value: self._monitor("qmp", value, "control"),
            "qtest": self._qtest,
            "trace": self._trace,
            "name": self._name,
            "uuid": self._uuid,
            "S": lambda _: setattr(seen, "paused", True),
            "incoming": self._incoming,
            "run-with": self._run_with,
            "display": lambda value: _one_of("type", value, ("none",)),
            "vga": lambda value: _one_of("vga", value, ("none", "std", "cirrus")),
            "serial": _silent,
            "parallel": _silent,
            "net": _no_network,
            "nic": _no_network,
            "smp": lambda value: smp(value, machine.CPUS_OF),
            **READERS,
        }
        for option, name in (
            ("qtest-log", "qtest_log"),
            ("D", "log"),
            ("runtime-dir", "directory"),
            ("host-dir", "host"),
        ):
            self._handlers[option] = lambda value, name=name: setattr(seen, name, value)  # type: ignore[misc]

    def take(self, name: str, value: str) -> None:
        """One option. :raise ConfigError: without saying which."""
        name = OPTIONS[name].same_as or name
        text = topic(name, value, self._words)
        if text is not None:
            raise HelpWanted(text)
        handler = self._handlers.get(name)
        if handler is not None:
            handler(value)

    # -- machine -------------------------------------------------------------------------------------------------

    def _machine(self, value: str) -> None:
        given = options(value, "type")
        if "accel" in given:
            self._accel(str(given.pop("accel")))
        self.seen.machine |= given

    def _memory(self, value: str) -> None:
        given = split(value, "size")
        only(given, ("size", "slots", "maxmem"))
        if "size" in given:
            self.seen.ram = size("size", given["size"], shift=_MEBI)
        hotplug_memory(self.seen.ram or DEFAULT_RAM, given)

    def _accel(self, value: str) -> None:
        for name in split(value, "accel").get("accel", "").split(":"):
            if name not in ACCELERATORS:
                raise ConfigError(f"invalid accelerator {name}")
            self.seen.accelerator = self.seen.accelerator or name

    def _object(self, value: str) -> None:
        given = options(value, "qom-type")
        kind = given.get("qom-type")
        if kind in ("monitor-qmp", "monitor-hmp"):
            only(given, ("qom-type", "id", "chardev", "pretty"))
            mode = "control" if kind == "monitor-qmp" else "readline"
            self.seen.monitors.append((f"-object {value}", str(given.get("chardev", "")), mode))
            return
        backend = devices.memory_backend(given)
        if backend.id in self.seen.backends:
            raise ConfigError(f"attempt to add duplicate property '{backend.id}' to object (type 'container')")
        self.seen.backends[backend.id] = backend

    def _device(self, value: str) -> None:
        given = options(value, "driver")
        text = not value.startswith("{")
        if "id" in given:
            name = identifier(given["id"])
            if any(words.options.get("id") == name for words in self.seen.devices):
                raise ConfigError(f"Duplicate ID '{name}' for device" if text else f"Duplicate device ID '{name}'")
        self.seen.devices.append(devices.DeviceWords(given, text, f"-device {value}"))

    # -- sockets -------------------------------------------------------------------------------------------------

    def _chardev(self, value: str) -> None:
        given = split(value, "backend")
        kind = given.pop("backend", "")
        name = given.pop("id", "")
        if not name:
            raise ConfigError("chardev: no id specified")
        if identifier(name) in self.seen.chardevs:
            raise ConfigError(f"Duplicate ID '{name}' for chardev")
        if kind == "null":
            only(given, ("mux", "logfile", "logappend"))
            self.seen.chardevs[name] = Endpoint("")
        elif kind == "socket":
            self.seen.chardevs[name] = _socket(given)
        else:
            raise ConfigError(f"'{kind}' is not a valid char driver name")

    def _mon(self, value: str) -> None:
        given = split(value, "chardev")
        only(given, ("chardev", "mode", "pretty", "default"))
        mode = given.get("mode", "readline")
        if mode not in ("control", "readline"):
            raise ConfigError(f'unknown monitor mode "{mode}"')
        self.seen.monitors.append((f"-mon {value}", given.get("chardev", ""), mode))

    def _monitor(self, option: str, value: str, mode: str) -> None:
        where = f"-{option} {value}"
        if value.startswith("chardev:"):
            self.seen.monitors.append((where, value.removeprefix("chardev:"), mode))
        elif value not in ("none", "null"):
            self.seen.chardevs[where] = endpoint(value)
            self.seen.monitors.append((where, where, mode))

    def _qtest(self, value: str) -> None:
        self.seen.qtest = value

    # -- the rest ------------------------------------------------------------------------------------------------

    def _trace(self, value: str) -> None:
        given = split(value, "enable")
        only(given, ("enable", "events", "file"))
        if "enable" in given:
            self.seen.patterns.append(given["enable"])
        if "events" in given:
            self.seen.patterns += read_patterns(given["events"])
        self.seen.log = given.get("file", self.seen.log)

    def _name(self, value: str) -> None:
        given = split(value, "guest")
        only(given, ("guest", "process", "debug-threads"))
        switch("debug-threads", given.get("debug-threads", "off"))
        self.seen.name = given.get("guest", "")

    def _uuid(self, value: str) -> None:
        try:
            self.seen.uuid = str(uuid.UUID(value))
        except ValueError:
            raise ConfigError("failed to parse UUID string: wrong format") from None

    def _run_with(self, value: str) -> None:
        given = split(value)
        only(given, ("exit-with-parent", "async-teardown"))
        for name, word in given.items():
            on = switch(name, word)
            if name == "exit-with-parent":
                self.seen.exit_with_parent = on

    def _incoming(self, value: str) -> None:
        if value != "defer":
            migration_uri.parse(value)
        self.seen.incoming = value

    # -- all together --------------------------------------------------------------------------------------------

    def finish(self) -> Invocation:
        """What came out.

        :raise ConfigError: for what cannot be together.
        """
        seen = self.seen
        given = dict(seen.machine)
        backend = self._backend(given.pop("memory-backend", None))
        self._configure(given, backend)
        plugged = devices.plug_all(seen.devices, self._words, seen.globals, seen.names, shared=backend.share)
        config = GuestConfig(
            machine=self._words.config(),
            devices=plugged,
            drives=seen.names.drives,
            netdevs=seen.names.netdevs,
            uplinks=seen.names.uplinks,
            notifier="inline" if not seen.directory else "process",
            name=seen.name,
            monitors=self._monitors(),
            qtest=self._qtest_config(),
            paused=seen.paused,
            incoming=seen.incoming,
            host_dir=seen.host,
        )
        if seen.uuid:
            config.uuid = seen.uuid
        steps = config.qtest is not None or seen.accelerator == "qtest"
        directory = Path(seen.directory) if seen.directory else None
        warnings = (*seen.globals.warnings(self._words.OWN), *seen.names.warnings(plugged))
        return Invocation(config, directory, not steps, tuple(seen.patterns), seen.log, warnings, seen.exit_with_parent)

    def _backend(self, name: object) -> devices.MemoryBackend:
        if name is None:
            return devices.MemoryBackend("")
        if name not in self.seen.backends:
            raise ConfigError(f"Memory backend '{name}' not found")
        return self.seen.backends[str(name)]

    def _configure(self, given: dict[str, object], backend: devices.MemoryBackend) -> None:
        kind = str(given.pop("type", next(iter(self._words.MACHINES))))
        ram: dict[str, object] = {"ram": self._ram(backend)}
        if backend.page_size:
            ram["page_size"] = backend.page_size
        asked = devices.MachineAsked(kind, given, ram)
        self._words.configure(asked, self.seen.devices, self.seen.globals)

    def _ram(self, backend: devices.MemoryBackend) -> int:
        asked = self.seen.ram
        if backend.size and asked not in (0, backend.size):
            raise ConfigError(_ONE_RAM)
        return backend.size or asked or DEFAULT_RAM

    def _monitors(self) -> list[MonitorConfig]:
        found = []
        for where, name, mode in self.seen.monitors:
            chardev = self.seen.chardevs.get(name)
            if chardev is None:
                raise ConfigError(f'chardev "{name}" not found', where=where)
            if chardev.path:
                readline = mode == "readline"
                kind = MonitorConfig(path=chardev.path, server=chardev.server)
                found.append(msgspec.structs.replace(kind, mode="readline") if readline else kind)
        return found

    def _qtest_config(self) -> QtestConfig | None:
        value = self.seen.qtest
        if not value or value == "none":
            return None
        if value.startswith("chardev:"):
            chardev = self.seen.chardevs.get(value.removeprefix("chardev:"))
            if chardev is None:
                raise ConfigError(f'chardev "{value}" not found', where=f"-qtest {value}")
        else:
            try:
                chardev = endpoint(value)
            except ConfigError as error:
                raise ConfigError(f'{error}\nFailed to initialize device for qtest: "{value}"') from error
        return QtestConfig(path=chardev.path, server=chardev.server, log=self.seen.qtest_log)


def endpoint(text: str) -> Endpoint:
    """``unix:PATH[,server=on][,wait=off]``.

    :raise ConfigError: for anything else.
    """
    kind, colon, rest = text.partition(":")
    if kind != "unix" or not colon:
        raise ConfigError(f"'{text}' is not a valid char driver")
    return _socket(split(rest, "path"))


def _socket(given: dict[str, str]) -> Endpoint:
    """Whether to ``wait`` for a client does not matter: nothing happens before somebody asks for it."""
    given = {("wait" if name == "nowait" else name): value for name, value in given.items()}
    only(given, _SOCKET)
    if not given.get("path"):
        raise ConfigError("chardev: socket: no path specified")
    return Endpoint(given["path"], switch("server", given.get("server", "off")))


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value.partition(",")[0] not in known:
        raise ConfigError(f"Parameter '{name}' does not accept value '{value}'")


def _silent(value: str) -> None:
    if value not in ("none", "null"):
        raise ConfigError(f"'{value}' is not a valid char driver")


def _no_network(value: str) -> None:
    if value.partition(",")[0] != "none":
        raise ConfigError(f"this machine has no network devices: '{value}'")
