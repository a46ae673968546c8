"""What ``info SUBJECT`` prints about the machine: PCI, the device tree, locked memory."""

from __future__ import annotations

from guestd.device_options import driver_of
from guestd.guest import Guest
from guestd.host_status import Mm, own_mm
from guestd.machines.board import shown_id
from guestd.qmp_pci import UNMAPPED, query_pci, regions
from protocols.transport.loop import Loop
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.device import PCIDevice


def pci(guest: Guest) -> list[str]:
    """``info pci``."""
    found: list[str] = []
    for bus, about in zip(guest.board.root_buses(), query_pci(guest), strict=True):
        names = about["devices"]
        assert isinstance(names, list), "a list of functions"
        for (devfn, device), function in zip(sorted(bus.devices.items()), names, strict=True):
            found += _pci_function(bus, devfn, device, function)
    return found


def _pci_function(bus: PCIBus, devfn: int, device: PCIDevice, about: dict[str, object]) -> list[str]:
    lines = [
        f"  Bus {bus.number:2}, device {devfn >> 3:3}, function {devfn & 7}:",
        f"    Class {device.CLASS_ID:04}: PCI device {device.VENDOR_ID:04x}:{device.DEVICE_ID:04x}",
    ]
    if device.SUBSYSTEM_VENDOR_ID or device.SUBSYSTEM_ID:
        lines.append(f"      PCI subsystem {device.SUBSYSTEM_VENDOR_ID:04x}:{device.SUBSYSTEM_ID:04x}")
    if device.INTERRUPT_PIN:
        lines.append(f"      IRQ {about['irq']}, pin {'ABCD'[device.INTERRUPT_PIN - 1]}")
    lines += [f"      BAR{region['bar']}: {_bar(region)}" for region in regions(device)]
    return [*lines, f'      id "{about["qdev_id"]}"']


def _bar(region: dict[str, object]) -> str:
    address, size = region["address"], region["size"]
    assert isinstance(address, int) and isinstance(size, int), "numbers"
    if region["type"] == "io":
        kind, digits = "I/O", 4
    else:
        width, digits = (64 if region["mem_type_64"] else 32), 8
        kind = f"{width} bit {'prefetchable ' if region['prefetch'] else ''}memory"
    if address == UNMAPPED:
        return f"{kind} (not mapped)"
    return f"{kind} at 0x{address:0{digits}x} [0x{address + size - 1:0{digits}x}]"


def qtree(guest: Guest) -> list[str]:
    """``info qtree``."""
    found = ["bus: main-system-bus", "  type System"]
    for bridge in guest.board.qtree():
        found.append(f'  dev: {bridge.driver}, id "{bridge.id}"')
        found += [f"    {line}" for line in bridge.lines]
        found += [f"    {line}" for line in _qtree_bus(guest, bridge.bus)]
    return found


def _qtree_bus(guest: Guest, name: str) -> list[str]:
    names = {id(device): called for called, (_, device) in guest.devices.items()}
    found = [f"bus: {name}", "  type PCI"]
    for devfn, device in sorted(guest.board.buses[name].devices.items(), reverse=True):
        found += [f"  {line}" for line in _qtree_device(guest, devfn, device, names.get(id(device), ""))]
    return found


def _qtree_device(guest: Guest, devfn: int, device: PCIDevice, name: str) -> list[str]:
    driver = driver_of(guest.devices[name][0]) if name else type(device).__name__
    lines = [f'dev: {driver}, id "{shown_id(name)}"', f"  addr = {devfn >> 3:02x}.{devfn & 7}"]
    for prop, value in device.props.items():
        text = f"{value} ({value:#x})" if type(value) is int else f'"{value}"' if isinstance(value, str) else value
        lines.append(f"  {prop} = {str(text).lower() if isinstance(value, bool) else text}")
    ids = f"{device.VENDOR_ID:04x}:{device.DEVICE_ID:04x}"
    subsystem = f"{device.SUBSYSTEM_VENDOR_ID:04x}:{device.SUBSYSTEM_ID:04x}"
    address = f"00:{devfn >> 3:02x}.{devfn & 7}"
    lines.append(f"  class Class {device.CLASS_ID:04x}, addr {address}, pci id {ids} (sub {subsystem})")
    for region in regions(device):
        first, size = region["address"], region["size"]
        assert isinstance(first, int) and isinstance(size, int), "numbers"
        mask = (1 << 64) - 1
        kind = "i/o" if region["type"] == "io" else "mem"
        lines.append(f"  bar {region['bar']}: {kind} at {first & mask:#x} [{first + size - 1 & mask:#x}]")
    return lines


def locked_vm(guest: Guest, loop: Loop) -> list[str]:
    """``info locked_vm``: what the host has accounted to this guest, in pages of the host, and its limit in bytes."""
    if guest.host.port is None:
        return ["locked_vm: 0 (no host is connected)"]
    mm = own_mm(guest.directory, loop)
    if not isinstance(mm, Mm):
        return [f"locked_vm: unknown ({mm})"]
    limit = "unlimited" if mm.memlock is None else str(mm.memlock)
    return [f"locked_vm: {mm.locked_vm}", f"memlock: {limit}"]
