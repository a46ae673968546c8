"""Virtual time: a number of nanoseconds and the timers that wait for it.

Nothing here reads a clock. Whoever owns the time (guestd, or a test) calls :meth:`VirtualClock.advance`; timers whose
moment has come then run in order of their moment. This is QEMU's ``QEMU_CLOCK_VIRTUAL`` as ``-qtest`` drives it.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Timer:
    """One timer; :meth:`mod` arms it for an absolute virtual time in ns, :meth:`cancel` disarms it."""

    __slots__ = ("_callback", "_clock", "_expire_ns", "_ticket")

    def __init__(self, clock: VirtualClock, callback: Callable[[], None]) -> None:
        self._clock, self._callback, self._ticket, self._expire_ns = clock, callback, 0, 0

    @property
    def pending(self) -> bool:
        """Whether the timer is armed."""
        return self._ticket != 0

    @property
    def remaining_ns(self) -> int | None:
        """Virtual time until it fires; None when it is not armed."""
        return max(self._expire_ns - self._clock.now_ns, 0) if self._ticket else None

    def mod(self, expire_ns: int) -> None:
        """Arm for ``expire_ns`` (absolute), replacing an earlier moment. It fires at exactly that time, not before."""
        self._expire_ns = expire_ns
        self._ticket = self._clock._push(expire_ns, self)

    def cancel(self) -> None:
        """Disarm; harmless when not armed."""
        self._ticket = 0

    def _fire(self, ticket: int) -> None:
        if ticket == self._ticket:
            self._ticket = 0
            self._callback()


class VirtualClock:
    """Virtual nanoseconds since the machine started, and its timers."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns
        self._queue: list[tuple[int, int, Timer]] = []
        self._tickets = itertools.count(1)

    def timer(self, callback: Callable[[], None]) -> Timer:
        """A disarmed timer that calls ``callback()`` when it fires."""
        return Timer(self, callback)

    def _push(self, expire_ns: int, timer: Timer) -> int:
        ticket = next(self._tickets)
        heapq.heappush(self._queue, (expire_ns, ticket, timer))
        return ticket

    def next_expiry_ns(self) -> int | None:
        """The moment of the earliest armed timer, or None."""
        while self._queue and self._queue[0][2]._ticket != self._queue[0][1]:
            heapq.heappop(self._queue)
        return self._queue[0][0] if self._queue else None

    def advance_to(self, now_ns: int) -> None:
        """Set the time to ``now_ns`` (never backwards) and run every timer due by then, in order of its moment."""
        while (due := self.next_expiry_ns()) is not None and due <= now_ns:
            _, ticket, timer = heapq.heappop(self._queue)
            self.now_ns = max(self.now_ns, due)
            timer._fire(ticket)
        self.now_ns = max(self.now_ns, now_ns)

    def advance(self, step_ns: int) -> None:
        """:meth:`advance_to` the present plus ``step_ns``."""
        self.advance_to(self.now_ns + step_ns)
