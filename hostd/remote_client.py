"""One client of a remote device: a connection, and from its VERSION on the one whose memory the device uses.

The three ways of the device's DMA, chosen by what the client offers:

- *ats*: RAM by DMA_MAP in guest-physical addresses, translations by X_TRANSLATE, kept in an ATC as soon as the
  notifier has armed it; until then, and for what is not RAM, by message;
- no extension: DMA_MAP in the device's own addresses, used directly, as a stock QEMU maps it;
- no descriptors: by message, nothing is kept.

DMA_UNMAP answers when nothing of the device's is under way there: mappings in place were given back. A device that does
not give one back in time loses it: its view is released, and what it does with the copy that it finds instead goes
nowhere.
"""

from __future__ import annotations

import contextlib
import errno
import time
from typing import Final, Protocol

from hostd.device_session import DeviceSession
from hostd.dma_failures import DmaFailures
from hostd.remote_device import RemoteDevice
from hostd.remote_dma import MAX_DMA_MESSAGE, MessageDma, translator
from hostd.remote_iommu import RemoteIommu
from hostd.remote_memory import RemoteMemory
from hostd.subscription import Subscription
from protocols.transport.loop import Loop, deadline_scale
from protocols.transport.shm import map_memory
from protocols.transport.unix import StreamConnection, close_fds
from protocols.transport.vfio_user import VfioUserEndpoint, server_capabilities
from protocols.vfio_user import messages as wire
from protocols.vfio_user.iommu_messages import IommuSetup, PageAnswer
from protocols.vfio_user.messages import Command, Extensions, Role
from vfio_model.errors import DeadlineExceeded, PeerLost, RemoteProtocolError
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.ats_gate import AREA_SIZE
from vfio_model.memory.mapped_dma import MappedDma
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.ring import RingReader
from vfio_model.trace import Trace

CLIENT_SECONDS: Final = 5.0
"""Deadline of a translation or DMA message (scaled as every deadline)."""
GIVE_BACK_SECONDS: Final = 2.0
"""How long a device may keep a mapping whose memory is taken away; less than a client waits for its DMA_UNMAP."""


ATTENTION_NS: Final = 2_000_000
"""How long a client alone is listened to, at most."""
SLICE_SECONDS: Final = 0.01


class Owner(Protocol):
    """Who has the device: the server."""

    name: str

    def admit(self, client: RemoteClient) -> bool:
        """``client`` has negotiated: whether the device is its from now on."""

    def ended(self, client: RemoteClient, reason: str) -> None:
        """``client`` is gone."""

    def let_work(self) -> float | None:
        """Let the device do a round of what it does by itself; seconds until the next one, None: until then."""


