"""A device server in a process of its own, and what its clients may do to it and to each other."""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.serve import ServedDevice, device_server
from protocols.transport.kernel import EventFd
from protocols.transport.loop import deadline_scale
from protocols.transport.shm import MappedMemory, create_memory
from protocols.transport.unix import StreamConnection
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Capabilities, Command, IoFd, Role, TwinSocket
from protocols.vfio_user.state import CommandReceived, ReplyReceived
from tests.hostd import probe_device as probe
from tests.hostd.probe_device import PAGE, ProbeDevice
from tests.processes.port_client import RawDevice, wait_readable
from vfio_model.errors import PeerLost, RemoteProtocolError
from vfio_model.memory.types import MemTxResult

DECODE, ACCESS = int(MemTxResult.DECODE_ERROR), int(MemTxResult.ACCESS_ERROR)


class Client(RawDevice):
    """A client with memory of its own that answers DMA messages from it."""

    memory: MappedMemory | None = None
    asked = 0
    last_fds: list[int]

    @classmethod
    def open(cls, path: str, capabilities: Capabilities = Capabilities(max_msg_fds=16)) -> Client:
        device = cls.__new__(cls)
        device.last_fds = []
        device._init(VfioUserEndpoint(StreamConnection.connect(path, "server"), Role.CLIENT, capabilities))
        device.on_command = device._serve
        return device

    def _serve(self, event: CommandReceived) -> None:
        self.asked += 1
        request = event.payload
        assert isinstance(request, wire.DmaAccess) and self.memory is not None
        at = request.address % self.memory.size
        if event.command == Command.DMA_READ:
            data = bytes(self.memory.view[at : at + request.count])
            self.endpoint.reply(event, wire.DmaAccess(request.address, len(data), data))
        else:
            self.memory.view[at : at + request.count] = request.data
            self.endpoint.reply(event, wire.DmaAccess(request.address, request.count))

    def wait_reply(self) -> ReplyReceived:
        twin = self.endpoint.twin
        while True:
            event = self.endpoint.receive()
            if event is None:
                wait_any(self.endpoint, twin)
            elif isinstance(event, CommandReceived):
                self.on_command(event)
            else:
                self.last_fds = event.fds
                return event

    def map(self, fd: int | None, address: int, size: int, offset: int = 0, flags: int = 3) -> None:
        fds = () if fd is None else (fd,)
        self.call(Command.DMA_MAP, wire.DmaMap(32, flags, offset, address, size), wire.Empty, fds)

    def unmap(self, address: int, size: int, flags: int = 0) -> None:
        self.call(Command.DMA_UNMAP, wire.DmaUnmap(24, flags, address, size), wire.DmaUnmap)

    def do(self, command: int, iova: int = 0, length: int = 8, data: int | None = None) -> int:
        """Have the device do something; its result."""
        self.write(0, probe.IOVA, 8, iova)
        self.write(0, probe.LENGTH, 8, length)
        if data is not None:
            self.write(0, probe.DATA, 8, data)
        self.write(0, probe.COMMAND, 8, command)
        return self.read(0, probe.RESULT, 8)


def wait_any(*sources: object) -> None:
    poll = select.poll()
    for source in sources:
        if source is not None:
            poll.register(source, select.POLLIN)  # type: ignore[arg-type]
    assert poll.poll(20_000 * deadline_scale()), "nothing came within the deadline"


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[ServedDevice]:
    with device_server(ProbeDevice, socket=runtime_dir / "probe.sock", scratch=9) as served:
        yield served


@pytest.fixture
def ram() -> Iterator[MappedMemory]:
    with create_memory("ram", 256 * PAGE) as memory:
        yield memory


def descriptors(server: ServedDevice) -> int:
    return len(os.listdir(f"/proc/{server.pid}/fd"))


# -- clients come and go ---------------------------------------------------------------------------------------------


