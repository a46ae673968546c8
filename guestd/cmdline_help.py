"""The options of the command line, and what their ``help`` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from guestd.cmdline_devices import MachineWords
from guestd.device_options import ASSIGNED, REMOTE, drivers
from protocols.monitor.messages import QEMU_VERSION
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError

ACCELERATORS: Final = ("qtest", "tcg", "kvm")
_TYPES: Final = {int: "uint64", bool: "bool", str: "str"}
_MORE_DEVICES: Final = {
    ASSIGNED: ("group=<uint32>", "host=<str>             - Address (bus/device/function) of the host device"),
    REMOTE: ("dma=<str>              - shared/message", "socket=<str>           - of the device's server"),
}


class HelpWanted(Exception):
    """Not an error: ``text`` is to be printed, and that is all."""

    def __init__(self, text: str) -> None:
        self.text = text
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Option:
    """``argument`` is empty for a switch; ``same_as`` names the option that this is another name of."""

    argument: str = ""
    help: str = "accepted, without effect"
    same_as: str = ""


OPTIONS: Final[dict[str, Option]] = {
    "h": Option(help="this text", same_as="help"),
    "help": Option(help="this text"),
    "version": Option(help="the version"),
    "machine": Option("[type=]NAME[,PROP=VALUE…]", "the machine; NAME help lists them, NAME,help its properties"),
    "M": Option("NAME[,…]", "as -machine", "machine"),
    "accel": Option("NAME[,…]", "qtest: time only passes by steps"),
    "m": Option("[size=]MEGS[,slots=,maxmem=]", "size of guest RAM, in mebibytes or with a suffix"),
    "object": Option("TYPE,id=ID[,PROP=VALUE…]", "memory-backend-memfd|ram|file|shm, monitor-qmp|hmp"),
    "device": Option("DRIVER[,PROP=VALUE…]", "a device; help lists drivers, DRIVER,help properties"),
    "netdev": Option("TYPE,id=ID[,PROP=VALUE…]", "a network: dgram (UDP, AF_UNIX), socket,udp=, hubport"),
    "drive": Option("file=PATH,if=none,id=ID,format=raw[,readonly=on]", "a disk that is a file"),
    "blockdev": Option("[driver=]file|raw,node-name=ID[,PROP=VALUE…]", "the same, in parts"),
    "global": Option("DRIVER.PROP=VALUE", "a default for every device of that kind"),
    "qtest": Option("unix:PATH[,server=on] | chardev:ID", "connect to a test that drives the machine"),
    "qtest-log": Option("FILE | none", "what goes over it; stderr when not given"),
    "qmp": Option("unix:PATH[,server=on] | chardev:ID", "a QMP monitor"),
    "qmp-pretty": Option("unix:PATH[,server=on] | chardev:ID", "as -qmp", "qmp"),
    "monitor": Option("none | unix:PATH[,server=on]", "a monitor for people"),
    "chardev": Option("socket,id=ID,path=PATH[,server=on] | null,id=ID", "a socket by name"),
    "mon": Option("[chardev=]ID[,mode=control|readline]", "a monitor on a chardev"),
    "trace": Option("[[enable=]PATTERN][,events=FILE][,file=FILE]", "write events as lines of text"),
    "D": Option("FILE", "where they go; stderr when not given"),
    "name": Option("NAME", "of the guest"),
    "uuid": Option("UUID", "of the guest"),
    "S": Option(help="wait for 'cont' before time passes"),
    "incoming": Option("unix:PATH | tcp:HOST:PORT | fd:NUMBER | defer", "the machine comes from another one"),
    "run-with": Option("exit-with-parent=on|off[,async-teardown=on|off]", "on: end when the parent process does"),
    "runtime-dir": Option("DIR", "sockets, lock and event log; a host's own directory for assigned devices"),
    "host-dir": Option("DIR", "the host's directory, when the guest has one of its own"),
    "display": Option("none"),
    "vga": Option("none"),
    "serial": Option("none | null"),
    "parallel": Option("none | null"),
    "net": Option("none"),
    "nic": Option("none"),
    "cpu": Option("MODEL"),
    "smp": Option("N"),
    "rtc": Option("…"),
    "boot": Option("…"),
    "audio": Option("none"),
    "L": Option("DIR"),
    "sandbox": Option("…"),
    "msg": Option("…"),
    "nodefaults": Option(),
    "no-user-config": Option(),
    "nographic": Option(),
    "no-reboot": Option(),
    "no-shutdown": Option(),
}


def topic(option: str, value: str, machine: MachineWords) -> str | None:
    """The help that ``-option value`` asks for, or None, with what ``machine`` has of its own.

    :raise ConfigError: when it is about something unknown.
    """
    if option == "help":
        return _overview(machine.ARCH)
    if option == "version":
        number = ".".join(str(part) for part in QEMU_VERSION.values())
        return f"QEMU emulator version {number} (vfio-model: its options, qtest and QMP; no CPU)"
    words = value.split(",")
    if not {"help", "?"} & set(words):
        return None
    if option == "device":
        return _device(words[0].removeprefix("driver="), machine)
    if option == "machine":
        return _machine(words[0].removeprefix("type="), machine)
    if option == "accel":
        return "\n".join(["Accelerators supported in QEMU binary:", *ACCELERATORS])
    return f"-{option} {OPTIONS[option].argument}\n    {OPTIONS[option].help}"


def _overview(arch: str) -> str:
    lines = [f"usage: guestd-system-{arch} [options]", ""]
    for name, option in OPTIONS.items():
        lines.append(f"-{name} {option.argument}".rstrip())
        lines.append(f"                {option.help}")
    return "\n".join(lines)


def _device(driver: str, machine: MachineWords) -> str:
    own_names = [f'name "{name}"' for name in machine.DRIVERS]
    if driver in ("help", "?"):
        return "\n".join(["Controller/Bridge/Hub devices:", *own_names, "", "Misc devices:", *_pci_devices()])
    known = {**_MORE_DEVICES, **machine.DRIVERS}
    if driver in known:
        own = tuple(known[driver])
    elif driver in DEVICES:
        props = sorted(DEVICES[driver].PROPS.items())
        shown = ((f"{name}=<{_TYPES[prop.type]}>", prop) for name, prop in props)
        own = tuple(f"{name:<22} - {prop.doc} (default: {prop.default})" for name, prop in shown)
    else:
        raise ConfigError(f"Device '{driver}' not found")
    address = "addr=<str>             - Slot and optional function number, example: 06.0 or 06"
    common = () if driver in machine.OFF_PCI else (address,)
    return "\n".join([f"{driver} options:", *(f"  {line}" for line in sorted((*common, *own)))])


def _pci_devices() -> list[str]:
    return [f'name "{name}", bus PCI' for name in drivers()]


def _machine(name: str, machine: MachineWords) -> str:
    if name in ("help", "?"):
        return "\n".join(
            ["Supported machines are:", *(f"{kind:<20} {what}" for kind, what in machine.MACHINES.items())]
        )
    return "\n".join([f"{name} options:", *(f"  {line}" for line in machine.MACHINE_HELP)])
