"""A minimal client of hostd: sockets and messages, none of guestd's code.

:class:`RawPort` has the shape of ``vfio_model.vfio.ioctl.VfioPort`` where that is enough for the typed functions
over it; :class:`RawDevice` speaks vfio-user on a stream that hostd handed out. Both block, with a deadline.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protocols.control import messages as control
from protocols.port import files, messages
from protocols.transport.channel import DealerChannel, FdChannel
from protocols.transport.kernel import EventFd, Pidfd
from protocols.transport.loop import Loop, deadline_scale
from protocols.transport.shm import MappedMemory, create_memory
from protocols.transport.unix import SeqpacketConnection, StreamConnection
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.transport.zmq import DealerClient
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Capabilities, Command, Extensions, Role
from protocols.vfio_user.state import CommandReceived, ReplyReceived
from vfio_model.errors import RemoteProtocolError
from vfio_model.memory import clock_area
from vfio_model.uapi.vfio import IommuType, PciIrq, PciRegion
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup

SECONDS = 20.0
T = TypeVar("T")


def wait_readable(source: object, seconds: float = SECONDS) -> None:
    """Wait until ``source`` is readable."""
    poll = select.poll()
    poll.register(source, select.POLLIN)  # type: ignore[arg-type]
    assert poll.poll(seconds * deadline_scale() * 1000), "nothing came within the deadline"


class RawFile:
    """One open file: a SEQPACKET connection."""

    def __init__(self, directory: Path) -> None:
        connection = SeqpacketConnection.connect(directory / "hostd.sock", "hostd")
        self.channel: FdChannel[files.Response, files.Request] = FdChannel(
            connection, files.RESPONSES, files.REQUESTS, files.fd_count
        )
        self.handle = 0

    def send(self, message: files.Request, fds: tuple[int, ...] = ()) -> None:
        """Send without waiting."""
        self.channel.send(message, fds)

    def receive(self) -> tuple[files.Response, list[int]]:
        """The next message."""
        while (received := self.channel.receive()) is None:
            wait_readable(self.channel)
        return received

    def ask(self, message: files.Request, fds: tuple[int, ...] = ()) -> files.Response:
        """Send, and return what comes; an OpenError raises OSError."""
        self.send(message, fds)
        answer, _ = self.receive()
        if isinstance(answer, files.OpenError):
            raise OSError(answer.errno, answer.reason)
        if isinstance(answer, files.Opened):
            self.handle = answer.handle
        return answer

    def close(self) -> None:
        """EOF."""
        self.channel.close()


class RawPort:
    """A client: one mm, its files, ioctls by message."""

    def __init__(self, directory: Path, memlock: int = 1 << 40, name: str = "test") -> None:
        self.directory = directory
        self.mm = RawFile(directory)
        self.mm.ask(files.OpenMm(memlock, name))
        self.files: dict[int, RawFile] = {}
        self.memory: list[MappedMemory] = []
        self.taken: list[RawDevice] = []
        self._devices: dict[int, tuple[files.DeviceFd, list[int]]] = {}
        self._seq = 0
        self._loop = Loop()
        self.zmq: DealerChannel[messages.Response, messages.Request] = DealerChannel(
            DealerClient(directory / "hostd.zmq"), messages.RESPONSES, messages.REQUESTS
        )

    # -- files

    def open(self, path: str) -> int:
        """A handle."""
        file = RawFile(self.directory)
        try:
            file.ask(files.OpenFile(path, self.mm.handle))
        except OSError:
            file.close()
            raise
        self.files[file.handle] = file
        return file.handle

    def close_file(self, handle: int) -> None:
        """EOF of one file."""
        self.files.pop(handle).close()

    def declare(self, name: str, hva: int, size: int, page_size: int = 65536) -> MappedMemory:
        """New RAM at ``hva``."""
        memory = create_memory(name, size)
        self.mm.ask(files.DeclareMemory(hva, size, name, 0, page_size), (memory.fd,))
        self.memory.append(memory)
        return memory

    # -- ioctls

    def send_ioctl(self, handle: int, cmd: int, arg: bytes, count: int = 1, mm: int | None = None) -> int:
        """Send without waiting; returns the sequence number."""
        self._seq += 1
        message = messages.Ioctl(self._seq, 7, self.mm.handle if mm is None else mm, handle, cmd, count, arg)
        self.zmq.send(message)
        return self._seq

    def poll_return(self, seconds: float) -> messages.Response | None:
        """The next answer, or None when none comes in ``seconds``."""
        poll = select.poll()
        poll.register(self.zmq.fileno(), select.POLLIN)
        for _ in range(max(1, int(seconds * 100))):
            answer = self.zmq.receive()
            if answer is not None:
                return answer
            poll.poll(10)
        return self.zmq.receive()

    def wait_return(self) -> messages.Return:
        """The next Return."""
        answer = self.poll_return(SECONDS * deadline_scale())
        assert isinstance(answer, messages.Return), f"{answer} instead of a Return"
        return answer

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        """One ioctl; OSError with its errno."""
        seq = self.send_ioctl(handle, cmd, arg)
        answer = self.wait_return()
        assert answer.seq == seq
        if answer.errno:
            raise OSError(answer.errno, "ioctl")
        return answer.arg

    def take(self, token: int, group: int) -> RawDevice:
        """The device that came with ``token`` on the connection of file ``group``."""
        while token not in self._devices:
            message, fds = self.files[group].receive()
            assert isinstance(message, files.DeviceFd)
            self._devices[message.token] = (message, fds)
        message, fds = self._devices.pop(token)
        device = RawDevice(message, fds)
        self.taken.append(device)
        return device

    def close(self) -> None:
        """The client goes, as at the end of a process: everything at once."""
        for device in self.taken:
            device.close()
        for file in self.files.values():
            file.close()
        self.files.clear()
        self.mm.close()
        self.zmq.close()
        self._loop.close()
        for memory in self.memory:
            memory.close()


class RawDevice:
    """A vfio-user client of a device process."""

    def __init__(self, message: files.DeviceFd, fds: list[int]) -> None:
        stream = StreamConnection(socket.socket(fileno=fds[0]), message.name)
        self.pidfd = Pidfd(fds[1], message.pid)
        self.pid = message.pid
        self._init(
            VfioUserEndpoint(stream, Role.CLIENT, Capabilities(max_msg_fds=16, extensions=Extensions(clock=True)))
        )

    def _init(self, endpoint: VfioUserEndpoint) -> None:
        self.endpoint = endpoint
        self.on_command: Callable[[CommandReceived], None] = lambda event: endpoint.reply_error(event, 5)
        endpoint.version()
        try:
            self.wait_reply()
        except RemoteProtocolError:
            endpoint.close()
            raise

    @classmethod
    def connected(cls, path: Path, extensions: Extensions = Extensions(clock=True)) -> RawDevice:
        """A client of a server that listens at ``path``."""
        device = cls.__new__(cls)
        stream = StreamConnection.connect(path, "server")
        device._init(VfioUserEndpoint(stream, Role.CLIENT, Capabilities(max_msg_fds=16, extensions=extensions)))
        return device

    def wait_reply(self) -> ReplyReceived:
        """The next reply; commands of the device are served meanwhile."""
        while True:
            event = self.endpoint.receive()
            if event is None:
                wait_readable(self.endpoint)
            elif isinstance(event, CommandReceived):
                self.on_command(event)
            else:
                return event

    def call(self, command: Command, payload: wire.Payload, kind: type[T], fds: tuple[int, ...] = ()) -> T:
        """Ask and wait; OSError with the errno of a refusal."""
        self.endpoint.command(command, payload, fds)
        reply = self.wait_reply()
        if reply.errno:
            raise OSError(reply.errno, command.name)
        assert isinstance(reply.payload, kind)
        return reply.payload

    def read(self, region: int, offset: int, size: int) -> int:
        """A little-endian register."""
        answer = self.call(Command.REGION_READ, wire.RegionAccess(offset, region, size), wire.RegionAccess)
        return int.from_bytes(answer.data, "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """A little-endian register, not posted."""
        data = value.to_bytes(size, "little")
        self.call(Command.REGION_WRITE, wire.RegionAccess(offset, region, size, data), wire.RegionAccess)

    def post(self, region: int, offset: int, size: int, value: int) -> None:
        """A posted write: nothing is waited for."""
        data = value.to_bytes(size, "little")
        self.endpoint.command(Command.REGION_WRITE, wire.RegionAccess(offset, region, size, data), no_reply=True)

    def bus_master(self) -> None:
        """Memory decoding and bus mastering on."""
        self.write(int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX), 4, 2, 6)

    def intx(self) -> EventFd:
        """An eventfd for the pin."""
        event = EventFd()
        request = wire.SetIrqs(20, 0x24, int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX), 0, 1)
        self.call(Command.DEVICE_SET_IRQS, request, wire.Empty, (event.fd,))
        return event

    def unmask(self) -> None:
        """The pin may signal again."""
        request = wire.SetIrqs(20, 0x11, int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX), 0, 1)
        self.call(Command.DEVICE_SET_IRQS, request, wire.Empty)

    def close_stream(self) -> None:
        """EOF of the device file."""
        if not self.endpoint.stream.closed:
            self.endpoint.close()

    def close(self) -> None:
        """The same, and the pidfd."""
        self.close_stream()
        self.pidfd.close()


class Clock:
    """The guest's clock, as guestd shares it with a device."""

    def __init__(self, device: RawDevice) -> None:
        self._clock, self._ticks = (
            create_memory("clock", clock_area.AREA_SIZE),
            create_memory("ticks", clock_area.AREA_SIZE),
        )
        clock_area.init_clock(self._clock.words, 0)
        clock_area.init_ticks(self._ticks.words, 0)
        self._step, self._done = EventFd(), EventFd()
        fds = (self._clock.fd, self._ticks.fd, self._step.fd, self._done.fd)
        device.call(Command.X_CLOCK, wire.ClockSetup(0), wire.Empty, fds)
        self._done.drain()

    def step(self, ns: int) -> None:
        """Advance, and wait until the device has taken it."""
        now = clock_area.read_time(self._clock.words) + ns
        clock_area.write_time(self._clock.words, now)
        self._step.ring()
        while clock_area.read_time(self._ticks.words) < now:
            wait_readable(self._done)
            self._done.drain()

    def __enter__(self) -> Clock:
        return self

    def __exit__(self, *exc: object) -> None:
        for owner in (self._clock, self._ticks, self._step, self._done):
            owner.close()


