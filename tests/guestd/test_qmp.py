"""Monitors: what the commands do to a guest, and a real guestd as QEMU's own clients see it (the qemu.qmp package)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from qemu.qmp import EventListener, ExecuteError, Message, QMPClient

from guestd.config import DeviceConfig, GuestConfig, MachineConfig, MonitorConfig, PhbConfig
from guestd.guest import Guest
from guestd.host_status import Mm, own_mm
from guestd.operations import Operations
from guestd.qmp import Monitors
from guestd.qmp_commands import MonitorCommands
from protocols.control import messages as control
from protocols.monitor.commands import COMMANDS
from protocols.monitor.messages import CommandFailed
from protocols.transport.channel import RouterChannel
from protocols.transport.loop import Loop
from protocols.transport.runtime import RoleLock
from protocols.transport.unix import ByteConnection
from protocols.transport.zmq import RouterServer
from tests.protocols.fuzz import Fuzzer
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError, InternalGuestError
from vfio_model.iommu.spapr.regs import HCall, RtasToken, phb_buid
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import U32_MAX
from vfio_model.trace import ListTrace

SECONDS = 30.0
EDU = DeviceConfig(id="e0", model="edu", addr="02.0")
BAR = 0x8010_0000
NEGOTIATE = b'{"execute":"qmp_capabilities"}'


# -- in this process -----------------------------------------------------------------------------------------------


class Machine:
    """A guest, its commands and the events that were told."""

    def __init__(self, directory: Path, loop: Loop, machine: MachineConfig | None = None) -> None:
        self.loop = loop
        config = GuestConfig(machine=machine or MachineConfig(ram=1 << 24), devices=[EDU])
        self.guest = Guest(config, directory, loop, ListTrace())
        self.guest.start()
        self.operations = Operations(self.guest, loop, ListTrace(), wall_ns=lambda: 5_000_001_999)
        self.commands = MonitorCommands(self.operations, "1")
        self.monitors = Monitors(self.commands, loop)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.operations.subscribers.append(lambda name, data, _: self.events.append((name, data)))

    def ask(self, name: str, **arguments: object) -> Any:
        return self.commands.ask(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def refusal(self, name: str, **arguments: object) -> tuple[str, str]:
        with pytest.raises(CommandFailed) as caught:
            self.ask(name, **arguments)
        return caught.value.error_class, caught.value.reason

    def human(self, line: str) -> str:
        return str(self.ask("human-monitor-command", command_line=line)).replace("\r\n", "\n")

    def told(self) -> list[str]:
        """The names of the events so far, those of the next turn too."""
        self.loop.run_once(0)
        return [name for name, _ in self.events]

    def config(self, offset: int, size: int, value: int) -> None:
        self.guest.phb.bus.config_write(0x10, offset, size, value)


@pytest.fixture
def machine(runtime_dir: Path, loop: Loop) -> Iterator[Machine]:
    machine = Machine(runtime_dir, loop)
    yield machine
    machine.monitors.close()
    machine.guest.close()


def test_every_command_of_the_table_has_who_carries_it_out(machine: Machine) -> None:
    assert {*machine.commands.handlers, "qmp_capabilities"} == set(COMMANDS)
    assert machine.ask("query-commands") == [{"name": name} for name in COMMANDS]
    assert machine.refusal("nope") == ("CommandNotFound", "The command nope has not been found")


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
    machine = Machine(runtime_dir, loop, MachineConfig(ram=1 << 24, phbs=[PhbConfig(index=0), PhbConfig(index=3)]))
    machine.commands.ask("device_add", {"driver": "edu", "id": "far", "bus": "phb3.0"})
    found = [[device["qdev_id"] for device in bus["devices"]] for bus in machine.ask("query-pci")]
    assert found == [["e0"], ["far"]]
    assert machine.ask("qom-get", path="far", property="parent_bus") == "/machine/unattached/device[1]/phb3.0"
    assert "LIOBN 80000300: " in machine.human("info windows")
    machine.monitors.close()
    machine.guest.close()


def test_what_migration_is_told_is_kept(machine: Machine) -> None:
    assert machine.ask("query-migrate") == {}
    machine.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    on = [each["capability"] for each in machine.ask("query-migrate-capabilities") if each["state"]]
    assert on == ["events"]
    machine.commands.ask("migrate-set-parameters", {"max-bandwidth": 5})
    assert machine.ask("query-migrate-parameters")["max-bandwidth"] == 5


def test_a_guest_that_cannot_go_on_says_so_and_answers_questions(machine: Machine) -> None:
    machine.operations.fail(InternalGuestError("out of luck"))
    assert machine.ask("query-status") == {"status": "internal-error", "running": False}
    assert machine.refusal("cont") == ("GenericError", "Resetting the Virtual Machine is required")
    assert machine.refusal("system_reset") == ("GenericError", "out of luck")
    assert machine.human("info status") == "VM status: paused (internal-error)\n"
    assert machine.told() == ["STOP"]


# -- for a person --------------------------------------------------------------------------------------------------


def test_info_pci(machine: Machine) -> None:
    machine.config(0x10, 4, BAR)
    machine.config(4, 2, 2)
    assert machine.human("info pci") == (
        "  Bus  0, device   2, function 0:\n"
        "    Class 0255: PCI device 1234:11e8\n"
        "      PCI subsystem 1af4:1100\n"
        "      IRQ 0, pin A\n"
        "      BAR0: 32 bit memory at 0x80100000 [0x801fffff]\n"
        '      id "e0"\n'
    )


def test_info_mtree_shows_trees_and_flat_views(machine: Machine) -> None:
    machine.config(0x10, 4, BAR)
    machine.config(4, 2, 2)
    text = machine.human("info mtree")
    assert text.startswith(
        "address-space: memory\n"
        "  0000000000000000-ffffffffffffffff (prio 0, container): system\n"
        "    0000000000000000-0000000000ffffff (prio 0, ram): ram\n"
    )
    assert "\n      0000000000000000-000000003fffffff (prio 0, i/o): tce-iommu-80000000\n" in text
    assert "mmio32 @pci@800000020000000.mmio 0000000080000000-00000000ffffffff\n" in text
    assert "memory-region: pci@800000020000000.mmio\n" in text
    assert "    0000000080100000-00000000801fffff (prio 1, i/o): " in text
    flat = machine.human("info mtree -f")
    assert flat.startswith('FlatView #0\n AS "memory", root: system\n Root memory region: system\n')
    assert "  0000200080100000-00002000801fffff (prio 1, i/o): " in flat


def test_info_windows_and_who_follows_them(machine: Machine) -> None:
    buid = phb_buid(0)
    create = [0, buid >> 32, buid & U32_MAX, 16, 30]
    assert machine.guest.machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, create, 4)[0] == 0
    assert machine.human("info windows") == (
        "LIOBN 80000000: 0000000000000000-000000003fffffff, page size 0x1000, entries 0x40000\n"
        "LIOBN 80000001: 0800000000000000-080000003fffffff, page size 0x10000, entries 0x4000\n"
    )
    region = machine.guest.phb.dma.tables[1].iommu
    assert region is not None
    region.register_notifier(IOMMUNotifier(lambda *_: None, IOMMUNotifierFlag.UNMAP, 0, 0xFFFF))
    text = machine.human("info iommu")
    assert "LIOBN 80000000: 0x40000 entries of 0x1000 bytes, need_vfio off\n" in text
    assert "LIOBN 80000001: 0x4000 entries of 0x10000 bytes, need_vfio on\n    followed by function: UNMAP, " in text


def test_a_person_and_a_program_do_the_same(machine: Machine) -> None:
    assert machine.human("stop") == "" and machine.human("info status") == "VM status: paused\n"
    assert machine.human("c") == "" and machine.human("info status") == "VM status: running\n"
    assert machine.human("device_add edu,id=e1,addr=5,dma_mask=0xff") == ""
    assert machine.ask("qom-get", path="e1", property="dma_mask") == 0xFF
    assert 'dev: edu, id "e1"' in machine.human("info qtree")
    assert machine.human("device_del e1") == "" and machine.human("device_del e1") == "Error: Device 'e1' not found\n"
    assert machine.human("device_add nope") == "Error: 'nope' is not a valid device model name\n"
    assert machine.human("nope") == "unknown command: 'nope'\n"
    assert machine.human("info nope") == "unknown command: 'info nope'\n"
    assert machine.human("info status x").startswith("status: extraneous characters at the end of line\n")
    assert machine.human("info mtree -z").startswith("mtree: unsupported option -z\n")
    assert machine.human('"') != "" and machine.human("") == ""
    assert "info windows" in machine.human("info") == machine.human("help info")
    assert machine.human("info locked_vm") == "locked_vm: 0 (no host is connected)\n"
    assert machine.told() == ["STOP", "RESUME", "DEVICE_DELETED"]


def test_the_host_is_asked_what_it_has_locked(runtime_dir: Path, loop: Loop) -> None:
    assert "hostd" in str(own_mm(runtime_dir, loop, seconds=0.01)), "nobody answers"
    lock = RoleLock(runtime_dir, "hostd")
    channel: RouterChannel[Any, Any] = RouterChannel(
        RouterServer(runtime_dir / "hostd.ctl", lock=lock), control.REQUESTS, control.RESPONSES, control.Refused
    )
    mms = [{"pid": 1, "locked_vm": 3, "memlock": 7, "name": "other"}]

    def answer() -> None:
        if (received := channel.receive()) is not None:
            channel.send(received[0], control.Response(1, control.Document(msgspec.json.encode({"mms": mms}))))

    loop.register(channel, answer, served=True)
    assert own_mm(runtime_dir, loop) == "hostd does not know this process"
    mms.append({"pid": os.getpid(), "locked_vm": 5, "memlock": None, "name": "guest"})
    assert own_mm(runtime_dir, loop) == Mm(os.getpid(), 5, None)
    loop.unregister(channel)
    channel.close()
    lock.close()


# -- sockets, in this process --------------------------------------------------------------------------------------


class Client:
    """Reads and writes a monitor of the same loop."""

    def __init__(self, machine: Machine, path: Path, first: bytes = NEGOTIATE) -> None:
        self._loop = machine.loop
        self.connection = ByteConnection.connect(path)
        self._begun = b""
        if first:
            self.read()
            self.connection.send(first)
            self.read()

    def until(self, ready: Callable[[bytes], bool]) -> bytes:
        while not ready(self._begun):
            self._loop.run_once(0.01)
            self._begun += self.connection.receive() or b""
        found, self._begun = self._begun, b""
        return found

    def read(self) -> dict[str, Any]:
        """The next message."""
        found = self.until(lambda data: b"\n" in data)
        line, _, self._begun = found.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


@pytest.fixture
def qmp(machine: Machine, runtime_dir: Path) -> Path:
    machine.monitors.start(MonitorConfig(path=str(runtime_dir / "qmp"), server=True))
    return runtime_dir / "qmp"


def test_several_clients_each_negotiate_and_all_hear_of_events(machine: Machine, qmp: Path) -> None:
    one, two, silent = Client(machine, qmp), Client(machine, qmp), Client(machine, qmp, first=b"")
    assert "QMP" in silent.read()
    one.connection.send(b'{"execute":"stop","id":1}')
    told = {"timestamp": {"seconds": 5, "microseconds": 1}, "event": "STOP"}
    assert one.read() == told and one.read() == {"return": {}, "id": 1}
    assert two.read() == told
    silent.connection.send(b'{"execute":"query-status"}')
    assert silent.read()["error"]["class"] == "CommandNotFound", "and no event before the negotiation"
    one.connection.close()
    two.connection.send(b'{"execute":"cont"}')
    assert two.read()["event"] == "RESUME"
    for client in (two, silent):
        client.connection.close()


def test_who_does_not_read_is_not_read_from_and_loses_nothing(machine: Machine, qmp: Path) -> None:
    lazy, other = Client(machine, qmp), Client(machine, qmp)
    count = 3000
    ask = b'{"execute":"query-commands","id":%d}'
    lazy.connection.send(b"".join(ask % number for number in range(count)))
    for _ in range(3 * count):
        lazy.connection.flush()
        machine.loop.run_once(0)
    other.connection.send(b'{"execute":"query-status"}')
    assert other.read()["return"]["running"]
    for number in range(count):
        lazy.connection.flush()
        assert lazy.read()["id"] == number
    lazy.connection.close()
    other.connection.close()


def test_a_command_that_waits_serves_what_is_served(
    machine: Machine, qmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ``device_add`` waits for the host: other commands wait for it, everything that must not wait goes on."""
    one, two = Client(machine, qmp), Client(machine, qmp)
    order: list[str] = []
    peer, served = socket.socketpair()

    def serve() -> None:
        order.append(f"served {served.recv(1).decode()}")
        machine.loop.unregister(served)

    def slow(_config: DeviceConfig) -> None:
        order.append("begins")
        two.connection.send(b'{"execute":"stop"}')
        peer.send(b"x")
        machine.loop.serve_until(lambda: len(order) > 1, SECONDS, "hostd", "an answer")
        order.append("ends")

    machine.loop.register(served, serve, served=True)
    monkeypatch.setattr(machine.guest, "add_device", slow)
    machine.operations.subscribers.append(lambda name, _data, _ns: order.append(name))
    one.connection.send(b'{"execute":"device_add","arguments":{"driver":"edu"}}')
    assert one.read() == {"return": {}}
    assert two.read()["event"] == "STOP"
    assert order == ["begins", "served x", "ends", "STOP"]
    for end in (peer, served, one.connection, two.connection):
        end.close()


