"""A vfio-user server in the test's own loop: it answers as told, or not at all."""

from __future__ import annotations

from guestd.remote import VfioUserDevice, capabilities
from guestd.remote_peer import DeviceServices
from protocols.transport.loop import Loop
from protocols.transport.unix import close_fds, stream_pair
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Capabilities, Command, Extensions, Payload, Role
from protocols.vfio_user.state import CommandReceived, ReplyReceived
from vfio_model.errors import PeerLost
from vfio_model.pci.config_space import CONFIG_SIZE
from vfio_model.uapi.vfio import PciRegion

CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)


class FakeDevice:
    """One BAR of a page, INTA, no MSI. ``silent`` commands get no answer; ``errors`` gives the errno of others."""

    def __init__(self, loop: Loop, *, extensions: Extensions = Extensions(True, True, True)) -> None:
        self.loop = loop
        ours, theirs = stream_pair("guestd", "fake")
        self.endpoint = VfioUserEndpoint(theirs, Role.SERVER, Capabilities(max_msg_fds=8, extensions=extensions))
        self.client_stream = ours
        self.bar = bytearray(4096)
        self.config = bytearray(CONFIG_SIZE)
        self.config[0:4] = bytes.fromhex("3412e811")
        self.config[0x3D] = 1
        self.silent: set[int] = set()
        self.errors: dict[int, int] = {}
        self.received: list[CommandReceived] = []
        self.replies: list[ReplyReceived] = []
        self.clients: list[VfioUserDevice] = []
        loop.register(self.endpoint, self._readable, served=True)

    def connect(self, services: DeviceServices | None = None, *, seconds: float = 5.0) -> VfioUserDevice:
        """The client's end."""
        endpoint = VfioUserEndpoint(self.client_stream, Role.CLIENT, capabilities(ats=True))
        device = VfioUserDevice("fake", endpoint, self.loop, services=services, seconds=seconds)
        self.clients.append(device)
        return device

    def of(self, command: Command) -> list[CommandReceived]:
        """What has come of one kind."""
        return [event for event in self.received if event.command == command]

    def _readable(self) -> None:
        try:
            while (event := self.endpoint.receive()) is not None:
                if isinstance(event, ReplyReceived):
                    self.replies.append(event)
                else:
                    self.received.append(event)
                    self._serve(event)
        except PeerLost:
            self.close()

    def _serve(self, event: CommandReceived) -> None:
        if event.command in self.silent:
            return
        if event.command == Command.VERSION:
            self.endpoint.accept(event)
        elif event.command in self.errors:
            self.endpoint.reply_error(event, self.errors[event.command])
        else:
            self.endpoint.reply(event, self._answer(event.command, event.payload))

    def _answer(self, command: int, request: Payload | None) -> Payload:
        match request:
            case wire.RegionAccess() if command == Command.REGION_READ:
                data = bytes(self._region(request.region)[request.offset : request.offset + request.count])
                return wire.RegionAccess(request.offset, request.region, len(data), data)
            case wire.RegionAccess():
                self._region(request.region)[request.offset : request.offset + request.count] = request.data
                return wire.RegionAccess(request.offset, request.region, request.count)
            case wire.DeviceInfo():
                return wire.DeviceInfo(16, 3, 9, 5)
            case wire.RegionInfo():
                return wire.RegionInfo(32, 3, request.index, 0, 4096 if request.index == 0 else 0)
            case wire.IrqInfo():
                return wire.IrqInfo(16, 7, request.index, 1)
            case _:
                return wire.Empty()

    def _region(self, index: int) -> bytearray:
        return self.config if index == CONFIG else self.bar

    def close(self) -> None:
        """The process ends."""
        self.loop.unregister(self.endpoint)
        self.endpoint.close()

    def release(self) -> None:
        """Close both ends and every descriptor that came: the end of a test."""
        for client in self.clients:
            client.close()
        self.client_stream.close()
        self.close()
        for event in self.received:
            close_fds(event.fds)
