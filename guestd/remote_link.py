"""One remote device of a guest: its connection, what it has of the guest's memory, and how it comes back.

::

    connected ──EOF, its process died, deadline, broken protocol──▶ lost: the guest reads all ones
        ▲                                                            │ after a pause that doubles, up to reconnect-ms
        └─ the same device? reset, clock, memory, interrupts ◀── connect, VERSION ◀──┘

A server that cannot be reached, keeps silent or is another device is tried again. When it is back the guest sees a
device that was reset, under the configuration that it had given to the one before: BAR addresses, messages, the command
register.

What the device reaches of guest memory:

====================== ==================================================================================
our own servers        RAM by guest-physical address, translations asked for and cached (``dma: shared``)
any vfio-user server   DMA_MAP as the guest's IOMMU maps (:mod:`vfio_model.vfio.vfio_user`); also ours,
                       with ``dma: mapped``
``dma: message``       nothing: every access is a message, translated and checked here
====================== ==================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

from guestd.clock import GuestClock
from guestd.config import DeviceConfig
from guestd.device_space import DeviceSpace
from guestd.dma_services import DmaServices
from guestd.function_iommu import AtsInvalidations, FunctionIommu
from guestd.remote import VfioUserDevice, capabilities
from guestd.remote_peer import DEVICE_SECONDS
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop, LoopTimer, deadline_scale
from protocols.transport.vfio_user import VfioUserEndpoint, connect
from protocols.vfio_user import messages as wire
from protocols.vfio_user.state import ReplyReceived
from vfio_model.errors import ConfigError, PeerLost, ProtocolError, VfioModelError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.trace import Trace
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vfio.vfio_user import VfioUserIOMMU, VfioUserSpace

FIRST_PAUSE_NS: Final = 50_000_000
"""How long after a loss the first attempt is made."""
AGAIN_SECONDS: Final = 2.0
"""Deadline of each request to a device that comes back: the guest waits meanwhile."""
_DMA_RW: Final = 3


class Around(Protocol):
    """What of the guest a link has to do with."""

    ram: RAMBlock
    system: AddressSpace
    clock: GuestClock
    sharing: bool
    """Whether devices that translate by themselves have guest RAM mapped."""

    def follow_notifier(self, space: DeviceSpace) -> str:
        """Where invalidations of ``space`` are published from now on: a socket.

        :raise ConfigError: they cannot be, here.
        """

    def hears_all(self, space: DeviceSpace) -> bool:
        """Whether all that becomes of translations in ``space`` is published."""

    @property
    def invalidations(self) -> AtsInvalidations | None:
        """Where those of caches go; None before anybody follows the notifier."""

    def lost(self, link: RemoteLink) -> None:
        """Its device is gone."""

    def back(self, link: RemoteLink) -> None:
        """Its device is there again."""


class RemoteLink:
    """The device of ``config``, whose DMA is translated in ``space``; ``bus_master`` is asked when it wants to do DMA
    by message.
    """

    def __init__(
        self,
        config: DeviceConfig,
        space: DeviceSpace,
        bus_master: Callable[[], bool],
        around: Around,
        loop: Loop,
        trace: Trace,
    ) -> None:
        self.config, self.device_space = config, space
        self._bus_master, self._around, self._loop, self._trace = bus_master, around, loop, trace
        self.connection: VfioUserDevice | None = None
        self.space: VfioUserSpace | None = None
        """What follows the device's address space for one that gets maps."""
        self.device: VFIOPCIDevice | None = None
        self._services: DmaServices | None = None
        """Of the present connection."""
        self._shaking: VfioUserEndpoint | None = None
        self._timer: LoopTimer | None = None
        self._pause_ns = FIRST_PAUSE_NS
        self._since_ns = 0
        """When it came, monotonic."""
        self._closed = False

    @property
    def caches(self) -> bool:
        """Whether the device translates by itself, from guest RAM that it has mapped."""
        return self.connection is not None and self.connection.lost is None and self.connection.extensions.ats

    # -- coming ------------------------------------------------------------------------------------------------------

    def open(self) -> VfioUserDevice:
        """Connect, and give the device what it needs.

        :raise OSError: it refuses. :raise PeerLost: it is gone, or nobody listens. :raise ConfigError: it cannot cache.
        """
        connection = self._connection(self._connect(), DEVICE_SECONDS)
        try:
            self._set_up(connection)
        except (OSError, VfioModelError):
            self._let_go(connection)
            raise
        self._since_ns = time.monotonic_ns()
        self.connection = connection
        return connection

    def _connect(self) -> VfioUserEndpoint:
        ats = self.config.dma == "shared"
        return connect(self.config.socket, self.config.id, capabilities(ats=ats, twin=True, iommu=True))

    def _connection(self, endpoint: VfioUserEndpoint, seconds: float) -> VfioUserDevice:
        """:raise PeerLost: it is gone."""
        space = self.device_space
        services = DmaServices(
            space.address_space,
            self._around.system,
            self._bus_master,
            cacheable=lambda: self._around.hears_all(space),
            trace=self._trace,
        )
        try:
            process = Pidfd(endpoint.stream.open_pidfd())
        except PeerLost:
            endpoint.close()
            raise
        self._forget_iommu()
        self._services = services
        return VfioUserDevice(
            self.config.id,
            endpoint,
            self._loop,
            process=process,
            services=services,
            seconds=seconds,
            trace=self._trace,
        )

    def _set_up(self, connection: VfioUserDevice) -> None:
        """Reset it, because it may have served another guest, and give it clock and memory."""
        around = self._around
        try:
            connection.reset()
        except OSError as error:
            self._trace("vfio_device_refused", name=self.config.id, what="reset", reason=str(error))
        around.clock.attach(connection)
        if connection.extensions.ats:
            path = around.follow_notifier(self.device_space)
            if around.sharing:
                self.share_ram(connection)
            if connection.extensions.notifier:
                connection.notifier(self.device_space.as_id, path)
        else:
            by_message = self.config.dma == "message"
            backend = VfioUserIOMMU(
                connection, (around.ram,), connection.limits, by_message=by_message, trace=self._trace
            )
            self.space = VfioUserSpace(backend, around.system, self.device_space.address_space, trace=self._trace)

    def share_ram(self, connection: VfioUserDevice, *, share: bool = True) -> None:
        """Give the device its map of guest RAM, or take it away. :raise OSError: it refuses."""
        ram = self._around.ram
        if share:
            request = wire.DmaMap(flags=_DMA_RW, offset=ram.fd_offset, address=0, size=ram.size)
            connection.dma_map(request, ram.fd)
        else:
            connection.dma_unmap(wire.DmaUnmap(address=0, size=ram.size))

    def follow(self, device: VFIOPCIDevice) -> None:
        """``device`` is the guest's side of it: it is told of losses, and brought back."""
        self.device = device
        assert self.connection is not None, "opened before"
        self._offer_iommu(self.connection, device)
        self._watch(self.connection)

    def _offer_iommu(self, connection: VfioUserDevice, device: VFIOPCIDevice) -> None:
        """Let the device ask what the IOMMU offers to those that cache translations, if it offers anything and the
        device has a use for it.
        """
        if self._services is None or device.ats is None or not connection.iommu_services:
            return
        invalidations = self._around.invalidations if connection.extensions.ats else None
        try:
            function = FunctionIommu(device, invalidations, self.device_space.as_id, connection.page_response)
        except OSError:
            return
        self._services.function = function
        try:
            connection.iommu(function.setup, function.gate.fd)
        except OSError as error:
            self._forget_iommu()
            self._trace("vfio_device_refused", name=self.config.id, what="iommu", reason=str(error))
        except PeerLost:
            self._forget_iommu()

    def _forget_iommu(self) -> None:
        if self._services is not None and self._services.function is not None:
            self._services.function.close()
            self._services.function = None

    def _watch(self, connection: VfioUserDevice) -> None:
        connection.on_lost = self._lost
        if connection.lost is not None:
            self._lost(connection.lost)

    # -- losing, and coming back -------------------------------------------------------------------------------------

    def _lost(self, error: PeerLost) -> None:
        """Called from wherever the loss was noticed: what changes lists that somebody may be going through is left for
        later.
        """
        if self.device is not None:
            self.device.lost(error)
        if self.space is not None:
            self.space.backend.queue.gone(error)
        self._around.lost(self)
        self._loop.call_soon(self._after_loss)

    def _after_loss(self) -> None:
        if self._closed:
            return
        self._drop_space()
        self._forget_iommu()
        lived_ns = time.monotonic_ns() - self._since_ns
        if lived_ns > self.config.reconnect_ms * 1_000_000:
            self._pause_ns = FIRST_PAUSE_NS
        self._try_later()

    def _try_later(self) -> None:
        longest_ns = self.config.reconnect_ms * 1_000_000
        if longest_ns and not self._closed:
            self._timer = self._loop.call_later(min(self._pause_ns, longest_ns), self._try)
            self._pause_ns = min(self._pause_ns * 2, longest_ns)

    def _try(self) -> None:
        try:
            endpoint = self._connect()
        except (PeerLost, ConfigError) as error:
            self._not_back(error)
            return
        self._shaking = endpoint
        self._loop.register(endpoint, self._shaken)
        self._timer = self._loop.call_later(int(AGAIN_SECONDS * deadline_scale() * 1e9), self._silent)
        try:
            endpoint.version()
        except PeerLost as error:
            self._stop_shaking()
            endpoint.close()
            self._not_back(error)

    def _silent(self) -> None:
        endpoint = self._stop_shaking()
        if endpoint is not None:
            endpoint.close()
        self._not_back(PeerLost(self.config.id, "shaking hands: it does not answer"))

    def _stop_shaking(self) -> VfioUserEndpoint | None:
        endpoint, self._shaking = self._shaking, None
        if self._timer is not None:
            self._timer.cancel()
        if endpoint is not None:
            self._loop.unregister(endpoint)
        return endpoint

    def _shaken(self) -> None:
        assert self._shaking is not None, "registered with it"
        reason: Exception = PeerLost(self.config.id, "shaking hands: it refuses")
        try:
            event = self._shaking.receive()
            if event is None:
                return
        except (PeerLost, ProtocolError) as error:
            event, reason = None, error
        endpoint = self._stop_shaking()
        assert endpoint is not None, "it was there"
        if isinstance(event, ReplyReceived) and not event.errno and endpoint.ready:
            self._come_back(endpoint)
            return
        endpoint.close()
        self._not_back(reason)

    def _come_back(self, endpoint: VfioUserEndpoint) -> None:
        device = self.device
        assert device is not None, "a device that is followed"
        connection: VfioUserDevice | None = None
        try:
            connection = self._connection(endpoint, AGAIN_SECONDS)
            if difference := device.difference(connection):
                device.dead = PeerLost(self.config.id, f"coming back: another device is there: {difference}")
                raise device.dead
            self._set_up(connection)
            device.reconnect(connection)
            self._offer_iommu(connection, device)
        except (OSError, VfioModelError) as error:
            device.lost(PeerLost(self.config.id, f"coming back: {error}"))
            if connection is not None:
                self._let_go(connection)
            self._not_back(error)
            return
        connection.seconds = DEVICE_SECONDS
        self._since_ns = time.monotonic_ns()
        self.connection = connection
        self._watch(connection)
        self._around.back(self)

    def _not_back(self, error: Exception) -> None:
        self._trace("vfio_user_not_back", name=self.config.id, reason=str(error))
        self._try_later()

    def _let_go(self, connection: VfioUserDevice) -> None:
        connection.close()
        self._drop_space()

    def _drop_space(self) -> None:
        if self.space is not None:
            self.space.abandon()
            self.space = None

    def close(self) -> None:
        """The device was unplugged: nothing is followed, nobody comes back. Harmless twice."""
        self._closed = True
        endpoint = self._stop_shaking()
        if endpoint is not None:
            endpoint.close()
        self._drop_space()
        self._forget_iommu()
        if self.connection is not None:
            self.connection.close()