def test_the_device_keeps_its_state_and_loses_what_was_its_clients(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path)
    before = descriptors(server)
    assert client.read(0, probe.SCRATCH, 8) == 9
    client.write(0, probe.SCRATCH, 8, 1234)
    client.bus_master()
    client.map(ram.fd, 0, ram.size)
    client.intx().close()
    assert client.do(probe.WRITE, PAGE, data=5) == 0
    client.close_stream()
    again = Client.open(server.path)
    assert again.read(0, probe.SCRATCH, 8) == 1234
    assert again.do(probe.WRITE, PAGE, data=6) == DECODE, "its memory went with the one that gave it"
    assert ram.words[PAGE // 8] == 5
    again.call(Command.DEVICE_RESET, wire.Empty(), wire.Empty)
    assert again.read(0, probe.SCRATCH, 8) == 9
    assert descriptors(server) == before
    again.close_stream()


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"\0",
        b"\xff" * 64,
        struct.pack("=HHIII", 1, 1, 100, 0, 0),
        struct.pack("=HHIII", 1, 1, 100, 0, 0) + b"\0\0\0\0{",
        struct.pack("=HHIII", 1, 9, 32, 0, 0) + bytes(16),
        struct.pack("=HHIIIHH", 1, 1, 20, 0, 0, 3, 0),
    ],
)
@pytest.mark.parametrize("leaves", [False, True])
def test_who_says_nothing_or_nonsense_keeps_nobody_out(server: ServedDevice, said: bytes, leaves: bool) -> None:
    rude = socket.socket(socket.AF_UNIX)
    rude.connect(server.path)
    rude.sendall(said)
    if leaves:
        rude.close()
    client = Client.open(server.path)
    assert client.read(0, 0, 4) == probe.IDENTIFICATION
    client.close_stream()
    rude.close()


def test_a_client_that_goes_in_mid_message_is_gone(server: ServedDevice) -> None:
    client = Client.open(server.path)
    client.write(0, probe.SCRATCH, 8, 77)
    _, data = client.endpoint.state.command(Command.REGION_READ, wire.RegionAccess(0, 0, 4))
    client.endpoint.stream.send(data[:20])
    client.close_stream()
    again = Client.open(server.path)
    assert again.read(0, probe.SCRATCH, 8) == 77
    again.close_stream()


def test_a_second_client_is_told_that_the_device_is_taken(server: ServedDevice) -> None:
    client = Client.open(server.path)
    with pytest.raises(RemoteProtocolError):
        Client.open(server.path)
    assert client.read(0, 0, 4) == probe.IDENTIFICATION
    client.close_stream()


def test_clients_leave_no_descriptors(server: ServedDevice, ram: MappedMemory) -> None:
    counts = set()
    for _ in range(5):
        client = Client.open(server.path, Capabilities(max_msg_fds=16, twin_socket=TwinSocket(True)))
        client.map(ram.fd, 0, ram.size)
        bells = [EventFd() for _ in range(4)]
        request = wire.SetIrqs(20, 0x24, 2, 0, 4)
        client.call(Command.DEVICE_SET_IRQS, request, wire.Empty, tuple(bell.fd for bell in bells))
        client.call(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(4096, 0, 0), wire.RegionIoFds)
        for fd in client.last_fds:
            os.close(fd)
        counts.add(descriptors(server))
        for bell in bells:
            bell.close()
        client.close_stream()
    assert len(counts) == 1