@pytest.mark.parametrize("seed", range(4))
def test_a_client_that_sends_garbage_costs_nobody_else_anything(machine: Machine, qmp: Path, seed: int) -> None:
    bad, good = Client(machine, qmp), Client(machine, qmp)
    for data in islice(Fuzzer(seed).qmp(), 150):
        if b"quit" not in data:
            bad.connection.send(data)
        good.connection.send(b'{"execute":"query-name","id":"mine"}')
        while good.read().get("id") != "mine":
            continue
        bad.connection.receive()
    bad.connection.send(b'\xff{"execute":"query-name","id":"still here"}')
    bad.until(lambda data: b"still here" in data)
    bad.connection.close()
    good.connection.close()


def test_a_person_has_a_prompt(machine: Machine, runtime_dir: Path) -> None:
    machine.monitors.start(MonitorConfig(path=str(runtime_dir / "hmp"), server=True, mode="readline"))
    person = Client(machine, runtime_dir / "hmp", first=b"")
    assert b"type 'help'" in person.until(lambda data: data.endswith(b"(qemu) "))
    person.connection.send(b"info sta")
    person.connection.send(b"tus\ninfo windows\n")
    answer = person.until(lambda data: data.count(b"(qemu) ") == 2)
    assert answer.startswith(b"VM status: running\r\n(qemu) LIOBN 80000000: ")
    person.connection.close()


