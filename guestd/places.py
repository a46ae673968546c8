"""Places for devices on a bus: which are free, and who may go where. Messages are QEMU's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from vfio_model.errors import ConfigError

SLOTS: Final = 32


@dataclass(frozen=True, slots=True)
class Occupant:
    """What is in a place: a device, or one that will be; ``id`` is empty when it was given none."""

    driver: str
    id: str = ""
    multifunction: bool = False
    """Whether its header says that the slot has more functions."""


@dataclass
class Slots:
    """A bus, as far as places on it go; ``devices`` by devfn."""

    name: str
    devices: dict[int, Occupant] = field(default_factory=dict)
    hotplug: bool = True
    """Whether devices come and go while the machine runs."""
    bridges_only: bool = False
    """An expander's bus."""
    below_port: bool = False
    """A PCI Express port's, whose link shows one device: its function 0 is that of slot 0."""

    def free_devfn(self) -> int:
        """The first function 0 that is free.

        :raise ConfigError: when there is none.
        """
        for slot in range(SLOTS):
            if slot << 3 not in self.devices:
                return slot << 3
        raise ConfigError(f"PCI: no slot/function available on bus '{self.name}', all in use or reserved")


PlaceCheck = Callable[[Slots, int, Occupant, bool], None]
"""``check(bus, devfn, device, plugged)``: whether ``device`` can go there; ``plugged``: while the machine runs.

:raise ConfigError: it cannot.
"""


def check_pseries(bus: Slots, devfn: int, device: Occupant, plugged: bool) -> None:
    """On a PHB of a pseries machine, whose hot-plug handler looks first."""
    slot, function = devfn >> 3, devfn & 7
    zero = bus.devices.get(devfn & ~7)
    if function and zero is not None and plugged:
        raise ConfigError(
            f"PCI: slot {slot} function 0 already occupied by {zero.driver}, additional functions can no longer be "
            "exposed to guest."
        )
    if devfn in bus.devices:
        raise ConfigError(f"PCI: slot {slot} already occupied by {bus.devices[devfn].driver}")
    check_functions(bus, devfn, device)


def check_pc(bus: Slots, devfn: int, device: Occupant, plugged: bool) -> None:
    """On a bus of a PC."""
    if plugged and not bus.hotplug:
        raise ConfigError(f"Bus '{bus.name}' does not support hotplugging")
    if bus.bridges_only and device.driver not in BRIDGES:
        raise ConfigError("PCI: Only PCI/PCIe bridges can be plugged into pxb-pcie")
    slot, function = devfn >> 3, devfn & 7
    other, zero = bus.devices.get(devfn), bus.devices.get(0 if bus.below_port else devfn & ~7)
    if other is not None:
        raise ConfigError(
            f"PCI: slot {slot} function {function} not available for {device.driver}, in use by "
            f"{other.driver},id={other.id or '(null)'}"
        )
    if plugged and zero is not None:
        raise ConfigError(
            f"PCI: slot {0 if bus.below_port else slot} function 0 already occupied by {zero.driver}, new func "
            f"{device.driver} cannot be "
            "exposed to guest."
        )
    check_functions(bus, devfn, device)


@dataclass
class Buses:
    """The buses of a machine by name, as far as places on them go."""

    slots: dict[str, Slots]
    default: str
    """Where a device goes that does not say; QEMU's choice."""
    check: PlaceCheck

    def find(self, name: object) -> Slots:
        """The bus called so; None: the default one.

        :raise ConfigError: there is none.
        """
        found = self.slots.get(self.default if name is None else str(name))
        if found is None:
            raise ConfigError(f"Bus '{name}' not found")
        return found


EXPANDER: Final = "pxb-pcie"
PORTS: Final = ("pcie-root-port", "ioh3420", "xio3130-downstream")
"""Bridges whose bus is a link, with a slot."""
BRIDGES: Final = (*PORTS, "x3130-upstream", "pcie-pci-bridge", "i82801b11-bridge", "pci-bridge")


def check_functions(bus: Slots, devfn: int, device: Occupant) -> None:
    """:raise ConfigError: the functions of its slot do not say alike whether there are several."""
    slot, function = devfn >> 3, devfn & 7
    zero = bus.devices.get(devfn & ~7)
    if function and zero is not None and not zero.multifunction:
        raise ConfigError(f"PCI: single function device can't be populated in function {slot:x}.{function:x}")
    if not function and not device.multifunction:
        other = next((n for n in range(1, 8) if devfn | n in bus.devices), None)
        if other is not None:
            raise ConfigError(
                f"PCI: {slot:x}.0 indicates single function, but {slot:x}.{other:x} is already populated."
            )
