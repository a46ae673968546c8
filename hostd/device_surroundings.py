"""What surrounds a device in a process of its own: clock, interrupts and idle work (a ``DeviceHost`` of
vfio_model.pci).

INTx is level-triggered and masks itself: it is signalled once when the pin goes up, and again at unmask if the pin is
still up (``VFIO_IRQ_INFO_AUTOMASKED``). A message is one signal. Whatever the device wrote before it raised the
interrupt is visible to who reads the eventfd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from protocols.transport.kernel import EventFd
from protocols.transport.shm import MappedMemory
from vfio_model.clock import VirtualClock
from vfio_model.memory.clock_area import read_time, write_time
from vfio_model.trace import Trace


class Bell(Protocol):
    """What an interrupt rings: the client's eventfd, or a handler where the client is in this process."""

    def ring(self) -> object:
        """The interrupt is signalled."""

    def close(self) -> None:
        """It is not rung any more."""


class IntxLine:
    """The pin and its bell."""

    def __init__(self) -> None:
        self.level = False
        self.masked = False
        self._event: Bell | None = None

    def set_event(self, event: Bell | None) -> None:
        """Signal on ``event`` (taken over) from now on; None disables."""
        if self._event is not None:
            self._event.close()
        self._event = event
        self.masked = False
        self._signal()

    def set_level(self, level: bool) -> None:
        """The device drives its pin."""
        self.level = level
        self._signal()

    def mask(self) -> None:
        """Signal nothing until :meth:`unmask`."""
        self.masked = True

    def unmask(self) -> None:
        """Signal again, at once if the pin is up."""
        self.masked = False
        self._signal()

    def trigger(self) -> None:
        """Signal as if the pin had gone up."""
        if self._event is not None:
            self._event.ring()

    def _signal(self) -> None:
        if self.level and not self.masked and self._event is not None:
            self.masked = True
            self._event.ring()


class Vectors:
    """The bells of the messages; a vector without one is lost, as a message to nowhere is."""

    def __init__(self) -> None:
        self._events: dict[int, Bell] = {}

    def __len__(self) -> int:
        return len(self._events)

    def set_events(self, start: int, events: Sequence[Bell]) -> None:
        """Vectors from ``start`` on signal on ``events`` (taken over)."""
        for number, event in enumerate(events, start):
            self.clear(number)
            self._events[number] = event

    def clear(self, number: int) -> None:
        """Vector ``number`` signals nowhere."""
        event = self._events.pop(number, None)
        if event is not None:
            event.close()

    def clear_all(self) -> None:
        """No vector signals."""
        for number in list(self._events):
            self.clear(number)

    def trigger(self, number: int) -> None:
        """Signal ``number``; past the last vector it wraps, as the guest gave fewer than the device has."""
        if self._events:
            event = self._events.get(number % (max(self._events) + 1))
            if event is not None:
                event.ring()


class SharedClock:
    """The guest's clock as this device follows it: the shared word, our tick word, and the doorbells of a step."""

    def __init__(self, clock: MappedMemory, ticks: MappedMemory, step: EventFd, done: EventFd) -> None:
        self.step = step
        self._clock, self._ticks, self._done = clock, ticks, done

    def take(self, virtual: VirtualClock) -> None:
        """A step was signalled: run what is due by the shared time, then say that it is done."""
        self.step.drain()
        now = read_time(self._clock.words)
        virtual.advance_to(now)
        if self.step.fd < 0:
            return  # a timer did DMA by message, and found its client gone: this clock is closed
        write_time(self._ticks.words, now)
        self._done.ring()

    def close(self) -> None:
        """Harmless twice."""
        self.step.close()
        self._done.close()
        self._clock.close()
        self._ticks.close()


class ProcessSurroundings:
    """A ``DeviceHost`` with an idle hook."""

    def __init__(self, trace: Trace) -> None:
        self.clock = VirtualClock()
        self.trace = trace
        self.intx = IntxLine()
        self.vectors = Vectors()
        self.idle_work: list[Callable[[], bool]] = []

    def set_intx(self, level: bool) -> None:
        """See ``DeviceHost``."""
        self.intx.set_level(level)

    def msi(self, vector: int) -> None:
        """See ``DeviceHost``."""
        self.vectors.trigger(vector)

    def idle(self, callback: Callable[[], bool]) -> None:
        """Call ``callback()`` whenever there is nothing else to do, until it returns False."""
        self.idle_work.append(callback)

    def run_idle(self) -> None:
        """One round of what is to be done when there is nothing else."""
        self.idle_work = [callback for callback in list(self.idle_work) if callback()]

    def drop_irqs(self) -> None:
        """The client is gone: nothing is signalled any more."""
        self.intx.set_event(None)
        self.vectors.clear_all()
