"""``-device``, ``-global`` and ``-object`` of QEMU's command line, as parts of the configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final

import msgspec

from guestd.backends import check_names
from guestd.cmdline_backends import BackendNames
from guestd.config import ANONYMOUS, DeviceConfig
from guestd.device_options import ASSIGNED, REMOTE, device_config, driver_of, drivers
from guestd.machine_config import PhbConfig, PseriesConfig, VioConfig
from guestd.option_syntax import identifier, number, only, size, split, switch
from guestd.places import Buses, Occupant, Slots, check_pseries
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr.regs import MAX_PHBS, VIO_UNIT_BASE
from vfio_model.pci.address import PCIAddress

PHB: Final = "spapr-pci-host-bridge"
PHB_NUMBERS: Final = ("index", "pgsz", "dma_win_addr", "dma_win_size", "dma64_win_addr")
PHB_PROPERTIES: Final = (*PHB_NUMBERS, "ddw")
VIO: Final = {"spapr-vlan": "llan", "spapr-vscsi": "vscsi", "tpm-spapr": "tpm", "spapr-vty": "vty"}
"""Drivers of VIO devices; of them no more is here than their DMA windows."""
_VIO_NO_MEANING: Final = ("driver", "id", "irq", "netdev", "mac", "bootindex", "chardev", "tpmdev")
_FIRST_UNIT: Final = VIO_UNIT_BASE + 1
"""Units are counted up from here; the one below is the NVRAM's, which this machine does not show."""
_PHB_NO_MEANING: Final = ("driver", "id", "numa_node", "pre-5.1-associativity")
_BACKENDS: Final = ("memory-backend-memfd", "memory-backend-ram", "memory-backend-file", "memory-backend-shm")
_BACKEND_KEYS: Final = frozenset(
    (
        "qom-type",
        "id",
        "size",
        "share",
        "hugetlb",
        "hugetlbsize",
        "seal",
        "prealloc",
        "prealloc-threads",
        "reserve",
        "merge",
        "dump",
        "policy",
        "host-nodes",
        "mem-path",
        "align",
        "offset",
        "pmem",
        "discard-data",
        "readonly",
        "rom",
        "x-use-canonical-path-for-ramblock-id",
    )
)
_SMALLEST_PAGE: Final = 4096
_HUGE_PAGE: Final = 2 << 20


@dataclass(frozen=True, slots=True)
class MemoryBackend:
    """``-object memory-backend-…``. ``page_size`` 0: as usual."""

    id: str
    size: int = 0
    share: bool = False
    page_size: int = 0


def memory_backend(given: Mapping[str, object]) -> MemoryBackend:
    """:raise ConfigError: for what QEMU refuses, too."""
    kind = given.get("qom-type")
    if kind not in _BACKENDS:
        raise ConfigError(f"invalid object type: {kind}")
    if "id" not in given:
        raise ConfigError("Parameter 'id' is missing")
    name = identifier(given["id"])
    only(given, _BACKEND_KEYS)
    if "size" not in given:
        raise ConfigError("Parameter 'size' is missing")
    if kind == "memory-backend-file" and "mem-path" not in given:
        raise ConfigError("Parameter 'mem-path' is missing")
    bytes_ = size("size", given["size"])
    if not bytes_:
        raise ConfigError(f"property 'size' of {kind} doesn't take value '0'")
    share = switch("share", given.get("share", kind in ("memory-backend-memfd", "memory-backend-shm")))
    return MemoryBackend(name, bytes_, share, _page_size(given))


def _page_size(given: Mapping[str, object]) -> int:
    page = size("hugetlbsize", given["hugetlbsize"]) if "hugetlbsize" in given else 0
    if page and (page < _SMALLEST_PAGE or page & (page - 1)):
        raise ConfigError(f"hugetlbsize {page} is not a power of two of at least {_SMALLEST_PAGE}")
    if not page and switch("hugetlb", given.get("hugetlb", "off")):
        page = _HUGE_PAGE
    if not page and "mem-path" in given:
        try:
            page = os.statvfs(str(given["mem-path"])).f_bsize
        except OSError as error:
            raise ConfigError(f"can't open backing store {given['mem-path']}: {error.strerror}") from error
        page = page if page >= _HUGE_PAGE else 0
    return page