def test_a_monitor_that_cannot_connect_says_where(machine: Machine, runtime_dir: Path) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        machine.monitors.start(MonitorConfig(path=str(runtime_dir / "nobody")))


# -- a real process, and real clients ------------------------------------------------------------------------------


class Guestd:
    """``python -m guestd`` with monitors."""

    def __init__(self, directory: Path, *monitors: MonitorConfig) -> None:
        config = GuestConfig(machine=MachineConfig(ram=1 << 24), devices=[EDU], monitors=list(monitors))
        path = directory / "guestd.json"
        path.write_bytes(msgspec.json.encode(config))
        command = [sys.executable, "-m", "guestd", "--dir", str(directory), "--config", str(path), "--die-with-parent"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE)

    def wait(self) -> int:
        """Its exit status; nothing was written to stderr."""
        _, errors = self.process.communicate(timeout=SECONDS)
        assert errors == b""
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def start(runtime_dir: Path) -> Iterator[Callable[..., Guestd]]:
    started: list[Guestd] = []

    def start(*monitors: MonitorConfig) -> Guestd:
        started.append(Guestd(runtime_dir, *monitors))
        return started[-1]

    yield start
    for guestd in started:
        guestd.close()


async def next_event(listener: EventListener, name: str) -> Message:
    event = await asyncio.wait_for(listener.get(), SECONDS)
    assert event["event"] == name
    return event


