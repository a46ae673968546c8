"""The other end of a vfio-user connection, as guestd speaks to it: one request at a time, everything served meanwhile.

Who waits for an answer serves what devices ask in between: translations, DMA by message, interrupts. Serving never
waits: a DMA that leads to another process's BAR is an error there, not a question.

An answer that is the next thing to happen is taken without a turn of the loop. Whatever else has happened by then is
served first: an interrupt that a device sent before it answered is there when the answer is.

A device that is gone (EOF, dead pidfd, a broken protocol, a deadline) stays gone: every call raises
:class:`PeerLost` from then on, :attr:`RemotePeer.on_lost` is called once, and nobody else notices.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Final, Protocol, TypeVar

from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.unix import close_fds
from protocols.transport.vfio_user import VfioUserEndpoint
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import Command, Payload
from protocols.vfio_user.state import CommandReceived, Event, ReplyReceived
from vfio_model.errors import DeadlineExceeded, PeerLost, ProtocolError
from vfio_model.trace import NULL_TRACE, Trace

DEVICE_SECONDS: Final = 5.0
"""Deadline of one request to a device."""
END_SECONDS: Final = 2.0
"""How long a device process may take to end when its connection was closed."""
SHORT_WAIT_MS: Final = 1
"""How long an answer is waited for before the loop has its turn."""
MAX_TURN: Final = 32
"""Messages of one device that are taken before others have their turn."""

_REGION_READ = Command.REGION_READ

P = TypeVar("P", bound=Payload)
_serving: ContextVar[bool] = ContextVar("serving", default=False)
"""Whether this process is answering a device: nothing may be asked then."""


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """While a device is answered."""
    token = _serving.set(True)
    try:
        yield
    finally:
        _serving.reset(token)


def is_answering() -> bool:
    """Whether a device is answered now."""
    return _serving.get()


class DeviceServices(Protocol):
    """What the guest does for a device that asks. Nothing here may wait."""

    def translate(self, request: wire.TranslateRequest) -> list[wire.TranslationEntry]:
        """An ATS request."""

    def dma_read(self, address: int, count: int) -> bytes | None:
        """DMA by message: the bytes, or None when the access is refused."""

    def dma_write(self, address: int, data: bytes) -> bool:
        """DMA by message: whether all of it was written."""

    def iommu(self, request: Payload) -> Payload:
        """What a device with a cache of translations asks of the IOMMU. :raise OSError: it refuses."""


class NoServices:
    """For a device whose DMA does not go through this process."""

    def translate(self, request: wire.TranslateRequest) -> list[wire.TranslationEntry]:
        """Nothing is translated here."""
        return []

    def dma_read(self, address: int, count: int) -> bytes | None:
        """Refused."""
        return None

    def dma_write(self, address: int, data: bytes) -> bool:
        """Refused."""
        return False

    def iommu(self, request: Payload) -> Payload:
        """Refused."""
        raise OSError(errno.ENODEV, "no IOMMU of this process")


class RemotePeer:
    """``endpoint`` (its own from now on) negotiated and in the loop. ``process`` is the pidfd of the device process;
    with ``lives_for_us`` it ends when the connection does, and closing returns when it is dead.

    :raise PeerLost: when the device does not negotiate.
    """

    def __init__(
        self,
        name: str,
        endpoint: VfioUserEndpoint,
        loop: Loop,
        *,
        process: Pidfd | None = None,
        services: DeviceServices | None = None,
        lives_for_us: bool = False,
        seconds: float = DEVICE_SECONDS,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.name, self.process, self._lives_for_us = name, process, lives_for_us
        self.on_lost: Callable[[PeerLost], None] = lambda _error: None
        self.lost: PeerLost | None = None
        self._endpoint, self._loop, self.seconds, self._trace = endpoint, loop, seconds, trace
        self._services: DeviceServices = services or NoServices()
        self._replies: dict[int, ReplyReceived] = {}
        self._waiting: set[int] = set()
        self._posted = False
        """Whether something was sent since the last answer that wants none itself."""
        self._prepare()
        loop.register(endpoint, self._readable, served=True)
        if process is not None:
            loop.register(process, self._process_died, served=True)
        if not endpoint.ready:
            self._shake_hands()
        if endpoint.twin is not None:
            loop.register(endpoint.twin, self._readable, served=True)

    def _prepare(self) -> None:
        """What a subclass keeps is made here: before anything comes in."""

    def _shake_hands(self) -> None:
        try:
            number = self._endpoint.version()
            self._waiting.add(number)
            answer = self._await(number, Command.VERSION)
        except (PeerLost, OSError) as error:
            raise self._lose(f"shaking hands: {error}") from error
        if answer.errno:
            raise self._lose(f"shaking hands: it refuses: {os.strerror(answer.errno)}")

    # -- requests ------------------------------------------------------------------------------------------------

    def _send(self, command: Command, payload: Payload, fds: Sequence[int] = ()) -> int:
        number = self._transmit(command, payload, fds, no_reply=False)
        self._waiting.add(number)
        return number

    def _post(self, command: Command, payload: Payload) -> None:
        self._posted = True
        self._transmit(command, payload, (), no_reply=True)

    def _transmit(self, command: Command, payload: Payload, fds: Sequence[int], *, no_reply: bool) -> int:
        if self.lost is not None:
            raise PeerLost(self.name, self.lost.doing)
        try:
            return self._endpoint.command(command, payload, list(fds), no_reply=no_reply)
        except PeerLost as error:
            raise self._lose(error.doing) from error

    def _call(self, command: Command, payload: Payload, reply: type[P], fds: Sequence[int] = ()) -> P:
        """As :meth:`_exchange`, for answers without descriptors."""
        answer, got = self._exchange(command, payload, reply, fds)
        close_fds(got)
        return answer

    def _exchange(
        self, command: Command, payload: Payload, reply: type[P], fds: Sequence[int] = ()
    ) -> tuple[P, list[int]]:
        """Send and wait; the descriptors of the answer are the caller's.

        :raise OSError: the device's errno, EDEADLK while a device is answered. :raise PeerLost: it is gone, or too
        late.
        """
        self._may_ask(command)
        return self._result(self._await(self._send(command, payload, fds), command), reply)

    def _may_ask(self, command: Command) -> None:
        if is_answering():
            raise OSError(errno.EDEADLK, f"{self.name}: {wire.command_name(command)} while another device is served")
        if self.lost is not None:
            raise PeerLost(self.name, self.lost.doing)

    def _result(self, answer: ReplyReceived, reply: type[P]) -> tuple[P, list[int]]:
        self._posted = False
        if answer.errno:
            close_fds(answer.fds)
            what = wire.command_name(answer.command)
            raise OSError(answer.errno, f"{self.name}: {what}: {os.strerror(answer.errno)}")
        assert isinstance(answer.payload, reply), "the protocol state checked what answers what"
        return answer.payload, answer.fds

    def _read(self, index: int, offset: int, size: int) -> bytes:
        """REGION_READ, the short way as far as it goes; the answer may be a short one. :raise OSError: and others as
        :meth:`_exchange`.
        """
        self._may_ask(_REGION_READ)
        try:
            number = self._endpoint.read(index, offset, size)
        except PeerLost as error:
            raise self._lose(error.doing) from error
        self._waiting.add(number)
        data = self._read_soon(number, size)
        if data is None:
            answer, fds = self._result(self._await(number, _REGION_READ), wire.RegionAccess)
            close_fds(fds)
            return answer.data
        self._waiting.discard(number)
        self._posted = False
        return data

    def _read_soon(self, number: int, size: int) -> bytes | None:
        """The data, when their arrival is the next thing that happens."""
        if self._loop.wakes_fd(self._endpoint.fileno(), SHORT_WAIT_MS):
            try:
                event = self._endpoint.receive_data(number, size)
                if isinstance(event, bytes):
                    return event
                if event is not None:
                    self._handle(event)
            except (PeerLost, ProtocolError) as error:
                self._broken(error)
        return None

    def _await(self, number: int, command: Command, seconds: float | None = None) -> ReplyReceived:
        replies = self._replies
        # The usual case, without a turn of the loop: the answer is the next thing that happens.
        soon = number not in replies and self.lost is None
        if soon and self._loop.wakes_fd(self._endpoint.fileno(), SHORT_WAIT_MS):
            if len(self._waiting) == 1:
                self._take()
            else:
                self._readable()
        if number not in replies:
            self._await_in_loop(number, command, self.seconds if seconds is None else seconds)
        self._waiting.discard(number)
        if number not in replies:
            assert self.lost is not None, "the wait ends with an answer or a loss"
            raise PeerLost(self.name, self.lost.doing)
        return replies.pop(number)

    def _await_in_loop(self, number: int, command: Command, seconds: float) -> None:
        try:
            self._loop.serve_until(
                lambda: number in self._replies or self.lost is not None,
                seconds,
                self.name,
                wire.command_name(command),
            )
        except DeadlineExceeded as error:
            raise self._lose(f"waiting: {error}") from error
        finally:
            self._waiting.discard(number)

    # -- served --------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        for _ in range(MAX_TURN):
            if self.lost is not None or not self._take():
                return

    def _take(self) -> bool:
        """Take one message, if there is one."""
        try:
            event = self._endpoint.receive()
            if event is not None:
                self._handle(event)
        except (PeerLost, ProtocolError) as error:
            self._broken(error)
            return False
        return event is not None

    def _handle(self, event: Event) -> None:
        if isinstance(event, ReplyReceived) and event.id in self._waiting:
            self._replies[event.id] = event
            return
        close_fds(event.fds)  # nothing that a device asks needs a descriptor
        if isinstance(event, CommandReceived):
            with answering():
                self._serve(event)

    def _broken(self, error: PeerLost | ProtocolError) -> None:
        if isinstance(error, PeerLost):
            self._lose(f"{error.doing}: it ended the connection")
        else:
            self._lose(f"speaking: it broke the protocol: {error}")

    def _serve(self, event: CommandReceived) -> None:
        request, services = event.payload, self._services
        if isinstance(request, wire.TranslateRequest):
            self._endpoint.reply(event, wire.TranslateReply.of(services.translate(request)))
        elif isinstance(request, wire.DmaAccess) and event.command == Command.DMA_READ:
            data = services.dma_read(request.address, request.count)
            self._answer_dma(event, None if data is None else wire.DmaAccess(request.address, len(data), data))
        elif isinstance(request, wire.DmaAccess):
            done = services.dma_write(request.address, request.data)
            self._answer_dma(event, wire.DmaAccess(request.address, request.count) if done else None)
        elif request is not None:
            self._serve_iommu(event, request)
        else:
            self._endpoint.reply_error(event, errno.ENOTSUP)

    def _serve_iommu(self, event: CommandReceived, request: Payload) -> None:
        try:
            answer = self._services.iommu(request)
        except OSError as error:
            self._endpoint.reply_error(event, error.errno or errno.EIO)
            return
        self._endpoint.reply(event, answer)

    def _answer_dma(self, event: CommandReceived, answer: wire.DmaAccess | None) -> None:
        if answer is None:
            self._endpoint.reply_error(event, errno.EFAULT)
        else:
            self._endpoint.reply(event, answer)

    def _process_died(self) -> None:
        self._lose("running: its process died")

    # -- the end -------------------------------------------------------------------------------------------------

    def _lose(self, reason: str) -> PeerLost:
        if self.lost is None:
            self.lost = PeerLost(self.name, reason)
            self._trace("vfio_user_lost", name=self.name, reason=reason)
            self._release()
            self.on_lost(self.lost)
        return PeerLost(self.name, self.lost.doing)

    def _see_it_end(self) -> None:
        """A process that does not end by itself is killed: whoever opens the device next must not meet it."""
        process = self.process
        if process is None or not self._lives_for_us:
            return
        try:
            self._loop.serve_until(lambda: not process.alive(), END_SECONDS, self.name, "its end")
        except DeadlineExceeded as error:
            self._trace("vfio_user_killed", name=self.name, reason=str(error))
            process.send_signal(signal.SIGKILL)

    def _release_endpoint(self) -> None:
        self._loop.unregister(self._endpoint)
        if self._endpoint.twin is not None:
            self._loop.unregister(self._endpoint.twin)
        self._endpoint.close()

    def _release(self) -> None:
        self._release_endpoint()
        if self.process is not None:
            self._loop.unregister(self.process)
            self.process.close()
            self.process = None