@dataclass(frozen=True, slots=True)
class DeviceWords:
    """One ``-device``; ``text`` when it was not JSON."""

    options: dict[str, object]
    text: bool
    where: str

    @property
    def is_phb(self) -> bool:
        """Whether it is a host bridge."""
        return self.options.get("driver") == PHB

    @property
    def is_vio(self) -> bool:
        """Whether it is a VIO device."""
        return self.options.get("driver") in VIO


class Globals:
    """``-global DRIVER.PROPERTY=VALUE``: defaults of every device of that kind."""

    def __init__(self) -> None:
        self._given: list[tuple[str, str, str]] = []
        self.phb: dict[str, object] = {}
        """Of every PHB."""

    def add(self, text: str) -> None:
        """:raise ConfigError: when it is neither form."""
        head, equals, value = text.partition("=")
        driver, dot, name = head.partition(".")
        if not (equals and dot):
            given = split(text)
            only(given, ("driver", "property", "value"))
            if set(given) != {"driver", "property", "value"}:
                raise ConfigError("options 'driver', 'property', and 'value' are required")
            driver, name, value = given["driver"], given["property"], given["value"]
        self._given.append((driver, name, value))
        if driver == PHB:
            if name not in PHB_PROPERTIES:
                raise ConfigError(f"can't apply global {driver}.{name}={value}: Property '{driver}.{name}' not found")
            try:
                _phb_value(name, value)
            except ConfigError as error:
                raise ConfigError(f"can't apply global {driver}.{name}={value}: {error}") from error
            self.phb[name] = value

    def of(self, driver: object) -> dict[str, object]:
        """The defaults of ``driver``.

        :raise ConfigError: for a property that it has not got.
        """
        found: dict[str, object] = {}
        for kind, name, value in self._given:
            if kind == driver:
                if kind in DEVICES and name not in DEVICES[kind].PROPS:
                    what = f"can't apply global {kind}.{name}={value}: Property '{kind}.{name}' not found"
                    raise ConfigError(what)
                found[name] = value
        return found

    def warnings(self) -> list[str]:
        """About what holds for nothing."""
        known = (*drivers(), PHB, *VIO)
        return [f"global {kind}.{name} has invalid class name" for kind, name, _ in self._given if kind not in known]


def machine_with_phbs(fields: Mapping[str, object], devices: Sequence[DeviceWords]) -> PseriesConfig:
    """The machine with its first PHB, and the PHBs and VIO devices that ``devices`` name.

    :raise ConfigError: see :func:`_phb` and :func:`_vio`.
    """
    phbs = [PhbConfig(index=0)]
    vio: dict[int, tuple[str, VioConfig]] = {}
    machine = _machine(fields, phbs, [], "-machine")
    for words in devices:
        try:
            if words.is_phb:
                unnamed = sum(phb.id is None for phb in phbs)
                phbs.append(_phb(words.options, {phb.index for phb in phbs}, unnamed))
                _machine(fields, phbs, [], words.where)
            elif words.is_vio:
                unit = _vio(words.options, vio)
                assert unit.reg is not None, "given one"
                vio[unit.reg] = str(words.options["driver"]), unit
        except ConfigError as error:
            raise ConfigError(error.what, where=words.where) from error
    return _machine(fields, phbs, [unit for _, unit in vio.values()], "-machine") if devices else machine


