"""guestd's machine in this process, with its host and its remote devices a call away.

The machine, the plugging and unplugging of devices, their status and stage 1 of explain are guestd's own. Replaced is
what leads to other processes: an assigned device is opened through the host's port, a remote one is made here, asks
for translations by a call, caches them, and follows the invalidation ring.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from deploy.inline.device import InlineConnection, InlineDevice
from deploy.inline.host import InlineHost
from deploy.inline.log import InlineLog
from guestd.config import DeviceConfig, GuestConfig
from guestd.device_space import DeviceSpace
from guestd.dma_services import DmaServices
from guestd.guest import Guest
from guestd.notifier import UNTRANSLATED, SpaceFollower
from hostd.remote_dma import Call, MessageDma, asking, translator
from protocols.transport.loop import Loop
from protocols.vfio_user.messages import Command, DmaAccess, Payload, TranslateReply, TranslateRequest
from vfio_model.errors import InternalGuestError
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import LaneArea
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.memory.ring import RingReader, RingWriter, init_ring, ring_size
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace
from vfio_model.vfio.kvm import KvmPort


class InlineNotifier:
    """The publisher's ring and the lanes of those who read it, without a hub: an
    :class:`~guestd.notifier.Invalidations`.
    """

    def __init__(self, trace: Trace) -> None:
        self._words = memoryview(bytearray(ring_size())).cast("Q")
        init_ring(self._words)
        self._writer = RingWriter(self._words)
        self._lanes: dict[str, LaneArea] = {}
        self._trace = trace
        self.invalidations = 0
        """Flushes that had something to say."""

    def subscribe(self, name: str, lanes: LaneArea) -> RingReader:
        """The ring for ``name``, whose lanes every flush looks at from now on."""
        self._lanes[name] = lanes
        self._trace("notifier_subscribed", name=name)
        return RingReader(self._words)

    def unsubscribe(self, name: str) -> None:
        """It caches nothing any more. Harmless twice."""
        self._lanes.pop(name, None)

    def append(self, as_id: int, iova: int, last: int, flags: int = UNTRANSLATED) -> None:
        """See :class:`~guestd.notifier.Invalidations`."""
        self._writer.append(as_id, iova, last, flags)

    def flush(self) -> OSError | None:
        """See :class:`~guestd.notifier.Invalidations`."""
        if self._writer.publish():
            self.invalidations += 1
            revoke = Revoke(NoFence(), self._lanes.values())
            if not revoke.start():
                raise InternalGuestError(f"an invalidation inside a DMA section of {', '.join(revoke.late)}")
        return None

    def status(self) -> dict[str, object]:
        """As guestd's publisher reports itself."""
        return {
            "connected": True,
            "subscribers": sorted(self._lanes),
            "invalidations": self.invalidations,
            "records": self._writer.head,
        }


class InlineGuest(Guest):
    """The guest of ``config``; :meth:`start` plugs its devices."""

    def __init__(self, config: GuestConfig, host: InlineHost, log: InlineLog, loop: Loop) -> None:
        super().__init__(config, Path(), loop, log.trace("guestd"))
        self._host, self._log = host, log
        host.now_ns = lambda: self.clock.now_ns
        self.remotes: dict[str, InlineDevice] = {}
        self._notifier: InlineNotifier | None = None
        self._followers: dict[int, SpaceFollower] = {}
        if self.board.kvm or any(device.attach == "assigned" for device in config.devices):
            host.port.declare_memory(self.ram)

    def _accelerate(self, port: KvmPort | None = None) -> None:
        super()._accelerate(port or self._host.port)

    # -- assigned devices ----------------------------------------------------------------------------------------

    def _assigned(self, config: DeviceConfig, devfn: int) -> PCIDevice:
        return self._plug(config, devfn, self.host.open_at(config, self._host.port))

    # -- remote devices ------------------------------------------------------------------------------------------

    def _remote(self, config: DeviceConfig, devfn: int) -> PCIDevice:
        device: PCIDevice | None = None
        space = self.board.device_space(config)
        services = DmaServices(
            space.address_space,
            self.machine.system,
            lambda: device is not None and device.bus_master,
            cacheable=lambda: self._hears_all(space),
            trace=self._trace,
        )
        unit = InlineDevice(config.id, config.model, config.props, self._log.trace(config.id), self.clock.now_ns)
        by_message = config.dma == "message"
        call = served(services)
        unit.start(MessageDma(asking(call)) if by_message else self._cached(unit, call, space))
        self.remotes[config.id] = unit
        device = self._plug(config, devfn, InlineConnection(unit, self._loop.call_soon, lambda: self._end(unit)))
        unit.around.iommu = device.host.iommu
        return device

    def _hears_all(self, space: DeviceSpace) -> bool:
        follower = self._followers.get(space.as_id)
        return follower is not None and follower.complete

    def _cached(self, unit: InlineDevice, call: Call, space: DeviceSpace) -> DMAImpl:
        if self._notifier is None:
            self._notifier = InlineNotifier(self._trace)
        if space.as_id not in self._followers:
            follower = self._followers[space.as_id] = SpaceFollower(self._notifier, space.as_id)
            space.address_space.register_listener(follower)
        ram: IovaMaps[None] = IovaMaps()
        ram.add(IovaMap(0, len(self.ram.view), READ | WRITE, self.ram.view, None))
        ring = self._notifier.subscribe(unit.name, unit.lanes)
        cache = CachedImpl(translator(call), ring, unit.lane, ram, as_id=space.as_id, fallback=MessageDma(asking(call)))
        cache.arm()
        return cache

    def _end(self, unit: InlineDevice) -> None:
        self.remotes.pop(unit.name, None)
        unit.stop()
        unit.around.iommu = None
        if self._notifier is not None:
            self._notifier.unsubscribe(unit.name)

    # -- the whole machine ---------------------------------------------------------------------------------------

    @property
    def units(self) -> list[InlineDevice]:
        """Every device model beside the machine."""
        return [*self._host.units.values(), *self.remotes.values()]

    def step_clock(self, ns: int) -> int:
        """As :meth:`~guestd.clock.GuestClock.step`: this machine's timers, then those of the devices beside it."""
        now = self.clock.step(ns)
        for unit in self.units:
            unit.around.clock.advance_to(now)
        return now

    def status(self) -> dict[str, object]:
        """See :class:`~guestd.guest.Guest`."""
        notifier = self._notifier.status() if self._notifier is not None else None
        return {**super().status(), "notifier": notifier}

    def close(self) -> None:
        """Unplug everything, unmap everything, free the memory. Harmless twice."""
        for name in list(self.devices):
            self.remove_device(name)
        for containers in self.host.containers.values():
            containers.close()
        self.host.containers.clear()
        super().close()
        with contextlib.suppress(BufferError):  # views of it go with the machine
            self._memory.close()


def served(services: DmaServices) -> Call:
    """The guest's answers to what a remote device asks, by a call."""

    def call(command: Command, payload: Payload) -> Payload | None:
        if isinstance(payload, TranslateRequest):
            return TranslateReply.of(services.translate(payload))
        if not isinstance(payload, DmaAccess):
            return None
        if command == Command.DMA_READ:
            data = services.dma_read(payload.address, payload.count)
            return None if data is None else DmaAccess(payload.address, len(data), data)
        done = services.dma_write(payload.address, payload.data)
        return DmaAccess(payload.address, payload.count) if done else None

    return call
