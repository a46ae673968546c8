"""``query-pci``: the functions of every bus and what their BARs decode (``PciInfo`` in QEMU's ``qapi/pci.json``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from guestd.guest import Guest
from guestd.machines.board import shown_id
from vfio_model.pci.bar import BarType
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.config_space import INTERRUPT_LINE
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.type1 import IO_GRANULE, IO_WINDOW_BITS, MEMORY_GRANULE, MEMORY_WINDOW_BITS

UNMAPPED: Final = -1
"""The address of a BAR that decodes nothing."""
CLASSES: Final = {
    0x0106: "SATA controller",
    0x0200: "Ethernet controller",
    0x0600: "Host bridge",
    0x0601: "ISA bridge",
    0x0604: "PCI bridge",
    0x0C05: "SMBus",
}
"""Classes that have a name, as QEMU has it."""


def query_pci(guest: Guest) -> list[dict[str, object]]:
    """A ``PciInfo`` for each bus that is behind no bridge."""
    names = {id(device): name for name, (_, device) in guest.devices.items()}
    names |= {id(device): name for name, device in guest.board.bridges.items()}
    return [{"bus": bus.number, "devices": _functions(bus, names)} for bus in guest.board.root_buses()]


def _functions(bus: PCIBus, names: Mapping[int, str]) -> list[dict[str, object]]:
    functions = sorted(bus.devices.items())
    return [_function(bus, devfn, device, names) for devfn, device in functions]


def _function(bus: PCIBus, devfn: int, device: PCIDevice, names: Mapping[int, str]) -> dict[str, object]:
    about: dict[str, object] = {
        "bus": bus.number,
        "slot": devfn >> 3,
        "function": devfn & 7,
        "class_info": {"class": device.CLASS_ID},
        "id": {"device": device.DEVICE_ID, "vendor": device.VENDOR_ID},
        "irq_pin": device.INTERRUPT_PIN,
        "qdev_id": shown_id(names.get(id(device), "")),
        "regions": regions(device),
    }
    if device.CLASS_ID in CLASSES:
        about["class_info"] = {"class": device.CLASS_ID, "desc": CLASSES[device.CLASS_ID]}
    if isinstance(device, PCIBridge):
        about["pci_bridge"] = _bridge(device, names)
    else:
        about["id"] = {
            "device": device.DEVICE_ID,
            "vendor": device.VENDOR_ID,
            "subsystem-vendor": device.SUBSYSTEM_VENDOR_ID,
            "subsystem": device.SUBSYSTEM_ID,
        }
    if device.INTERRUPT_PIN:
        about["irq"] = device.config.read(INTERRUPT_LINE, 1)
    return about


def _bridge(device: PCIBridge, names: Mapping[int, str]) -> dict[str, object]:
    """``PciBridgeInfo``: numbers and windows, whether they decode or not; what is behind it, if it has a number."""
    get = device.config.get

    def range_of(kind: str, bits: int, shift: int, granule: int, upper: int = 0) -> dict[str, int]:
        base, limit = ((get(f"{kind}_{end}") & bits) << shift for end in ("base", "limit"))
        if upper:
            base, limit = base | get(f"{kind}_base_upper") << upper, limit | get(f"{kind}_limit_upper") << upper
        return {"base": base, "limit": limit | granule - 1}

    bus = {
        "number": get("primary_bus"),
        "secondary": get("secondary_bus"),
        "subordinate": get("subordinate_bus"),
        "io_range": range_of("io", IO_WINDOW_BITS, 8, IO_GRANULE, upper=16),
        "memory_range": range_of("memory", MEMORY_WINDOW_BITS, 16, MEMORY_GRANULE),
        "prefetchable_range": range_of("prefetch", MEMORY_WINDOW_BITS, 16, MEMORY_GRANULE, upper=32),
    }
    found: dict[str, object] = {"bus": bus}
    if get("secondary_bus"):
        found["devices"] = _functions(device.secondary, names)
    return found


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
