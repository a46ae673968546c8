"""One event loop: descriptors, ZeroMQ sockets, timers, and waits that go on serving.

Callbacks run at top level, or inside a wait of this process. Which ones a wait may run is said at registration:
``served`` marks what a peer may need answered while this side waits for it (ATS requests, DMA messages, interrupts,
invalidations; see :mod:`protocols.waits`). What is not served waits for the top level: a hypercall never starts inside
another one.

Two epoll sets hold that: all descriptors, and the served ones. ZeroMQ sockets do not go there, because their descriptor
only hints: ``zmq_poll`` waits for the sockets and for the epoll set's own descriptor, and knows without being asked
again whether there is a message (epoll on the hint costs a round trip 25 us more). A loop without them waits in the
epoll set itself. Sources with an outbox
(``wants_write``) are flushed when they become writable, in waits too. A callback must bear finding nothing to read, and
must handle its own peer's errors: an exception ends the wait or the loop it came up in.

Every deadline is CLOCK_MONOTONIC and is stretched by the environment variable VFIO_MODEL_DEADLINE_SCALE, for slow
machines.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import zmq
from zmq.backend import zmq_poll

from protocols.transport.halt_polling import HaltPoll
from protocols.transport.kernel import TimerFd
from vfio_model.errors import ConfigError, DeadlineExceeded, PeerLost

DEADLINE_SCALE_VARIABLE = "VFIO_MODEL_DEADLINE_SCALE"
FINE_NS = 2_000_000
"""Below this a poll timeout (whole milliseconds) is too coarse and the timerfd is used."""
_POLLIN = int(zmq.POLLIN)
_EPOLLIN = int(select.EPOLLIN)

Callback = Callable[[], None]


class Source(Protocol):
    """What can be registered. Also understood: ``zmq_socket`` (which is polled instead of the descriptor), and
    ``wants_write`` with ``flush()``; while something waits there and ``congested`` holds, it is not read at top level
    (waits go on reading: what they wait for may be there).
    """

    def fileno(self) -> int: ...


class _Writer(Protocol):
    wants_write: bool

    def flush(self) -> bool: ...


def deadline_scale() -> float:
    """The factor by which every deadline is stretched (1 when the variable is not set).

    :raise ConfigError: when it is not a positive number.
    """
    text = os.environ.get(DEADLINE_SCALE_VARIABLE, "1")
    try:
        scale = float(text)
    except ValueError:
        scale = 0.0
    if not 0 < scale < float("inf"):
        raise ConfigError(f"{text!r} is not a positive number", where=DEADLINE_SCALE_VARIABLE)
    return scale


class LoopTimer:
    """A pending call; :meth:`cancel` forgets it."""

    __slots__ = ("callback", "served", "when_ns")

    def __init__(self, when_ns: int, callback: Callback, served: bool) -> None:
        self.when_ns, self.callback, self.served = when_ns, callback, served

    def cancel(self) -> None:
        """Harmless when it has run."""
        self.callback = _nothing
        self.when_ns = 0


def _nothing() -> None:
    return None


class _Entry:
    __slots__ = ("armed", "callback", "fd", "held", "served", "source", "writer", "zmq")

    def __init__(self, source: Source, callback: Callback, served: bool) -> None:
        self.source, self.callback, self.served, self.fd = source, callback, served, source.fileno()
        self.zmq: zmq.Socket[bytes] | None = getattr(source, "zmq_socket", None)
        self.writer = cast(_Writer, source) if hasattr(source, "wants_write") else None
        self.armed = self.held = False


class _Timers:
    """A heap of timers; cancelled ones are skipped when their moment comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, LoopTimer]] = []
        self._numbers = itertools.count()

    def add(self, timer: LoopTimer) -> None:
        heapq.heappush(self._heap, (timer.when_ns, next(self._numbers), timer))

    def next_ns(self) -> int | None:
        while self._heap and self._heap[0][2].when_ns == 0:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def run_due(self) -> bool:
        """Run what is due now, but not what that adds; whether anything ran."""
        if not self._heap:
            return False
        now, due = time.monotonic_ns(), []
        while self._heap and self._heap[0][0] <= now:
            due.append(heapq.heappop(self._heap)[2])
        for timer in due:
            callback, timer.when_ns = timer.callback, 0
            timer.callback = _nothing
            callback()
        return bool(due)


