"""The guest's virtual time, shared with every device process.

A step stores the new time in the clock area, rings each device's *step* eventfd and waits until its tick word has
reached it, so that everything which was due by then has happened when :meth:`GuestClock.step` returns: timers have
fired, DMA has moved, interrupts have been counted. A device that is gone is not waited for; one that is too late
is given up.

Before a step each device has taken every register write that was posted to it. In ``realtime`` mode the clock follows
CLOCK_MONOTONIC in steps of 1 ms and waits for nobody.

While the machine is stopped nothing sees time pass. Steps that are asked for meanwhile add up, and are taken when it
goes on (as QEMU does with ``clock_step`` of a stopped machine).
"""

from __future__ import annotations

import time
from typing import Final

from guestd.remote import VfioUserDevice
from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop, LoopTimer
from protocols.transport.shm import create_memory
from vfio_model.clock import VirtualClock
from vfio_model.errors import DeadlineExceeded, PeerLost
from vfio_model.memory.clock_area import AREA_SIZE, init_clock, init_ticks, read_time, write_time

STEP_SECONDS: Final = 5.0
TICK_NS: Final = 1_000_000


class _Taker:
    """One device process that follows the clock."""

    def __init__(self, device: VfioUserDevice, now_ns: int) -> None:
        self.device = device
        self.ticks = create_memory(f"ticks-{device.name}", AREA_SIZE)
        init_ticks(self.ticks.words, now_ns)
        self.step, self.done = EventFd(), EventFd()

    @property
    def taken_ns(self) -> int:
        """The time that the device has taken."""
        return read_time(self.ticks.words)

    def close(self) -> None:
        self.step.close()
        self.done.close()
        self.ticks.close()


class GuestClock:
    """Virtual time in ns; ``virtual`` holds the timers of this process."""

    def __init__(self, loop: Loop, *, realtime: bool = False) -> None:
        self.virtual = VirtualClock()
        self._loop = loop
        self._area = create_memory("clock", AREA_SIZE, exclusive=True)
        init_clock(self._area.words, 0)
        self._takers: list[_Taker] = []
        self._running = False
        self._frozen = False
        self._owed_ns = 0
        """Steps asked for while frozen."""
        self._last_ns = 0
        self._next_tick: LoopTimer | None = None
        self.realtime = realtime
        if realtime:
            self.resume()

    @property
    def frozen(self) -> bool:
        """Whether nothing sees time pass."""
        return self._frozen

    @property
    def now_ns(self) -> int:
        """Virtual time, with the steps that a stopped machine has not taken yet."""
        return self.virtual.now_ns + self._owed_ns

    def attach(self, device: VfioUserDevice) -> None:
        """Let ``device`` follow, if it can.

        :raise OSError: when it refuses. :raise PeerLost: it is gone.
        """
        if not device.extensions.clock:
            return
        self._drop_lost()
        taker = _Taker(device, self.virtual.now_ns)
        try:
            device.clock(self.virtual.now_ns, (self._area.fd, taker.ticks.fd, taker.step.fd, taker.done.fd))
        except (OSError, PeerLost):
            taker.close()
            raise
        self._loop.register(taker.done, lambda: _drain(taker), served=True)
        self._takers.append(taker)

    def _drop_lost(self) -> None:
        for taker in [taker for taker in self._takers if taker.device.lost is not None]:
            self._takers.remove(taker)
            self._loop.unregister(taker.done)
            taker.close()

    def step(self, ns: int = 0) -> int:
        """Advance by ``ns``, or to this process's next timer when 0; the new time. Returns when every device has
        taken it; at once while frozen.
        """
        if self._frozen:
            self._owed_ns += ns
            return self.now_ns
        target = self.now_ns + ns if ns else self.virtual.next_expiry_ns() or self.now_ns
        self._drop_lost()
        for taker in self._takers:
            taker.device.sync()
        self._announce(target)
        for taker in list(self._takers):
            self._wait(taker, target)
        if self._takers:
            self._serve_what_came()
        return self.now_ns

    def _announce(self, target: int) -> None:
        self.virtual.advance_to(target)
        write_time(self._area.words, self.virtual.now_ns)
        for taker in self._takers:
            if taker.device.lost is None:
                taker.step.ring()

    def _wait(self, taker: _Taker, target: int) -> None:
        device = taker.device
        try:
            self._loop.serve_until(
                lambda: device.lost is not None or taker.taken_ns >= target, STEP_SECONDS, device.name, "a clock step"
            )
        except DeadlineExceeded as error:
            device.give_up(str(error))

    def _serve_what_came(self) -> None:
        """One more turn: an interrupt that a device raised before its tick is seen before the step returns."""
        turned = False

        def turn() -> None:
            nonlocal turned
            turned = True

        self._loop.call_later(0, turn, served=True)
        self._loop.serve_until(lambda: turned, STEP_SECONDS, "guestd", "a turn")

    def advance_to(self, now_ns: int) -> None:
        """Let it be ``now_ns`` at once, frozen or not: of a machine that came from elsewhere. Returns when every device
        knows.
        """
        self._drop_lost()
        self._announce(now_ns)
        for taker in list(self._takers):
            self._wait(taker, self.virtual.now_ns)

    # -- stopping, and real time ---------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Let no time pass until :meth:`thaw`. Harmless twice."""
        self._frozen = True
        self.stop()

    def thaw(self) -> None:
        """Go on, with the steps that were asked for meanwhile. Harmless when not frozen."""
        owed, self._owed_ns, self._frozen = self._owed_ns, 0, False
        if owed:
            self.step(owed)
        if self.realtime:
            self.resume()

    def resume(self) -> None:
        """Follow real time from here on. Harmless when it does."""
        if not self._running:
            self._running = True
            self._last_ns = time.monotonic_ns()
            self._next_tick = self._loop.call_later(TICK_NS, self._tick)

    def stop(self) -> None:
        """Follow real time no longer."""
        self._running = False
        if self._next_tick is not None:
            self._next_tick.cancel()
            self._next_tick = None

    def _tick(self) -> None:
        if not self._running:
            return
        now = time.monotonic_ns()
        elapsed, self._last_ns = now - self._last_ns, now
        self._drop_lost()
        self._announce(self.virtual.now_ns + elapsed)
        self._next_tick = self._loop.call_later(TICK_NS, self._tick)

    def close(self) -> None:
        """Let go of every device. Harmless twice."""
        self.stop()
        for taker in self._takers:
            self._loop.unregister(taker.done)
            taker.close()
        self._takers.clear()
        self._area.close()


def _drain(taker: _Taker) -> None:
    taker.done.drain()
