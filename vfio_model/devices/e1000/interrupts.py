"""Interrupts of an 82540EM (manual 13.4.17 to 13.4.21, 3.2.7 "Receive Interrupts", 3.4.3 "Transmit Interrupts").

A cause goes into ICR; the pin is up while a cause is there that IMS lets through. The throttle (ITR) is the least time
from one rise of the pin to the next. Causes may be delayed: :class:`Delay` waits for quiet, but never longer than its
absolute limit.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.clock import Timer, VirtualClock
from vfio_model.devices.e1000.regs import (
    ICR,
    ICS,
    IMC,
    IMS,
    INTERRUPTS,
    ITR,
    NS_PER_DELAY,
    NS_PER_THROTTLE,
)
from vfio_model.devices.register_file import RegisterFile


class Interrupts:
    """The causes, the mask and the pin; ``raise_pin`` and ``lower_pin`` may be called when it is so already."""

    def __init__(
        self,
        registers: RegisterFile,
        clock: VirtualClock,
        raise_pin: Callable[[], None],
        lower_pin: Callable[[], None],
    ) -> None:
        self._registers, self._clock = registers, clock
        self._raise_pin, self._lower_pin = raise_pin, lower_pin
        self.throttle: Timer = clock.timer(self.update)
        self.up = False
        """Whether the pin is up."""
        registers.on_read(ICR, self._read_icr)
        registers.on_write(ICR, self._changed)
        registers.on_write(ICS, self._write_ics)
        registers.on_write(IMS, self._write_ims)
        registers.on_write(IMC, self._write_imc)

    def cause(self, causes: int) -> None:
        """``causes`` have come up."""
        self._registers[ICR] |= causes & INTERRUPTS
        self.update()

    def update(self) -> None:
        """Let the pin show what is pending, as soon as the throttle allows."""
        if not self._registers[ICR] & self._registers[IMS]:
            if self.up:
                self.up = False
                self._lower_pin()
        elif not self.up and not self.throttle.pending:
            self.up = True
            interval = self._registers[ITR] * NS_PER_THROTTLE
            if interval:
                self.throttle.mod(self._clock.now_ns + interval)
            self._raise_pin()

    def reset(self) -> None:
        """Nothing is pending; the registers have been reset."""
        self.throttle.cancel()
        self.up = False
        self._lower_pin()

    def restore(self, up: bool, throttle_ns: int) -> None:
        """After a migration: where the pin was, and how long the throttle still holds (0: it does not)."""
        self.up = up
        self.throttle.cancel()
        if throttle_ns:
            self.throttle.mod(self._clock.now_ns + throttle_ns)

    def _read_icr(self, causes: int) -> int:
        self.update()
        return causes

    def _changed(self, _offset: int, _value: int) -> None:
        self.update()

    def _write_ics(self, _offset: int, value: int) -> None:
        self.cause(value)

    def _write_ims(self, _offset: int, value: int) -> None:
        self._registers[IMS] |= value & INTERRUPTS
        self.update()

    def _write_imc(self, _offset: int, value: int) -> None:
        self._registers[IMS] &= ~value
        self.update()


class Delay:
    """A cause that is held back: ``fire()`` is called when nothing came for the time in the register ``delay``, or when
    the time in the register ``limit`` (0: none) has passed since the first that waits."""

    def __init__(
        self, registers: RegisterFile, clock: VirtualClock, delay: int, limit: int, fire: Callable[[], None]
    ) -> None:
        self._registers, self._clock, self._delay, self._limit, self._fire = registers, clock, delay, limit, fire
        self.quiet: Timer = clock.timer(self.flush)
        self.absolute: Timer = clock.timer(self.flush)

    @property
    def waiting(self) -> bool:
        """Whether something is held back."""
        return self.quiet.pending

    def add(self) -> None:
        """Something came; without a delay it is told at once."""
        delay = self._registers[self._delay] * NS_PER_DELAY
        if not delay:
            self.flush()
            return
        now = self._clock.now_ns
        self.quiet.mod(now + delay)
        limit = self._registers[self._limit] * NS_PER_DELAY
        if limit and not self.absolute.pending:
            self.absolute.mod(now + limit)

    def flush(self) -> None:
        """Tell it now."""
        self.cancel()
        self._fire()

    def cancel(self) -> None:
        """Forget what waits."""
        self.quiet.cancel()
        self.absolute.cancel()

    def remaining(self) -> tuple[int, int]:
        """Nanoseconds that the two timers still run; 0 for one that does not."""
        return self.quiet.remaining_ns or 0, self.absolute.remaining_ns or 0

    def restore(self, quiet_ns: int, absolute_ns: int) -> None:
        """The same, after a migration."""
        self.cancel()
        for timer, ns in ((self.quiet, quiet_ns), (self.absolute, absolute_ns)):
            if ns:
                timer.mod(self._clock.now_ns + ns)
