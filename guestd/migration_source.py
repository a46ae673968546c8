"""A machine that leaves: what it sends, and when it stops (:mod:`guestd.migration_state` has the picture).

While the guest runs the stream is sent from the loop, as fast as the other end reads and ``max-bandwidth`` lets it: all
of RAM, then what was written meanwhile, until what is left could go within ``downtime-limit``, or :data:`MAX_PASSES`
have not got there. The end is one turn of the loop, in which nothing runs but what is served in waits: the machine
stops, devices of other processes too; what was written since, and every section, is sent; the other end says whether it
could load that. Then the machine is the other's, or it goes on here as if nothing had happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from guestd.dirty_ram import DirtyRam
from guestd.migration_state import FAILED, GO, LOADED, MAX_ANSWER, Progress, Settings, Status, outgoing
from guestd.operations import Operations, RunState
from protocols.transport.unix import ByteConnection
from protocols.transport.uri import connect
from vfio_model.errors import ConfigError, PeerLost, VfioModelError, VMStateError
from vfio_model.machine.migration import device_frames, entries, ram_views
from vfio_model.trace import Trace
from vfio_model.vmstate.ram import RamSender
from vfio_model.vmstate.stream import FrameWriter

MAX_PASSES: Final = 30
"""Passes over RAM after which the machine is stopped, however much is left."""
ANSWER_SECONDS: Final = 30.0
"""How long the destination may take to read what is there, or to load."""
_NAME: Final = "the destination"
_SLICE_NS: Final = 100_000_000
"""The bandwidth is counted anew after each."""
_PATIENCE_NS: Final = 1_000_000
_MS: Final = 1_000_000


@dataclass
class Times:
    """Monotonic ns; 0: not yet."""

    began: int = 0
    set_up: int = 0
    stopped: int = 0
    ended: int = 0


class Outgoing:
    """One attempt. :attr:`progress` says what became of it, :attr:`error` why it failed."""

    def __init__(self, operations: Operations, settings: Settings, trace: Trace) -> None:
        self._operations, self._guest, self._loop = operations, operations.guest, operations.loop
        self._settings, self._trace = settings, trace
        self.progress = Progress(operations, settings)
        self.error: Exception | None = None
        self._times = Times()
        self._writer = FrameWriter()
        self._sender = RamSender(self._writer, ram_views(self._guest.machine))
        self._dirty = DirtyRam(self._guest, trace)
        self._connection: ByteConnection | None = None
        self._answer = b""
        self._lost: PeerLost | None = None
        self._frames: Iterator[bytes] = iter(())
        self._passes = 0
        self._bytes = self._slice_bytes = self._slice_began = 0
        self._left = 0
        self._was = operations.state

    # -- how it goes -------------------------------------------------------------------------------------------------

    def start(self, uri: str) -> None:
        """Begin; what happens then is asked for, or told by events.

        :raise VMStateError: a device cannot be migrated. :raise ConfigError: ``uri`` is none.
        """
        list(entries(self._guest.machine))
        outgoing(self._guest)
        self._times.began = time.monotonic_ns()
        self.progress.to(Status.SETUP)
        self._loop.call_soon(lambda: self._guarded(lambda: self._set_up(uri)))

    def _guarded(self, act: Callable[[], None]) -> None:
        if not self.progress.under_way:
            return
        try:
            act()
        except (VfioModelError, OSError) as error:
            self._fail(error)

    def _set_up(self, uri: str) -> None:
        try:
            self._connection = connect(uri, _NAME)
        except PeerLost as error:
            raise ConfigError(f"Failed to connect to '{uri}': {error.doing.rpartition(': ')[2]}") from error
        self._loop.register(self._connection, self._readable, served=True)
        self._dirty.start()
        self._frames = self._first_frames()
        self._times.set_up = self._slice_began = time.monotonic_ns()
        self.progress.to(Status.ACTIVE)
        self._pump()

    def _readable(self) -> None:
        assert self._connection is not None, "registered with it"
        try:
            self._answer += self._connection.receive() or b""
        except PeerLost as error:
            self._lost = error
            self._loop.unregister(self._connection)
            self._loop.call_soon(lambda: self._guarded(self._check))
        else:
            if self.progress.status is Status.ACTIVE and self._answer.startswith(FAILED):
                self._loop.call_soon(lambda: self._guarded(self._check))

    def _check(self) -> None:
        """:raise VMStateError: the destination has refused. :raise PeerLost: it is gone."""
        if self._answer.startswith(FAILED):
            reason = self._answer[len(FAILED) : MAX_ANSWER].partition(b"\n")[0]
            raise VMStateError(f"the destination refused: {reason.decode(errors='replace')}")
        if self._lost is not None:
            raise self._lost
        if not LOADED.startswith(self._answer):
            raise VMStateError("the destination does not speak this protocol")

    # -- while the guest runs ----------------------------------------------------------------------------------------

    def _first_frames(self) -> Iterator[bytes]:
        """The header, then passes until little is left."""
        sender = self._sender
        yield self._writer.header(self._guest.machine.TYPE)
        yield sender.blocks()
        assert len(self._guest.machine.ram) == 1, "this machine's RAM is one block"
        for offset, size in self._guest.memory.extents():
            yield from sender.run(0, offset, size)
        yield self._end_pass(final=False)
        while not self._little_is_left():
            yield from self._dirty_frames()
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
        self._left = self._dirty.dirty_bytes
        limit = self._settings.parameters["max-bandwidth"] * self._settings.parameters["downtime-limit"] // 1000
        return self._left <= limit or self._passes >= MAX_PASSES

    def _pump(self) -> None:
        """Send while the socket takes it; the guest's turn comes after each frame."""
        connection = self._connection
        assert connection is not None, "set up"
        self._check()
        wait = self._pause_ns() if not connection.wants_write else _PATIENCE_NS
        if wait:
            self._loop.call_later(wait, lambda: self._guarded(self._pump))
            return
        frame = next(self._frames, None)
        if frame is None:
            self._finish()
            return
        self._send(frame)
        self._loop.call_soon(lambda: self._guarded(self._pump))

    def _send(self, data: bytes) -> None:
        assert self._connection is not None, "set up"
        self._connection.send(data)
        self._bytes += len(data)
        self._slice_bytes += len(data)

    def _pause_ns(self) -> int:
        """How long to wait until ``max-bandwidth`` allows more; 0 is no limit there."""
        limit = self._settings.parameters["max-bandwidth"] * _SLICE_NS // 1_000_000_000
        passed = time.monotonic_ns() - self._slice_began
        if passed >= _SLICE_NS:
            self._slice_began, self._slice_bytes = time.monotonic_ns(), 0
        return max(_SLICE_NS - passed, 0) if limit and self._slice_bytes >= limit else 0

    # -- the end -----------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        """The machine stops; see the module's head."""
        operations, guest = self._operations, self._guest
        self._was = operations.state
        self._times.stopped = time.monotonic_ns()
        operations.stop(RunState.FINISH_MIGRATE)
        operations.state = RunState.FINISH_MIGRATE
        guest.stop_devices()
        self._dirty.sync()
        for frame in self._dirty_frames():
            self._send_now(frame)
        self._send_now(self._end_pass(final=True))
        self._left = 0
        self.progress.to(Status.DEVICE)
        for piece in device_frames(guest.machine, self._writer, outgoing(guest)):
            self._send_now(piece)
        self._wait(lambda: self._answer.startswith(LOADED), "its state")
        self._send_now(GO)
        self._close()
        self._dirty.stop()
        operations.state = RunState.POSTMIGRATE
        self._times.ended = time.monotonic_ns()
        self._trace("migration_completed", passes=self._passes, bytes=self._bytes)
        self.progress.to(Status.COMPLETED)

    def _send_now(self, data: bytes) -> None:
        """Send, and return when all of it is on its way."""
        connection = self._connection
        assert connection is not None, "set up"
        self._send(data)
        self._wait(lambda: not connection.wants_write, "a frame")

    def _wait(self, done: Callable[[], bool], what: str) -> None:
        self._loop.serve_until(
            lambda: done() or self._lost is not None or self._answer.startswith(FAILED), ANSWER_SECONDS, _NAME, what
        )
        if not done():
            self._check()

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._trace("migration_failed", reason=str(error))
        self._go_on()
        self.progress.to(Status.FAILED)

    def cancel(self) -> None:
        """The machine stays here. Harmless when nothing is under way."""
        if self.progress.under_way:
            self._go_on()
            self.progress.to(Status.CANCELLED)

    def _go_on(self) -> None:
        self._close()
        self._dirty.stop()
        self._times.ended = time.monotonic_ns()
        operations = self._operations
        if operations.state is not RunState.FINISH_MIGRATE:
            return
        self._guest.run_devices()
        if self._was is RunState.RUNNING:
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
        if self.error is not None:
            found["error-desc"] = str(self.error)
        if times.set_up:
            found["ram"] = self._ram(now)
        return found

    def _ram(self, now: int) -> dict[str, object]:
        seconds = max(now - self._times.set_up, 1) / 1e9
        page = 1 << 12
        return {
            "transferred": self._bytes,
            "remaining": self._dirty.dirty_bytes if self.progress.under_way else self._left,
            "total": sum(block.size for block in self._guest.machine.ram),
            "duplicate": 0,
            "normal": self._sender.sent // page,
            "normal-bytes": self._sender.sent,
            "dirty-pages-rate": 0,
            "mbps": self._bytes * 8 / seconds / 1e6,
            "dirty-sync-count": self._dirty.syncs,
            "page-size": page,
        }
