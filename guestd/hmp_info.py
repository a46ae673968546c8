"""What ``info SUBJECT`` prints about the machine: PCI, the device tree, windows, vIOMMU, locked memory."""

from __future__ import annotations

from guestd.device_options import driver_of
from guestd.guest import Guest
from guestd.host_status import Mm, own_mm
from guestd.operations import ANONYMOUS
from guestd.qmp_pci import UNMAPPED, bridges, named_buses, query_pci, regions
from protocols.transport.loop import Loop
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.phb import SpaprPhb
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.device import PCIDevice


def pci(guest: Guest) -> list[str]:
    """``info pci``."""
    found: list[str] = []
    for bus, about in zip(reversed(named_buses(guest).values()), query_pci(guest), strict=True):
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
    names = {id(device): name for name, (_, device) in guest.devices.items()}
    for name, phb in bridges(guest):
        found.append('  dev: spapr-pci-host-bridge, id ""')
        found += [f"    {line}" for line in _phb_properties(phb)]
        found += [f"    bus: {name}", "      type PCI"]
        for devfn, device in sorted(phb.bus.devices.items(), reverse=True):
            found += [f"      {line}" for line in _qtree_device(devfn, device, names.get(id(device), ""))]
    return found


def _phb_properties(phb: SpaprPhb) -> list[str]:
    options = phb.dma.options
    numbers = {
        "index": phb.index,
        "dma_win_addr": options.dma_win_addr,
        "dma_win_size": options.dma_win_size,
        "dma64_win_addr": options.dma64_win_addr,
    }
    lines = [f"{name} = {value} ({value:#x})" for name, value in numbers.items()]
    return [*lines, f"ddw = {str(options.ddw).lower()}", f"pgsz = {options.pgsz} ({options.pgsz:#x})"]


def _qtree_device(devfn: int, device: PCIDevice, name: str) -> list[str]:
    shown = "" if name.startswith(ANONYMOUS) else name
    lines = [f'dev: {driver_of(device)}, id "{shown}"', f"  addr = {devfn >> 3:02x}.{devfn & 7}"]
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


def windows(guest: Guest) -> list[str]:
    """``info windows``: every open DMA window; addresses inclusive, sizes in bytes."""
    found = []
    for table in sorted(guest.machine.tables.values(), key=lambda table: table.liobn):
        window = table.window
        if window is not None:
            where = f"LIOBN {table.liobn:08x}: {window.start:016x}-{window.last:016x}"
            found.append(f"{where}, page size {1 << table.page_shift:#x}, entries {table.nb_table:#x}")
    return found or ["no DMA window is open"]


def iommu(guest: Guest) -> list[str]:
    """``info iommu``: every vIOMMU unit, its tables, and who follows them."""
    found = []
    for phb in guest.machine.phbs.values():
        found.append(f"{phb.name}: sPAPR TCE, address space {phb.address_space.name}")
        for table in phb.dma.tables:
            found += _table(table)
    units = [device for device in guest.machine.vio if device.dma is not None]
    for unit in units:
        assert unit.dma is not None, "filtered above"
        found.append(f"{unit.node}: sPAPR TCE, bypass {'on' if unit.dma.bypass else 'off'}")
        found += _table(unit.dma.table)
    return found


def _table(table: SpaprTceTable) -> list[str]:
    if table.iommu is None:
        return [f"  LIOBN {table.liobn:08x}: disabled"]
    need = f"need_vfio {'on' if table.need_vfio else 'off'}{', in the kernel' if table.kernel is not None else ''}"
    lines = [f"  LIOBN {table.liobn:08x}: {table.nb_table:#x} entries of {1 << table.page_shift:#x} bytes, {need}"]
    return [*lines, *(f"    followed by {_follower(notifier)}" for notifier in table.iommu.notifiers)]


def _follower(notifier: IOMMUNotifier) -> str:
    """The owner of the callback names the follower; the range is relative to the window."""
    owner = type(getattr(notifier.fn, "__self__", notifier.fn)).__name__
    flags = "|".join(flag.name or "" for flag in type(notifier.flags) if flag and flag in notifier.flags)
    return f"{owner}: {flags}, {notifier.start:016x}-{notifier.last:016x}"


def locked_vm(guest: Guest, loop: Loop) -> list[str]:
    """``info locked_vm``: what the host has accounted to this guest, in pages of the host, and its limit in bytes."""
    if guest.host.port is None:
        return ["locked_vm: 0 (no host is connected)"]
    mm = own_mm(guest.directory, loop)
    if not isinstance(mm, Mm):
        return [f"locked_vm: unknown ({mm})"]
    limit = "unlimited" if mm.memlock is None else str(mm.memlock)
    return [f"locked_vm: {mm.locked_vm}", f"memlock: {limit}"]
