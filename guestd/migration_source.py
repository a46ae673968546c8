"""A machine that leaves: what it sends, and when it stops (:mod:`guestd.migration_state` has the picture).

Everything goes from the loop, as fast as the other end reads and ``max-bandwidth`` lets it: while the guest runs all of
RAM, then what was written meanwhile, with each pass what devices say of themselves (:mod:`guestd.precopy`), until what
is left could go within ``downtime-limit``, or :data:`MAX_PASSES` have not got there. Then the machine stops, devices of
other processes too; what was written since, and every section, is sent; the other end says whether it could load that.
Then the machine is the other's, or it goes on here as if nothing had happened.

Monitors are served all the time, so that ``migrate_cancel`` is heard whatever the destination does. Whoever would
change the machine while it stands waits, or is refused (``RunState.FINISH_MIGRATE``). A destination that reads nothing
is waited for while the guest runs, as with QEMU (``x-idle-time`` of ``query-migrate`` says for how long); a guest that
stands does not wait longer than :data:`ANSWER_SECONDS`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from guestd.dirty_ram import DirtyRam
from guestd.migration_state import FAILED, GO, LOADED, MAX_ANSWER, Progress, Settings, Status, outgoing, run_state
from guestd.operations import Operations, RunState
from guestd.precopy import DevicePreCopy
from protocols.transport.loop import deadline_scale
from protocols.transport.unix import ByteConnection
from vfio_model.errors import ConfigError, DeadlineExceeded, PeerLost, VfioModelError, VMStateError
from vfio_model.machine.migration import device_frames, entries, ram_views
from vfio_model.trace import Trace
from vfio_model.vmstate.ram import CHUNK, RamSender
from vfio_model.vmstate.stream import FrameWriter

MAX_PASSES: Final = 30
"""Passes over RAM after which the machine is stopped, however much is left."""
ANSWER_SECONDS: Final = 30.0
"""How long the destination may take nothing while the machine stands, or load."""
_NAME: Final = "the destination"
_SLICE_NS: Final = 100_000_000
"""The bandwidth is counted anew after each."""
_PATIENCE_NS: Final = 1_000_000
_MS: Final = 1_000_000


Connect = Callable[[], ByteConnection]


@dataclass
class Times:
    """Monotonic ns; 0: not yet."""

    began: int = 0
    set_up: int = 0
    stopped: int = 0
    ended: int = 0


class Outgoing:
    """One attempt. :attr:`progress` says what became of it, :attr:`error` why it failed."""

    def __init__(self, operations: Operations, settings: Settings, trace: Trace, connect: Connect) -> None:
        """``connect()`` makes the connection; it may be under way still when it returns."""
        self._connect = connect
        self._operations, self._guest, self._loop = operations, operations.guest, operations.loop
        self._settings, self._trace = settings, trace
        self.progress = Progress(operations, settings)
        self.error: Exception | None = None
        self._times = Times()
        self._writer = FrameWriter()
        self._sender = RamSender(self._writer, ram_views(self._guest.machine))
        self._dirty = DirtyRam(self._guest, trace)
        self._precopy = DevicePreCopy(self._guest, self._writer, trace)
        self._connection: ByteConnection | None = None
        self._answer = b""
        self._lost: PeerLost | None = None
        self._frames: Iterator[bytes] = iter(())
        self._passes = 0
        self._bytes = self._slice_bytes = self._slice_began = 0
        self._taken = self._moved = 0
        """How many bytes the destination has taken, and when it took the last, or there was nothing to take."""
        self._everything_sent = False
        self._limit_ns = int(ANSWER_SECONDS * deadline_scale() * 1e9)
        self._early: dict[int, int] = {}
        """Bytes that were read of a device before it stood, by instance."""
        self._first_left = self._left = 0
        """Bytes that the first pass still has to send, and those that were left when it ended."""
        self._was = operations.state

    # -- how it goes -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; what happens then is asked for, or told by events.

        :raise VMStateError: a device cannot be migrated.
        """
        list(entries(self._guest.machine))
        outgoing(self._guest)
        self._times.began = time.monotonic_ns()
        self.progress.to(Status.SETUP)
        self._soon(self._set_up)

    def _soon(self, act: Callable[[], None]) -> None:
        self._loop.call_soon(lambda: self._guarded(act))

    def _guarded(self, act: Callable[[], None]) -> None:
        if not self.progress.under_way:
            return
        try:
            act()
        except (VfioModelError, OSError) as error:
            self._fail(error)

    def _set_up(self) -> None:
        self._connection = self._connect()
        self._loop.register(self._connection, self._readable, served=True)
        self._dirty.start()
        self._precopy.start()
        self._frames = self._first_frames()
        self._times.set_up = self._slice_began = self._moved = time.monotonic_ns()
        self.progress.to(Status.ACTIVE)
        self._pump()

    def _readable(self) -> None:
        assert self._connection is not None, "registered with it"
        try:
            self._answer += self._connection.receive() or b""
        except PeerLost as error:
            self._lost = error
            self._loop.unregister(self._connection)
        self._soon(self._check)

    def _check(self) -> None:
        """:raise VMStateError: the destination has refused, or says what it cannot say now.
        :raise PeerLost: it is gone. :raise ConfigError: it has never been there.
        """
        if self._answer.startswith(FAILED):
            reason = self._answer[len(FAILED) : MAX_ANSWER].partition(b"\n")[0]
            raise VMStateError(f"the destination refused: {reason.decode(errors='replace')}")
        if self._lost is not None:
            raise self._lost if self._taken else ConfigError(f"Failed to connect: {self._lost.doing}")
        if not LOADED.startswith(self._answer) and not FAILED.startswith(self._answer):
            raise VMStateError("the destination does not speak this protocol")

    # -- while the guest runs ----------------------------------------------------------------------------------------

    def _first_frames(self) -> Iterator[bytes]:
        """The header, then passes until little is left."""
        sender = self._sender
        yield self._writer.header(self._guest.machine.TYPE)
        yield sender.blocks()
        assert len(self._guest.machine.ram) == 1, "this machine's RAM is one block"
        extents = list(self._guest.memory.extents())
        self._first_left = sum(size for _, size in extents)
        for first, size in extents:
            for offset in range(first, first + size, CHUNK):
                part = min(CHUNK, first + size - offset)
                yield from sender.run(0, offset, part)
                self._first_left -= part
        yield from self._precopy.frames()
        yield self._end_pass(final=False)
        while not self._little_is_left():
            yield from self._dirty_frames()
            yield from self._precopy.frames()
            yield self._end_pass(final=False)

    def _dirty_frames(self) -> Iterator[bytes]:
        for block, offset, size in self._dirty.take():
            yield from self._sender.run(block, offset, size)

    def _end_pass(self, *, final: bool) -> bytes:
        self._passes += 1
        self.progress.event("MIGRATION_PASS", {"pass": self._passes})
        return self._sender.end_pass(final=final)

    def _little_is_left(self) -> bool:
        self._dirty.sync()
        limit = self._settings.parameters["max-bandwidth"] * self._settings.parameters["downtime-limit"] // 1000
        left = self._dirty.dirty_bytes + self._precopy.waiting()
        return left <= limit or self._passes >= MAX_PASSES

    def _pump(self) -> None:
        """Send while the socket takes it; everybody else's turn comes after each frame."""
        connection = self._connection
        assert connection is not None, "set up"
        self._watch(connection)
        self._check()
        if not connection.wants_write and not self._pause_ns():
            frame = next(self._frames, None)
            if frame is not None:
                self._send(frame)
            elif self.progress.status is Status.ACTIVE:
                self._stop()
            elif self._answer == LOADED:
                self._let_go(connection)
                return
            else:
                self._everything_sent = True
        if connection.wants_write or self._everything_sent:
            self._later(_PATIENCE_NS)
        elif wait := self._pause_ns():
            self._later(wait)
        else:
            self._soon(self._pump)

    def _later(self, wait_ns: int) -> None:
        self._loop.call_later(wait_ns, lambda: self._guarded(self._pump))

    def _watch(self, connection: ByteConnection) -> None:
        """:raise DeadlineExceeded: the machine stands, and the destination does nothing."""
        now, taken = time.monotonic_ns(), self._bytes - connection.unsent
        if taken != self._taken or not (connection.wants_write or self._everything_sent):
            self._taken, self._moved = taken, now
        elif self._times.stopped and now - self._moved > self._limit_ns:
            what = "its state" if self._everything_sent else "a frame"
            raise DeadlineExceeded(_NAME, what, self._limit_ns / 1e9)

    def _send(self, data: bytes) -> None:
        assert self._connection is not None, "set up"
        if self._answer:
            raise VMStateError("the destination answers what it has not been given")
        self._connection.send(data)
        self._bytes += len(data)
        self._slice_bytes += len(data)

    def _pause_ns(self) -> int:
        """How long to wait until ``max-bandwidth`` allows more; 0 is no limit there, nor is one for a machine that
        stands.
        """
        if self._times.stopped:
            return 0
        limit = self._settings.parameters["max-bandwidth"] * _SLICE_NS // 1_000_000_000
        passed = time.monotonic_ns() - self._slice_began
        if passed >= _SLICE_NS:
            self._slice_began, self._slice_bytes = time.monotonic_ns(), 0
        return max(_SLICE_NS - passed, 0) if limit and self._slice_bytes >= limit else 0

    # -- the end -----------------------------------------------------------------------------------------------------

    def _stop(self) -> None:
        """The machine stands. Interrupts that are on their way are seen before the first section."""
        operations = self._operations
        self._was = operations.state
        self._times.stopped = self._moved = time.monotonic_ns()
        operations.stop(RunState.FINISH_MIGRATE)
        operations.state = RunState.FINISH_MIGRATE
        self._guest.states.stop(self._precopy.check())
        self._early = self._precopy.stand()
        self._dirty.sync()
        self._frames = self._last_frames()
        self.progress.to(Status.DEVICE)

    def _last_frames(self) -> Iterator[bytes]:
        yield from self._dirty_frames()
        yield self._end_pass(final=True)
        extra = [run_state(lambda _: None, self._was), *outgoing(self._guest, self._early)]
        yield from device_frames(self._guest.machine, self._writer, extra)

    def _let_go(self, connection: ByteConnection) -> None:
        connection.send(GO)
        if connection.wants_write:
            raise PeerLost(_NAME, "it says that it has loaded, and reads nothing")
        self._bytes += len(GO)
        self._close()
        self._dirty.stop()
        self._operations.state = RunState.POSTMIGRATE
        self._times.ended = time.monotonic_ns()
        self._trace("migration_completed", passes=self._passes, bytes=self._bytes)
        self.progress.to(Status.COMPLETED)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._trace("migration_failed", reason=str(error))
        self._go_on()
        self.progress.to(Status.FAILED)

    def cancel(self) -> None:
        """The machine stays here. Harmless when nothing is under way."""
        if self.progress.under_way:
            self.progress.to(Status.CANCELLING)
            self._go_on()
            self.progress.to(Status.CANCELLED)

    def _go_on(self) -> None:
        self._left = self._remaining
        self._close()
        self._dirty.stop()
        self._precopy.abandon()
        self._times.ended = time.monotonic_ns()
        operations = self._operations
        if operations.state is not RunState.FINISH_MIGRATE:
            return
        if self._was is RunState.RUNNING:
            operations.state = RunState.PAUSED
            operations.cont()
        else:
            operations.state = self._was

    def _close(self) -> None:
        if self._connection is not None:
            self._loop.unregister(self._connection)
            self._connection.close()

    # -- what is said of it ------------------------------------------------------------------------------------------

    def info(self) -> dict[str, object]:
        """``MigrationInfo``."""
        times, status = self._times, self.progress.status
        now = times.ended or time.monotonic_ns()
        found: dict[str, object] = {"status": str(status)}
        if status is Status.SETUP:
            return found
        found["total-time"] = (now - times.began) // _MS
        found["setup-time"] = max(times.set_up - times.began, 0) // _MS
        if status is Status.COMPLETED:
            found["downtime"] = (times.ended - times.stopped) // _MS
        elif status is Status.ACTIVE:
            found["expected-downtime"] = self._settings.parameters["downtime-limit"]
        if status in (Status.ACTIVE, Status.DEVICE):
            found["x-idle-time"] = self._idle_ms(now)
        if self.error is not None:
            found["error-desc"] = str(self.error)
        if times.set_up:
            found["ram"] = self._ram(now)
        if self._precopy.sent:
            found["vfio"] = {"transferred": self._precopy.sent}
        return found

    @property
    def _remaining(self) -> int:
        return self._first_left + self._dirty.dirty_bytes

    def _idle_ms(self, now: int) -> int:
        """For how long the destination has not taken what is there for it."""
        waits = self._everything_sent or (self._connection is not None and self._connection.wants_write)
        return (now - self._moved) // _MS if waits else 0

    def _ram(self, now: int) -> dict[str, object]:
        seconds = max(now - self._times.set_up, 1) / 1e9
        page = 1 << 12
        return {
            "transferred": self._taken if self.progress.under_way else self._bytes,
            "remaining": self._remaining if self.progress.under_way else self._left,
            "total": sum(block.size for block in self._guest.machine.ram),
            "duplicate": 0,
            "normal": self._sender.sent // page,
            "normal-bytes": self._sender.sent,
            "dirty-pages-rate": 0,
            "mbps": self._bytes * 8 / seconds / 1e6,
            "dirty-sync-count": self._dirty.syncs,
            "page-size": page,
        }