def test_descriptors_without_room_are_an_error_and_not_the_end(runtime_dir: Path, ram: MappedMemory) -> None:
    command = [sys.executable, "-m", "hostd", "device", "--die-with-parent", "--model", "edu", "--announce", "json"]
    limited = ["prlimit", "--nofile=40:40", *command, "--socket", str(runtime_dir / "edu.sock")]
    popen = subprocess.Popen(limited, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert popen.stdout is not None
    path = json.loads(popen.stdout.readline())["socket"]
    client = Client.open(path)
    refused = 0
    files = [create_memory(f"ram{number}", PAGE) for number in range(64)]
    for number, file in enumerate(files):
        try:
            client.map(file.fd, number * PAGE, PAGE)
        except OSError:
            refused += 1
    assert 0 < refused < 64
    client.unmap(0, 64 * PAGE)
    client.map(ram.fd, 0, PAGE)
    for file in files:
        file.close()
    client.close_stream()
    popen.terminate()
    assert popen.wait(20) == 0
    popen.stdout.close()


# -- memory ----------------------------------------------------------------------------------------------------------


def test_one_table_serves_single_accesses_mappings_and_many_at_once(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path)
    client.bus_master()
    for page in range(128):
        client.map(ram.fd, 0x100000 + page * PAGE, PAGE, (127 - page) * PAGE)
    assert client.do(probe.WRITE, 0x100000 + PAGE - 4, 8, 0x1122334455667788) == 0
    assert bytes(ram.view[128 * PAGE - 4 : 128 * PAGE]) == bytes.fromhex("88776655")
    assert bytes(ram.view[126 * PAGE : 126 * PAGE + 4]) == bytes.fromhex("44332211")
    assert client.do(probe.WRITE_MANY, 0x100000, 128, 0x0101010101010101) == 0
    assert all(ram.words[page * PAGE // 8] == 0x0101010101010101 for page in range(128))
    assert client.do(probe.READ_MANY, 0x100000, 128) == 0
    assert client.read(0, probe.DATA, 8) == 8 * 128
    assert client.do(probe.MAP, 0x100000, PAGE) == PAGE, "in place"
    client.do(probe.STORE, data=0xABCD)
    assert ram.words[127 * PAGE // 8] == 0xABCD
    assert client.do(probe.WRITE_MANY, 0x100000, 129) == DECODE
    client.close_stream()


def test_a_permission_holds_for_every_kind_of_access(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path)
    client.memory = ram
    client.bus_master()
    client.map(ram.fd, 0, PAGE, flags=1)
    client.map(ram.fd, PAGE, PAGE, flags=2)
    client.map(None, 2 * PAGE, PAGE, flags=1)
    for page, may_read in ((0, True), (1, False), (2, True)):
        assert client.do(probe.READ, page * PAGE) == (0 if may_read else ACCESS)
        assert client.do(probe.WRITE, page * PAGE, data=1) == (ACCESS if may_read else 0)
    assert client.do(probe.MAP, 0, PAGE) == 0
    assert client.do(probe.WRITE_MANY, 0, 80) == ACCESS
    assert client.asked == 1, "the read of what has no descriptor"
    client.close_stream()


@pytest.mark.parametrize("kind", ["memfd", "file", "read-only"])
def test_files_of_any_kind_are_memory(server: ServedDevice, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ram"
    fd = os.memfd_create("plain") if kind == "memfd" else os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, 4 * PAGE)
    os.pwrite(fd, b"\x07" * 8, PAGE)
    given = os.open(path, os.O_RDONLY) if kind == "read-only" else os.dup(fd)
    client = Client.open(server.path)
    client.bus_master()
    client.map(given, 0x8000, 4 * PAGE, flags=1 if kind == "read-only" else 3)
    assert client.do(probe.READ, 0x8000 + PAGE) == 0
    assert client.read(0, probe.DATA, 8) == 0x0707070707070707
    if kind != "read-only":
        assert client.do(probe.WRITE, 0x8000, data=3) == 0
        assert os.pread(fd, 1, 0) == b"\3"
    os.ftruncate(fd, PAGE)
    assert client.do(probe.READ, 0x8000 + 2 * PAGE) == 0, "what the file lost reads as zeros"
    assert client.read(0, probe.DATA, 8) == 0
    os.close(given)
    os.close(fd)
    client.close_stream()


def test_an_unmap_may_cover_many_maps_or_none_and_cuts_none(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path)
    client.bus_master()
    for page in range(64):
        client.map(ram.fd, 0xFEE00000 + page * PAGE, PAGE, page * PAGE)
    client.unmap(0x100000, 0x100000)
    with pytest.raises(OSError):
        client.map(ram.fd, 0xFEE00000 + PAGE, PAGE)
    client.unmap(0xFEF00000, 0xFFFFFFFF01100000)
    assert client.do(probe.READ, 0xFEE00000) == 0
    client.unmap(0, 0xFFFFFFFFFFFFF000)
    assert client.do(probe.READ, 0xFEE00000) == DECODE
    client.map(ram.fd, 0, 2 * PAGE)
    with pytest.raises(OSError):
        client.unmap(0, PAGE)
    with pytest.raises(OSError):
        client.unmap(0, 0)
    assert client.do(probe.READ, 0) == 0
    client.unmap(0, 0, flags=2)
    assert client.do(probe.READ, 0) == DECODE
    client.close_stream()


@pytest.mark.parametrize("how", ["at once", "when idle"])
def test_an_unmap_answers_when_the_mapping_was_given_back(server: ServedDevice, ram: MappedMemory, how: str) -> None:
    client = Client.open(server.path)
    client.bus_master()
    client.map(ram.fd, 0, ram.size)
    if how == "when idle":
        client.do(probe.IDLE_GIVE_BACK)
    assert client.do(probe.MAP, PAGE, PAGE) == PAGE
    client.unmap(0, ram.size)
    client.map(ram.fd, 0, ram.size)
    assert client.do(probe.MAP, PAGE, PAGE) == PAGE
    client.close_stream()


def test_a_mapping_that_is_kept_is_taken_away(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path)
    client.bus_master()
    client.map(ram.fd, 0, ram.size)
    client.do(probe.KEEP)
    assert client.do(probe.MAP, PAGE, PAGE) == PAGE
    client.do(probe.STORE, data=1)
    client.unmap(0, ram.size)
    client.do(probe.STORE, data=2)
    assert ram.words[PAGE // 8] == 1
    client.close_stream()


def test_what_the_client_asks_meanwhile_is_answered_while_it_is_asked(server: ServedDevice, ram: MappedMemory) -> None:
    """Else both wait: raising INTx makes QEMU unmap BARs, and it answers no DMA message before that is done."""
    client = Client.open(server.path)
    client.memory = ram
    client.bus_master()
    client.map(None, 0, ram.size)
    order: list[str] = []

    def serve(event: CommandReceived) -> None:
        order.append("asked")
        client.endpoint.command(Command.DMA_UNMAP, wire.DmaUnmap(24, 0, 1 << 40, PAGE))
        while not isinstance(answer := client.endpoint.receive(), ReplyReceived):
            wait_readable(client.endpoint)
        assert answer.errno == 0
        order.append("answered")
        client._serve(event)

    client.on_command = serve
    assert client.do(probe.READ, PAGE) == 0
    assert order == ["asked", "answered"]
    client.close_stream()


# -- the protocol ----------------------------------------------------------------------------------------------------


def test_with_a_twin_socket_the_servers_commands_travel_there(server: ServedDevice, ram: MappedMemory) -> None:
    client = Client.open(server.path, Capabilities(max_msg_fds=4, twin_socket=TwinSocket(True)))
    assert client.endpoint.twin is not None
    client.memory = ram
    client.bus_master()
    client.map(None, 0, ram.size)
    assert client.do(probe.WRITE, PAGE, data=0x55) == 0
    assert client.do(probe.READ, PAGE) == 0
    assert ram.words[PAGE // 8] == 0x55 and client.asked == 2
    client.close_stream()


def test_many_writes_in_one_message(server: ServedDevice) -> None:
    client = Client.open(server.path, Capabilities(max_msg_fds=4, write_multiple=True))
    writes = [
        wire.RegionAccess(probe.SCRATCH, 0, 8, (1).to_bytes(8, "little")),
        wire.RegionAccess(probe.DATA, 0, 4, (2).to_bytes(4, "little")),
        wire.RegionAccess(PAGE, 0, 4, bytes(4)),
        wire.RegionAccess(probe.SCRATCH, 0, 8, (3).to_bytes(8, "little")),
    ]
    answer = client.call(Command.REGION_WRITE_MULTI, wire.RegionWriteMulti.of(writes), wire.RegionWriteMultiReply)
    assert answer.wr_cnt == 2, "the third is outside"
    assert (client.read(0, probe.SCRATCH, 8), client.read(0, probe.DATA, 8)) == (1, 2)
    client.close_stream()


def test_a_bar_with_areas_is_mapped_and_read_by_message_alike(server: ServedDevice) -> None:
    client = Client.open(server.path)
    small = client.call(Command.DEVICE_GET_REGION_INFO, wire.RegionInfo(32, index=2), wire.RegionInfo)
    assert small.argsz > 32 and small.caps == b"" and client.last_fds == []
    info = client.call(Command.DEVICE_GET_REGION_INFO, wire.RegionInfo(small.argsz, index=2), wire.RegionInfo)
    assert info.flags & 0xF == 0xF and info.cap_offset == 32
    assert struct.unpack("=HHIIIQQ", info.caps) == (1, 1, 0, 1, 0, *probe.AREA)
    (fd,) = client.last_fds
    with mmap.mmap(fd, probe.AREA[1], offset=info.offset + probe.AREA[0]) as area:
        area[:4] = b"here"
        assert client.read(2, probe.AREA[0], 4) == int.from_bytes(b"here", "little")
        client.write(2, probe.AREA[0] + 8, 8, 0x42)
        assert area[8] == 0x42
    assert client.read(2, 0, 1) == 0x5A, "the rest is the device's"
    os.close(fd)
    client.close_stream()


def test_msix_rings_the_vectors_eventfd_whatever_the_table_says(server: ServedDevice) -> None:
    client = Client.open(server.path)
    assert client.call(Command.DEVICE_GET_IRQ_INFO, wire.IrqInfo(index=2), wire.IrqInfo).count == 4
    bells = [EventFd() for _ in range(4)]
    request = wire.SetIrqs(20, 0x24, 2, 0, 4)
    client.call(Command.DEVICE_SET_IRQS, request, wire.Empty, tuple(bell.fd for bell in bells))
    client.do(probe.IRQ, data=2)
    assert [bell.drain() for bell in bells] == [0, 0, 1, 0]
    client.call(Command.DEVICE_SET_IRQS, wire.SetIrqs(20, 0x24, 2, 2, 1), wire.Empty)
    client.do(probe.IRQ, data=2)
    client.do(probe.IRQ, data=3)
    assert [bell.drain() for bell in bells] == [0, 0, 0, 1], "no descriptors take one away"
    client.call(Command.DEVICE_SET_IRQS, wire.SetIrqs(24, 0x22, 2, 0, 2, b"\0\1"), wire.Empty)
    assert [bell.drain() for bell in bells] == [0, 1, 0, 0], "the client may trigger"
    client.call(Command.DEVICE_SET_IRQS, wire.SetIrqs(20, 0x21, 2, 0, 0), wire.Empty)
    client.do(probe.IRQ, data=3)
    assert [bell.drain() for bell in bells] == [0, 0, 0, 0]
    for bell in bells:
        bell.close()
    client.close_stream()


def test_a_doorbell_is_rung_instead_of_written(server: ServedDevice) -> None:
    client = Client.open(server.path)
    none = client.call(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(16, 0, 0), wire.RegionIoFds)
    assert (none.argsz, none.count, client.last_fds) == (96, 0, [])
    answer = client.call(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds(96, 0, 0), wire.RegionIoFds)
    assert IoFd.unpack_all(answer.areas) == [IoFd(probe.BELL, 4, 0), IoFd(probe.BELL + 8, 8, 1, 0, 1, 0x77)]
    for fd in client.last_fds:
        os.eventfd_write(fd, 1)
        os.close(fd)
    while client.read(0, probe.RUNG, 8) < 2:
        pass
    client.close_stream()


def test_the_unmask_eventfd_speaks_in_both_directions(server: ServedDevice) -> None:
    client = Client.open(server.path)
    pin, unmask = client.intx(), EventFd()
    client.call(Command.DEVICE_SET_IRQS, wire.SetIrqs(20, 0x14, 0, 0, 1), wire.Empty, (unmask.fd,))
    client.do(probe.IRQ)
    assert pin.drain() == 1
    client.unmask()
    assert unmask.drain() == 1 and pin.drain() == 1, "the pin is still up"
    unmask.ring()
    wait_readable(pin)
    assert pin.drain() == 1
    pin.close()
    unmask.close()
    client.close_stream()


def test_commands_that_nobody_knows_are_refused_one_by_one(server: ServedDevice) -> None:
    client = Client.open(server.path)
    client.endpoint.stream.send(struct.pack("=HHIII", 500, 14, 16, 0, 0))
    wait_readable(client.endpoint)
    with pytest.raises(RemoteProtocolError, match="not asked"):  # an answer for an id that only this test knows
        client.endpoint.receive()
    client.close_stream()


# -- from the command line -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "option"), [(signal.SIGINT, "--socket"), (signal.SIGTERM, "--socket-path")])
def test_the_command_says_how_qemu_attaches_it_and_ends_in_order(
    runtime_dir: Path, number: signal.Signals, option: str
) -> None:
    """``--socket-path`` is what the document's "Backend Program Conventions" ask for."""
    path = runtime_dir / "edu.sock"
    command = [sys.executable, "-m", "deploy.cli", "serve", "edu,dma_mask=0xffffffff", option, str(path), "--json"]
    popen = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert popen.stdout is not None and popen.stderr is not None
    ready = json.loads(popen.stdout.readline())
    assert (ready["device"], ready["socket"], ready["pid"]) == ("edu", str(path), popen.pid)
    assert json.loads(ready["qemu"][-1])["socket"]["path"] == str(path)
    client = Client.open(str(path))
    assert client.read(0, 0, 4) == 0x010000ED
    popen.send_signal(number)
    assert popen.wait(20) == 0
    assert not path.exists()
    with pytest.raises(PeerLost):
        client.read(0, 0, 4)
    said = popen.stderr.read()
    assert "connected" in said and "Traceback" not in said
    popen.stdout.close()
    popen.stderr.close()
    client.endpoint.close()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing", "--socket", "x"], "no device model 'nothing'"),
        (["edu"], "--socket PATH or --fd N"),
        (["edu,foo=1", "--socket", "x"], "no property 'foo'"),
        (["edu,dma_mask=zz", "--socket", "x"], "not a int"),
        (["edu", "--socket", "/nonexistent/x"], "cannot listen"),
        (["edu", "--socket", "/etc/passwd"], "no socket"),
        (["edu", "--socket", "."], "no socket"),
        (["edu", "--fd", "99"], "not open"),
        (["nowhere.py:Device", "--socket", "x"], "no such file"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_sentence(runtime_dir: Path, arguments: list[str], words: str) -> None:
    command = [sys.executable, "-m", "deploy.cli", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=runtime_dir, timeout=60, check=False)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_a_connected_descriptor_is_one_client(runtime_dir: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    command = [sys.executable, "-m", "deploy.cli", "serve", "edu", "--fd", str(theirs.fileno())]
    popen = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.DEVNULL)
    theirs.close()
    client = Client.__new__(Client)
    client.last_fds = []
    client._init(VfioUserEndpoint(StreamConnection(ours, "server"), Role.CLIENT, Capabilities(max_msg_fds=4)))
    assert client.read(0, 0, 4) == 0x010000ED
    client.close_stream()
    assert popen.wait(20) == 0