async def converse(client: QMPClient) -> None:
    """What a program does that manages QEMU."""
    assert client.greeting is not None
    assert await client.execute("query-status") == {"status": "running", "running": True}
    with client.listener() as events:
        await client.execute("stop")
        stamp: Any = (await next_event(events, "STOP"))["timestamp"]
        assert set(stamp) == {"seconds", "microseconds"}
        await client.execute("cont")
        await next_event(events, "RESUME")
        await client.execute("device_add", {"driver": "edu", "id": "e1"})
        await client.execute("device_del", {"id": "e1"})
        event = await next_event(events, "DEVICE_DELETED")
        assert event["data"] == {"device": "e1", "path": "/machine/peripheral/e1"}
        await client.execute("system_reset")
        await next_event(events, "RESET")
    with pytest.raises(ExecuteError, match="not a valid device model name"):
        await client.execute("device_add", {"driver": "nope"})
    buses: Any = await client.execute("query-pci")
    assert [device["qdev_id"] for bus in buses for device in bus["devices"]] == ["e0"]
    assert "VM status" in str(await client.execute("human-monitor-command", {"command-line": "info status"}))


def test_the_client_of_qemu_manages_a_guest_that_connects_to_it(
    start: Callable[..., Guestd], runtime_dir: Path
) -> None:
    path = str(runtime_dir / "out")

    async def run() -> Guestd:
        client = QMPClient("test")
        await client.start_server(path)
        guestd = start(MonitorConfig(path=path))
        await asyncio.wait_for(client.accept(), SECONDS)
        await converse(client)
        with client.listener() as events:
            await client.execute("quit")
            event = await next_event(events, "SHUTDOWN")
            assert event["data"] == {"guest": False, "reason": "host-qmp-quit"}
        await client.disconnect()
        return guestd

    assert asyncio.run(run()).wait() == 0


