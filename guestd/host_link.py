"""The guest's tie to its host: the port, the container, the assigned devices; and what happens when the host goes and
comes back.

::

    connected ──EOF, deadline──▶ lost: container abandoned, devices dead to the guest
        ▲                          │ a ping each 100 ms, until one is answered
        └── memory declared, container connected, devices opened, replay ◀──┘

While the host is lost hypercalls succeed: nothing is left that a mapping could serve. The new container's listeners are
handed every section and every mapping, which rebuilds the host's tables; then the devices come back, reset.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guestd.clock import GuestClock
from guestd.config import DeviceConfig
from guestd.port import WirePort
from guestd.remote import VfioUserDevice, capabilities
from protocols.port import files
from protocols.port import messages as port
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop, LoopTimer
from protocols.transport.unix import StreamConnection
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.transport.zmq import DealerClient
from protocols.vfio_user.messages import Role
from vfio_model.errors import PeerLost, RemoteProtocolError, VfioModelError
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import Trace
from vfio_model.vfio.address_space import ContainerOptions, VFIOAddressSpace
from vfio_model.vfio.ioctl import VfioPort
from vfio_model.vfio.kinds import ContainerChoice
from vfio_model.vfio.kvm import KvmAccelerator, KvmPort
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vfio.region import DeviceConnection

RETRY_NS: Final = 100_000_000


@dataclass(frozen=True)
class HostOptions:
    """How to reach the host and what to tell it. ``port_path``: where ioctls go (an interposer may sit there)."""

    directory: Path
    port_path: Path
    name: str
    memlock: int
    host_page_size: int
    container: ContainerChoice = "auto"


@dataclass(frozen=True)
class GuestSide:
    """What of the guest the host has to know."""

    ram: tuple[RAMBlock, ...]
    system: AddressSpace
    device_as: Callable[[DeviceConfig], AddressSpace]
    """The address space that a device's DMA is translated in."""
    check_assignment: Callable[[DeviceConfig, int], None]
    """Whether a device of a host with addresses of so many bits can be there. Raises OSError."""
    clock: GuestClock


class _Probe:
    """Asks whether a host answers at the port's address, without waiting."""

    def __init__(self, path: Path, loop: Loop, on_answer: Callable[[], None]) -> None:
        self._client = DealerClient(path, hwm=4)
        self._loop, self._on_answer = loop, on_answer
        loop.register(self._client, self._readable)

    def ask(self) -> None:
        self._client.send(port.REQUESTS.encode(port.Ping(1)))

    def _readable(self) -> None:
        answered = False
        while (data := self._client.receive()) is not None:
            try:
                answered = isinstance(port.RESPONSES.decode(data), port.Pong) or answered
            except RemoteProtocolError:
                continue
        if answered:
            self._on_answer()

    def close(self) -> None:
        self._loop.unregister(self._client)
        self._client.close()


