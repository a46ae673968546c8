"""``query-pci``: the functions of every bus and what their BARs decode (``PciInfo`` in QEMU's ``qapi/pci.json``)."""

from __future__ import annotations

from typing import Final

from guestd.guest import Guest
from guestd.machines.board import shown_id
from vfio_model.pci.bar import BarType
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.config_space import INTERRUPT_LINE
from vfio_model.pci.device import PCIDevice

UNMAPPED: Final = -1
"""The address of a BAR that decodes nothing."""


def query_pci(guest: Guest) -> list[dict[str, object]]:
    """A ``PciInfo`` for each bus that is behind no bridge."""
    names = {id(device): name for name, (_, device) in guest.devices.items()}
    return [
        {
            "bus": bus.number,
            "devices": [
                _function(bus, devfn, device, names.get(id(device), ""))
                for devfn, device in sorted(bus.devices.items())
            ],
        }
        for bus in guest.board.root_buses()
    ]


def _function(bus: PCIBus, devfn: int, device: PCIDevice, name: str) -> dict[str, object]:
    about: dict[str, object] = {
        "bus": bus.number,
        "slot": devfn >> 3,
        "function": devfn & 7,
        "class_info": {"class": device.CLASS_ID},
        "id": {
            "device": device.DEVICE_ID,
            "vendor": device.VENDOR_ID,
            "subsystem-vendor": device.SUBSYSTEM_VENDOR_ID,
            "subsystem": device.SUBSYSTEM_ID,
        },
        "irq_pin": device.INTERRUPT_PIN,
        "qdev_id": shown_id(name),
        "regions": regions(device),
    }
    if device.INTERRUPT_PIN:
        about["irq"] = device.config.read(INTERRUPT_LINE, 1)
    return about


def regions(device: PCIDevice) -> list[dict[str, object]]:
    """The BARs: ``address`` on the bus, or -1."""
    found: list[dict[str, object]] = []
    for bar in device.BARS:
        where = device.bar_range(bar.index, allow_zero=True)
        region: dict[str, object] = {"bar": bar.index, "size": bar.size, "type": "io" if bar.is_io else "memory"}
        region["address"] = UNMAPPED if where is None else where.start
        if not bar.is_io:
            region |= {"prefetch": bar.prefetch, "mem_type_64": bar.type is BarType.MEM64}
        found.append(region)
    return found