def test_a_signal_ends_a_guest_with_an_event_and_success(start: Callable[..., Guestd], runtime_dir: Path) -> None:
    path = str(runtime_dir / "out")

    async def run() -> Guestd:
        client = QMPClient("test")
        await client.start_server(path)
        guestd = start(MonitorConfig(path=path))
        await asyncio.wait_for(client.accept(), SECONDS)
        with client.listener() as events:
            guestd.process.send_signal(signal.SIGTERM)
            event = await next_event(events, "SHUTDOWN")
            assert event["data"] == {"guest": False, "reason": "host-signal"}
        with contextlib.suppress(EOFError):  # it may have noticed already
            await client.disconnect()
        return guestd

    assert asyncio.run(run()).wait() == 0


def shell(path: Path, lines: list[str], *options: str) -> str:
    """What qmp-shell prints when ``lines`` are typed."""
    program = [sys.executable, "-m", "qemu.qmp.qmp_shell", *options, str(path)]
    typed = "\n".join(lines) + "\n"
    home = {**os.environ, "HOME": str(path.parent)}
    done = subprocess.run(program, input=typed, capture_output=True, text=True, timeout=SECONDS, env=home)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for(path: Path, guestd: Guestd) -> None:
    """Until one can connect to ``path``."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert guestd.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def test_qmp_shell_works_as_with_qemu(start: Callable[..., Guestd], runtime_dir: Path) -> None:
    path = runtime_dir / "in"
    guestd = start(MonitorConfig(path=str(path), server=True))
    wait_for(path, guestd)
    added = ["device_add driver=edu id=e1 addr=40", "query-pci", "nope", "device_del id=e1", "stop", "query-status"]
    said = shell(path, added)
    assert "Connected to QEMU 11" in said
    assert '"qdev_id": "e1"' in said and '"slot": 5' in said
    assert "The command nope has not been found" in said
    assert '{"return": {"status": "paused", "running": false}}' in said
    human = shell(path, ["info status", "info windows", "info mtree"], "-H")
    assert "VM status: paused" in human and "LIOBN 80000000: " in human and "address-space: memory" in human
    assert '{"return": {}}' in shell(path, ["quit"])
    assert guestd.wait() == 0