class HostLink:
    """All assigned devices of one address space live in one container, or in as many as its kind takes, and all
    containers are reached over one port. Nothing is opened before the first device.
    """

    def __init__(self, options: HostOptions, guest: GuestSide, loop: Loop, trace: Trace) -> None:
        self._options, self._guest, self._loop, self._trace = options, guest, loop, trace
        self.port: WirePort | None = None
        self.containers: dict[AddressSpace, VFIOAddressSpace] = {}
        """By the address space that they follow."""
        self.devices: dict[str, tuple[DeviceConfig, VFIOPCIDevice | None]] = {}
        self.losses = 0
        """How often the host was lost."""
        self.reason = ""
        """Why it was lost the last time."""
        self._probe: _Probe | None = None
        self._next_ask: LoopTimer | None = None
        self._opening = ""
        self._closed = False
        self.kvm: KvmAccelerator | None = None
        """In-kernel acceleration, where the machine has it; see :meth:`accelerate`."""

    @property
    def lost(self) -> bool:
        """Whether the host is gone and not back yet."""
        return self._probe is not None

    # -- connecting ----------------------------------------------------------------------------------------------

    def accelerate(self, machine: PseriesMachine, port: KvmPort | None = None) -> None:
        """Let the host have the machine's TCE tables whenever it is there, beginning now; ``port`` is one that the
        caller has connected.

        :raise OSError: it has no KVM. :raise PeerLost: there is no host, or it went away.
        """
        self.kvm = KvmAccelerator(self._guest.system, self._options.host_page_size, self._trace)
        self.kvm.on_change = machine.relocate_tables
        machine.accelerate(self.kvm)
        if port is not None:
            self.kvm.connect(port)
        else:
            self._connect_port()

    def open_device(self, config: DeviceConfig) -> VfioUserDevice:
        """Open an assigned device, connecting first what is not connected yet.

        :raise OSError: what the host refused. :raise PeerLost: there is no host, or it went away.
        """
        if self.port is None:
            self._connect_port()
        assert self.port is not None, "connected above"
        self._opening = config.id
        device = self.open_at(config, self.port)
        assert isinstance(device, VfioUserDevice), "the wire port makes these"
        try:
            self._guest.clock.attach(device)
        except (OSError, PeerLost):
            device.close()
            self.leave(config)
            raise
        return device

    def open_at(self, config: DeviceConfig, port: VfioPort) -> DeviceConnection:
        """The device at the host behind ``port``; its group joins the container of its address space.

        :raise OSError: EINVAL: the group is in another one; ENOTSUP: the guest's IOMMU takes no devices of a host; and
            what the host refuses. The group is out again then. :raise PeerLost: the host went away.
        """
        space, path = self._guest.device_as(config), config.group_path
        if any(other is not space and known.has_group(path) for other, known in self.containers.items()):
            raise OSError(errno.EINVAL, f"group {path.rpartition('/')[2]} used in multiple address spaces")
        containers = self.containers_of(space, port)
        try:
            containers.add_group(path)
            self._guest.check_assignment(config, containers.address_bits)
            return containers.get_device(path, config.host)
        except (OSError, PeerLost):
            self.leave(config)
            raise

    def containers_of(self, space: AddressSpace, port: VfioPort) -> VFIOAddressSpace:
        """The containers that follow ``space``, a device's; those that are to come are reached over ``port``."""
        known = self.containers.get(space)
        if known is None:
            options = ContainerOptions(self._options.host_page_size, self._options.container, self.kvm)
            known = VFIOAddressSpace(port, self._guest.system, space, options, trace=self._trace)
            self.containers[space] = known
        return known

    def follow(self, config: DeviceConfig, device: VFIOPCIDevice) -> None:
        """Bring ``device`` back when the host comes back; what its connection notices it is told."""
        self.devices[config.id] = (config, device)
        watch_losses(device)

    def forget(self, name: str) -> None:
        """The device was unplugged and is closed; the last of a group takes the group out of the container."""
        config, _ = self.devices.pop(name, (None, None))
        if config is not None:
            self.leave(config)

    def leave(self, config: DeviceConfig) -> None:
        """There is no such device (any more): where no other is of its group, that leaves the container."""
        space, path = self._guest.device_as(config), config.group_path
        containers = self.containers.get(space)
        if containers is None or containers.lost:
            return
        if any(other.group_path == path for other, _ in self.devices.values()):
            return
        try:
            containers.remove_group(path)
        except (OSError, PeerLost) as error:
            self._trace("vfio_error", reason=f"{config.id}: its group did not leave the container: {error}")

    def _connect_port(self) -> None:
        options = self._options
        self.port = WirePort(
            options.directory,
            self._loop,
            self._make_device,
            name=options.name,
            memlock=options.memlock,
            port_path=options.port_path,
            trace=self._trace,
        )
        self.port.on_lost = lambda _error: self._loop.call_soon(self._host_lost)
        for block in self._guest.ram:
            self.port.declare_memory(block)
        if self.kvm is not None:
            self.kvm.connect(self.port)

    def _make_device(self, message: files.DeviceFd, stream: int, process: Pidfd) -> VfioUserDevice:
        name = f"{self._opening} ({message.name})"
        connection = StreamConnection(socket.socket(fileno=stream), name)
        endpoint = VfioUserEndpoint(connection, Role.CLIENT, capabilities(ats=False))
        return VfioUserDevice(name, endpoint, self._loop, process=process, lives_for_us=True, trace=self._trace)

    # -- losing and coming back ----------------------------------------------------------------------------------

    def _host_lost(self) -> None:
        if self._closed or self.lost or self.port is None or self.port.lost is None:
            return
        self.losses += 1
        error = self.port.lost
        self.reason = str(error)
        self._drop()
        for _, device in self.devices.values():
            if device is not None:
                device.lost(error)
        self._retry()

    def _drop(self) -> None:
        if self.kvm is not None:
            self.kvm.disconnect()
        for containers in self.containers.values():
            containers.abandon()
        self.containers.clear()
        if self.port is not None:
            self.port.close_all()
            self.port = None

    def _retry(self) -> None:
        if self._closed:
            return
        if self._probe is None:
            self._probe = _Probe(self._options.port_path, self._loop, self._host_answers)
        self._probe.ask()
        self._ask_later()

    def _ask_later(self) -> None:
        if self._next_ask is not None:
            self._next_ask.cancel()
        self._next_ask = self._loop.call_later(RETRY_NS, self._ask_again)

    def _ask_again(self) -> None:
        if self._probe is not None:
            self._retry()

    def _host_answers(self) -> None:
        if self._probe is not None:
            self._probe.close()
            self._probe = None
            self._come_back()

    def _come_back(self) -> None:
        try:
            if self.port is None and self.kvm is not None:
                self._connect_port()
            for config, device in list(self.devices.values()):
                connection = self.open_device(config)
                if device is not None:
                    device.reconnect(connection)
                    watch_losses(device)
        except (OSError, VfioModelError) as error:
            self._trace("host_not_back", reason=str(error))
            self._drop()
            for _, device in self.devices.values():
                if device is not None:
                    device.lost(PeerLost("hostd", str(error)))
            self._probe = _Probe(self._options.port_path, self._loop, self._host_answers)
            self._ask_later()
        else:
            self._trace("host_back", devices=len(self.devices))

    def status(self) -> dict[str, object]:
        """For guestd's status."""
        containers = [container for space in self.containers.values() for container in space.containers]
        windows = [window for space in self.containers.values() for window in space.windows]
        return {
            "lost": self.lost,
            "losses": self.losses,
            "reason": self.reason,
            "containers": [container.backend.kind for container in containers],
            "connected": bool(containers) and not any(container.lost for container in containers),
            "kvm": self.kvm is not None and self.kvm.connected,
            "windows": [{"start": window.min_iova, "last": window.max_iova} for window in windows],
        }

    def close(self) -> None:
        """Unmap and close everything, in order. Harmless twice."""
        self._closed = True
        if self._probe is not None:
            self._probe.close()
            self._probe = None
        if self.port is not None and self.port.lost is None:
            for containers in self.containers.values():
                try:
                    containers.close()
                except (OSError, PeerLost) as error:
                    self._trace("host_close_failed", reason=str(error))
            self.containers.clear()
        self._drop()


def watch_losses(device: VFIOPCIDevice) -> None:
    """Tell ``device`` when its present connection notices that the device process is gone."""
    connection = device.connection
    if isinstance(connection, VfioUserDevice):
        connection.on_lost = device.lost
        if connection.lost is not None:
            device.lost(connection.lost)
