"""What of a q35 machine monitors show: the root complex, the vIOMMU, and how it translates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from guestd.machine_config import ROOT_BUS, Q35Config
from guestd.machines.followers import follower
from guestd.machines.q35_places import CHIPSET
from guestd.machines.qom import QomObject, QomTree
from guestd.machines.walk import PERMS, Walk
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.pci.bus import PCIBus

MACHINE_TYPE: Final = "pc-q35-11.1-machine"
IOAPIC_PINS: Final = 24
_UNATTACHED: Final = {0xF8: "device[2]", 0xFA: "device[12]", 0xFB: "device[13]"}
"""What QEMU calls them in QOM, where no device comes by default."""
TYPES: Final[Mapping[str, tuple[str, bool]]] = {
    "x86-machine": ("machine", True),
    "generic-pc-machine": ("x86-machine", True),
    MACHINE_TYPE: ("generic-pc-machine", False),
    "pcie-host-bridge": ("pci-host-bridge", True),
    "q35-pcihost": ("pcie-host-bridge", False),
    "ioapic-common": ("sys-bus-device", True),
    "ioapic": ("ioapic-common", False),
    "x86-iommu": ("sys-bus-device", True),
    "intel-iommu": ("x86-iommu", False),
    "PCIE": ("PCI", False),
    **{name: ("pci-device", False) for name in CHIPSET.values()},
}


def host_properties(config: Q35Config) -> list[str]:
    """Those of the root complex, as lines."""
    return [f"bypass-iommu = {str(config.default_bus_bypass_iommu).lower()}"]


def qom_tree(config: Q35Config) -> QomTree:
    """The paths that QEMU has."""
    tree = QomTree(MACHINE_TYPE)
    host = QomObject("q35-pcihost", properties={"bypass-iommu": ("bool", lambda: config.default_bus_bypass_iommu)})
    tree.buses[ROOT_BUS] = host.children[ROOT_BUS] = QomObject("PCIE")
    host.children |= {"mch": QomObject("mch"), "ioapic": QomObject("ioapic")}
    tree.objects[""] = {"q35": host}
    tree.objects["unattached"] = {name: QomObject(CHIPSET[devfn]) for devfn, name in _UNATTACHED.items()}
    return tree


def function_spaces(buses: Mapping[str, PCIBus]) -> Iterator[AddressSpace]:
    """The address space of every function."""
    for bus in buses.values():
        for devfn in sorted(bus.devices):
            yield bus.iommu_address_space(devfn)


def iommu_lines(config: Q35Config, buses: Mapping[str, PCIBus]) -> list[str]:
    """The unit, and every space that somebody follows."""
    if config.iommu is None:
        return ["no IOMMU"]
    found = [f"intel-iommu: {'scalable' if config.iommu.scalable_mode else 'legacy'} mode, {config.iommu.aw_bits} bits"]
    for space in dict.fromkeys(function_spaces(buses)):
        for region in _regions(space):
            found += [f"  {space.name} followed by {follower(notifier)}" for notifier in region.notifiers]
    return found


def _regions(space: AddressSpace) -> list[IOMMUMemoryRegion]:
    ranges = (each.region for each in space.view.ranges)
    return list(dict.fromkeys(region for region in ranges if isinstance(region, IOMMUMemoryRegion)))


def explain(walk: Walk, system: AddressSpace, space: AddressSpace, iova: int) -> None:
    """The steps from the address space to RAM."""
    if space is system:
        walk.step("address space", "memory: no IOMMU is in between")
        walk.reach(system, iova, 3)
        return
    walk.step("address space", space.name)
    found = space.view.lookup(iova)
    if found is None or not isinstance(found.region, IOMMUMemoryRegion):
        walk.step("translation", "off" if found is not None else "nothing answers there", ok=found is not None)
        walk.reach(system, iova, 3)
        return
    entry = found.region.translate(iova - found.start + found.offset, IOMMUAccessFlags.NONE, 0)
    perm = int(entry.perm) & 3
    walk.page_size = entry.addr_mask + 1
    what = f"{found.region.name}: page {iova & ~entry.addr_mask:#x} of {walk.page_size:#x} bytes: {PERMS[perm]}"
    if walk.step("translation", what, ok=bool(perm)):
        walk.reach(system, entry.translated_addr & ~entry.addr_mask | iova & entry.addr_mask, perm)
