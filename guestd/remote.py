"""A device behind vfio-user framing, as its user: assigned (its stream came from hostd) or remote (connected by path).

It is the guest-facing device's :class:`~vfio_model.vfio.region.DeviceConnection`: every command as a method. How they
are asked, and what is served meanwhile, is :mod:`guestd.remote_peer`'s. Region writes are posted; those of a burst
(:mod:`guestd.posted_writes`) travel together.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Sequence
from typing import Final

from guestd.posted_writes import current_burst
from guestd.remote_doorbells import RemoteDoorbells
from guestd.remote_peer import RemotePeer, answering, is_answering
from guestd.remote_regions import Areas, RegionMaps
from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop, deadline_scale
from protocols.transport.unix import close_fds
from protocols.vfio_user import messages as wire
from protocols.vfio_user.iommu_messages import IommuSetup, PageAnswer
from protocols.vfio_user.messages import (
    Capabilities,
    Command,
    Extensions,
    MigrationCapability,
    Payload,
    TwinSocket,
)
from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import DeviceFlags, DeviceInfo, IrqInfo, IrqSetFlags, RegionInfo
from vfio_model.vfio.region import IrqHandler
from vfio_model.vfio.vfio_user import DmaChange, DmaLimits

MAX_REGION_ACCESS: Final = 32 << 10
"""Bytes of one region access: larger messages break peers in spite of what was negotiated."""

MAX_MULTI_BYTES: Final = 8
"""Bytes of a region write that can travel with others."""

MAX_REGION_INFO: Final = 64 << 10
"""Bytes of an answer about a region that are asked for."""
SOME_DOORBELLS: Final = wire.RegionIoFds.SIZE + 16 * wire.IoFd.FORMAT.size
"""Bytes of an answer about a region's doorbells that are asked for at first."""
MAX_HELD: Final = 64
"""Region writes that are held to travel together."""
DMA_PIPELINE: Final = 128
"""DMA_MAPs and DMA_UNMAPs on their way at a time."""
DMA_CHANGE_SECONDS: Final = 0.001
"""What each of them adds to the deadline of all."""

PGSIZES: Final = 1 << 12 | 1 << 16 | 1 << 21 | 1 << 24 | 1 << 30
"""Pages that guestd can map for a server."""


def capabilities(*, ats: bool, twin: bool = False, iommu: bool = False) -> Capabilities:
    """What guestd proposes; without ``ats`` the device's DMA goes through maps, or by message, or not here at all.
    ``twin``: a second socket for what the device asks. ``iommu``: it may ask for what the IOMMU offers.
    """
    return Capabilities(
        max_msg_fds=16,
        pgsizes=PGSIZES,
        write_multiple=True,
        migration=MigrationCapability(),
        twin_socket=TwinSocket(True) if twin else None,
        extensions=Extensions(ats=ats, clock=True, notifier=ats, iommu=iommu),
    )


class _Irq:
    """One vector's eventfd in the loop."""

    def __init__(self, loop: Loop, handler: IrqHandler) -> None:
        self.event = EventFd()
        self._loop, self._handler = loop, handler
        loop.register(self.event, self._rung, served=True)

    def _rung(self) -> None:
        if self.event.drain():
            with answering():
                self._handler()

    def close(self) -> None:
        self._loop.unregister(self.event)
        self.event.close()


def _close_irqs(irqs: Sequence[_Irq]) -> None:
    for irq in irqs:
        irq.close()


