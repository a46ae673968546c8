"""A remote emulated device: the device of one vfio-user client, its DMA through a cache of the guest's translations.

The three ways of its DMA, chosen by what the client offers:

- *ats*: RAM by DMA_MAP in guest-physical addresses, translations by X_TRANSLATE, kept in an ATC as soon as the
  notifier has armed it; until then, and for what is not RAM, by message;
- no extension: DMA_MAP in the device's own addresses, used directly, as a stock QEMU maps it;
- no descriptors: by message, nothing is kept.

Each client gets a fresh device: a device that served another guest remembers nothing of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from hostd.device_migration import DeviceMigration
from hostd.device_regions import DeviceRegions
from hostd.device_session import DeviceSession
from hostd.device_surroundings import ProcessSurroundings
from hostd.remote_dma import MAX_DMA_MESSAGE, MappedDma, MessageDma, translator
from hostd.remote_memory import RemoteMemory
from hostd.subscription import Subscription
from protocols.transport.loop import Loop
from protocols.transport.unix import StreamConnection
from protocols.transport.vfio_user import MAX_MSG_FDS, VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Capabilities, Command, Extensions, Role
from vfio_model.errors import PeerLost
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.ring import RingReader
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace

CLIENT_SECONDS = 5.0
"""Deadline of a translation or DMA message (scaled as every deadline)."""


class RemoteDevice:
    """A connection, and from its VERSION on a device. ``admit()`` says whether the device is free for it."""

    def __init__(
        self,
        loop: Loop,
        connection: StreamConnection,
        make: Callable[[ProcessSurroundings], PCIDevice],
        admit: Callable[[RemoteDevice], bool],
        on_end: Callable[[RemoteDevice], None],
        trace: Trace,
    ) -> None:
        self._loop, self._trace, self._on_end = loop, trace, on_end
        self._admit = admit
        self.around = ProcessSurroundings(trace)
        self.device = make(self.around)
        self._memory = RemoteMemory()
        self._cache: CachedImpl | None = None
        self._subscription: Subscription | None = None
        self._message = MessageDma(self._call)
        self._started = False
        extensions = Extensions(ats=True, clock=True, notifier=True)
        endpoint = VfioUserEndpoint(
            connection, Role.SERVER, Capabilities(max_msg_fds=MAX_MSG_FDS, extensions=extensions)
        )
        regions = DeviceRegions(self.device, self.around)
        self.migration = DeviceMigration(self.device, trace, logs=False)
        """Its writes go where the client sees them, or not: it asks for its memory back while it counts them."""
        self.session = DeviceSession(
            endpoint, regions, self.around, loop, self, self._ended, self._start, self.migration
        )

    def _start(self) -> bool:
        if not self._admit(self):
            return False
        self._started = True
        self._message.limit = max(1, min(MAX_DMA_MESSAGE, self.session.endpoint.state.peer.max_data_xfer_size))
        self.device.realize()
        ats = self.session.endpoint.state.extensions.ats
        self._bind(self._message if ats else MappedDma(self._memory.ram, self._message))
        return True

    def _bind(self, impl: DMAImpl) -> None:
        self.device.attach_dma(impl)
        self._trace("remote_dma", through=type(impl).__name__)

    def _call(self, command: Command, payload: wire.Payload) -> wire.Payload | None:
        return self.session.call(command, payload, CLIENT_SECONDS)

    def _ended(self, reason: str) -> None:
        self._trace("remote_client_end", reason=reason)
        if self._started:
            self.device.reset_enter()
            self.device.unrealize()
        if self._subscription is not None:
            self._subscription.close()
        self.around.drop_irqs()
        self.around.idle_work.clear()
        self._memory.close()
        self._on_end(self)

    # -- what the client says about memory (hostd.device_session.Memory) ---------------------------------------------

    def dma_map(self, request: wire.DmaMap, fds: list[int]) -> None:
        """DMA_MAP."""
        self._memory.add(request, fds)

    def dma_unmap(self, request: wire.DmaUnmap) -> None:
        """DMA_UNMAP; whatever was cached over it goes first."""
        if self._cache is not None:
            self._cache.flush()
        self._memory.remove(request)

    def notifier(self, request: wire.NotifierSetup) -> None:
        """X_NOTIFIER: subscribe; nothing is cached until the notifier says that the subscription stands."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        try:
            path = request.path.rstrip(b"\0").decode()
            self._subscription = Subscription(
                self._loop, path, type(self.device).__name__, request.as_id, self._armed, self._disarmed, self._trace
            )
        except (PeerLost, UnicodeDecodeError) as error:
            raise OSError(errno.ENOTCONN, f"no notifier: {error}") from error

    def _armed(self, ring: RingReader) -> None:
        assert self._subscription is not None, "armed by the subscription"
        self._cache = CachedImpl(
            translator(self._call),
            ring,
            self._subscription.lane,
            self._memory.ram,
            as_id=self._subscription.as_id,
            fallback=self._message,
        )
        self._cache.arm()
        self._bind(self._cache)

    def _disarmed(self) -> None:
        if self._cache is not None:
            self._cache.disarm()
            self._cache = None
        self._bind(self._message)
