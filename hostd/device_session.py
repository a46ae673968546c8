"""One vfio-user client of a device: its commands, answered in order.

The same session serves an assigned device (the client is guestd, the stream came from hostd) and a remote emulated one.
What DMA travels through is not decided here: :class:`Memory` takes DMA_MAP, DMA_UNMAP, X_TRANSLATE's answers and
X_NOTIFIER; an assigned device has no use for them.

A client that breaks the protocol, or goes away, ends the session; :attr:`DeviceSession.on_end` says why.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from hostd.device_doorbells import DeviceDoorbells
from hostd.device_migration import DeviceMigration, NoRoom
from hostd.device_regions import DeviceRegions
from hostd.device_surroundings import ProcessSurroundings, SharedClock
from protocols.transport.kernel import EventFd, is_eventfd
from protocols.transport.loop import Loop
from protocols.transport.shm import map_memory
from protocols.transport.unix import close_fds
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.iommu_messages import IommuSetup, PageAnswer
from protocols.vfio_user.messages import Command
from protocols.vfio_user.short_way import PlainRequest, plain_answer, plain_refusal
from protocols.vfio_user.state import CommandReceived, ReplyReceived
from vfio_model.errors import DeadlineExceeded, LocalProtocolError, PeerLost, RemoteProtocolError
from vfio_model.memory.clock_area import AREA_SIZE, check_clock, check_ticks

PATIENCE_SECONDS = 0.05
"""How long a client may take to answer in the middle of its own write before it is taken for one that cannot."""
IN_READ_SECONDS = 2.0
"""Deadline of what the device asks for while its client waits for an answer; QEMU gives up after 5 s."""
# Members of an enumeration cost 0.2 us each time that they are looked up in their class.
_VERSION, _REGION_READ = Command.VERSION, Command.REGION_READ
_WRITE = int(Command.REGION_WRITE)
MAX_NESTED: Final = 32
"""Waits inside one another: a client that answers questions with questions is asked no more of them."""


class Memory(Protocol):
    """What a session does with the client's memory messages. Descriptors are taken over."""

    def dma_map(self, request: wire.DmaMap, fds: list[int]) -> None:
        """:raise OSError: when it cannot be done."""

    def dma_unmap(self, request: wire.DmaUnmap) -> None:
        """:raise OSError: when it cannot be done."""

    def notifier(self, request: wire.NotifierSetup) -> None:
        """Subscribe there. :raise OSError: when it cannot be done."""

    def iommu(self, request: IommuSetup, fds: list[int]) -> None:
        """There is an IOMMU with services for devices. :raise OSError: when it cannot be used."""

    def page_response(self, answer: PageAnswer) -> None:
        """A page request group is answered."""


class NoMemory:
    """An assigned device: the host's tables say what it may reach, and the client's DMA_MAPs say nothing."""

    def dma_map(self, request: wire.DmaMap, fds: list[int]) -> None:
        """Accepted and without effect."""
        close_fds(fds)

    def dma_unmap(self, request: wire.DmaUnmap) -> None:
        """Accepted and without effect."""

    def notifier(self, request: wire.NotifierSetup) -> None:
        """Refused: what this device caches, the host revokes."""
        raise OSError(errno.ENOTSUP, "an assigned device has no translations of the guest's")

    def iommu(self, request: IommuSetup, fds: list[int]) -> None:
        """Refused."""
        close_fds(fds)
        raise OSError(errno.ENOTSUP, "an assigned device has the host's IOMMU in front of it")

    def page_response(self, answer: PageAnswer) -> None:
        """Nothing was asked."""