def _machine(
    fields: Mapping[str, object], phbs: Sequence[PhbConfig], vio: Sequence[VioConfig], where: str
) -> PseriesConfig:
    parts = {"phbs": msgspec.to_builtins(phbs), "vio": msgspec.to_builtins(vio)}
    try:
        return msgspec.convert({**parts, **fields}, PseriesConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(str(error), where=where) from error


def _phb_value(name: str, value: object) -> object:
    """:raise ConfigError: what cannot be the property ``name`` of a bridge."""
    if name == "ddw":
        return switch(name, value)
    return number(name, value, kind="uint64" if name != "index" else "uint32_t")


def _phb(options: Mapping[str, object], taken: set[int], unnamed: int) -> PhbConfig:
    """One more bridge than those of the indices ``taken``, of which ``unnamed`` have no id."""
    fields: dict[str, object] = {}
    for name, value in options.items():
        if name in PHB_PROPERTIES:
            fields[name] = _phb_value(name, value)
        elif name not in _PHB_NO_MEANING:
            raise ConfigError(f"Property '{PHB}.{name}' not found")
    index = fields.get("index")
    if index is None:
        raise ConfigError('"index" for PAPR PHB is mandatory')
    assert isinstance(index, int), "read as a number"
    if index >= MAX_PHBS:
        raise ConfigError(f'"index" for PAPR PHB is too large (max {MAX_PHBS - 1})')
    if index in taken:
        raise ConfigError(f"PHB {index} already attached")
    if "id" in options:
        fields["id"] = identifier(options["id"])
    else:
        fields["bus_name"] = f"pci.{unnamed}"
    return msgspec.convert(fields, PhbConfig)


def _vio(options: Mapping[str, object], taken: Mapping[int, tuple[str, VioConfig]]) -> VioConfig:
    """One more VIO device than those ``taken``, by unit with their drivers."""
    driver = str(options["driver"])
    unit = next(unit for unit in count(_FIRST_UNIT) if unit not in taken)
    for name, value in options.items():
        if name == "reg":
            unit = number(name, value)
        elif name not in _VIO_NO_MEANING:
            raise ConfigError(f"Property '{driver}.{name}' not found")
    if unit in taken:
        raise ConfigError(f"{taken[unit][0]} and {driver} devices conflict at address {unit:#x}")
    try:
        return msgspec.convert({"kind": VIO[driver], "reg": unit}, VioConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"Property '{driver}.reg' doesn't take value '{options['reg']}'") from error


def plug_all(
    devices: Sequence[DeviceWords], machine: PseriesConfig, given: Globals, names: BackendNames, *, shared: bool
) -> list[DeviceConfig]:
    """Every PCI device of ``devices``, each on its bus, which a bridge before it has made. ``names`` are those of back
    ends; ``shared``: whether remote ones get guest RAM.

    :raise ConfigError: naming the option.
    """
    bridges = iter(machine.phbs)
    buses = Buses({}, "", check_pseries)
    _add_bus(buses, next(bridges))
    taken: dict[str, DeviceConfig] = {}
    for words in devices:
        if words.is_phb:
            _add_bus(buses, next(bridges))
        if words.is_phb or words.is_vio:
            continue
        own = words.options
        place = sum(name.startswith(ANONYMOUS) for name in taken)
        try:
            config = _plug({**given.of(own.get("driver")), **own}, buses, taken, place, text=words.text)
            known = {"drive": names.drives, "netdev": names.netdevs}
            check_names(config, known, taken.values(), names.uplinks)
        except ConfigError as error:
            raise ConfigError(str(error), where=words.where) from error
        if config.attach == "remote" and "dma" not in own and not shared:
            config.dma = "message"
        taken[config.id] = config
    return list(taken.values())


def _plug(
    own: dict[str, object], buses: Buses, taken: Mapping[str, DeviceConfig], place: int, *, text: bool
) -> DeviceConfig:
    if own.get("driver") == REMOTE and "socket.path" in own:
        own["socket"] = own.pop("socket.path")
        own.pop("socket.type", None)
    if own.get("driver") == REMOTE and not own.get("socket"):
        raise ConfigError("No socket specified")
    if own.get("driver") == ASSIGNED and "host" in own and "group" not in own:
        raise ConfigError("No IOMMU group: use group=N", hint="there is no sysfs to find it in")
    config = device_config(own, buses, taken, anonymous=f"{ANONYMOUS}{place}]", text=text)
    devfn = PCIAddress.parse(config.addr).devfn
    occupant = Occupant(driver_of(config), str(own.get("id", "")), config.multifunction)
    buses.slots[config.bus].devices[devfn] = occupant
    return config


def _add_bus(buses: Buses, phb: PhbConfig) -> None:
    """The bus of ``phb``, where QEMU puts from now on what does not say."""
    buses.slots[phb.bus] = Slots(phb.bus)
    buses.default = phb.bus
