"""The monitor's commands on a whole running system: devices of the host by ``device_add``, what is locked, stopping."""

from __future__ import annotations

import msgspec
import pytest

from protocols.control import messages as control
from tests.processes.rig import CARD, NIC, Live

pytestmark = pytest.mark.machine


def human(live: Live, line: str) -> str:
    """What a person's line answers."""
    command = control.Qmp("human-monitor-command", msgspec.json.encode({"command-line": line}))
    answer = live.link("guestd").ask(command)
    assert isinstance(answer, control.Document)
    return str(msgspec.json.decode(answer.json))


def act(live: Live, name: str, **arguments: object) -> None:
    """Carry out a command that returns nothing."""
    answer = live.link("guestd").ask(control.Qmp(name, msgspec.json.encode(arguments)))
    assert answer == control.Document(b"{}")


def test_devices_of_other_processes_come_and_go_and_the_host_says_what_it_locked() -> None:
    with Live(caches=True) as live:
        assert f"locked_vm: {live.locked_vm()}\r\n" in human(live, "info locked_vm")
        followers = human(live, "info iommu")
        assert "need_vfio on" in followers and followers.count("followed by") >= 2, "VFIO, and the remote device"
        assert f'dev: vfio-pci, id "{NIC}"' in human(live, "info qtree") and f'id "{CARD}"' in human(live, "info pci")
        config = msgspec.json.decode((live.directory / "guestd.json").read_bytes())
        configs = {device["id"]: device for device in config["devices"]}
        assigned, remote = configs[NIC], configs[CARD]
        act(live, "device_del", id=NIC)
        act(live, "device_del", id=CARD)
        alone = live.locked_vm()
        assert alone == live.locked_unassigned()
        act(live, "device_add", driver="vfio-pci", id="again", host=assigned["host"], group=assigned["group"])
        act(live, "device_add", driver="vfio-user-pci", socket={"type": "unix", "path": remote["socket"]}, id="card")
        assert live.locked_vm() > alone
        assert live.device("again")["state"] == live.device("card")["state"] == "running"