class VfioUserDevice(RemotePeer):
    """The device at the other end; made as :class:`RemotePeer` is."""

    def _prepare(self) -> None:
        self._irqs: dict[int, list[_Irq]] = {}
        self._maps = RegionMaps(self.name, self._trace)
        self._doorbells = RemoteDoorbells(self.name, self._trace)
        self._fence: int | None = None
        """The request behind which nothing was posted; its answer has not been looked at."""
        self._held: list[wire.RegionAccess] = []
        """Stores of a burst that have not left."""
        self._flags: int | None = None
        """What the device can do, once it was asked."""

    @property
    def limits(self) -> DmaLimits:
        """What the device takes of DMA_MAP."""
        peer = self._endpoint.state.peer
        return DmaLimits(peer.max_dma_maps, peer.pgsizes)

    @property
    def _access_limit(self) -> int:
        """Bytes of one region access."""
        return min(MAX_REGION_ACCESS, self._endpoint.state.peer.max_data_xfer_size)

    @property
    def extensions(self) -> Extensions:
        """What both sides know beyond the standard."""
        return self._endpoint.state.extensions

    # -- DeviceConnection ----------------------------------------------------------------------------------------

    def get_info(self) -> DeviceInfo:
        """DEVICE_GET_INFO."""
        reply = self._call(Command.DEVICE_GET_INFO, wire.DeviceInfo(), wire.DeviceInfo)
        return DeviceInfo(reply.argsz, reply.flags, reply.num_regions, reply.num_irqs)

    def get_region_info(self, index: int) -> RegionInfo:
        """DEVICE_GET_REGION_INFO."""
        reply, fds = self._region_info(index, wire.RegionInfo.SIZE)
        close_fds(fds)
        return RegionInfo(reply.argsz, reply.flags, reply.index, reply.cap_offset, reply.size, reply.offset)

    def _region_info(self, index: int, argsz: int) -> tuple[wire.RegionInfo, list[int]]:
        request = wire.RegionInfo(argsz=argsz, index=index)
        reply, fds = self._exchange(Command.DEVICE_GET_REGION_INFO, request, wire.RegionInfo)
        if reply.index != index:
            close_fds(fds)
            raise OSError(errno.EIO, f"{self.name}: it tells of region {reply.index}, not {index}")
        return reply, fds

    def region_memory(self, index: int) -> Areas:
        """(offset, bytes) of each area of a region that is mapped here; a server that wants more room for its answer
        gets it.
        """
        if index not in self._maps:
            reply, fds = self._region_info(index, wire.RegionInfo.SIZE)
            try:
                if wire.RegionInfo.SIZE < reply.argsz <= MAX_REGION_INFO:
                    close_fds(fds)
                    fds = []
                    reply, fds = self._region_info(index, reply.argsz)
                self._maps.add(reply, fds)
            finally:
                close_fds(fds)
        return self._maps.of(index)

    def region_vanished(self, index: int) -> bool:
        """Whether an access found the file behind a region cut."""
        return self._maps.vanished(index)

    def region_doorbells(self, index: int, size: int) -> None:
        """DEVICE_GET_REGION_IO_FDS of a region of ``size`` bytes: from now on what it lists is rung. A server may have
        none, or not know the command.
        """
        reply, fds = wire.RegionIoFds(SOME_DOORBELLS, 0, index), list[int]()
        try:
            for _ in range(2):
                close_fds(fds)
                fds = []
                request = wire.RegionIoFds(min(max(reply.argsz, SOME_DOORBELLS), MAX_REGION_INFO), 0, index)
                reply, fds = self._exchange(Command.DEVICE_GET_REGION_IO_FDS, request, wire.RegionIoFds)
                if reply.count or reply.argsz <= request.argsz:
                    break
        except OSError as error:
            self._trace("vfio_device_refused", name=self.name, what="doorbells", reason=str(error))
        if reply.index == index:
            self._doorbells.add(reply, size, fds)
        else:
            close_fds(fds)

    def get_irq_info(self, index: int) -> IrqInfo:
        """DEVICE_GET_IRQ_INFO."""
        reply = self._call(Command.DEVICE_GET_IRQ_INFO, wire.IrqInfo(index=index), wire.IrqInfo)
        return IrqInfo(reply.argsz, reply.flags, reply.index, reply.count)

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """REGION_READ; a short answer is EIO."""
        limit = self._access_limit
        if size <= limit:
            return self._region_read(index, offset, size)
        return b"".join(
            self._region_read(index, at, min(limit, offset + size - at)) for at in range(offset, offset + size, limit)
        )

    def _region_read(self, index: int, offset: int, size: int) -> bytes:
        if self._held:
            self.send_held()
        data = self._read(index, offset, size)
        if len(data) != size:
            raise OSError(errno.EIO, f"{self.name}: {len(data)} bytes of {size} read")
        return data

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """REGION_WRITE, posted; one of REGION_WRITE_MULTI; or the ring of a doorbell."""
        if self._doorbells.are_rung(index, offset, data):
            if not self._settled():
                self._ring_in_turn(wire.RegionAccess(offset, index, len(data), data))
                return
            if self._doorbells.ring(index, offset, data):
                return
        if len(data) <= MAX_MULTI_BYTES and self._endpoint.state.write_multiple:
            burst = current_burst()
            if burst is not None and self.lost is None:
                if not self._held:
                    burst.join(self)
                self._held.append(wire.RegionAccess(offset, index, len(data), data))
                if len(self._held) >= min(MAX_HELD, self._access_limit // wire.MULTI_WRITE_SIZE):
                    self.send_held()
                return
        limit = self._access_limit
        for at in range(0, len(data), limit):
            part = data[at : at + limit]
            self._post(Command.REGION_WRITE, wire.RegionAccess(offset + at, index, len(part), part))

    def _settled(self) -> bool:
        """Whether the device has taken everything that was posted to it."""
        if self._fence is not None and self._fence in self._replies:
            del self._replies[self._fence]
            self._fence = None
        return self._fence is None and not self._posted and not self._held and self.lost is None

    def _ring_in_turn(self, write: wire.RegionAccess) -> None:
        """A ring that would overtake something goes by message; its answer, for which nobody waits, says when the next
        one would not.
        """
        if self._fence is not None:
            self._post(Command.REGION_WRITE, write)
            return
        self._fence = self._send(Command.REGION_WRITE, write)
        self._posted = False

    def send_held(self) -> None:
        """See ``Holder``; that the device is gone, whoever follows it is told."""
        held, self._held = self._held, []
        with contextlib.suppress(PeerLost):
            if len(held) == 1:
                self._post(Command.REGION_WRITE, held[0])
            elif held:
                self._post(Command.REGION_WRITE_MULTI, wire.RegionWriteMulti.of(held))

    def _transmit(self, command: Command, payload: Payload, fds: Sequence[int], *, no_reply: bool) -> int:
        if self._held:
            self.send_held()
        return super()._transmit(command, payload, fds, no_reply=no_reply)

    def set_irqs(self, index: int, handlers: Sequence[IrqHandler]) -> None:
        """DEVICE_SET_IRQS with one eventfd for each handler; none disables the index. A refusal changes nothing."""
        irqs = [_Irq(self._loop, handler) for handler in handlers]
        try:
            self._set_eventfds(index, [irq.event.fd for irq in irqs])
        except (OSError, PeerLost):
            _close_irqs(irqs)
            raise
        _close_irqs(self._irqs.pop(index, []))
        self._irqs[index] = irqs

    def _set_eventfds(self, index: int, fds: list[int]) -> None:
        """In as many requests as the descriptors need."""
        flags = IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER
        if not fds:
            flags |= IrqSetFlags.VFIO_IRQ_SET_DATA_NONE
            self._call(Command.DEVICE_SET_IRQS, wire.SetIrqs(flags=int(flags), index=index), wire.Empty)
            return
        flags |= IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD
        step = max(self._endpoint.state.peer.max_msg_fds, 1)
        for start in range(0, len(fds), step):
            some = fds[start : start + step]
            request = wire.SetIrqs(flags=int(flags), index=index, start=start, count=len(some))
            self._call(Command.DEVICE_SET_IRQS, request, wire.Empty, some)

    def unmask_irq(self, index: int) -> None:
        """DEVICE_SET_IRQS, unmask; posted, because the device answers with an interrupt if it wants one."""
        flags = IrqSetFlags.VFIO_IRQ_SET_DATA_NONE | IrqSetFlags.VFIO_IRQ_SET_ACTION_UNMASK
        self._post(Command.DEVICE_SET_IRQS, wire.SetIrqs(flags=int(flags), index=index, count=1))

    def reset(self) -> None:
        """DEVICE_RESET. :raise OSError: ENOTTY for a device that says that it has none."""
        if self._flags is None:
            self._flags = self.get_info().flags
        if not self._flags & DeviceFlags.VFIO_DEVICE_FLAGS_RESET:
            raise OSError(errno.ENOTTY, f"{self.name}: it cannot be reset")
        self._call(Command.DEVICE_RESET, wire.Empty(), wire.Empty)

    def close(self) -> None:
        """Close the stream, which ends what the device does for us. Harmless twice."""
        if self.lost is None:
            self.lost = PeerLost(self.name, "closing: it was closed here")
            self._release_endpoint()
            self._see_it_end()
            self._release()
            self._maps.close()
            self._doorbells.close()

    def sync(self) -> None:
        """Return when the device has taken everything that was posted to it, or is gone."""
        if self.lost is None and not self._settled():
            with contextlib.suppress(PeerLost, OSError):
                self.get_info()

    def give_up(self, reason: str) -> None:
        """Treat the device as gone."""
        self._lose(f"waiting: {reason}")

    # -- migration -----------------------------------------------------------------------------------------------

    def device_feature(self, flags: int, data: bytes = b"") -> bytes:
        """DEVICE_FEATURE: the data of the answer."""
        request = wire.DeviceFeature(wire.MAX_FEATURE, flags, data)
        return self._call(Command.DEVICE_FEATURE, request, wire.DeviceFeature).data

    @property
    def mig_data_limit(self) -> int:
        """Bytes of a state that one message carries at most."""
        return self._endpoint.state.peer.max_data_xfer_size

    def mig_data_read(self, size: int) -> bytes:
        """MIG_DATA_READ: at most ``size`` bytes; none at the end of the state."""
        size = min(size, self.mig_data_limit)
        request = wire.MigData(wire.MigData.SIZE + size, size)
        return self._call(Command.MIG_DATA_READ, request, wire.MigData).data

    def mig_data_write(self, data: bytes) -> None:
        """MIG_DATA_WRITE, in as many messages as it takes."""
        limit = self.mig_data_limit
        for at in range(0, len(data), limit):
            part = data[at : at + limit]
            request = wire.MigData(wire.MigData.SIZE + len(part), len(part), part)
            self._call(Command.MIG_DATA_WRITE, request, wire.Empty)

    # -- DMA maps ------------------------------------------------------------------------------------------------

    def dma_many(self, changes: Sequence[DmaChange]) -> list[int]:
        """DMA_MAP and DMA_UNMAP, several on their way at a time: the errno of each. However many, they have to be done
        in time: a guest's hypercall waits.

        :raise PeerLost: the device is gone, or too slow.
        """
        if is_answering():
            raise self._lose("waiting: its memory changes while a device is served")
        until = time.monotonic() + (self.seconds + len(changes) * DMA_CHANGE_SECONDS) * deadline_scale()
        errors: list[int] = []
        for start in range(0, len(changes), DMA_PIPELINE):
            some = [_dma_message(change) for change in changes[start : start + DMA_PIPELINE]]
            numbers = [(self._send(command, request, fds), command) for command, request, fds in some]
            for number, command in numbers:
                answer = self._await(number, command, max(until - time.monotonic(), 0) / deadline_scale())
                errors.append(answer.errno)
        return errors

    # -- what only a device server of ours knows -----------------------------------------------------------------

    def dma_map(self, request: wire.DmaMap, fd: int) -> None:
        """DMA_MAP of guest RAM."""
        self._call(Command.DMA_MAP, request, wire.Empty, [fd])

    def dma_unmap(self, request: wire.DmaUnmap) -> None:
        """DMA_UNMAP: afterwards the device reaches that memory by message."""
        self._call(Command.DMA_UNMAP, request, wire.DmaUnmap)

    def clock(self, now_ns: int, fds: Sequence[int]) -> None:
        """X_CLOCK with the clock area, the tick area, and the step and done eventfds."""
        self._call(Command.X_CLOCK, wire.ClockSetup(now_ns), wire.Empty, list(fds))

    def notifier(self, as_id: int, path: str) -> None:
        """X_NOTIFIER: subscribe to ``as_id``."""
        self._call(Command.X_NOTIFIER, wire.NotifierSetup(as_id, os.fsencode(path)), wire.Empty)

    def iommu(self, request: IommuSetup, gate: int) -> None:
        """X_IOMMU: there is one with services for devices; ``gate`` is the descriptor of its area."""
        self._call(Command.X_IOMMU, request, wire.Empty, [gate])

    def page_response(self, answer: PageAnswer) -> None:
        """X_PAGE_RESPONSE; posted."""
        with contextlib.suppress(PeerLost):
            self._post(Command.X_PAGE_RESPONSE, answer)

    @property
    def iommu_services(self) -> bool:
        """See :class:`~vfio_model.vfio.pci.ServedFunction`."""
        return self.extensions.iommu

    # -- the end -------------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> PeerLost:
        error = super()._lose(reason)
        self._maps.close()
        self._doorbells.close()
        return error

    def _release(self) -> None:
        super()._release()
        for irqs in self._irqs.values():
            _close_irqs(irqs)
        self._irqs.clear()


def _dma_message(change: DmaChange) -> tuple[Command, wire.DmaMap | wire.DmaUnmap, tuple[int, ...]]:
    if not change.is_map:
        return Command.DMA_UNMAP, wire.DmaUnmap(address=change.iova, size=change.size), ()
    request = wire.DmaMap(flags=change.perm, offset=change.offset, address=change.iova, size=change.size)
    return Command.DMA_MAP, request, () if change.fd < 0 else (change.fd,)
