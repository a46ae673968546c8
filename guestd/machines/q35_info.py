"""What of a q35 machine monitors show: the root complex, the vIOMMU, and how it translates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Final

import msgspec

from guestd.machine_config import ANONYMOUS, ROOT_BUS, BridgeConfig, IntelIommuConfig, Q35Config
from guestd.machines.followers import follower
from guestd.machines.q35_places import CHIPSET
from guestd.machines.qom import TYPE_NAMES, QomObject, QomTree, Value
from guestd.machines.walk import Walk
from guestd.places import EXPANDER, PORTS
from vfio_model.iommu.vtd import explain as vtd_explain
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.translation import Translation
from vfio_model.iommu.vtd.walk import page_mask
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.bus import PCIBus
from vfio_model.pci.device import PCIDevice

MACHINE_TYPE: Final = "pc-q35-11.1-machine"
IOAPIC_PINS: Final = 24
_PAGE: Final = 4096
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
    "System": ("bus", False),
    "PCIE": ("PCI", False),
    "pxb-pcie-bus": ("PCIE", False),
    "pci-bridge-base": ("pci-device", True),
    "pcie-port": ("pci-bridge-base", True),
    "pcie-slot": ("pcie-port", True),
    "pcie-root-port-base": ("pcie-slot", True),
    "pcie-root-port": ("pcie-root-port-base", False),
    "ioh3420": ("pcie-root-port-base", False),
    "x3130-upstream": ("pcie-port", False),
    "xio3130-downstream": ("pcie-slot", False),
    "pcie-pci-bridge": ("pci-bridge-base", False),
    "pci-bridge": ("pci-bridge-base", False),
    "i82801b11-bridge": ("pci-bridge-base", False),
    "pxb-pcie": ("pci-device", False),
    **{name: ("pci-device", False) for name in CHIPSET.values()},
}


BUS_TYPES: Final = {**dict.fromkeys((*PORTS, "x3130-upstream"), "PCIE"), EXPANDER: "pxb-pcie-bus"}
"""Of the buses that bridges make; of others: PCI."""
IOMMU_PROPERTIES: Final[Mapping[str, str]] = {
    **{"aw-bits": "uint8", "caching-mode": "bool", "device-iotlb": "bool", "dma-translation": "bool"},
    **{"eim": "OnOffAuto", "fs1gp": "bool", "fsts": "bool", "intremap": "OnOffAuto", "pasid-bits": "uint8"},
    **{"scalable-mode": "bool", "snoop-control": "bool", "stale-tm": "bool", "svm": "bool", "version": "uint32"},
}
"""Of ``intel-iommu``, with types."""


_SYSBUS: Final[Mapping[str, tuple[str, Value]]] = {"parent_bus": ("link<bus>", lambda: "/machine/unattached/sysbus")}


def expander_properties(config: BridgeConfig) -> list[str]:
    """Those of an expander's host bridge, as lines."""
    return [f"bypass-iommu = {str(bool(config.props.get('bypass_iommu'))).lower()}"]


def iommu_properties(config: IntelIommuConfig) -> list[str]:
    """Those of the unit, as lines."""
    found = []
    for name, (kind, value) in _iommu(config).properties.items():
        content = value()
        if kind == "OnOffAuto":
            found.append(f'{name} = "{content}"')
        elif isinstance(content, bool) and name in IOMMU_PROPERTIES:
            found.append(f"{name} = {str(content).lower()}")
        elif isinstance(content, int) and not isinstance(content, bool):
            found.append(f"{name} = {content} ({content:#x})")
    return found


def host_properties(config: Q35Config) -> list[str]:
    """Those of the root complex, as lines."""
    return [f"bypass-iommu = {str(config.default_bus_bypass_iommu).lower()}"]


def qom_tree(config: Q35Config, bridges: Mapping[str, PCIDevice]) -> QomTree:
    """The paths that QEMU has; ``bridges`` by id."""
    tree = QomTree(MACHINE_TYPE)
    tree.properties["default-bus-bypass-iommu"] = "bool", lambda: config.default_bus_bypass_iommu
    host = QomObject("q35-pcihost", properties=dict(_SYSBUS))
    host.properties["bypass-iommu"] = "bool", lambda: config.default_bus_bypass_iommu
    tree.buses[ROOT_BUS] = host.children[ROOT_BUS] = QomObject("PCIE")
    host.children |= {"mch": QomObject("mch"), "ioapic": QomObject("ioapic")}
    tree.objects[""] = {"q35": host}
    tree.objects["unattached"] = {name: QomObject(CHIPSET[devfn]) for devfn, name in _UNATTACHED.items()}
    tree.objects["unattached"]["sysbus"] = QomObject("System")
    if config.iommu is not None:
        _attach(tree, config.iommu.id or f"{ANONYMOUS}0]", _iommu(config.iommu))
    for bridge in config.bridges:
        _attach(tree, bridge.id, _bridge(tree, bridge, bridges[bridge.id]))
    return tree


def _attach(tree: QomTree, name: str, found: QomObject) -> None:
    container = "peripheral-anon" if name.startswith(ANONYMOUS) else "peripheral"
    tree.objects.setdefault(container, {})[name] = found


def _iommu(config: IntelIommuConfig) -> QomObject:
    options = config.options()
    auto = {"eim": options.eim, "intremap": options.intremap}
    found = QomObject("intel-iommu", properties={"realized": ("bool", lambda: True), **_SYSBUS})
    for name, value in msgspec.to_builtins(config).items():
        if name in auto:
            found.properties[name] = "OnOffAuto", partial(_same, "on" if auto[name] else "off")
        elif name in IOMMU_PROPERTIES:
            found.properties[name] = IOMMU_PROPERTIES[name], partial(_same, value)
    return found


def _bridge(tree: QomTree, config: BridgeConfig, device: PCIDevice) -> QomObject:
    above, devfn = tree.buses[config.bus], PCIAddress.parse(config.addr).devfn
    found = QomObject(config.driver, properties={"parent_bus": ("link<bus>", lambda: above.path)})
    found.properties |= {"realized": ("bool", lambda: True), "addr": ("str", lambda: devfn)}
    own = {**{name: prop.default for name, prop in device.PROPS.items() if name != "id"}, **config.props}
    for name, value in own.items():
        found.properties[name] = TYPE_NAMES[type(value)], partial(_same, value)
    kind = BUS_TYPES.get(config.driver, "PCI")
    tree.buses[config.bus_below] = found.children[config.bus_below] = QomObject(kind)
    return found


def _same(value: object) -> object:
    return value


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


def explain_direct(walk: Walk, system: AddressSpace, iova: int) -> None:
    """Of a function that no IOMMU stands before."""
    walk.page_size = _PAGE
    walk.step("address space", "memory: no IOMMU is in between")
    walk.reach(system, iova, 3)


def explain(walk: Walk, translation: Translation, space: VtdSpace, iova: int) -> None:
    """The steps from the address space to RAM."""
    walk.page_size = _PAGE
    walk.step("address space", f"{space.name}: {'translated' if space.translated else 'as memory'}")
    found = vtd_explain.explain(translation.lookup, space, iova)
    for step in found.steps:
        walk.step(*step[:2], ok=step.ok)
    if found.passed:
        walk.reach(translation.system, iova, 3)
    elif found.page is not None:
        low = page_mask(found.page.level)
        walk.page_size = low + 1
        walk.reach(translation.system, found.page.page | iova & low, found.page.perm)
