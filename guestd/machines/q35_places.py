"""The places on a q35's buses, before there is a machine and while it runs."""

from __future__ import annotations

from typing import Final

from guestd.machine_config import ROOT_BUS, BridgeConfig
from guestd.places import EXPANDER, PORTS, Buses, Occupant, Slots, check_pc
from vfio_model.pci.address import PCIAddress

CHIPSET: Final = {0x00: "mch", 0xF8: "ICH9-LPC", 0xFA: "ich9-ahci", 0xFB: "ICH9-SMB"}
"""Functions of the root bus that are always there, by devfn."""


def root_places() -> Buses:
    """The root bus with what is always there."""
    chipset = {devfn: Occupant(driver, multifunction=devfn >= 0xF8) for devfn, driver in CHIPSET.items()}
    return Buses({ROOT_BUS: Slots(ROOT_BUS, chipset, hotplug=False)}, ROOT_BUS, check_pc)


def add_bridge(buses: Buses, bridge: BridgeConfig) -> None:
    """``bridge`` in its place, and the bus that it makes. QEMU puts on an expander's bus what does not say."""
    devfn = PCIAddress.parse(bridge.addr).devfn
    occupant = Occupant(bridge.driver, bridge.named_id, bridge.multifunction)
    buses.slots[bridge.bus].devices[devfn] = occupant
    below = Slots(bridge.bus_below)
    below.bridges_only = bridge.driver == EXPANDER
    below.hotplug = not below.bridges_only and bool(bridge.props.get("hotplug", True))
    below.below_port = bridge.driver in PORTS
    buses.slots[below.name] = below
    if below.bridges_only:
        buses.default = below.name