class DeviceSession:
    """Serves ``endpoint`` (its own from now on) from ``loop``."""

    def __init__(
        self,
        endpoint: VfioUserEndpoint,
        regions: DeviceRegions,
        around: ProcessSurroundings,
        loop: Loop,
        memory: Memory,
        on_end: Callable[[str], None],
        on_start: Callable[[], bool] = lambda: True,
        migration: DeviceMigration | None = None,
        attention: Callable[[], int] = lambda: 0,
    ) -> None:
        """``on_start()`` is asked when the client has sent VERSION; False refuses it with EBUSY. Without ``migration``
        the device has no features. ``attention()`` says until when (monotonic ns) this client alone is listened to
        while it goes on speaking, before the loop has its turn; 0: not at all.
        """
        self._attention, self._attend_until = attention, 0
        self._plain_asked = 0
        """Requests under way by the short way whose answers the client waits for."""
        self._migration = migration
        self.endpoint = endpoint
        self._on_start = on_start
        self._regions, self._around, self._loop, self._memory = regions, around, loop, memory
        self._on_end = on_end
        self._clock: SharedClock | None = None
        self._doorbells = DeviceDoorbells(regions.device, loop)
        self.replies: dict[int, ReplyReceived] = {}
        self.expected: set[int] = set()
        """Ids of commands of ours whose replies somebody waits for."""
        self.closed = False
        self._under_way: dict[int, CommandReceived] = {}
        """Requests that are being carried out, one inside the other, and not answered yet; by serial."""
        self._client_waits = False
        """Whether the client was seen to serve nothing while it waits for an answer of ours."""
        self._taking: dict[type[wire.Payload] | type[None], Callable[..., None]] = {
            wire.SetIrqs: regions.set_irqs,
            wire.DmaMap: memory.dma_map,
            IommuSetup: memory.iommu,
            wire.ClockSetup: lambda _request, fds: self._set_clock(fds),
        }
        """Requests whose descriptors are taken over."""
        self._simple: dict[type[wire.Payload] | type[None], Callable[[Any], wire.Payload]] = {
            wire.DmaUnmap: self._unmap,
            wire.DeviceInfo: lambda _request: regions.info(),
            wire.IrqInfo: lambda request: regions.irq_info(request.index),
            wire.RegionWriteMulti: self._write_multi,
            wire.NotifierSetup: self._subscribe,
            PageAnswer: self._page_response,
        }
        """What their answers say comes from the request alone."""
        self._short = {
            int(Command.REGION_READ): self._plain_read,
            _WRITE: self._plain_write,
            int(Command.DMA_MAP): self._plain_map,
            int(Command.DMA_UNMAP): self._plain_unmap,
        }
        """What goes the short way; each gives the body of its answer."""
        endpoint.stream.attend()
        loop.register(endpoint, self.receive, served=True)

    def receive(self) -> None:
        """Serve what has come; called by the loop, and by whoever waits for a reply.

        Who has asked waits for the answer: whether it has sent more is left to the loop, unless it is the one that is
        listened to.
        """
        self._attend_until = 0 if self._loop.depth else self._attention()
        wait, receive, plain = False, self.endpoint.receive, self._plain
        try:
            while not self.closed and (event := receive(wait=wait, plain=plain)) is not None:
                if isinstance(event, ReplyReceived):
                    self._reply(event)
                    continue
                self._command(event)
                wait = time.monotonic_ns() < self._attend_until and not self.endpoint.congested
                if not event.no_reply and not wait:
                    break
        except (PeerLost, RemoteProtocolError) as error:
            self.end(str(error))
        self._loop.expect()

    def end(self, reason: str) -> None:
        """Close the session. Harmless twice."""
        if self.closed:
            return
        self.closed = True
        self._loop.unregister(self.endpoint)
        if self.endpoint.twin is not None:
            self._loop.unregister(self.endpoint.twin)
        self.endpoint.close()
        self._drop_clock()
        self._doorbells.close()
        self._on_end(reason)

    def call(self, command: Command, payload: wire.Payload, seconds: float) -> wire.Payload | None:
        """Ask the client and wait, serving what is *served* meanwhile; None when it refuses, is late or gone.

        A client may not look at what we ask before it has the answer to what it asked, as QEMU. When one is seen to
        wait, region writes that are under way are answered first from then on, whatever becomes of them; a read cannot
        be, and what the device asks for in the middle of one has failed after a time that its client can bear.
        """
        reply = self._exchange(command, payload, seconds)
        return None if reply is None or reply.errno else reply.payload

    def ask(self, command: Command, payload: wire.Payload, seconds: float) -> wire.Payload:
        """As :meth:`call`.

        :raise OSError: the client's errno; ENODEV when it is late or gone.
        """
        reply = self._exchange(command, payload, seconds)
        if reply is None:
            raise OSError(errno.ENODEV, f"{self.endpoint.name} does not answer {wire.command_name(command)}")
        if reply.errno or reply.payload is None:
            raise OSError(reply.errno, f"{wire.command_name(command)}: {os.strerror(reply.errno)}")
        return reply.payload

    @property
    def in_access(self) -> bool:
        """Whether the client waits for an answer of ours: it has accessed a register, say."""
        return bool(self._plain_asked or self._awaited())

    def _exchange(self, command: Command, payload: wire.Payload, seconds: float) -> ReplyReceived | None:
        if self.closed or not self.endpoint.ready or self._loop.depth >= MAX_NESTED:
            return None
        try:
            if self._client_waits:
                self._answer_writes()
            number = self.endpoint.command(command, payload)
        except (PeerLost, LocalProtocolError):
            return None
        self.expected.add(number)
        try:
            self._await(number, command, seconds)
        except PeerLost as error:
            self.end(str(error))
        finally:
            self.expected.discard(number)
        return self.replies.pop(number, None)

    def _await(self, number: int, command: Command, seconds: float) -> None:
        """Return when there is an answer, or there will be none."""

        def wait(limit: float) -> bool:
            try:
                self._loop.serve_until(
                    lambda: number in self.replies or self.closed, limit, self.endpoint.name, command.name
                )
            except DeadlineExceeded as error:
                late.append(error)
                return False
            return True

        late: list[DeadlineExceeded] = []
        if any(event.command == Command.REGION_WRITE for event in self._awaited()):
            if wait(PATIENCE_SECONDS):
                return
            self._client_waits = True
            self._answer_writes()
        asked = self.in_access
        if not wait(min(seconds, IN_READ_SECONDS) if asked else seconds) and not asked:
            self.end(str(late[-1]))

    def _awaited(self) -> list[CommandReceived]:
        """Requests under way whose answers the client waits for."""
        return [event for event in self._under_way.values() if not event.no_reply]

    def _answer_writes(self) -> None:
        """Answer the region writes that are being carried out. :raise PeerLost: the client is gone."""
        for event in self._awaited():
            if event.command == Command.REGION_WRITE:
                del self._under_way[event.serial]
                request = event.payload
                assert isinstance(request, wire.RegionAccess), "the state checked what belongs to a write"
                self.endpoint.reply(event, wire.RegionAccess(request.offset, request.region, request.count))

    def _plain(self, request: PlainRequest, body: bytes, fds: list[int]) -> bool:
        """A request by the short way; whether more is waited for."""
        self._doorbells.settle()
        command = request[1]
        asked = command != _WRITE
        self._plain_asked += asked
        try:
            answer = plain_answer(request, self._short[command](request[2], body, fds))
        except OSError as error:
            answer = plain_refusal(request, error.errno or errno.EIO)
        finally:
            self._plain_asked -= asked
        if asked and not self.closed:
            self.endpoint.stream.send(answer)
        return not self.closed and time.monotonic_ns() < self._attend_until and not self.endpoint.congested

    def _plain_read(self, values: tuple[int, ...], body: bytes, _fds: list[int]) -> bytes:
        self._around.free_clock.catch_up()
        offset, region, count = values
        return body + self._regions.read(region, offset, count)

    def _plain_write(self, values: tuple[int, ...], body: bytes, _fds: list[int]) -> bytes:
        self._around.free_clock.catch_up()
        self._regions.write(values[1], values[0], body[wire.RegionAccess.SIZE :])
        return b""

    def _plain_map(self, values: tuple[int, ...], _body: bytes, fds: list[int]) -> bytes:
        self._memory.dma_map(wire.DmaMap(*values), fds)
        return b""

    def _plain_unmap(self, values: tuple[int, ...], body: bytes, _fds: list[int]) -> bytes:
        self._memory.dma_unmap(wire.DmaUnmap(*values))
        return body

    def _reply(self, event: ReplyReceived) -> None:
        close_fds(event.fds)
        if event.id in self.expected:
            self.replies[event.id] = event

    def _command(self, event: CommandReceived) -> None:
        self._doorbells.settle()
        if event.command == _VERSION:
            if self._on_start():
                self._accept(event)
            else:
                self.endpoint.reply_error(event, errno.EBUSY)
                self.end("the device serves another client")
            return
        self._under_way[event.serial] = event
        try:
            payload, fds = self._carry_out(event)
        except OSError as error:
            if event.serial in self._under_way:
                self.endpoint.reply_error(event, error.errno or errno.EIO)
            return
        finally:
            answered = self._under_way.pop(event.serial, None) is None
        if self.closed or answered:
            return
        try:
            self.endpoint.reply(event, payload, fds)
        except LocalProtocolError as error:
            raise RemoteProtocolError(f"a request that cannot be answered: {error}") from error

    def _accept(self, event: CommandReceived) -> None:
        self.endpoint.accept(event)
        if self.endpoint.twin is not None:
            self._loop.register(self.endpoint.twin, self.receive, served=True)

    def _carry_out(self, event: CommandReceived) -> tuple[wire.Payload, tuple[int, ...]]:
        """The answer and its descriptors, which stay the device's. :raise OSError: the errno of a refusal."""
        request, fds = event.payload, event.fds
        taking = self._taking.get(type(request))
        if taking is not None:
            taking(request, fds)
            return wire.Empty(), ()
        close_fds(fds)
        simple = self._simple.get(type(request))
        if simple is not None:
            return simple(request), ()
        if isinstance(request, wire.RegionInfo):
            return self._regions.region_info(request.index, request.argsz)
        if isinstance(request, wire.RegionIoFds):
            return self._doorbells.describe(request, self.endpoint.state.peer.max_msg_fds)
        return self._answer(event.command, request), ()

    def _answer(self, command: int, request: wire.Payload | None) -> wire.Payload:
        if isinstance(request, wire.RegionAccess):
            return self._access(command, request)
        if command == Command.DEVICE_RESET:
            self._regions.reset()
            if self._migration is not None:
                self._migration.reset()
            return wire.Empty()
        if self._migration is not None and isinstance(request, wire.DeviceFeature | wire.MigData):
            return _migrate(self._migration, command, request)
        raise OSError(errno.ENOTSUP, f"command {command}")

    def _unmap(self, request: wire.DmaUnmap) -> wire.Payload:
        self._memory.dma_unmap(request)
        return request

    def _subscribe(self, request: wire.NotifierSetup) -> wire.Payload:
        self._memory.notifier(request)
        return wire.Empty()

    def _page_response(self, answer: PageAnswer) -> wire.Payload:
        self._memory.page_response(answer)
        return wire.Empty()

    def _write_multi(self, request: wire.RegionWriteMulti) -> wire.RegionWriteMultiReply:
        """The first write that is refused ends it; how many were done says which."""
        self._around.free_clock.catch_up()
        done = 0
        with contextlib.suppress(OSError):
            for write in request.writes():
                self._regions.write(write.region, write.offset, write.data)
                done += 1
        return wire.RegionWriteMultiReply(done)

    @property
    def has_clock(self) -> bool:
        """Whether the client brought the guest's clock."""
        return self._clock is not None

    def _access(self, command: int, request: wire.RegionAccess) -> wire.RegionAccess:
        self._around.free_clock.catch_up()
        if command == _REGION_READ:
            data = self._regions.read(request.region, request.offset, request.count)
            return wire.RegionAccess(request.offset, request.region, len(data), data)
        self._regions.write(request.region, request.offset, request.data)
        return wire.RegionAccess(request.offset, request.region, request.count)

    # -- the guest's clock -------------------------------------------------------------------------------------------

    def _set_clock(self, fds: list[int]) -> None:
        if len(fds) != 4 or not all(map(is_eventfd, fds[2:])):
            close_fds(fds)
            raise OSError(errno.EINVAL, f"X_CLOCK with {len(fds)} descriptors, or without its eventfds")
        self._drop_clock()
        self._around.free_clock.run(False)
        for fd in fds[2:]:
            os.set_blocking(fd, False)
        step, done = EventFd(fds[2]), EventFd(fds[3])
        try:
            clock = map_memory(fds[0], size=AREA_SIZE, what="clock")
        except RemoteProtocolError:
            close_fds(fds[1:])
            raise
        try:
            ticks = map_memory(fds[1], writable=True, size=AREA_SIZE, what="ticks")
        except RemoteProtocolError:
            clock.close()
            close_fds(fds[2:])
            raise
        self._clock = SharedClock(clock, ticks, step, done)
        check_clock(clock.words)
        check_ticks(ticks.words)
        self._loop.register(step, self._step, served=True)
        self._step()

    def _step(self) -> None:
        self._doorbells.settle()
        if self._clock is not None:
            self._clock.take(self._around.clock)

    def _drop_clock(self) -> None:
        if self._clock is not None:
            self._loop.unregister(self._clock.step)
            self._clock.close()
            self._clock = None


def _migrate(
    migration: DeviceMigration, command: int, request: wire.DeviceFeature | wire.MigData
) -> wire.DeviceFeature | wire.MigData | wire.Empty:
    head = wire.DeviceFeature.SIZE
    if isinstance(request, wire.DeviceFeature):
        try:
            data = migration.feature(request.flags, request.data, max(request.argsz - head, 0))
        except NoRoom as short:
            return wire.DeviceFeature(head + short.needed, request.flags)
        return wire.DeviceFeature(head + len(data), request.flags, data)
    if command == Command.MIG_DATA_READ:
        data = migration.read(request.size)
        # padded, as libvfio-user's servers do and its client expects
        return wire.MigData(wire.MigData.SIZE + len(data), len(data), data.ljust(request.size, b"\0"))
    migration.write(request.data)
    return wire.Empty()
