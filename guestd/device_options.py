"""``-device`` and ``device_add``: QEMU's options of a device as a :class:`~guestd.config.DeviceConfig`.

The models of this process go by their names; ``vfio-pci`` is an assigned device (``host=``, and ``group=``, which QEMU
finds in sysfs), ``vfio-user-pci`` one behind a socket. Messages are QEMU's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from guestd.config import DeviceConfig
from guestd.places import Buses, Occupant, Slots
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.device import Prop

ASSIGNED: Final = "vfio-pci"
REMOTE: Final = "vfio-user-pci"
_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")
_ADDR: Final = re.compile(r"(?:0x)?([0-9a-f]{1,2})(?:\.([0-7]))?", re.IGNORECASE)
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|[0-9]+", re.IGNORECASE)
_SWITCH: Final = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}
_LAST_DEVFN: Final = 255
_COMMON: Final = frozenset(("driver", "id", "bus", "addr", "multifunction"))
_NO_MEANING: Final = frozenset(("rombar", "romfile", "romsize", "acpi-index", "failover_pair_id"))
"""Properties of every PCI device on QEMU that have none here."""
_BOOTED: Final = frozenset(("drive", "netdev"))
"""A device with one of these has a ``bootindex``, too, which means nothing here."""


def drivers() -> list[str]:
    """What may be a ``driver``."""
    return sorted((*DEVICES, ASSIGNED, REMOTE))


def properties(driver: str) -> Mapping[str, Prop]:
    """Those of a model of this process by the name ``driver``; none for others."""
    model = DEVICES.get(driver)
    return {} if model is None else model.PROPS


def device_config(
    options: Mapping[str, object],
    buses: Buses,
    taken: Collection[str],
    *,
    anonymous: str,
    text: bool = False,
    plugged: bool = False,
) -> DeviceConfig:
    """The device that ``options`` ask for on one of ``buses``; ``anonymous`` is its name when they give no id.

    ``text``: values come from a command line, numbers and switches as words. ``plugged``: into a machine that runs.

    :raise ConfigError: with QEMU's message.
    """
    driver = options.get("driver")
    if not isinstance(driver, str):
        raise ConfigError("Parameter 'driver' is missing")
    if driver not in drivers():
        raise ConfigError(f"'{driver}' is not a valid device model name")
    bus = buses.find(options.get("bus"))
    name = options.get("id", anonymous)
    if name != anonymous and (not isinstance(name, str) or not _ID.fullmatch(name)):
        raise ConfigError(f"Invalid qdev ID '{name}'")
    if name in taken:
        raise ConfigError(f"Duplicate device ID '{name}'")
    several = _value("multifunction", bool, options.get("multifunction", False), text=text)
    devfn = place(driver, options.get("addr", -1), bus)
    occupant = Occupant(driver, "" if name == anonymous else str(name), bool(several))
    buses.check(bus, devfn, occupant, plugged)
    own = {key: value for key, value in options.items() if key not in _COMMON | _NO_MEANING}
    if "bootindex" in own and not _BOOTED.isdisjoint(properties(driver)):
        _value("bootindex", int, own.pop("bootindex"), text=text)
    fields: dict[str, object] = {"id": name, "bus": bus.name, "addr": written(devfn)}
    fields["multifunction"] = several
    make = {ASSIGNED: _assigned, REMOTE: _remote}.get(driver)
    fields |= make(own) if make is not None else {"model": driver, "props": _props(driver, own, text=text)}
    try:
        return msgspec.convert(fields, DeviceConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(str(error)) from error


def written(devfn: int) -> str:
    """``02.0``."""
    return f"{devfn >> 3:02x}.{devfn & 7}"


def place(driver: str, addr: object, bus: Slots) -> int:
    """The devfn that ``addr=`` names: slot, or slot.function, hexadecimal; as a number the devfn; -1 for the first free
    slot of ``bus``.

    :raise ConfigError: none of these, or no slot is free.
    """
    if addr == -1:
        return bus.free_devfn()
    if isinstance(addr, bool) or not isinstance(addr, int | str):
        raise ConfigError("Invalid parameter type for 'addr', expected int or str")
    if isinstance(addr, int):
        if not 0 <= addr <= _LAST_DEVFN:
            raise ConfigError(f"Parameter 'addr' expects a value between -1 and {_LAST_DEVFN}")
        devfn = addr
    else:
        match = _ADDR.fullmatch(addr)
        if match is None or int(match[1], 16) > 31:
            raise ConfigError(f"Property '{driver}.addr' doesn't take value '{addr}'")
        devfn = int(match[1], 16) << 3 | int(match[2] or "0")
    return devfn


def driver_of(device: DeviceConfig) -> str:
    """The driver of the device of that configuration."""
    return device.model if device.attach == "emulated" else {"assigned": ASSIGNED, "remote": REMOTE}[device.attach]


def _props(driver: str, own: Mapping[str, object], *, text: bool) -> dict[str, object]:
    known = DEVICES[driver].PROPS
    found: dict[str, object] = {}
    for name, value in own.items():
        if name not in known:
            raise ConfigError(f"Property '{driver}.{name}' not found")
        found[name] = _value(name, known[name].type, value, text=text)
    return found


def _value(name: str, kind: type, value: object, *, text: bool) -> object:
    if text and isinstance(value, str):
        if kind is int and _NUMBER.fullmatch(value):
            return int(value, 0)
        if kind is bool and value in _SWITCH:
            return _SWITCH[value]
    if kind is bool and not text and type(value) is not bool:
        raise ConfigError(f"Invalid parameter type for '{name}', expected: boolean")
    if type(value) is not kind:
        raise ConfigError(f"Parameter '{name}' expects {_TYPE_NAMES[kind]}")
    return value


_TYPE_NAMES: Final[dict[type, str]] = {int: "uint64", bool: "'on' or 'off'", str: "a string"}


def _assigned(own: dict[str, object]) -> dict[str, object]:
    tracking = own.pop("x-device-dirty-page-tracking", True)
    for name in own:
        if name not in ("host", "group"):
            raise ConfigError(f"Property '{ASSIGNED}.{name}' not found")
    if "host" not in own:
        raise ConfigError("No provided host device")
    group = own.get("group")
    if isinstance(group, str) and group.isdecimal():
        group = int(group)
    host = PCIAddress.parse(str(own["host"]), where="host")
    tracked = _value("x-device-dirty-page-tracking", bool, tracking, text=True)
    return {"attach": "assigned", "host": str(host), "group": group, "dirty_tracking": tracked}


def _remote(own: dict[str, object]) -> dict[str, object]:
    for name in own:
        if name not in ("socket", "dma", "reconnect-ms"):
            raise ConfigError(f"Property '{REMOTE}.{name}' not found")
    fields: dict[str, object] = {"attach": "remote", "socket": _socket_path(own.get("socket", ""))}
    if "dma" in own:
        fields["dma"] = own["dma"]
    if "reconnect-ms" in own:
        fields["reconnect_ms"] = _value("reconnect-ms", int, own["reconnect-ms"], text=True)
    return fields


def _socket_path(socket: object) -> object:
    """Of a path, or of QEMU's ``SocketAddress``."""
    if not isinstance(socket, dict):
        return socket
    kind = socket.get("type")
    if kind != "unix" or not isinstance(socket.get("path"), str):
        raise ConfigError(f"Property '{REMOTE}.socket': a UNIX socket with a path is needed, not '{kind}'")
    return socket["path"]
