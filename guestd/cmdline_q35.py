"""What a command line says of a q35 machine: its properties, the IOMMU and bridges. Messages are those of QEMU 11.1."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Final

import msgspec

from guestd.cmdline_devices import DeviceWords, Globals, MachineAsked, MachineWords
from guestd.device_options import place as place_of
from guestd.device_options import written
from guestd.machine_config import ANONYMOUS, BridgeConfig, IntelIommuConfig, Q35Config
from guestd.machines.q35_info import BUS_TYPES, IOMMU_PROPERTIES
from guestd.machines.q35_places import add_bridge, root_places
from guestd.option_syntax import number, size, switch
from guestd.places import EXPANDER, PORTS, Occupant
from vfio_model.errors import ConfigError
from vfio_model.pci.bridges import SPEEDS, WIDTHS

IOMMU: Final = "intel-iommu"
_MACHINE: Final = re.compile(r"q35|pc-q35-\d+\.\d+")
_NEWEST: Final = "pc-q35-11.1"
_BYPASS: Final = "default-bus-bypass-iommu"
_GATE: Final = "x-bridges-gate-dma"
_COUNT: Final = {_BYPASS: "default_bus_bypass_iommu", _GATE: "bridges_gate_dma"}
"""Machine properties that change something: fields of :class:`~guestd.machine_config.Q35Config`."""
_CHOICES: Final[Mapping[str, Sequence[str]]] = {"speed": SPEEDS, "width": WIDTHS}
_BITS: Final = {"uint8": 8, "uint16": 16, "uint32": 32}
_SWITCHES: Final = frozenset(
    (
        *("aux-ram-share", *_COUNT, "dump-guest-core", "fd-bootchk", "graphics", "hpet", "i8042", "mem-merge", "pit"),
        *("sata", "smbus", "suppress-vmdesc", "usb", "wdat"),
    )
)
_AUTO_SWITCHES: Final = frozenset(("acpi", "pic", "smm", "vmport"))
_NO_MEANING: Final = re.compile(
    r"append|boot|bus-lock-ratelimit|dt-compatible|dtb|dumpdtb|firmware|initrd|kernel|kernel-irqchip|max-fw-size"
    r"|max-ram-below-4g|memory-encryption|phandle-start|smbios-entry-point-type|smp|smp-cache\..*|smp\..*|boot\..*|x-.*"
)
_IOMMU_PROPERTIES: Final = {**IOMMU_PROPERTIES, "nested": "bool", "invalidation": "sync|async", "quirks": "str"}
_PCI: Final[Mapping[str, str]] = {
    **{"acpi-index": "uint32", "addr": "addr", "bus": "bus", "failover_pair_id": "str", "multifunction": "bool"},
    **{"rombar": "number", "romfile": "str", "romsize": "uint32", "sriov-pf": "str"},
    **{"x-max-bounce-buffer-size": "size", "x-pcie-ari-nextfn-1": "bool", "x-pcie-err-unc-mask": "bool"},
    **{"x-pcie-ext-tag": "bool", "x-pcie-lnksta-dllla": "bool", "x-pci-express-writeable-slt-bug": "bool"},
}
_RESERVE: Final[Mapping[str, str]] = {
    **{"bus-reserve": "uint32", "io-reserve": "size", "mem-reserve": "size", "pref32-reserve": "size"},
    "pref64-reserve": "size",
}
_SLOT: Final[Mapping[str, str]] = {
    **{"aer_log_max": "uint16", "chassis": "uint8", "hotplug": "bool", "port": "uint8", "slot": "uint16"},
    **{"power_controller_present": "bool", "x-do-not-expose-native-hotplug-cap": "bool"},
}
_BRIDGES: Final[Mapping[str, Mapping[str, str]]] = {
    "pcie-root-port": {**_SLOT, "x-speed": "speed", "x-width": "width", **_RESERVE},
    "ioh3420": _SLOT,
    "x3130-upstream": {"aer_log_max": "uint16", "port": "uint8"},
    "xio3130-downstream": _SLOT,
    "pcie-pci-bridge": {"msi": "OnOffAuto"},
    "i82801b11-bridge": {},
    "pci-bridge": {"chassis_nr": "uint8", "msi": "OnOffAuto", "shpc": "bool", **_RESERVE},
    EXPANDER: {"bus_nr": "uint8", "bypass_iommu": "bool", "numa_node": "uint16"},
}
"""Properties of their own, by driver, with types."""


def _help(properties: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}=<{kind}>" for name, kind in properties.items())


class Q35Words(MachineWords):
    """Of ``guestd-system-x86_64``."""

    ARCH: ClassVar = "x86_64"
    MACHINES: ClassVar = {
        "q35": f"Standard PC (Q35 + ICH9, 2009) (alias of {_NEWEST}) (default)",
        _NEWEST: "Standard PC (Q35 + ICH9, 2009)",
    }
    CPUS_OF: ClassVar = _NEWEST
    OWN: ClassVar = (*_BRIDGES, IOMMU)
    DRIVERS: ClassVar = {
        **{driver: _help(properties) for driver, properties in _BRIDGES.items()},
        IOMMU: _help(_IOMMU_PROPERTIES),
    }
    OFF_PCI: ClassVar = (IOMMU,)
    MACHINE_HELP: ClassVar = (
        "default-bus-bypass-iommu=<bool>",
        "memory-backend=<link<memory-backend>>",
        f"{_GATE}=<bool>",
    )

    def __init__(self) -> None:
        self.buses = root_places()
        self._fields: dict[str, object] = {}
        self._iommu: IntelIommuConfig | None = None
        self._bridges: list[BridgeConfig] = []
        self._chassis: set[tuple[object, object]] = set()
        self._numbers: set[object] = set()
        self._unnamed = 0

    @property
    def unnamed(self) -> int:
        """See :class:`~guestd.cmdline_devices.MachineWords`, here and below."""
        return self._unnamed

    def check_global(self, driver: str, name: str, value: str) -> None:
        """Properties are looked at when a device comes."""

    def configure(self, asked: MachineAsked, devices: Sequence[DeviceWords], defaults: Globals) -> None:
        """Underlines in names are dashes."""
        kind, fields = asked.kind, dict(asked.ram)
        if not _MACHINE.fullmatch(kind):
            raise ConfigError(f'unsupported machine type: "{kind}"\nUse -machine help to list supported machines')
        for written_name, value in asked.given.items():
            name = written_name.replace("_", "-")
            if name in _SWITCHES:
                on = switch(name, value)
                if name in _COUNT:
                    fields[_COUNT[name]] = on
            elif name in _AUTO_SWITCHES:
                _typed(name, "OnOffAuto", value)
            elif not _NO_MEANING.fullmatch(name):
                raise ConfigError(f"Property '{kind if kind != 'q35' else _NEWEST}-machine.{name}' not found")
        self._fields = fields
        self.config()

    def take(self, words: DeviceWords, given: Globals, place: int) -> bool:
        """The IOMMU and bridges."""
        driver = words.options.get("driver")
        if driver not in self.OWN:
            return False
        known = _IOMMU_PROPERTIES if driver == IOMMU else {**_PCI, **_BRIDGES[str(driver)]}
        own = {**given.of(driver, known), **words.options}
        name = str(own.get("id", f"{ANONYMOUS}{place}]"))
        self._unnamed += "id" not in own
        if driver == IOMMU:
            self._add_iommu(name, own)
        else:
            self._add_bridge(str(driver), name, own)
        return True

    def config(self) -> Q35Config:
        """With what has come so far."""
        parts: dict[str, object] = {"type": "q35", "bridges": msgspec.to_builtins(self._bridges)}
        if self._iommu is not None:
            parts["iommu"] = msgspec.to_builtins(self._iommu)
        try:
            return msgspec.convert({**self._fields, **parts}, Q35Config)
        except (msgspec.ValidationError, ValueError) as error:
            raise ConfigError(str(error), where="-machine") from error

    # -- the IOMMU ---------------------------------------------------------------------------------------------------

    def _add_iommu(self, name: str, own: Mapping[str, object]) -> None:
        if "bus" in own:
            bus = self.buses.find(own["bus"])
            raise ConfigError(f"Device '{IOMMU}' can't go on {'PCIE' if bus.name == 'pcie.0' else 'PCI'} bus")
        if self._iommu is not None:
            raise ConfigError("QEMU does not support multiple vIOMMUs for x86 yet.")
        fields: dict[str, object] = {"id": name}
        for prop, value in own.items():
            if prop in ("driver", "id"):
                continue
            if prop not in _IOMMU_PROPERTIES:
                raise ConfigError(f"Property '{IOMMU}.{prop}' not found")
            fields[prop] = _typed(prop, _IOMMU_PROPERTIES[prop], value)
        if "quirks" in fields:
            fields["quirks"] = str(fields["quirks"]).split("+")
        try:
            self._iommu = msgspec.convert(fields, IntelIommuConfig)
            self._iommu.options()
        except msgspec.ValidationError as error:
            raise ConfigError(str(error)) from error
        except ConfigError as error:
            raise ConfigError(error.what, hint=error.hint) from error

    # -- bridges -----------------------------------------------------------------------------------------------------

    def _add_bridge(self, driver: str, name: str, own: Mapping[str, object]) -> None:
        bus = self.buses.find(own.get("bus"))
        kinds = {**_PCI, **_BRIDGES[driver]}
        props: dict[str, int | str | bool] = {}
        for prop, value in own.items():
            if prop in ("driver", "id", "bus", "addr"):
                continue
            if prop not in kinds:
                raise ConfigError(f"Property '{driver}.{prop}' not found")
            typed = _typed(prop, kinds[prop], value)
            if prop in _BRIDGES[driver]:
                props[prop] = typed
        several = switch("multifunction", own.get("multifunction", False))
        if driver == EXPANDER and bus.name != "pcie.0" and not bus.bridges_only:
            raise ConfigError("PXB devices can be attached only to root bus")
        devfn = place_of(driver, own.get("addr", -1), bus)
        shown = name if "id" in own else ""
        self.buses.check(bus, devfn, Occupant(driver, shown, several), False)
        self._check_numbers(driver, props)
        place = {"bus": bus.name, "addr": written(devfn), "multifunction": several}
        bus_name = None if shown else self._free_name(BUS_TYPES.get(driver, "PCI").lower())
        fields = {"driver": driver, "id": name, **place, "bus_name": bus_name, "props": props}
        bridge = msgspec.convert(fields, BridgeConfig)
        add_bridge(self.buses, bridge)
        self._bridges.append(bridge)

    def _free_name(self, kind: str) -> str:
        """QEMU counts buses without a name by their type."""
        names = (f"{kind}.{count}" for count in range(len(self.buses.slots) + 1))
        return next(name for name in names if name not in self.buses.slots)

    def _check_numbers(self, driver: str, props: Mapping[str, object]) -> None:
        """Chassis and bus numbers are somebody's."""
        if driver in PORTS:
            key = (props.get("chassis", 0), props.get("slot", 0))
            if key in self._chassis:
                raise ConfigError("Can't add chassis slot, error -16")
            self._chassis.add(key)
        elif driver == "pci-bridge" and not props.get("chassis_nr", 0):
            what = "Bridge chassis not specified. Each bridge is required to be assigned a unique chassis id > 0."
            raise ConfigError(what)
        elif driver == EXPANDER:
            bus = props.get("bus_nr", 0)
            if bus in self._numbers:
                raise ConfigError(f"Bus {bus} is already in use")
            self._numbers.add(bus)


def _typed(name: str, kind: str, value: object) -> int | str | bool:
    """:raise ConfigError: ``value`` is not of that kind."""
    if kind == "bool":
        return switch(name, value)
    if kind == "OnOffAuto":
        if value == "auto":
            return "auto"
        if value not in ("on", "off", True, False):
            raise ConfigError(f"Parameter '{name}' does not accept value '{value}'")
        return switch(name, value)
    if kind in _CHOICES and value not in _CHOICES[kind]:
        raise ConfigError(f"Parameter '{name}' does not accept value '{value}'")
    if "|" in kind:
        if value not in kind.split("|"):
            raise ConfigError(f"Parameter '{name}' does not accept value '{value}'", hint=f"known: {kind}")
        return str(value)
    if kind in _BITS:
        found = number(name, value)
        if found >> _BITS[kind]:
            raise ConfigError(f"Parameter '{name}' expects {kind}_t")
        return found
    if kind == "size":
        return size(name, value)
    return str(value)