def control_call(directory: Path, role: str, command: control.Command) -> control.Answer | control.BatchDone:
    """One command on a control socket."""
    channel: DealerChannel[control.FromRole, control.ToRole] = DealerChannel(
        DealerClient(directory / f"{role}.ctl"), control.RESPONSES, control.REQUESTS
    )
    try:
        channel.send(control.Request(1, 0, command))
        poll = select.poll()
        poll.register(channel.fileno(), select.POLLIN)
        for _ in range(int(SECONDS * deadline_scale() * 100)):
            answer = channel.receive()
            if answer is not None:
                assert isinstance(answer, control.Response)
                return answer.answer
            poll.poll(10)
        raise AssertionError(f"{role} does not answer {command}")
    finally:
        channel.close()


class Opened:
    """Container, group and memory of a client that is ready to map: the usual start of a test."""

    def __init__(self, port: RawPort, group: int = 26, ram: int = 1 << 20, page: int = 65536) -> None:
        self.port = port
        self.container_handle = port.open("/dev/vfio/vfio")
        self.group_handle = port.open(f"/dev/vfio/{group}")
        self.group = VfioGroup(port, self.group_handle)  # type: ignore[arg-type]
        self.container = SpaprContainer(port, self.container_handle)  # type: ignore[arg-type]
        self.group.set_container(self.container_handle)
        self.container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
        self.hva = 0x7000_0000_0000
        self.ram = port.declare("ram", self.hva, ram, page)
        self.container.register_memory(self.hva, ram)

    def device(self, name: str = "0000:01:00.0") -> RawDevice:
        """Open it."""
        return self.port.take(self.group.get_device_fd(name), self.group_handle)


def pack_handle(handle: int) -> bytes:
    """A handle as an ioctl's argument."""
    return struct.pack("=Q", handle)
