"""What a command line says of a pseries machine: its properties, host bridges and VIO devices."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import ClassVar, Final

import msgspec

from guestd.cmdline_devices import DeviceWords, Globals, MachineAsked, MachineWords
from guestd.machine_config import PhbConfig, PseriesConfig, VioConfig
from guestd.option_syntax import identifier, number, switch
from guestd.places import Buses, Slots, check_pseries
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr.regs import MAX_PHBS, VIO_UNIT_BASE

PHB: Final = "spapr-pci-host-bridge"
PHB_NUMBERS: Final = ("index", "pgsz", "dma_win_addr", "dma_win_size", "dma64_win_addr")
PHB_PROPERTIES: Final = (*PHB_NUMBERS, "ddw")
VIO: Final = {"spapr-vlan": "llan", "spapr-vscsi": "vscsi", "tpm-spapr": "tpm", "spapr-vty": "vty"}
"""Drivers of VIO devices; of them no more is here than their DMA windows."""
_VIO_NO_MEANING: Final = ("driver", "id", "irq", "netdev", "mac", "bootindex", "chardev", "tpmdev")
_FIRST_UNIT: Final = VIO_UNIT_BASE + 1
"""Units are counted up from here; the one below is the NVRAM's, which this machine does not show."""
_PHB_NO_MEANING: Final = ("driver", "id", "numa_node", "pre-5.1-associativity")
_MACHINE: Final = re.compile(r"pseries(-\d+\.\d+(-sxxm)?)?")
_NUMBERS: Final = ("pgsz", "dma_win_addr", "dma_win_size", "dma64_win_addr")
_NO_MEANING: Final = re.compile(
    r"usb|graphics|mem-merge|dump-guest-core|suppress-vmdesc|ic-mode|vsmt|resize-hpt|max-cpu-compat|kernel_irqchip"
    r"|kvm-type|aux-ram-share|dumpdtb|cap-.*|x-.*"
)
_PHB_HELP: Final = (
    "ddw=<bool>             - on/off (default: on)",
    "dma64_win_addr=<uint64>",
    "dma_win_addr=<uint64>  -  (default: 0)",
    "dma_win_size=<uint64>  -  (default: 1073741824)",
    "index=<uint32>",
    "pgsz=<uint64>          - bitmap of IOMMU page sizes",
)


class PseriesWords(MachineWords):
    """Of ``guestd-system-ppc64``."""

    ARCH: ClassVar = "ppc64"
    MACHINES: ClassVar = {"pseries": "pSeries Logical Partition (PAPR compliant) (default)"}
    CPUS_OF: ClassVar = "pseries"
    OWN: ClassVar = (PHB, *VIO)
    DRIVERS: ClassVar = {PHB: _PHB_HELP}
    OFF_PCI: ClassVar = (PHB,)
    MACHINE_HELP: ClassVar = (
        "ddw=<bool>             - dynamic DMA windows on every PHB",
        "dma64_win_addr=<int>",
        "dma_win_addr=<int>",
        "dma_win_size=<int>",
        "kvm-tce=<bool>         - TCE tables live with the host",
        "memory-backend=<link<memory-backend>>",
        "multitce=<bool>        - H_STUFF_TCE and H_PUT_TCE_INDIRECT",
        "pgsz=<int>             - bitmap of IOMMU page sizes",
        "quirks=<string>        - differences from QEMU to give up",
    )

    def __init__(self) -> None:
        self.buses = Buses({}, "", check_pseries)
        self._config: PseriesConfig | None = None
        self._phbs: Iterator[PhbConfig] = iter(())

    def check_global(self, driver: str, name: str, value: str) -> None:
        """Properties of every bridge, which the first one has before any device comes."""
        if driver == PHB:
            if name not in PHB_PROPERTIES:
                raise ConfigError(f"Property '{driver}.{name}' not found")
            _phb_value(name, value)

    def configure(self, asked: MachineAsked, devices: Sequence[DeviceWords], defaults: Globals) -> None:
        """See :class:`~guestd.cmdline_devices.MachineWords`, here and below."""
        fields = dict(asked.ram)
        if not _MACHINE.fullmatch(asked.kind):
            raise ConfigError(f'unsupported machine type: "{asked.kind}"\nUse -machine help to list supported machines')
        for name, value in {**defaults.of(PHB, PHB_PROPERTIES), **asked.given}.items():
            if name in ("ddw", "multitce", "kvm-tce"):
                fields["kvm" if name == "kvm-tce" else name] = switch(name, value)
            elif name in _NUMBERS:
                fields[name] = number(name, value, kind="uint64")
            elif name == "quirks":
                fields[name] = str(value).split("+")
            elif not _NO_MEANING.fullmatch(name):
                raise ConfigError(f"Property 'pseries-machine.{name}' not found")
        self._config = _machine_with_phbs(fields, devices)
        self._phbs = iter(self._config.phbs)
        self._add_bus()

    def take(self, words: DeviceWords, given: Globals, place: int) -> bool:
        """Bridges and VIO devices."""
        driver = words.options.get("driver")
        if driver == PHB:
            self._add_bus()
        return driver == PHB or driver in VIO

    def _add_bus(self) -> None:
        """The bus of the next bridge, where QEMU puts from now on what does not say."""
        phb = next(self._phbs)
        self.buses.slots[phb.bus] = Slots(phb.bus)
        self.buses.default = phb.bus

    def config(self) -> PseriesConfig:
        """It was known before the devices came."""
        assert self._config is not None, "configured"
        return self._config


def _machine_with_phbs(fields: Mapping[str, object], devices: Sequence[DeviceWords]) -> PseriesConfig:
    """The machine with its first PHB, and the PHBs and VIO devices that ``devices`` name.

    :raise ConfigError: see :func:`_phb` and :func:`_vio`.
    """
    phbs = [PhbConfig(index=0)]
    vio: dict[int, tuple[str, VioConfig]] = {}
    machine = _machine(fields, phbs, [], "-machine")
    for words in devices:
        try:
            if words.options.get("driver") == PHB:
                unnamed = sum(phb.id is None for phb in phbs)
                phbs.append(_phb(words.options, {phb.index for phb in phbs}, unnamed))
                _machine(fields, phbs, [], words.where)
            elif words.options.get("driver") in VIO:
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
