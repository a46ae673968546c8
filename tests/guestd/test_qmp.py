"""Monitor sockets: in one process, and a real guestd as QEMU's own clients see it (the qemu.qmp package)."""

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

from guestd.config import DeviceConfig, GuestConfig, MonitorConfig
from guestd.machine_config import PseriesConfig
from protocols.transport.unix import ByteConnection
from tests.acceleration import kvm
from tests.guestd.accelerated_guest import host_options
from tests.guestd.monitor_rig import EDU, Machine
from tests.protocols.fuzz import Fuzzer
from vfio_model.errors import ConfigError

pytestmark = pytest.mark.machine

SECONDS = 30.0
NEGOTIATE = b'{"execute":"qmp_capabilities"}'


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
    monkeypatch.setattr(machine.operations, "add_device", slow)
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
        machine = PseriesConfig(ram=1 << 24, kvm=kvm())
        config = GuestConfig(machine=machine, devices=[EDU], monitors=list(monitors))
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

    with host_options(runtime_dir):
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
