"""Options of QEMU's command line that have no effect here, and are read all the same: what QEMU refuses is refused.

Source: ``qemu-options.hx``, and the answers of QEMU 11.1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final

from guestd.option_syntax import number, only, size, split, switch
from vfio_model.errors import ConfigError

MAX_CPUS: Final = 4096
_SMP: Final = frozenset(
    ("cpus", "maxcpus", "drawers", "books", "sockets", "dies", "clusters", "modules", "cores", "threads")
)
_BOOT: Final = frozenset(("order", "once", "menu", "splash", "splash-time", "reboot-timeout", "strict"))
_SANDBOX: Final = frozenset(("enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"))
_DATE: Final = re.compile(r"utc|localtime|\d{4}-\d{2}-\d{2}(T\d{2}:\d{2}:\d{2})?")
_INTEGER: Final = re.compile(r"-?(0x[0-9a-f]+|[0-9]+)", re.IGNORECASE)


def smp(value: str, machine: str) -> None:
    """``-smp`` of ``machine``. :raise ConfigError: no topology of 1 to 4096 CPUs."""
    given = split(value, "cpus")
    _expected("smp", given, _SMP)
    counts = {name: _integer(f"smp.{name}", text) for name, text in given.items()}
    if 0 in counts.values():
        raise ConfigError("Invalid CPU topology: CPU topology parameters must be greater than zero")
    for name in ("cpus", "maxcpus"):
        if not 0 < counts.get(name, 1) <= MAX_CPUS:
            what = f"Invalid SMP CPUs {counts[name]}. The max CPUs supported by machine '{machine}' is {MAX_CPUS}"
            raise ConfigError(what)
    if counts.get("maxcpus", MAX_CPUS) < counts.get("cpus", 1):
        raise ConfigError("Invalid CPU topology: maxcpus must be equal to or greater than smp")
    if min(counts.values(), default=1) < 0:
        raise ConfigError("Invalid CPU topology: CPU topology parameters must be greater than zero")


def hotplug_memory(ram: int, given: dict[str, str]) -> None:
    """``slots`` and ``maxmem`` of ``-m``; memory is not plugged here.

    :raise ConfigError: they are no room for more than ``ram`` bytes.
    """
    if "slots" in given and not _INTEGER.fullmatch(given["slots"]):
        raise ConfigError("Parameter 'slots' expects a number")
    if "maxmem" not in given:
        if "slots" in given:
            raise ConfigError("slots specified but no max-size")
        return
    most = size("maxmem", given["maxmem"])
    if most < ram:
        what = f"maximum memory size ({most:#x}) must be at least the initial memory size ({ram:#x})"
        raise ConfigError(f"invalid value of maxmem: {what}")
    slots = number("slots", given.get("slots", "0"))
    if most == ram and slots:
        what = f"memory slots were specified but maximum memory size ({most:#x}) is equal to the initial memory size"
        raise ConfigError(f"invalid value of maxmem: {what} ({ram:#x})")


def _rtc(value: str) -> None:
    given = split(value)
    only(given, ("base", "clock", "driftfix"))
    if not _DATE.fullmatch(given.get("base", "utc")):
        raise ConfigError("invalid datetime format\nvalid formats: '2006-06-17T16:01:21' or '2006-06-17'")
    if given.get("clock", "host") not in ("host", "rt", "vm"):
        raise ConfigError(f"invalid option value '{given['clock']}'")


def _boot(value: str) -> None:
    given = split(value, "order")
    _expected("boot", given, _BOOT)
    for name in ("order", "once"):
        wrong = re.search(r"[^a-p]", given.get(name, ""))
        if wrong:
            raise ConfigError(f"Invalid boot device '{wrong[0]}'")


def _audio(value: str) -> None:
    given = split(value, "driver")
    if "driver" not in given:
        raise ConfigError("Parameter 'driver' is missing")
    if given["driver"] != "none" or "model" in given:
        raise ConfigError(f"Parameter 'driver' does not accept value '{given['driver']}'")


def _msg(value: str) -> None:
    given = split(value)
    only(given, ("timestamp", "guest-name"))
    for name, word in given.items():
        switch(name, word)


def _sandbox(value: str) -> None:
    given = split(value, "enable")
    only(given, _SANDBOX)
    switch("enable", given.get("enable", "off"))


READERS: Final[dict[str, Callable[[str], None]]] = {
    "rtc": _rtc,
    "boot": _boot,
    "audio": _audio,
    "msg": _msg,
    "sandbox": _sandbox,
}
"""By option. :raise ConfigError: each does, for what QEMU would refuse."""


def _expected(option: str, given: Collection[str], known: Collection[str]) -> None:
    for name in given:
        if name not in known:
            raise ConfigError(f"Parameter '{option}.{name}' is unexpected")


def _integer(name: str, text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ConfigError(f"Parameter '{name}' expects integer")
    return int(text, 16 if "x" in text.lower() else 10)
