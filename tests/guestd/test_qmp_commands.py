"""QMP's commands: what they return, what they do to a guest, and what they refuse with which words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestd.machine_config import PhbConfig, PseriesConfig
from protocols.monitor.commands import COMMANDS
from protocols.monitor.messages import CommandFailed
from protocols.transport.loop import Loop
from tests.acceleration import kvm
from tests.guestd.monitor_rig import Machine
from vfio_model.devices import DEVICES
from vfio_model.errors import InternalGuestError
from vfio_model.iommu.spapr.regs import HCall

pytestmark = pytest.mark.machine

BAR = 0x8010_0000


def test_every_command_of_the_table_has_who_carries_it_out(machine: Machine) -> None:
    assert {*machine.commands.handlers, "qmp_capabilities"} == set(COMMANDS)
    assert machine.ask("query-commands") == [{"name": name} for name in COMMANDS]
    assert machine.refusal("nope") == ("CommandNotFound", "The command nope has not been found")


def test_who_the_guest_is(machine: Machine) -> None:
    assert machine.ask("query-name") == {"name": "guest"} and machine.ask("query-target") == {"arch": "ppc64"}
    assert machine.ask("query-uuid") == {"UUID": machine.human("info uuid").strip()}
    assert machine.ask("query-kvm") == {"enabled": kvm(), "present": kvm()}


def test_query_pci_shows_functions_and_what_their_bars_decode(machine: Machine) -> None:
    machine.config(0x10, 4, BAR)
    machine.config(0x3C, 1, 9)
    (bus,) = machine.ask("query-pci")
    (function,) = bus["devices"]
    assert function["regions"][0]["address"] == -1, "decoding is off"
    machine.config(4, 2, 2)
    ((function,),) = (bus["devices"] for bus in machine.ask("query-pci"))
    assert function == {
        "bus": 0,
        "slot": 2,
        "function": 0,
        "class_info": {"class": 0xFF},
        "id": {"vendor": 0x1234, "device": 0x11E8, "subsystem-vendor": 0x1AF4, "subsystem": 0x1100},
        "irq": 9,
        "irq_pin": 1,
        "qdev_id": "e0",
        "regions": [
            {"bar": 0, "type": "memory", "size": 1 << 20, "address": BAR, "prefetch": False, "mem_type_64": False}
        ],
    }


def test_stop_freezes_virtual_time_and_cont_lets_it_go_on(machine: Machine) -> None:
    fired: list[int] = []
    machine.guest.clock.virtual.timer(lambda: fired.append(1)).mod(100)
    machine.ask("stop")
    machine.ask("stop")
    assert machine.ask("query-status") == {"status": "paused", "running": False}
    assert machine.guest.clock.step(1000) == 1000 and not fired
    machine.ask("cont")
    machine.ask("cont")
    assert fired and machine.guest.clock.now_ns == 1000
    assert machine.ask("query-status") == {"status": "running", "running": True}
    assert machine.told() == ["STOP", "RESUME"]


def test_a_reset_empties_the_windows_and_is_told(machine: Machine) -> None:
    hcall = machine.guest.machine.hcall
    hcall(int(HCall.H_PUT_TCE), 0x8000_0000, 0x3000, 0x5003)
    machine.ask("system_reset")
    assert hcall(int(HCall.H_GET_TCE), 0x8000_0000, 0x3000) == (0, [0])
    assert machine.events == [("RESET", {"guest": False, "reason": "host-qmp-system-reset"})]


def test_devices_come_with_the_options_of_qemu_and_go_with_an_event(machine: Machine) -> None:
    machine.commands.ask("device_add", {"driver": "edu", "id": "e1", "addr": "5", "dma_mask": 0xFF})
    machine.commands.ask("device_add", {"driver": "edu"})
    slots = [device["slot"] for bus in machine.ask("query-pci") for device in bus["devices"]]
    assert slots == [0, 2, 5], "the first free slot for who asks for none"
    assert machine.ask("qom-get", path="e1", property="dma_mask") == 0xFF
    machine.ask("device_del", id="e1")
    machine.ask("device_del", id="/machine/peripheral-anon/device[1]")
    assert machine.events == [], "after the answer"
    machine.told()
    assert machine.events == [
        ("DEVICE_DELETED", {"device": "e1", "path": "/machine/peripheral/e1"}),
        ("DEVICE_DELETED", {"path": "/machine/peripheral-anon/device[1]"}),
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Parameter 'driver' is missing"),
        ({"driver": 5}, "Parameter 'driver' is missing"),
        ({"driver": "nope"}, "'nope' is not a valid device model name"),
        ({"driver": "edu", "id": "e0"}, "Duplicate device ID 'e0'"),
        ({"driver": "edu", "id": "e 1"}, "Invalid qdev ID 'e 1'"),
        ({"driver": "edu", "id": ""}, "Invalid qdev ID ''"),
        ({"driver": "edu", "bus": "nobus"}, "Bus 'nobus' not found"),
        ({"driver": "edu", "addr": "2"}, "PCI: slot 2 already occupied by edu"),
        ({"driver": "edu", "addr": "99"}, "Property 'edu.addr' doesn't take value '99'"),
        ({"driver": "edu", "addr": "a.9"}, "Property 'edu.addr' doesn't take value 'a.9'"),
        ({"driver": "edu", "foo": 1}, "Property 'edu.foo' not found"),
        ({"driver": "edu", "dma_mask": "0xff"}, "Parameter 'dma_mask' expects uint64"),
        ({"driver": "edu", "dma_mask": True}, "Parameter 'dma_mask' expects uint64"),
        ({"driver": "vfio-pci"}, "No provided host device"),
    ],
)
def test_what_is_no_device_is_refused_in_the_words_of_qemu(
    machine: Machine, options: dict[str, object], words: str
) -> None:
    with pytest.raises(CommandFailed) as caught:
        machine.commands.ask("device_add", options)
    assert caught.value.reason == words
    assert list(machine.guest.devices) == ["e0"]


def test_a_device_that_is_not_there(machine: Machine) -> None:
    assert machine.refusal("device_del", id="x") == ("DeviceNotFound", "Device 'x' not found")


def test_qom_shows_the_objects_that_there_are(machine: Machine) -> None:
    types = {each["name"]: each for each in machine.ask("qom-list-types", implements="pci-device")}
    assert types["edu"] == {"name": "edu", "parent": "pci-device"} and "pci-device" not in types
    abstract = machine.ask("qom-list-types", implements="pci-device", abstract=True)
    assert {"name": "pci-device", "parent": "device", "abstract": True} in abstract
    assert machine.ask("qom-list-types", implements="nope") == []
    names = {each["name"]: each["type"] for each in machine.ask("qom-list", path="/machine/peripheral")}
    assert names == {"type": "string", "e0": "child<edu>"}
    assert machine.ask("qom-get", path="/machine/peripheral/e0", property="type") == "edu"
    parent = machine.ask("qom-get", path="e0", property="parent_bus")
    assert machine.ask("qom-get", path=parent, property="type") == "PCI"
    assert machine.ask("qom-get", path=parent.rsplit("/", 1)[0], property="dma_win_size") == 1 << 30
    assert machine.refusal("qom-get", path="e0", property="nope") == ("GenericError", "Property 'edu.nope' not found")
    assert machine.refusal("qom-list", path="/nope") == ("DeviceNotFound", "Device '/nope' not found")


@pytest.mark.parametrize("model", DEVICES)
def test_every_model_shows_its_properties(machine: Machine, model: str) -> None:
    machine.commands.ask("device_add", {"driver": model, "id": "it"})
    shown = {each["name"] for each in machine.ask("qom-list", path="it")}
    assert shown >= set(DEVICES[model].PROPS)
    for name in shown:
        json.dumps(machine.ask("qom-get", path="it", property=name))
    assert f'dev: {model}, id "it"\n' in machine.human("info qtree")


def test_devices_go_to_the_bus_that_they_name(runtime_dir: Path, loop: Loop) -> None:
    machine = Machine(runtime_dir, loop, PseriesConfig(ram=1 << 24, phbs=[PhbConfig(index=0), PhbConfig(index=3)]))
    machine.commands.ask("device_add", {"driver": "edu", "id": "far", "bus": "phb3.0"})
    found = [[device["qdev_id"] for device in bus["devices"]] for bus in machine.ask("query-pci")]
    assert found == [["far"], ["e0"]], "the last bridge first, as in QEMU"
    assert machine.ask("qom-get", path="far", property="parent_bus") == "/machine/unattached/device[1]/phb3.0"
    assert "LIOBN 80000300: " in machine.human("info windows")
    machine.monitors.close()
    machine.guest.close()


def test_a_function_plugged_without_a_function_0_is_not_seen_before_there_is_one(machine: Machine) -> None:
    machine.ask("device_add", driver="edu", id="first", addr="9.3")
    machine.ask("device_add", driver="edu", id="cold", addr="a.3")
    bus = machine.guest.machine.phb().bus
    machine.guest.devices["cold"][1].hotplugged = False
    bus.config_write(9 << 3 | 3, 0x3C, 1, 5)
    assert bus.config_read(9 << 3 | 3, 0, 4) == 0xFFFF_FFFF and bus.config_read(10 << 3 | 3, 0, 4) == 0x11E8_1234
    machine.ask("device_add", driver="edu", id="zero", addr="9.0", multifunction=True)
    assert bus.config_read(9 << 3 | 3, 0, 4) == 0x11E8_1234 and bus.config_read(9 << 3 | 3, 0x3C, 1) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"multifunction": "on"}, "Invalid parameter type for 'multifunction', expected: boolean"),
        ({"addr": 300}, "Parameter 'addr' expects a value between -1 and 255"),
        ({"addr": -2}, "Parameter 'addr' expects a value between -1 and 255"),
        ({"addr": True}, "Invalid parameter type for 'addr', expected int or str"),
    ],
)
def test_values_that_device_add_refuses(machine: Machine, options: dict[str, object], reason: str) -> None:
    with pytest.raises(CommandFailed, match=reason):
        machine.commands.ask("device_add", {"driver": "edu", **options})


def test_a_bridge_with_an_id_and_a_guest_without_a_name(runtime_dir: Path, loop: Loop) -> None:
    bridges = [PhbConfig(index=0), PhbConfig(index=7, id="far", pgsz=0x1000)]
    machine = Machine(runtime_dir, loop, PseriesConfig(ram=1 << 24, phbs=bridges))
    machine.guest.config.name = ""
    assert machine.ask("query-name") == {}
    assert machine.ask("qom-get", path="/machine/peripheral/far", property="pgsz") == 0x1000
    machine.commands.ask("device_add", {"driver": "iommu-testdev", "id": "x", "addr": "3.1", "bus": "far.0"})
    machine.commands.ask("device_add", {"driver": "edu", "id": "y", "addr": "3", "bus": "far.0", "multifunction": True})
    edu, testdev = machine.ask("query-pci")[0]["devices"]
    assert edu["irq"] == 0 and "irq" not in testdev and testdev["function"] == 1
    assert machine.guest.devices["y"][1].config.read(0x0C, 4) == 0x80_0000
    machine.monitors.close()
    machine.guest.close()


def test_what_migration_is_told_is_kept(machine: Machine) -> None:
    assert machine.ask("query-migrate") == {}
    machine.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    on = [each["capability"] for each in machine.ask("query-migrate-capabilities") if each["state"]]
    assert on == ["events"]
    machine.commands.ask("migrate-set-parameters", {"max-bandwidth": 5})
    assert machine.ask("query-migrate-parameters")["max-bandwidth"] == 5


@pytest.mark.parametrize(
    ("command", "options", "reason"),
    [
        ("migrate", {}, "need either 'uri' or 'channels' argument"),
        ("migrate", {"channels": [{"channel-type": "main"}]}, "need either 'uri' or 'channels' argument"),
        ("migrate", {"uri": "fd:gone"}, "File descriptor named 'gone' not found"),
        ("getfd", {"fdname": "stream"}, "No file descriptor supplied via SCM_RIGHTS"),
        ("closefd", {"fdname": "stream"}, "File descriptor named 'stream' not found"),
        ("migrate", {"uri": "tcp:here:port"}, "'tcp:here:port' is not a valid migration URI"),
        ("migrate-incoming", {"uri": "unix:/x"}, "'-incoming' was not specified on the command line"),
    ],
)
def test_migrations_that_cannot_begin(machine: Machine, command: str, options: dict[str, object], reason: str) -> None:
    assert machine.refusal(command, **options) == ("GenericError", reason)
    assert machine.ask("query-migrate") == {} and machine.ask("query-status")["running"]
    assert machine.ask("migrate_cancel") == {}


def test_a_device_that_says_nothing_of_its_state_blocks_a_migration(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(machine.guest.devices["e0"][1]), "VMSTATE", None)
    assert "EduDevice does not say what of it migrates" in machine.refusal("migrate", uri="unix:/nowhere")[1]


def test_a_destination_that_is_not_there_fails_the_migration_later(machine: Machine) -> None:
    machine.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    assert machine.ask("migrate", uri="unix:/nowhere/at/all") == {}
    assert machine.ask("query-migrate") == {"status": "setup"}
    assert machine.told() == ["MIGRATION", "MIGRATION"]
    info = machine.ask("query-migrate")
    assert info["status"] == "failed" and info["error-desc"].startswith("Failed to connect to 'unix:/nowhere/at/all'")
    assert machine.ask("query-status")["running"]


def test_a_guest_that_cannot_go_on_says_so_and_answers_questions(machine: Machine) -> None:
    machine.operations.fail(InternalGuestError("out of luck"))
    assert machine.ask("query-status") == {"status": "internal-error", "running": False}
    assert machine.refusal("cont") == ("GenericError", "Resetting the Virtual Machine is required")
    assert machine.refusal("system_reset") == ("GenericError", "out of luck")
    assert machine.human("info status") == "VM status: paused (internal-error)\n"
    assert machine.told() == ["STOP"]
