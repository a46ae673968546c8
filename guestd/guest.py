"""The guest machine of this process: RAM in sealed memfds, the machine model, its devices, and their ties to other
processes.

Three kinds of device stand on one bus. *Emulated* ones run here. *Assigned* ones are opened at the host. *Remote*
ones are served by another process, which gets guest RAM mapped, caches translations and subscribes to their
invalidation. What a device does wrong costs that device only.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from guestd.backends import Backends, EmulatedHost, check_names, with_address
from guestd.clock import GuestClock
from guestd.config import DeviceConfig, GuestConfig
from guestd.device_states import DeviceStates
from guestd.host_link import GuestSide, HostLink, HostOptions
from guestd.machines.board import Board, Parts
from guestd.machines.build import RAM_IDS, build_board
from guestd.remote_devices import GuestParts, RemoteDevices
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, create_memory
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.machine.base import Machine
from vfio_model.machine.phb import EehPort
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.pci.address import PCIAddress
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import Hva
from vfio_model.trace import Trace
from vfio_model.vfio.eeh import eeh_port
from vfio_model.vfio.kvm import KvmPort
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vfio.region import DeviceConnection

RAM_HVA: Final = Hva(0x7F00_0000_0000)
"""Where this client declares its RAM: a property of the model, not of this process."""
_UNNAMED: Final = "guest"
"""What the host and the notifier call a guest without a name."""
IDLE_LOOK_NS: Final = 1_000_000
"""How often a machine that stands is asked whether it runs."""


class Guest:
    """Made by :meth:`start`, ended by :meth:`close`."""

    def __init__(
        self, config: GuestConfig, directory: Path, loop: Loop, trace: Trace, *, realtime: bool = False
    ) -> None:
        self.config, self._directory, self._loop, self._trace = config, directory, loop, trace
        machine = config.machine
        self._memory = _ram(machine.ram, RAM_IDS[type(machine)])
        self.ram = RAMBlock("ram", self._memory.view, page_size=machine.page_size, hva=RAM_HVA, fd=self._memory.fd)
        self.clock = GuestClock(loop, realtime=realtime)
        parts = Parts(self.ram, self.clock.virtual, self._when_idle, trace)
        self.board: Board = build_board(machine, parts, self._eeh)
        self.machine: Machine = self.board.machine
        host = Path(config.host_dir) if config.host_dir else directory
        name = config.name or _UNNAMED
        port_path = Path(config.port) if config.port else host / "hostd.zmq"
        self.host = HostLink(
            HostOptions(host, port_path, name, config.memlock_bytes, config.host_page, config.container),
            GuestSide((self.ram,), self.machine.system, self._device_as, self._check_assignment, self.clock),
            loop,
            trace,
        )
        self.devices: dict[str, tuple[DeviceConfig, PCIDevice]] = {}
        self.backends = Backends(
            loop, lambda: self.clock.frozen, drives=config.drives, netdevs=config.netdevs, uplinks=config.uplinks
        )
        self.remote = RemoteDevices(
            GuestParts(name, directory, config.notifier, self.ram, self.machine.system, self.clock, self._remote_back),
            loop,
            trace,
        )
        self.states = DeviceStates(lambda: self.foreign, trace)

    @property
    def directory(self) -> Path:
        """The runtime directory."""
        return self._directory

    def _device_as(self, device: DeviceConfig) -> AddressSpace:
        return self.board.device_space(device).address_space

    def _check_assignment(self, device: DeviceConfig, host_bits: int) -> None:
        devfn = PCIAddress.parse(device.addr).devfn
        if why := self.board.bus_of(device).refuses_assignment(devfn, host_bits):
            raise OSError(errno.ENOTSUP, f"Failed to set vIOMMU: {why}")

    def _eeh(self, address_space: AddressSpace) -> EehPort | None:
        space = self.host.containers.get(address_space)
        return eeh_port(space.containers if space is not None and not space.lost else [])

    def start(self) -> None:
        """Plug every device of the configuration.

        :raise ConfigError: when one cannot be: it says which and why.
        """
        if self.board.kvm:
            try:
                self._accelerate()
            except (OSError, PeerLost) as error:
                raise ConfigError(f"in-kernel acceleration: {error}", where="machine.kvm") from error
        self.backends.start()
        for config in self.config.devices:
            try:
                self.add_device(config)
            except ConfigError as error:
                raise ConfigError(error.what, where=error.where or f"device {config.id}", hint=error.hint) from error

    def _accelerate(self, port: KvmPort | None = None) -> None:
        machine = self.machine
        assert isinstance(machine, PseriesMachine), "the only one whose tables the host can have"
        self.host.accelerate(machine, port)

    # -- devices -------------------------------------------------------------------------------------------------

    def add_device(self, config: DeviceConfig) -> None:
        """Plug one device.

        :raise ConfigError: see :meth:`start`; nothing is plugged then.
        """
        where = f"device {config.id}"
        if config.id in self.devices:
            raise ConfigError("the id is taken", where=where)
        others = [other for other, _ in self.devices.values()]
        check_names(config, self.backends.names, others, self.backends.uplinks)
        config = msgspec.structs.replace(config, props=with_address(config, others))
        attach = {"emulated": self._emulated, "assigned": self._assigned, "remote": self._remote}[config.attach]
        try:
            devfn = PCIAddress.parse(config.addr, where=where).devfn
            device = attach(config, devfn)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "error")
            raise ConfigError(f"{error.strerror or error} ({name})", where=where) from error
        except PeerLost as error:
            raise ConfigError(str(error), where=where) from error
        device.config.multifunction = config.multifunction
        self.devices[config.id] = (config, device)
        self._trace("device_add", id=config.id, attach=config.attach, addr=config.addr)

    def remove_device(self, name: str) -> None:
        """Unplug: DMA stops, the device file is closed.

        :raise ConfigError: when there is no such device.
        """
        if name not in self.devices:
            raise ConfigError(f"no device {name}")
        config, _ = self.devices.pop(name)
        self.board.bus_of(config).detach(PCIAddress.parse(config.addr).devfn)
        self.host.forget(name)
        self.remote.forget(name)
        self._trace("device_del", id=name)

    def _emulated(self, config: DeviceConfig, devfn: int) -> PCIDevice:
        model = DEVICES.get(config.model)
        if model is None:
            known = ", ".join(sorted(DEVICES))
            raise ConfigError(f"no device model {config.model!r}", where=f"device {config.id}", hint=f"known: {known}")
        bus = self.board.bus_of(config)
        return bus.attach(model(EmulatedHost(bus, devfn, self.backends), **config.props), devfn)

    def _assigned(self, config: DeviceConfig, devfn: int) -> PCIDevice:
        connection = self.host.open_device(config)
        try:
            device = self._plug(config, devfn, connection)
        except (OSError, PeerLost, ConfigError):
            self.host.leave(config)
            raise
        self.host.follow(config, device)
        return device

    def _plug(self, config: DeviceConfig, devfn: int, connection: DeviceConnection) -> VFIOPCIDevice:
        bus = self.board.bus_of(config)
        try:
            device = VFIOPCIDevice(bus.host_for(devfn), connection, name=config.id)
            bus.attach(device, devfn)
        except (OSError, PeerLost, ConfigError):
            connection.close()
            raise
        return device

    def _remote(self, config: DeviceConfig, devfn: int) -> PCIDevice:
        device: VFIOPCIDevice | None = None
        space = self.board.device_space(config)
        connection = self.remote.open(config, space, lambda: device is not None and device.bus_master)
        try:
            device = self._plug(config, devfn, connection)
        except (OSError, PeerLost, ConfigError):
            self.remote.forget(config.id)
            raise
        self.remote.follow(config.id, device)
        return device

    def _remote_back(self, device: VFIOPCIDevice) -> None:
        self.states.joined(device)

    def _when_idle(self, callback: Callable[[], bool]) -> None:
        """It rests while time stands."""

        def run() -> None:
            if self.clock.frozen:
                self._loop.call_later(IDLE_LOOK_NS, run)
            elif callback():
                self._loop.call_soon(run)

        self._loop.call_soon(run)

    @property
    def memory(self) -> MappedMemory:
        """The RAM's memory."""
        return self._memory

    @property
    def foreign(self) -> list[VFIOPCIDevice]:
        """The devices that live in other processes."""
        return [device for _, device in self.devices.values() if isinstance(device, VFIOPCIDevice)]

    # -- the whole machine ---------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Reset the machine; devices in other processes too."""
        self.machine.reset()

    def status(self) -> dict[str, object]:
        """What ``status`` on the control socket says."""
        publisher = self.remote.publisher
        return {
            "clock_ns": self.clock.now_ns,
            "devices": [self.device_status(name) for name in self.devices],
            "devices_lost": sum(1 for _, device in self.devices.values() if getattr(device, "dead", None)),
            "windows": self.board.windows(),
            "device_tree": self.board.device_tree(),
            "irqs": {str(irq): count for irq, count in self.machine.irqs.raised.items()},
            "host": self.host.status(),
            "notifier": publisher.status() if publisher is not None else None,
        }

    def device_status(self, name: str) -> dict[str, object]:
        """One device, as the device list has it."""
        config, device = self.devices[name]
        dead = device.dead if isinstance(device, VFIOPCIDevice) else None
        ranges = {bar.index: device.bar_range(bar.index, allow_zero=True) for bar in device.BARS}
        return {
            "id": name,
            "model": config.model,
            "address": str(self.board.address_of(config)),
            "attach": config.attach,
            "host": config.host,
            "bars": {str(index): where.start for index, where in ranges.items() if where is not None},
            "state": "lost" if dead is not None else "running",
            "reason": str(dead) if dead is not None else "",
            "irqs": device.irqs if isinstance(device, VFIOPCIDevice) else 0,
            "bus_master": device.bus_master,
        }

    def close(self) -> None:
        """Unplug everything, give the host back what it gave, and free the memory. Harmless twice."""
        for name in list(self.devices):
            self.remove_device(name)
        self.backends.close()
        self.host.close()
        self.remote.close()
        self.clock.close()
        with contextlib.suppress(BufferError):  # the machine still shows it; the descriptor is closed
            self._memory.close()


def _ram(size: int, name: str) -> MappedMemory:
    """:raise ConfigError: when the machine that this runs on does not give ``size`` bytes."""
    try:
        return create_memory("ram", size)
    except (OSError, OverflowError) as error:
        why = os.strerror(errno.ENOMEM) if isinstance(error, OverflowError) else error.strerror
        raise ConfigError(f"cannot set up guest memory '{name}': {why}") from error