class RemoteClient:
    """``connection`` (its own from now on) to ``unit``."""

    def __init__(
        self, loop: Loop, connection: StreamConnection, unit: RemoteDevice, server: Owner, trace: Trace
    ) -> None:
        self._loop, self._unit, self._server, self._trace = loop, unit, server, trace
        self._memory = RemoteMemory()
        self._cache: CachedImpl | None = None
        self._mapped: MappedDma | None = None
        self._iommu: RemoteIommu | None = None
        self._subscription: Subscription | None = None
        self._ring: RingReader | None = None
        """While the subscription is armed."""
        self._message = MessageDma(self._ask)
        self._failures = DmaFailures(server.name, trace)
        self.owns = False
        """Whether the device is this client's."""
        capabilities = server_capabilities(Extensions(ats=True, clock=True, notifier=True, iommu=True))
        self.session = DeviceSession(
            VfioUserEndpoint(connection, Role.SERVER, capabilities),
            unit.regions,
            unit.around,
            loop,
            self,
            self._ended,
            self._start,
            unit.migration,
            self._attention,
        )

    def _start(self) -> bool:
        self.owns = self._server.admit(self)
        if not self.owns:
            return False
        state = self.session.endpoint.state
        self._memory.maps.limit = min(self._memory.maps.limit, state.peer.max_dma_maps)
        self._message.limit = max(1, min(MAX_DMA_MESSAGE, state.peer.max_data_xfer_size))
        if state.extensions.ats:
            self._unit.bind(self._message)
        else:
            self._mapped = MappedDma(
                self._memory.maps, self._message, self._failures.note, ask_always=state.extensions.clock
            )
            # without an IOMMU in front of it, what the client maps is system memory
            self._unit.bind(self._mapped, system=self._mapped)
        return True

    def _attention(self) -> int:
        """A client that polls a register is answered without a turn of the loop for each read."""
        unit = self._unit
        if not self.owns or unit.around.idle_work or self.session.has_clock:
            return 0
        return unit.around.free_clock.before_due(time.monotonic_ns() + ATTENTION_NS)

    def _call(self, command: Command, payload: wire.Payload) -> wire.Payload | None:
        return self.session.call(command, payload, CLIENT_SECONDS)

    def _ended(self, reason: str) -> None:
        self._trace("remote_client_end", reason=reason, owner=self.owns)
        self._drop_iommu()
        if self._subscription is not None:
            self._subscription.close()
        if self.owns:
            self._unit.abandon()
            for mapping in [] if self._mapped is None else self._mapped.mappings:
                self._take_away(mapping)
        self._memory.close()
        self._server.ended(self, reason)

    # -- what the client says about memory (hostd.device_session.Memory) ---------------------------------------------

    def dma_map(self, request: wire.DmaMap, fds: list[int]) -> None:
        """DMA_MAP."""
        direct = bool(fds)
        try:
            self._memory.add(request, fds)
        except OSError as error:
            self._trace("remote_dma_map_refused", iova=request.address, size=request.size, reason=str(error.strerror))
            self._failures.say(
                f"DMA_MAP of {request.size:#x} bytes at {request.address:#x} is refused: {error.strerror}"
            )
            raise
        trace = self._trace
        if trace.enabled:
            trace("remote_dma_map", iova=request.address, size=request.size, flags=request.flags, direct=direct)

    def dma_unmap(self, request: wire.DmaUnmap) -> None:
        """DMA_UNMAP; whatever was cached or mapped over it goes first."""
        try:
            first, last = self._memory.touched(request)
        except OSError as error:
            self._trace("remote_dma_unmap_refused", iova=request.address, size=request.size, reason=str(error.strerror))
            self._failures.say(
                f"DMA_UNMAP of {request.size:#x} bytes at {request.address:#x} is refused: {error.strerror}"
            )
            raise
        if self._cache is not None:
            self._cache.flush()
        if self._iommu is not None:
            self._iommu.forget()
        if self._mapped is not None and self._mapped.mappings.invalidate(first, last):
            self._await_mappings(first, last)
        size = self._memory.remove(first, last)
        trace = self._trace
        if trace.enabled:
            trace("remote_dma_unmap", iova=first, last=last, bytes=size)

    def look(self) -> None:
        """Tell of files that turned out to be shorter than they were, and of invalidations."""
        if self._iommu is not None:
            self._iommu.hear()
        if self._memory.guarded:
            for known in self._memory.shrunk():
                self._trace("remote_dma_file_shrank", iova=known.iova, size=known.size)
                self._failures.say(f"the file behind {known!r} has become shorter: what is missing reads as zeros")

    def _await_mappings(self, first: int, last: int) -> None:
        assert self._mapped is not None, "there are mappings"
        live = self._mapped.mappings.overlapping
        until = time.monotonic() + GIVE_BACK_SECONDS * deadline_scale()
        while live(first, last) and time.monotonic() < until:
            # What a device does by itself is not done inside what it does for somebody else.
            pause = self._server.let_work() if self._loop.depth == 0 else None
            with contextlib.suppress(DeadlineExceeded):
                self._loop.serve_until(
                    lambda: not live(first, last),
                    SLICE_SECONDS if pause is None else min(SLICE_SECONDS, pause),
                    self._server.name,
                    "DMA_UNMAP",
                )
        for mapping in live(first, last):
            self._failures.say(f"{mapping!r} is not given back within {GIVE_BACK_SECONDS:g} s: it is taken away")
            self._take_away(mapping)

    def _take_away(self, mapping: DMAMapping) -> None:
        """The device keeps a copy, as a bounce buffer that leads nowhere."""
        assert self._mapped is not None, "its mapping"
        self._trace("remote_mapping_taken", iova=mapping.iova, last=mapping.last)
        self._mapped.mappings.remove(mapping)
        view, mapping.view, mapping.bounce = mapping.view, memoryview(bytearray(mapping.view)), True
        with contextlib.suppress(BufferError):
            view.release()

    def notifier(self, request: wire.NotifierSetup) -> None:
        """X_NOTIFIER: subscribe; nothing is cached until the notifier says that the subscription stands."""
        if self._subscription is not None:
            self._subscription.close()
            self._subscription = None
        try:
            path = request.path.rstrip(b"\0").decode()
            name = type(self._unit.device).__name__
            self._subscription = Subscription(
                self._loop, path, name, request.as_id, self._armed, self._disarmed, self._trace
            )
        except (PeerLost, UnicodeDecodeError) as error:
            raise OSError(errno.ENOTCONN, f"no notifier: {error}") from error

    def _armed(self, ring: RingReader) -> None:
        assert self._subscription is not None, "armed by the subscription"
        self._cache = CachedImpl(
            translator(self._call),
            ring,
            self._subscription.lane,
            self._memory.maps,
            as_id=self._subscription.as_id,
            fallback=self._message,
        )
        self._cache.arm()
        self._unit.bind(self._cache)
        self._ring = ring
        if self._iommu is not None:
            self._iommu.arm(ring, self._subscription.lane, self._subscription.as_id)

    def _disarmed(self) -> None:
        self._ring = None
        if self._iommu is not None:
            self._iommu.disarm()
        if self._cache is not None:
            self._cache.disarm()
            self._cache = None
        self._unit.bind(self._message)

    def iommu(self, request: IommuSetup, fds: list[int]) -> None:
        """X_IOMMU. :raise OSError: EINVAL for another descriptor than that of a gate; EBUSY the second time."""
        if len(fds) != 1 or self._iommu is not None:
            close_fds(fds)
            raise OSError(errno.EBUSY if self._iommu is not None else errno.EINVAL, "X_IOMMU: one area, once")
        try:
            gate = map_memory(fds[0], size=AREA_SIZE, what="gate of translated requests")
        except RemoteProtocolError as error:
            raise OSError(errno.EINVAL, str(error)) from error
        try:
            self._iommu = RemoteIommu(
                self._ask,
                request,
                gate,
                self._memory.maps,
                lambda: self.session.in_access,
                self._loop.call_soon,
                limit=self._message.limit,
            )
        except RemoteProtocolError as error:
            gate.close()
            raise OSError(errno.EINVAL, str(error)) from error
        if self._ring is not None and self._subscription is not None:
            self._iommu.arm(self._ring, self._subscription.lane, self._subscription.as_id)
        self._unit.around.iommu = self._iommu

    def page_response(self, answer: PageAnswer) -> None:
        """X_PAGE_RESPONSE."""
        if self._iommu is not None:
            self._iommu.page_response(answer)

    def _drop_iommu(self) -> None:
        if self._iommu is not None:
            self._unit.around.iommu = None
            self._iommu.close()
            self._iommu = None

    def _ask(self, command: Command, payload: wire.Payload) -> wire.Payload:
        return self.session.ask(command, payload, CLIENT_SECONDS)
