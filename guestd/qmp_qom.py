"""The objects of the machine as QOM shows them: types, paths, properties (QEMU's ``qapi/qom.json``).

The tree is what there is: the machine, its host bridges and their devices. Properties are read from the live objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from guestd.device_options import ASSIGNED, REMOTE
from guestd.guest import Guest
from guestd.operations import ANONYMOUS
from guestd.qmp_pci import bridges
from protocols.monitor.messages import CommandFailed
from vfio_model.devices import DEVICES
from vfio_model.machine.phb import SpaprPhb
from vfio_model.pci.address import PCIAddress

MACHINE_TYPE: Final = "pseries-machine"
PHB_TYPE: Final = "spapr-pci-host-bridge"
# name: (parent, abstract)
TYPES: Final[Mapping[str, tuple[str, bool]]] = {
    "object": ("", True),
    "container": ("object", False),
    "machine": ("object", True),
    "spapr-machine": ("machine", True),
    MACHINE_TYPE: ("spapr-machine", False),
    "device": ("object", True),
    "sys-bus-device": ("device", True),
    "pci-host-bridge": ("sys-bus-device", True),
    PHB_TYPE: ("pci-host-bridge", False),
    "spapr-tce-table": ("device", False),
    "bus": ("object", True),
    "PCI": ("bus", False),
    "pci-device": ("device", True),
    "vfio-pci-device": ("pci-device", True),
    ASSIGNED: ("vfio-pci-device", False),
    REMOTE: ("vfio-pci-device", False),
    **{name: ("pci-device", False) for name in DEVICES},
}

Value = Callable[[], object]


@dataclass
class QomObject:
    """``properties`` by name: type and how to read it; ``children`` by name."""

    type: str
    path: str = ""
    properties: dict[str, tuple[str, Value]] = field(default_factory=dict)
    children: dict[str, QomObject] = field(default_factory=dict)


def list_types(implements: str | None, abstract: bool | None) -> list[dict[str, object]]:
    """``qom-list-types``: those that derive from ``implements``, the abstract ones only when ``abstract``."""
    found: list[dict[str, object]] = []
    for name, (parent, is_abstract) in TYPES.items():
        if (is_abstract and not abstract) or (implements is not None and implements not in _line(name)):
            continue
        entry: dict[str, object] = {"name": name}
        if parent:
            entry["parent"] = parent
        if is_abstract:
            entry["abstract"] = True
        found.append(entry)
    return found


def _line(name: str) -> list[str]:
    """``name`` and all it derives from."""
    found = []
    while name:
        found.append(name)
        name = TYPES[name][0]
    return found


def tree(guest: Guest) -> QomObject:
    """The root object, made anew from what there is."""
    peripheral, anonymous, unattached = (QomObject("container") for _ in range(3))
    buses: dict[int, QomObject] = {}
    for place, (config, (bus, phb)) in enumerate(zip(guest.config.machine.phbs, bridges(guest), strict=True)):
        bridge = _phb(phb)
        if config.id:
            peripheral.children[config.id] = bridge
        else:
            unattached.children[f"device[{place}]"] = bridge
        shown = bridge.children[bus] = QomObject("PCI")
        buses |= {id(device): shown for device in phb.bus.devices.values()}
    for name in guest.devices:
        (anonymous if name.startswith(ANONYMOUS) else peripheral).children[name] = _device(guest, name, buses)
    machine = QomObject(MACHINE_TYPE)
    machine.children = {"peripheral": peripheral, "peripheral-anon": anonymous, "unattached": unattached}
    root = QomObject("container")
    root.children = {"machine": machine}
    _set_paths(root)
    return root


def _set_paths(start: QomObject) -> None:
    for name, child in start.children.items():
        child.path = f"{start.path}/{name}"
        _set_paths(child)


def _device(guest: Guest, name: str, buses: Mapping[int, QomObject]) -> QomObject:
    config, device = guest.devices[name]
    kind = config.model if config.attach == "emulated" else {"assigned": ASSIGNED, "remote": REMOTE}[config.attach]
    devfn = PCIAddress.parse(config.addr).devfn
    bus = buses[id(device)]
    properties: dict[str, tuple[str, Value]] = {
        "parent_bus": ("link<bus>", lambda: bus.path),
        "realized": ("bool", lambda: True),
        "addr": ("str", lambda: devfn),
    }
    for prop, content in device.props.items():
        properties[prop] = (_TYPE_NAMES[type(content)], lambda content=content: content)  # type: ignore[misc]
    if config.attach == "assigned":
        properties["host"] = ("str", lambda: config.host)
    if config.attach == "remote":
        properties["socket"] = ("str", lambda: config.socket)
    return QomObject(kind, properties=properties)


_TYPE_NAMES: Final[dict[type, str]] = {int: "uint64", bool: "bool", str: "str"}


def _phb(phb: SpaprPhb) -> QomObject:
    options = phb.dma.options
    return QomObject(
        PHB_TYPE,
        properties={
            "realized": ("bool", lambda: True),
            "index": ("uint32", lambda: phb.index),
            "dma_win_addr": ("uint64", lambda: options.dma_win_addr),
            "dma_win_size": ("uint64", lambda: options.dma_win_size),
            "dma64_win_addr": ("uint64", lambda: options.dma64_win_addr),
            "ddw": ("bool", lambda: options.ddw),
            "pgsz": ("uint64", lambda: options.pgsz),
        },
    )


def find(guest: Guest, path: str) -> QomObject:
    """The object at ``path``: absolute, or a part that only one object ends with.

    :raise CommandFailed: DeviceNotFound.
    """
    root = tree(guest)
    parts = [part for part in path.split("/") if part]
    if path.startswith("/"):
        found = [_descend(root, parts)]
    else:
        found = [_descend(start, parts) for start in _all(root)]
    there = [each for each in found if each is not None]
    if not there or not path:
        raise CommandFailed(f"Device '{path}' not found", "DeviceNotFound")
    if len(there) > 1:
        raise CommandFailed(f"Path '{path}' is ambiguous")
    return there[0]


def _descend(start: QomObject, parts: list[str]) -> QomObject | None:
    here: QomObject | None = start
    for part in parts:
        here = here.children.get(part) if here is not None else None
    return here


def _all(start: QomObject) -> list[QomObject]:
    return [start, *(each for child in start.children.values() for each in _all(child))]


def qom_list(guest: Guest, path: str) -> list[dict[str, str]]:
    """``qom-list``: the properties of the object at ``path``, its children among them."""
    found = find(guest, path)
    kinds = {"type": "string"}
    kinds |= {name: kind for name, (kind, _) in found.properties.items()}
    kinds |= {name: f"child<{child.type}>" for name, child in found.children.items()}
    return [{"name": name, "type": kind} for name, kind in kinds.items()]


def qom_get(guest: Guest, path: str, name: str) -> object:
    """``qom-get``: the value of one property; of a child its path."""
    found = find(guest, path)
    if name == "type":
        return found.type
    if name in found.properties:
        return found.properties[name][1]()
    if name in found.children:
        return found.children[name].path
    raise CommandFailed(f"Property '{found.type}.{name}' not found")
