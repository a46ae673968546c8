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
from deploy.scenario import Scenario
from deploy.scenario_machine import Device
from deploy.scenario_steps import Migrate

PORT = "hostd.zmq"
INTERPOSED_PORT = "interposer.zmq"
FIRST_GROUP = 26
_HOST_DOMAIN = "0000"


def host_name(index: int, copy: int = 0) -> str:
    """The host's name of the ``index``-th assigned device, or of its second ``copy``: its PCI address there."""
    return f"{_HOST_DOMAIN}:{1 + copy:02x}:{index // 8:02x}.{index % 8}"


def numbered(role: str, number: int) -> str:
    """What a process of the ``number``-th guest is called."""
    return role if number == 1 else f"{role}-{number}"


def stream(number: int) -> str:
    """Where the ``number``-th guest waits for the machine."""
    return f"stream-{number}.sock"


def remote_ids(scenario: Scenario) -> list[str]:
    """The devices that are served by a process of ours."""
    return [device.id for device in scenario.devices if device.attach == "remote"]


def copies(scenario: Scenario) -> int:
    """How many of each assigned device the host has: two where the guest moves."""
    return 1 + any(isinstance(step.migrate, Migrate) for step in scenario.steps)


def assigned(scenario: Scenario, copy: int = 0) -> list[tuple[Device, int, str]]:
    """The assigned devices with their IOMMU groups and host names; one that names no group gets one of its own. The
    second ``copy`` of each is in another group, with those that the first was with.
    """
    devices = [device for device in scenario.devices if device.attach == "assigned"]
    taken = {device.group for device in devices}
    free = (number for number in range(FIRST_GROUP, FIRST_GROUP + 1024) if number not in taken)
    groups = [device.group if device.group is not None else next(free) for device in devices]
    if copy:
        others = {group: next(free) for group in dict.fromkeys(groups)}
        groups = [others[group] for group in groups]
    return [
        (device, group, host_name(index, copy))
        for index, (device, group) in enumerate(zip(devices, groups, strict=True))
    ]


def topology(scenario: Scenario) -> dict[str, Any]:
    """``hostd.json``."""
    host = scenario.host
    groups: dict[int, list[dict[str, Any]]] = {}
    for device, group, name in (each for copy in range(copies(scenario)) for each in assigned(scenario, copy)):
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


def guest_config(scenario: Scenario, directory: Path, number: int = 1, copy: int = 0) -> dict[str, Any]:
    """``guestd.json``. Assigned devices say their group and host name, remote ones the socket of their server."""
    where = {device.id: {"group": group, "host": name} for device, group, name in assigned(scenario, copy)}
    devices = []
    for device in scenario.devices:
        config = msgspec.to_builtins(device, enc_hook=enc_hook)
        config.update(where.get(device.id, {}))
        if device.attach == "remote":
            config["socket"] = str(directory / f"{numbered(device.id, number)}.sock")
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


def destination(scenario: Scenario, directory: Path, number: int, copy: int) -> list[DaemonSpec]:
    """What to start for the ``number``-th guest, which waits for the machine in a directory of its own; its assigned
    devices are the host's ``copy``.
    """
    role = numbered("guestd", number)
    home = directory / role
    home.mkdir(mode=0o700)
    config = guest_config(scenario, directory, number, copy) | {
        "host_dir": str(directory),
        "incoming": f"unix:{directory / stream(number)}",
        "notifier": "inline",
    }
    argv = python("-m", "guestd", "--dir", str(home), "--config", _write(directory / f"{role}.json", config))
    servers = [_device_server(device, directory, number) for device in scenario.devices if device.attach == "remote"]
    return [*servers, DaemonSpec(role, argv, stage=1, home=role, speaks="guestd")]


def _device_server(device: Device, directory: Path, number: int = 1) -> DaemonSpec:
    role = numbered(device.id, number)
    socket = str(directory / f"{role}.sock")
    props = msgspec.json.encode(device.props).decode()
    argv = python("-m", "hostd", "device", "--dir", str(directory), "--model", device.model)
    return DaemonSpec(role, [*argv, "--socket", socket, "--props", props], ready_file=f"{role}.sock")


def _write(path: Path, value: object) -> str:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
    return str(path)
