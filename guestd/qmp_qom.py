"""The objects of the machine as QOM shows them: types, paths, properties (QEMU's ``qapi/qom.json``).

The tree is what there is: the machine, its host bridges and their devices. Properties are read from the live objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from guestd.config import ANONYMOUS
from guestd.device_options import ASSIGNED, REMOTE, driver_of
from guestd.guest import Guest
from guestd.machines.qom import TYPE_NAMES, QomObject, Value
from protocols.monitor.messages import CommandFailed
from vfio_model.devices import DEVICES
from vfio_model.pci.address import PCIAddress

_TYPES: Final[Mapping[str, tuple[str, bool]]] = {
    "object": ("", True),
    "container": ("object", False),
    "machine": ("object", True),
    "device": ("object", True),
    "sys-bus-device": ("device", True),
    "pci-host-bridge": ("sys-bus-device", True),
    "bus": ("object", True),
    "PCI": ("bus", False),
    "pci-device": ("device", True),
    "vfio-pci-device": ("pci-device", True),
    ASSIGNED: ("vfio-pci-device", False),
    REMOTE: ("vfio-pci-device", False),
    **{name: ("pci-device", False) for name in DEVICES},
}
"""Of every machine; by name: (parent, abstract)."""


def list_types(guest: Guest, implements: str | None, abstract: bool | None) -> list[dict[str, object]]:
    """``qom-list-types``: those that derive from ``implements``, the abstract ones only when ``abstract``."""
    found: list[dict[str, object]] = []
    types = {**_TYPES, **guest.board.qom_types}
    for name, (parent, is_abstract) in types.items():
        if (is_abstract and not abstract) or (implements is not None and implements not in _line(types, name)):
            continue
        entry: dict[str, object] = {"name": name}
        if parent:
            entry["parent"] = parent
        if is_abstract:
            entry["abstract"] = True
        found.append(entry)
    return found


def _line(types: Mapping[str, tuple[str, bool]], name: str) -> list[str]:
    """``name`` and all it derives from."""
    found = []
    while name:
        found.append(name)
        name = types[name][0]
    return found


def tree(guest: Guest) -> QomObject:
    """The root object, made anew from what there is."""
    own = guest.board.qom()
    machine = QomObject(own.machine_type, properties=own.properties)
    machine.children = {name: QomObject("container") for name in ("peripheral", "peripheral-anon", "unattached")}
    for container, objects in own.objects.items():
        (machine.children[container] if container else machine).children |= objects
    buses = {id(bus): own.buses[name] for name, bus in guest.board.buses.items()}
    for name, (config, _) in guest.devices.items():
        bus = buses[id(guest.board.bus_of(config))]
        container = "peripheral-anon" if name.startswith(ANONYMOUS) else "peripheral"
        machine.children[container].children[name] = _device(guest, name, bus)
    root = QomObject("container")
    root.children = {"machine": machine}
    _set_paths(root)
    return root


def _set_paths(start: QomObject) -> None:
    for name, child in start.children.items():
        child.path = f"{start.path}/{name}"
        _set_paths(child)


def _device(guest: Guest, name: str, bus: QomObject) -> QomObject:
    config, device = guest.devices[name]
    devfn = PCIAddress.parse(config.addr).devfn
    properties: dict[str, tuple[str, Value]] = {
        "parent_bus": ("link<bus>", lambda: bus.path),
        "realized": ("bool", lambda: True),
        "addr": ("str", lambda: devfn),
    }
    for prop, content in device.props.items():
        properties[prop] = (TYPE_NAMES[type(content)], partial(_same, content))
    if config.attach == "assigned":
        properties["host"] = ("str", lambda: config.host)
    if config.attach == "remote":
        properties["socket"] = ("str", lambda: config.socket)
    return QomObject(driver_of(config), properties=properties)


def _same(content: object) -> object:
    return content


def find(guest: Guest, path: str, *, says_ambiguous: bool = True) -> QomObject:
    """The object at ``path``: absolute, or a part that only one object ends with.

    :raise CommandFailed: DeviceNotFound; if it ``says_ambiguous`` GenericError where several end so.
    """
    root = tree(guest)
    parts = [part for part in path.split("/") if part]
    if path.startswith("/"):
        found = [_descend(root, parts)]
    else:
        found = [_descend(start, parts) for start in _all(root)]
    there = [each for each in found if each is not None]
    if len(there) == 1:
        return there[0]
    if there and says_ambiguous:
        raise CommandFailed(f"Path '{path}' is ambiguous")
    raise CommandFailed(f"Device '{path}' not found", "DeviceNotFound")


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
    found = find(guest, path, says_ambiguous=False)
    if name == "type":
        return found.type
    if name in found.properties:
        return found.properties[name][1]()
    if name in found.children:
        return found.children[name].path
    raise CommandFailed(f"Property '{found.type}.{name}' not found")
