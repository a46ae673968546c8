"""``-device`` and ``device_add``: QEMU's options of a device as a :class:`~guestd.config.DeviceConfig`.

The models of this process go by their names; ``vfio-pci`` is an assigned device (``host=``, and ``group=``, which QEMU
finds in sysfs), ``vfio-user-pci`` one behind a socket. Messages are QEMU's.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Final, Protocol

import msgspec

from guestd.config import DeviceConfig
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.device import PCIDevice, Prop

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


class Slots(Protocol):
    """A bus, as far as places on it go."""

    @property
    def devices(self) -> Mapping[int, object]:
        """What is there, by devfn: a device, or its configuration."""

    def free_devfn(self, first_slot: int = ...) -> int:
        """The first function 0 that is free.

        :raise ConfigError: when there is none.
        """


def drivers() -> list[str]:
    """What may be a ``driver``."""
    return sorted((*DEVICES, ASSIGNED, REMOTE))


def properties(driver: str) -> Mapping[str, Prop]:
    """Those of a model of this process by the name ``driver``; none for others."""
    model = DEVICES.get(driver)
    return {} if model is None else model.PROPS


def device_config(
    options: Mapping[str, object],
    buses: Mapping[str, Slots],
    taken: Collection[str],
    *,
    anonymous: str,
    text: bool = False,
    plugged: bool = False,
) -> DeviceConfig:
    """The device that ``options`` ask for on one of ``buses``, the last (QEMU's choice, too) unless they name another;
    ``anonymous`` is its name when they give no id.

    ``text``: values come from a command line, numbers and switches as words. ``plugged``: into a machine that runs.

    :raise ConfigError: with QEMU's message.
    """
    driver = options.get("driver")
    if not isinstance(driver, str):
        raise ConfigError("Parameter 'driver' is missing")
    if driver not in drivers():
        raise ConfigError(f"'{driver}' is not a valid device model name")
    bus = options.get("bus", list(buses)[-1])
    if not isinstance(bus, str) or bus not in buses:
        raise ConfigError(f"Bus '{bus}' not found")
    name = options.get("id", anonymous)
    if name != anonymous and (not isinstance(name, str) or not _ID.fullmatch(name)):
        raise ConfigError(f"Invalid qdev ID '{name}'")
    if name in taken:
        raise ConfigError(f"Duplicate device ID '{name}'")
    several = _value("multifunction", bool, options.get("multifunction", False), text=text)
    devfn = _devfn(driver, options.get("addr", -1), buses[bus])
    _check_place(buses[bus], devfn, several=bool(several), plugged=plugged)
    own = {key: value for key, value in options.items() if key not in _COMMON | _NO_MEANING}
    if "bootindex" in own and not _BOOTED.isdisjoint(properties(driver)):
        _value("bootindex", int, own.pop("bootindex"), text=text)
    fields: dict[str, object] = {"id": name, "bus": bus, "addr": f"{devfn >> 3:02x}.{devfn & 7}"}
    fields["multifunction"] = several
    make = {ASSIGNED: _assigned, REMOTE: _remote}.get(driver)
    fields |= make(own) if make is not None else {"model": driver, "props": _props(driver, own, text=text)}
    try:
        return msgspec.convert(fields, DeviceConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(str(error)) from error


def _devfn(driver: str, addr: object, bus: Slots) -> int:
    """``addr=``: slot, or slot.function, hexadecimal; as a number the devfn; -1 for the first free slot."""
    if addr == -1:
        return bus.free_devfn(0)
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


def _check_place(bus: Slots, devfn: int, *, several: bool, plugged: bool) -> None:
    """Whether ``devfn`` is free, and the functions of its slot say alike whether there are ``several``."""
    slot, function = devfn >> 3, devfn & 7
    zero = bus.devices.get(devfn & ~7)
    if function and zero is not None and plugged:
        raise ConfigError(
            f"PCI: slot {slot} function 0 already occupied by {driver_of(zero)}, additional functions can no longer be "
            "exposed to guest."
        )
    if devfn in bus.devices:
        raise ConfigError(f"PCI: slot {slot} already occupied by {driver_of(bus.devices[devfn])}")
    if function and zero is not None and not _is_multifunction(zero):
        raise ConfigError(f"PCI: single function device can't be populated in function {slot:x}.{function:x}")
    if not function and not several:
        other = next((n for n in range(1, 8) if devfn | n in bus.devices), None)
        if other is not None:
            raise ConfigError(
                f"PCI: {slot:x}.0 indicates single function, but {slot:x}.{other:x} is already populated."
            )


def _is_multifunction(device: object) -> bool:
    if isinstance(device, DeviceConfig):
        return device.multifunction
    assert isinstance(device, PCIDevice), "a bus holds PCI functions"
    return device.config.multifunction


def driver_of(device: object) -> str:
    """The driver that ``device``, or the device of that configuration, is of."""
    if isinstance(device, DeviceConfig):
        return device.model or {"assigned": ASSIGNED, "remote": REMOTE}[device.attach]
    return next((name for name, kind in DEVICES.items() if type(device) is kind), ASSIGNED)


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