class Loop:
    """See the module's head. Closes nothing that was registered."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._zmq: dict[Any, _Entry] = {}
        self._writers: list[_Entry] = []
        self._all, self._served = select.epoll(), select.epoll()
        self._look, self._look_served = HaltPoll(partial(self._all.poll, 0)), HaltPoll(partial(self._served.poll, 0))
        self._expecting = False
        self._all_fd, self._served_fd = self._all.fileno(), self._served.fileno()
        self._list_polled()
        self._timers, self._served_timers = _Timers(), _Timers()
        self._soon: deque[Callback] = deque()
        self._idle: list[Callback] = []
        self._fine = TimerFd()
        self._all.register(self._fine.fd, select.EPOLLIN)
        self._served.register(self._fine.fd, select.EPOLLIN)
        self._scale = deadline_scale()
        self._depth = 0
        self._stopping = False
        self._signals: _Signals | None = None

    @property
    def depth(self) -> int:
        """How many waits are in progress, one inside the other."""
        return self._depth

    def register(self, source: Source, callback: Callback, *, served: bool = False) -> None:
        """Call ``callback()`` when ``source`` is readable (or at EOF); in waits too when ``served``."""
        entry = _Entry(source, callback, served)
        if entry.fd < 0 or entry.fd in self._entries:
            raise ValueError(f"descriptor {entry.fd} is closed or registered already")
        self._entries[entry.fd] = entry
        if entry.zmq is not None:
            self._zmq[entry.zmq] = entry
            self._list_polled()
            return
        self._all.register(entry.fd, select.EPOLLIN)
        if served:
            self._served.register(entry.fd, select.EPOLLIN)
        if entry.writer is not None:
            self._writers.append(entry)

    def unregister(self, source: Source) -> None:
        """Forget ``source``; harmless when it is not known. To be called before it is closed."""
        entry = next((entry for entry in self._entries.values() if entry.source is source), None)
        if entry is None:
            return
        del self._entries[entry.fd]
        if entry.zmq is not None:
            del self._zmq[entry.zmq]
            self._list_polled()
            return
        self._writers = [other for other in self._writers if other is not entry]
        if source.fileno() == entry.fd:
            self._all.unregister(entry.fd)
            if entry.served or entry.armed:
                self._served.unregister(entry.fd)

    def _list_polled(self) -> None:
        """What ``zmq_poll`` waits for: at top level, and in waits."""
        served = [socket for socket, entry in self._zmq.items() if entry.served]
        self._polled: list[tuple[Any, int]] = [(each, _POLLIN) for each in (*self._zmq, self._all_fd)]
        self._polled_in_waits: list[tuple[Any, int]] = [(each, _POLLIN) for each in (*served, self._served_fd)]

    def call_later(self, delay_ns: int, callback: Callback, *, served: bool = False) -> LoopTimer:
        """Call once, ``delay_ns`` from now (not scaled)."""
        timer = LoopTimer(time.monotonic_ns() + max(delay_ns, 0), callback, served)
        (self._served_timers if served else self._timers).add(timer)
        return timer

    def call_soon(self, callback: Callback) -> None:
        """Call at the next turn of the top level, never inside a wait."""
        self._soon.append(callback)

    def on_idle(self, callback: Callback) -> None:
        """Call before every blocking wait for events (a trace is flushed there)."""
        self._idle.append(callback)

    def on_signal(self, number: int, callback: Callback) -> None:
        """Call at the top level after signal ``number`` came. Main thread only."""
        if self._signals is None:
            self._signals = _Signals()
            self.register(self._signals, self._signals.dispatch)
        self._signals.add(number, callback)

    def run(self) -> None:
        """Serve until :meth:`stop`; not at all when that was called since the last time."""
        while not self._stopping:
            self.run_once(None)
        self._stopping = False

    def stop(self) -> None:
        """End :meth:`run` after the present callback."""
        self._stopping = True

    def run_once(self, timeout: float | None = 0.0) -> None:
        """One turn at top level: what is due and ready. Waits for it at most ``timeout`` seconds (None: for ever)."""
        self._turn(None if timeout is None else int(timeout * 1e9), nested=False)

    def wakes(self, socket: zmq.Socket[bytes], milliseconds: int) -> bool:
        """Whether the served ``socket`` is the first source to have something within ``milliseconds``.

        One call instead of a turn, for an answer that is probably the next thing to happen. What else there is to serve
        remains to be served.
        """
        return bool(zmq_poll(self._polled_in_waits, milliseconds) == [(socket, _POLLIN)])

    def wakes_fd(self, fd: int, milliseconds: int) -> bool:
        """As :meth:`wakes` for a source by its descriptor: whether it is the only one that then has something."""
        ready = self._look_served()
        if self._zmq:
            if zmq_poll(self._polled_in_waits, 0 if ready else milliseconds) != [(self._served_fd, _POLLIN)]:
                return False
            milliseconds, ready = 0, []
        return (ready or self._served.poll(milliseconds / 1000)) == [(fd, _EPOLLIN)]

    def expect(self) -> None:
        """Something is likely to come within microseconds: the next turn looks for it before it sleeps (see
        :mod:`protocols.transport.halt_polling`).
        """
        self._expecting = True

    def serve_until(self, predicate: Callable[[], bool], seconds: float, peer: str, request: str) -> None:
        """Wait until ``predicate()``, serving what is ``served`` meanwhile; at most ``seconds``, scaled.

        :raise DeadlineExceeded: naming ``peer`` and ``request``.
        """
        limit = seconds * self._scale
        deadline = time.monotonic_ns() + int(limit * 1e9)
        self._depth += 1
        try:
            while not predicate():
                left = deadline - time.monotonic_ns()
                self._turn(max(left, 0), nested=True)
                if left <= 0 and not predicate():
                    raise DeadlineExceeded(peer, request, limit)
        finally:
            self._depth -= 1

    def _turn(self, timeout_ns: int | None, *, nested: bool) -> None:
        ran = self._served_timers.run_due()
        if not nested:
            ran = self._timers.run_due() or ran
            ran = self._run_soon() or ran
        self._arm_writers()
        if ran or (self._stopping and not nested):
            timeout_ns = 0
        milliseconds = self._limit(timeout_ns, nested)
        if self._zmq:
            self._dispatch(zmq_poll(self._polled_in_waits if nested else self._polled, milliseconds), nested)
        else:
            self._dispatch_fds(nested, milliseconds)

    def _run_soon(self) -> bool:
        count = len(self._soon)
        for _ in range(count):
            self._soon.popleft()()
        return count > 0

    def _arm_writers(self) -> None:
        for entry in self._writers:
            if entry.writer is None:
                continue
            on = entry.writer.wants_write
            if on or entry.armed:
                held = on and getattr(entry.writer, "congested", False)
                if on != entry.armed or held != entry.held:
                    self._arm(entry, on, held)

    def _arm(self, entry: _Entry, on: bool, held: bool) -> None:
        before, entry.armed, entry.held = entry.armed, on, held
        out = select.EPOLLOUT if on else 0
        self._all.modify(entry.fd, out if held else select.EPOLLIN | out)
        if on == before:
            return
        if entry.served:
            self._served.modify(entry.fd, select.EPOLLIN | out)
        elif on:
            self._served.register(entry.fd, select.EPOLLOUT)
        else:
            self._served.unregister(entry.fd)

    def _limit(self, timeout_ns: int | None, nested: bool) -> int:
        """Milliseconds to wait for events, -1 for ever; a part of one is left to the timerfd."""
        if timeout_ns == 0:
            return 0
        for callback in self._idle:
            callback()
        moment = self._served_timers.next_ns()
        other = None if nested else self._timers.next_ns()
        if moment is None or (other is not None and other < moment):
            moment = other
        if moment is not None:
            until = max(moment - time.monotonic_ns(), 0)
            timeout_ns = until if timeout_ns is None else min(until, timeout_ns)
        if timeout_ns is None:
            return -1
        if timeout_ns < FINE_NS:
            self._fine.arm_ns(timeout_ns)
            timeout_ns = FINE_NS
        return timeout_ns // 1_000_000

    def _dispatch(self, ready: list[tuple[Any, int]], nested: bool) -> None:
        for source, _ in ready:
            if (entry := self._zmq.get(source)) is not None:
                entry.callback()
            elif isinstance(source, int):
                self._dispatch_fds(nested, 0)

    def _dispatch_fds(self, nested: bool, milliseconds: int) -> None:
        ready = None
        if self._expecting and milliseconds:
            ready = (self._look_served if nested else self._look)()
        self._expecting = False
        if not ready:
            ready = (self._served if nested else self._all).poll(milliseconds / 1000 if milliseconds >= 0 else None)
        found = [(self._entries.get(fd), events) for fd, events in ready]
        for entry, events in found:
            if entry is None:
                self._fine.drain()
                continue
            if self._entries.get(entry.fd) is not entry:
                continue
            if events & select.EPOLLOUT:
                self._flush(entry)
            if events & ~select.EPOLLOUT and (entry.served or not nested) and self._entries.get(entry.fd) is entry:
                entry.callback()

    def _flush(self, entry: _Entry) -> None:
        """A peer that is gone is noticed by its callback, which finds EOF."""
        if entry.writer is not None:
            with contextlib.suppress(PeerLost):
                entry.writer.flush()

    def close(self) -> None:
        """Close what the loop itself opened, and put signal handlers back. Harmless twice."""
        if self._signals is not None:
            self._signals.close()
            self._signals = None
        self._fine.close()
        self._all.close()
        self._served.close()
        self._entries.clear()


class _Signals:
    """Signals as a readable source; the handlers of before come back at :meth:`close`."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before: dict[int, object] = {}
        self._callbacks: dict[int, Callback] = {}

    def fileno(self) -> int:
        return self._read.fileno()

    def add(self, number: int, callback: Callback) -> None:
        before = signal.signal(number, lambda *_: None)
        self._before.setdefault(number, before)
        self._callbacks[number] = callback

    def dispatch(self) -> None:
        with contextlib.suppress(BlockingIOError):
            for number in self._read.recv(256):
                self._callbacks.get(number, _nothing)()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before_fd)
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        self._read.close()
        self._write.close()
