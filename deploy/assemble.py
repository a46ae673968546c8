"""From a scenario to commands: which daemons a run needs, and the JSON files that they read.

``hostd.json`` has the shape of :class:`vfio_model.host.topology.HostTopology`; ``guestd.json`` has the scenario's
machine and devices plus what a client tells the host about itself. Daemons are started by their command, never
imported: these files are all that they are told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from deploy.launcher import DaemonSpec, python
from deploy.quantity import enc_hook
from deploy.scenario import Device, Scenario

PORT = "hostd.zmq"
INTERPOSED_PORT = "interposer.zmq"
FIRST_GROUP = 26
_HOST_BUS = "0000:01"


def host_name(index: int) -> str:
    """The host's name of the ``index``-th assigned device: its PCI address there."""
    return f"{_HOST_BUS}:{index // 8:02x}.{index % 8}"


def assigned(scenario: Scenario) -> list[tuple[Device, int, str]]:
    """The assigned devices with their IOMMU groups and host names; one that names no group gets one of its own."""
    devices = [device for device in scenario.devices if device.attach == "assigned"]
    taken = {device.group for device in devices}
    free = (number for number in range(FIRST_GROUP, FIRST_GROUP + 1024) if number not in taken)
    return [
        (device, device.group if device.group is not None else next(free), host_name(index))
        for index, device in enumerate(devices)
    ]


def topology(scenario: Scenario) -> dict[str, Any]:
    """``hostd.json``."""
    host = scenario.host
    groups: dict[int, list[dict[str, Any]]] = {}
    for device, group, name in assigned(scenario):
        groups.setdefault(group, []).append({"name": name, "model": device.model, "props": device.props})
    window = {
        "dma32_size": int(host.default_window),
        "pgsizes": sum(host.pgsizes),
        "max_windows": host.max_windows,
    }
    return {
        "groups": [{"id": group, "devices": devices, **window} for group, devices in sorted(groups.items())],
        "host_page_size": int(host.page_size),
        "hpa": host.hpa,
        "containers": host.containers,
    }


def guest_config(scenario: Scenario, directory: Path) -> dict[str, Any]:
    """``guestd.json``. Assigned devices say their group and host name, remote ones the socket of their server."""
    where = {device.id: {"group": group, "host": name} for device, group, name in assigned(scenario)}
    devices = []
    for device in scenario.devices:
        config = msgspec.to_builtins(device, enc_hook=enc_hook)
        config.update(where.get(device.id, {}))
        if device.attach == "remote":
            config["socket"] = str(directory / f"{device.id}.sock")
        devices.append(config)
    return {
        "machine": msgspec.to_builtins(scenario.machine, enc_hook=enc_hook),
        "devices": devices,
        "memlock": int(scenario.host.memlock),
        "host_page_size": int(scenario.host.page_size),
        "container": scenario.container,
        "notifier": scenario.notifier,
        "port": str(directory / (INTERPOSED_PORT if scenario.interpose else PORT)),
        "name": scenario.name,
    }


def rules(scenario: Scenario, *, arm: bool = False) -> list[dict[str, Any]]:
    """The interposer's rules as JSON values; with ``arm`` those that were waiting act too."""
    return [
        msgspec.to_builtins(rule, enc_hook=enc_hook) | ({"armed": True} if arm else {}) for rule in scenario.interpose
    ]


def daemons(scenario: Scenario, directory: Path) -> list[DaemonSpec]:
    """Write the files into ``directory`` and say what to start: the host's side first, then the guest."""
    home = str(directory)
    topology_file = _write(directory / "hostd.json", topology(scenario))
    config_file = _write(directory / "guestd.json", guest_config(scenario, directory))
    host = python("-m", "hostd", "container", "--dir", home, "--topology", topology_file)
    specs = [DaemonSpec("hostd", [*host, "--on-stuck", scenario.host.on_stuck])]
    if scenario.notifier == "process":
        specs.append(DaemonSpec("notifier", python("-m", "hostd", "notifier", "--dir", home)))
    if scenario.interpose:
        rules_file = _write(directory / "interposer.json", rules(scenario))
        specs.append(DaemonSpec("interposer", python("-m", "deploy.interposer", "--dir", home, "--rules", rules_file)))
    specs += [_device_server(device, directory) for device in scenario.devices if device.attach == "remote"]
    return [*specs, DaemonSpec("guestd", python("-m", "guestd", "--dir", home, "--config", config_file), stage=1)]


def _device_server(device: Device, directory: Path) -> DaemonSpec:
    socket = str(directory / f"{device.id}.sock")
    props = msgspec.json.encode(device.props).decode()
    argv = python("-m", "hostd", "device", "--dir", str(directory), "--model", device.model)
    return DaemonSpec(device.id, [*argv, "--socket", socket, "--props", props], ready_file=f"{device.id}.sock")


def _write(path: Path, value: object) -> str:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    return str(path)
