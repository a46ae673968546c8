"""A remote emulated device: a vfio-user server whose DMA goes by message, through its client's maps, or through an
ATC."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protocols.notifier import messages as hub
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import PeerLanes, Pidfd, probe
from protocols.transport.shm import MappedMemory, create_memory, map_memory
from protocols.transport.unix import SeqpacketConnection, StreamConnection
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Command, Extensions
from protocols.vfio_user.state import CommandReceived
from tests.processes.conftest import HostProcess
from tests.processes.port_client import RawDevice, wait_readable
from tests.processes.test_host_dma import burst
from vfio_model.devices.dma_burst import regs
from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.revoke import Revoke
from vfio_model.memory.ring import RingWriter, init_ring, ring_size

PAGE = 4096
AS_ID = 5
ATS = Extensions(ats=True, clock=True, notifier=True)


class Server:
    """``hostd device`` listening in a directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "burst.sock"
        argv = [sys.executable, "-m", "hostd", "device", "--dir", str(directory), "--model", "dma-burst"]
        self.popen = subprocess.Popen(
            [*argv, "--socket", str(self.path), "--die-with-parent"], stderr=subprocess.PIPE, text=True
        )
        assert self.popen.stderr is not None
        assert "serves" in self.popen.stderr.readline()
        self.pidfd = Pidfd.open(self.popen.pid)

    def connect(self, extensions: Extensions = Extensions()) -> RawDevice:
        return RawDevice.connected(self.path, extensions)

    def close(self) -> None:
        self.popen.terminate()
        assert self.popen.wait(20) == 0
        assert self.popen.stderr is not None
        self.popen.stderr.close()
        self.pidfd.close()
        assert not self.path.exists()


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[Server]:
    running = Server(runtime_dir)
    yield running
    running.close()


@pytest.fixture
def notifier(runtime_dir: Path) -> Iterator[HostProcess]:
    running = HostProcess(runtime_dir, role="notifier", command="notifier").ready()
    yield running
    running.close()


