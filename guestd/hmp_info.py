"""What ``info SUBJECT`` prints about the machine: PCI, the device tree, locked memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guestd.guest import Guest
from guestd.host_status import Mm, own_mm
from guestd.places import Occupant
from guestd.qmp_pci import CLASSES, UNMAPPED, query_pci, regions
from protocols.transport.loop import Loop
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.device import PCIDevice


def pci(guest: Guest) -> list[str]:
    """``info pci``."""
    found: list[str] = []
    for about in query_pci(guest):
        found += _pci_bus(about)
    return found


def _pci_bus(about: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for function in about.get("devices", ()):
        found += _pci_function(function)
        found += _pci_bus(function.get("pci_bridge", {}))
    return found


def _pci_function(about: Mapping[str, Any]) -> list[str]:
    number, ids, bridge = about["class_info"]["class"], about["id"], about.get("pci_bridge")
    kind = CLASSES.get(number, f"Class {number:04}")
    lines = [
        f"  Bus {about['bus']:2}, device {about['slot']:3}, function {about['function']}:",
        f"    {kind}: PCI device {ids['vendor']:04x}:{ids['device']:04x}",
    ]
    if ids.get("subsystem-vendor") or ids.get("subsystem"):
        lines.append(f"      PCI subsystem {ids['subsystem-vendor']:04x}:{ids['subsystem']:04x}")
    if about["irq_pin"]:
        lines.append(f"      IRQ {about['irq']}, pin {'ABCD'[about['irq_pin'] - 1]}")
    if bridge is not None:
        lines += _pci_bridge(bridge["bus"])
    lines += [f"      BAR{region['bar']}: {_bar(region)}" for region in about["regions"]]
    return [*lines, f'      id "{about["qdev_id"]}"']


def _pci_bridge(bus: Mapping[str, Any]) -> list[str]:
    io, memory, prefetch = bus["io_range"], bus["memory_range"], bus["prefetchable_range"]
    return [
        f"      BUS {bus['number']}.",
        f"      secondary bus {bus['secondary']}.",
        f"      subordinate bus {bus['subordinate']}.",
        f"      IO range [0x{io['base']:04x}, 0x{io['limit']:04x}]",
        f"      memory range [0x{memory['base']:08x}, 0x{memory['limit']:08x}]",
        f"      prefetchable memory range [0x{prefetch['base']:08x}, 0x{prefetch['limit']:08x}]",
    ]


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
        found += [f"    {line}" for line in _qtree_bus(guest, bridge.bus)] if bridge.bus else []
    return found


def _qtree_bus(guest: Guest, name: str) -> list[str]:
    board = guest.board
    places = board.places(guest.devices).slots[name]
    below = {id(bus.upstream): called for called, bus in board.buses.items() if not bus.is_root}
    found = [f"bus: {name}", f"  type {board.bus_type(name)}"]
    for devfn, device in sorted(board.buses[name].devices.items(), reverse=True):
        address = str(board.buses[name].address(devfn)).partition(":")[2]
        found += [f"  {line}" for line in _qtree_device(address, device, places.devices[devfn])]
        if id(device) in below:
            found += [f"    {line}" for line in _qtree_bus(guest, below[id(device)])]
    return found


def _qtree_device(address: str, device: PCIDevice, place: Occupant) -> list[str]:
    lines = [f'dev: {place.driver}, id "{place.id}"', f"  addr = {address.partition(':')[2]}"]
    for prop, value in device.props.items():
        if prop == "id":
            continue
        text = f"{value} ({value:#x})" if type(value) is int else f'"{value}"' if isinstance(value, str) else value
        lines.append(f"  {prop} = {str(text).lower() if isinstance(value, bool) else text}")
    ids = f"{device.VENDOR_ID:04x}:{device.DEVICE_ID:04x}"
    has_subsystem = not isinstance(device, PCIBridge)
    subsystem = f"{device.SUBSYSTEM_VENDOR_ID:04x}:{device.SUBSYSTEM_ID:04x}" if has_subsystem else "0000:0000"
    kind = CLASSES.get(device.CLASS_ID, f"Class {device.CLASS_ID:04x}")
    lines.append(f"  class {kind}, addr {address}, pci id {ids} (sub {subsystem})")
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
