"""A remote device's subscription at the notifier: it gives its lanes and gets the invalidation ring.

::

    off ──subscribe──► asked ──Subscribed + ring──► armed ──PublisherLost──► asked
     ▲                   │                            │
     └──refused, gone────┘                            └──notifier gone: stays armed, the ring goes on

Nothing is cached before *armed*: the guest machine does not wait for a lane that it does not know.
"""

from __future__ import annotations

from collections.abc import Callable

from protocols.notifier import messages as hub
from protocols.transport.channel import FdChannel
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, create_memory, map_memory
from protocols.transport.unix import SeqpacketConnection, close_fds
from vfio_model.errors import PeerLost, RemoteProtocolError
from vfio_model.memory.lane import LANES_SIZE, Lane, init_lanes, retire_lanes
from vfio_model.memory.ring import RingReader
from vfio_model.trace import Trace


class Subscription:
    """Lanes and ring stay mapped until the next turn at top level: when the subscription ends, the device may be in
    the middle of a DMA that waits for a translation.

    ``on_armed(ring)`` when invalidations reach us through ``ring``, ``on_disarmed()`` when they no longer do,
    ``on_space_gone()`` when the address space is no more.

    :raise PeerLost: when no notifier listens at ``path``.
    """

    def __init__(
        self,
        loop: Loop,
        path: str,
        name: str,
        as_id: int,
        on_armed: Callable[[RingReader], None],
        on_disarmed: Callable[[], None],
        trace: Trace,
    ) -> None:
        connection = SeqpacketConnection.connect(path, "notifier")
        self._loop, self._trace, self.as_id = loop, trace, as_id
        self._on_armed, self._on_disarmed = on_armed, on_disarmed
        self._channel: FdChannel[hub.FromHub, hub.ToHub] = FdChannel(connection, hub.FROM_HUB, hub.TO_HUB, hub.fd_count)
        self._lanes = create_memory(f"lanes.{name}", LANES_SIZE)
        init_lanes(self._lanes.words)
        self.lane = Lane(self._lanes.words, 0)
        self._ring: MappedMemory | None = None
        self._channel.send(hub.Subscribe(name, [as_id]), [self._lanes.fd])
        loop.register(self._channel, self._readable, served=True)

    def _readable(self) -> None:
        try:
            while self._channel.fileno() >= 0 and (received := self._channel.receive()) is not None:
                self._message(*received)
        except (PeerLost, RemoteProtocolError) as error:
            self._trace("remote_notifier_lost", reason=str(error))
            self._loop.unregister(self._channel)
            self._channel.close()

    def _message(self, message: hub.FromHub, fds: list[int]) -> None:
        if isinstance(message, hub.Subscribed):
            ring = map_memory(fds[0], what="invalidation ring")
            try:
                reader = RingReader(ring.words)
            except RemoteProtocolError:
                ring.close()
                raise
            self._drop_ring()
            self._ring = ring
            self._trace("remote_subscribed", as_id=self.as_id, subscriber=message.subscriber)
            self._on_armed(reader)
        else:
            close_fds(fds)
            self._trace("remote_unsubscribed", why=type(message).__name__)
            self._drop_ring()

    def _drop_ring(self) -> None:
        """The cache goes before the ring that says what is wrong in it."""
        if self._ring is not None:
            self._on_disarmed()
            self._loop.call_soon(self._ring.close)
            self._ring = None

    def close(self) -> None:
        """Leave. Harmless twice."""
        self._loop.unregister(self._channel)
        self._channel.close()
        self._drop_ring()
        self._loop.call_soon(self._retire)

    def _retire(self) -> None:
        """At top level no DMA is under way."""
        if self._lanes.fd >= 0:
            retire_lanes(self._lanes.words)
            self._lanes.close()