class Guest:
    """The guest's side of a remote device: RAM at guest-physical 0, a flat IOMMU, DMA by message."""

    def __init__(self, device: RawDevice, pages: int = 16) -> None:
        self.device = device
        self.ram = create_memory("guest", pages * PAGE)
        self.table: dict[int, int] = {}
        self.asked: list[str] = []
        device.on_command = self._serve

    def share(self, flags: int = 3) -> None:
        """DMA_MAP all of RAM at its guest-physical address."""
        request = wire.DmaMap(32, flags, 0, 0, self.ram.size)
        self.device.call(Command.DMA_MAP, request, wire.Empty, (self.ram.fd,))

    def _serve(self, event: CommandReceived) -> None:
        self.asked.append(Command(event.command).name)
        request, endpoint = event.payload, self.device.endpoint
        if isinstance(request, wire.TranslateRequest):
            gpa = self.table.get(request.iova // PAGE)
            entries = [] if gpa is None else [wire.TranslationEntry(request.iova & ~0xFFF, gpa, 0xFFF, 3)]
            endpoint.reply(event, wire.TranslateReply.of(entries))
        elif isinstance(request, wire.DmaAccess):
            gpa = self.table.get(request.address // PAGE)
            if gpa is None:
                endpoint.reply_error(event, 14)
                return
            at = gpa + request.address % PAGE
            if request.data:
                self.ram.view[at : at + request.count] = request.data
                endpoint.reply(event, wire.DmaAccess(request.address, request.count))
            else:
                data = bytes(self.ram.view[at : at + request.count])
                endpoint.reply(event, wire.DmaAccess(request.address, request.count, data))

    def close(self) -> None:
        self.device.close_stream()
        self.ram.close()


def write_once(guest: Guest, iova: int, pattern: int) -> int:
    return burst(guest.device, iova, 8, 1, regs.COMMAND_WRITE, pattern=pattern)


def test_without_descriptors_every_access_is_a_message_that_the_guest_checks(server: Server) -> None:
    guest = Guest(server.connect())
    guest.device.call(Command.DMA_MAP, wire.DmaMap(32, 3, 0, 0, 1 << 30), wire.Empty)
    guest.table[1] = 3 * PAGE
    guest.device.bus_master()
    assert write_once(guest, PAGE + 16, 0x77) == 1
    assert guest.ram.words[(3 * PAGE + 16) // 8] == 0x77
    assert write_once(guest, 2 * PAGE, 0x77) == 0
    assert guest.asked == ["DMA_WRITE", "DMA_WRITE"]
    guest.close()


def test_what_a_client_maps_is_used_without_a_message(server: Server) -> None:
    guest = Guest(server.connect())
    guest.share()
    guest.device.bus_master()
    assert write_once(guest, 2 * PAGE, 0x55) == 1
    assert guest.ram.words[2 * PAGE // 8] == 0x55
    unmap = wire.DmaUnmap(24, 0, 0, 1 << 40)
    guest.device.call(Command.DMA_UNMAP, unmap, wire.DmaUnmap)
    assert write_once(guest, 2 * PAGE, 0x66) == 0
    assert guest.asked == [], "what was not mapped is not asked for"
    guest.close()


def test_unmapping_half_of_a_map_is_refused(server: Server) -> None:
    guest = Guest(server.connect())
    guest.share()
    with pytest.raises(OSError) as refused:
        guest.device.call(Command.DMA_UNMAP, wire.DmaUnmap(24, 0, 0, PAGE), wire.DmaUnmap)
    assert refused.value.errno == 22
    guest.close()


def test_a_silent_client_keeps_nobody_out_and_a_second_one_is_told_to_wait(server: Server) -> None:
    silent = StreamConnection.connect(server.path)
    guest = Guest(server.connect())
    with pytest.raises(RemoteProtocolError):
        server.connect()
    assert guest.device.read(0, 0, 8) == regs.IDENTIFICATION_VALUE
    guest.device.write(0, regs.PATTERN, 8, 5)
    guest.close()
    silent.close()
    again = Guest(server.connect())
    assert again.device.read(0, regs.PATTERN, 8) == 5, "the device is the same one"
    again.device.call(Command.DEVICE_RESET, wire.Empty(), wire.Empty)
    assert again.device.read(0, regs.PATTERN, 8) == 0
    again.close()


def test_a_client_that_breaks_the_protocol_costs_itself_alone(server: Server) -> None:
    guest = Guest(server.connect())
    for junk in (b"\0" * 64, b"\xff" * 64):
        bad = StreamConnection.connect(server.path)
        bad.send(junk)
        wait_readable(bad)
        bad.close()
    assert guest.device.read(0, 0, 8) == regs.IDENTIFICATION_VALUE
    guest.close()


class Publisher:
    """The guest's side of the notifier: the ring, and the lanes it must wait for."""

    def __init__(self, directory: Path) -> None:
        self.channel: FdChannel[hub.FromHub, hub.ToHub] = FdChannel(
            SeqpacketConnection.connect(directory / "notifier.sock"), hub.FROM_HUB, hub.TO_HUB, hub.fd_count
        )
        self.ring = create_memory("ring", ring_size())
        init_ring(self.ring.words)
        self.writer = RingWriter(self.ring.words)
        self.lanes: list[tuple[MappedMemory, PeerLanes, Pidfd]] = []
        self.channel.send(hub.Announce("guest", [AS_ID]), [self.ring.fd])

    def accept(self) -> None:
        """Take a subscriber's lanes."""
        message, fds = self._receive()
        while isinstance(message, hub.Want):
            self.channel.send(hub.Wanted(message.seq))
            message, fds = self._receive()
        assert isinstance(message, hub.LaneAdd)
        memory, pidfd = map_memory(fds[0]), Pidfd(fds[1], message.pid)
        self.lanes.append((memory, PeerLanes(message.name, memory.words, pidfd), pidfd))
        self.channel.send(hub.LaneReady(message.subscriber))

    def _receive(self) -> tuple[hub.FromHub, list[int]]:
        while (received := self.channel.receive()) is None:
            wait_readable(self.channel)
        return received

    def invalidate(self, iova: int, last: int) -> None:
        """As a guest does it: publish, then wait for the lanes."""
        fence = probe()
        assert fence is not None
        self.writer.append(AS_ID, iova, last)
        self.writer.publish()
        revoke = Revoke(fence, [lanes for _, lanes, _ in self.lanes])
        over = revoke.start()
        while not over:
            over = revoke.poll()

    def close(self) -> None:
        self.channel.close()
        for memory, lanes, pidfd in self.lanes:
            lanes.close()
            memory.close()
            pidfd.close()
        self.ring.close()


def subscribed(server: Server, directory: Path) -> tuple[Guest, Publisher]:
    """A device with an armed ATC: its first cached access has happened."""
    publisher = Publisher(directory)
    guest = Guest(server.connect(ATS))
    guest.share()
    guest.device.bus_master()
    guest.table[1] = 3 * PAGE
    setup = wire.NotifierSetup(AS_ID, str(directory / "notifier.sock").encode())
    guest.device.call(Command.X_NOTIFIER, setup, wire.Empty)
    assert write_once(guest, PAGE, 1) == 1
    assert guest.asked == ["DMA_WRITE"], "nothing is cached before the publisher knows the lane"
    publisher.accept()
    while guest.asked[-1] != "X_TRANSLATE":
        assert write_once(guest, PAGE, 2) == 1
    guest.asked.clear()
    return guest, publisher


def test_a_translation_is_cached_until_it_is_invalidated(
    notifier: HostProcess, server: Server, runtime_dir: Path
) -> None:
    guest, publisher = subscribed(server, runtime_dir)
    assert burst(guest.device, PAGE, 8, 1000, regs.COMMAND_WRITE, pattern=9) == 1000
    assert guest.asked == []
    guest.table[1] = 4 * PAGE
    publisher.invalidate(PAGE, 2 * PAGE - 1)
    guest.ram.words[3 * PAGE // 8] = 0
    assert write_once(guest, PAGE, 11) == 1
    assert guest.asked == ["X_TRANSLATE"]
    assert guest.ram.words[3 * PAGE // 8] == 0
    assert guest.ram.words[4 * PAGE // 8] == 11
    del guest.table[1]
    publisher.invalidate(PAGE, 2 * PAGE - 1)
    assert write_once(guest, PAGE, 12) == 0
    guest.close()
    publisher.close()


def test_without_the_notifier_a_subscriber_goes_on_with_its_ring(
    notifier: HostProcess, server: Server, runtime_dir: Path
) -> None:
    guest, publisher = subscribed(server, runtime_dir)
    notifier.close()
    assert write_once(guest, PAGE, 21) == 1
    assert guest.asked == []
    guest.table[1] = 5 * PAGE
    publisher.invalidate(0, (1 << 64) - 1)
    assert write_once(guest, PAGE, 22) == 1
    assert guest.ram.words[5 * PAGE // 8] == 22
    guest.close()
    publisher.close()


def test_when_the_publisher_is_gone_nothing_cached_is_used(
    notifier: HostProcess, server: Server, runtime_dir: Path
) -> None:
    guest, publisher = subscribed(server, runtime_dir)
    publisher.close()
    notifier.until(lambda status: not status["publishers"])
    while not guest.asked:
        assert write_once(guest, PAGE, 31) == 1
    assert guest.asked == ["DMA_WRITE"]
    guest.close()


def test_without_a_notifier_the_request_is_refused_and_dma_goes_by_message(server: Server, runtime_dir: Path) -> None:
    guest = Guest(server.connect(ATS))
    guest.share()
    guest.device.bus_master()
    guest.table[1] = 3 * PAGE
    setup = wire.NotifierSetup(AS_ID, str(runtime_dir / "notifier.sock").encode())
    with pytest.raises(OSError) as refused:
        guest.device.call(Command.X_NOTIFIER, setup, wire.Empty)
    assert refused.value.errno == 107
    assert write_once(guest, PAGE, 1) == 1
    assert guest.asked == ["DMA_WRITE"]
    guest.close()


def test_the_command_line_names_what_is_wrong(runtime_dir: Path) -> None:
    for args, text in (
        (["--model", "flux", "--socket", str(runtime_dir / "x.sock")], "no device model 'flux'"),
        (["--model", "edu", "--socket", str(runtime_dir / ("x" * 200))], "the kernel takes 107"),
        (["--model", "edu", "--socket", str(runtime_dir / "x.sock"), "--prop", "a=1"], "no property 'a'"),
        (["--model", "edu", "--socket", str(runtime_dir / "x.sock"), "--props", "[]"], "--props"),
    ):
        done = subprocess.run([sys.executable, "-m", "hostd", "device", *args], capture_output=True, text=True)
        assert done.returncode == 2
        assert text in done.stderr and "Traceback" not in done.stderr
