"""What surrounds a device in a process of its own: clock, interrupts and idle work (a ``DeviceHost`` of
vfio_model.pci).

INTx is level-triggered and masks itself: it is signalled once when the pin goes up, and again at unmask if the pin is
still up (``VFIO_IRQ_INFO_AUTOMASKED``). A message is one signal. Whatever the device wrote before it raised the
interrupt is visible to who reads the eventfd.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from hostd.device_backends import DeviceBackends
from hostd.unmask_bell import UnmaskBell
from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, create_memory
from vfio_model.backends.block import BlockBackend
from vfio_model.backends.net import NetBackend, OnFrame
from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError
from vfio_model.memory.clock_area import read_time, write_time
from vfio_model.pci.iommu_ops import IommuPort
from vfio_model.trace import Trace
from vfio_model.uapi.vfio import PciIrq

_MSI = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
_MSIX = int(PciIrq.VFIO_PCI_MSIX_IRQ_INDEX)
_EVENTS = (int(PciIrq.VFIO_PCI_ERR_IRQ_INDEX), int(PciIrq.VFIO_PCI_REQ_IRQ_INDEX))


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
        self._mask_event: Bell | None = None
        self._unmask_event: Bell | None = None

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
        if self._mask_event is not None:
            self._mask_event.ring()

    def unmask(self) -> None:
        """Signal again, at once if the pin is up, and say so."""
        if self._unmask_event is not None:
            self._unmask_event.ring()
        self.unmasked()

    def unmasked(self) -> None:
        """As :meth:`unmask`, when it was the one whom that would tell who did it."""
        self.masked = False
        self._signal()

    def on_mask(self, event: Bell | None) -> None:
        """Ring ``event`` (taken over) whenever the client masks; None: nothing."""
        if self._mask_event is not None:
            self._mask_event.close()
        self._mask_event = event

    def on_unmask(self, event: Bell | None) -> None:
        """Ring ``event`` (taken over) whenever the client unmasks; None: nothing."""
        if self._unmask_event is not None:
            self._unmask_event.close()
        self._unmask_event = event

    def trigger(self) -> None:
        """Signal as if the pin had gone up."""
        if self._event is not None:
            self._event.ring()

    def _signal(self) -> None:
        if self.level and not self.masked and self._event is not None:
            self.masked = True
            self._event.ring()


class Vectors:
    """The bells of one kind of interrupt; a vector without one is lost, as a message to nowhere is.

    With ``wraps`` a number past the last one that has a bell starts again, as MSI does when the guest allotted fewer
    vectors than the device has.
    """

    def __init__(self, *, wraps: bool = False) -> None:
        self._events: dict[int, Bell] = {}
        self._wraps = wraps

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
        """Signal ``number``."""
        if self._wraps and self._events:
            number %= max(self._events) + 1
        event = self._events.get(number)
        if event is not None:
            event.ring()


_MS = 1_000_000


class SharedClock:
    """The guest's clock as this device follows it: the shared word, our tick word, and the doorbells of a step."""

    def __init__(self, clock: MappedMemory, ticks: MappedMemory, step: EventFd, done: EventFd) -> None:
        self.step = step
        self._clock, self._ticks, self._done = clock, ticks, done
        self._ahead_ns: int | None = None
        """By how much the device is older than this guest: it may have served another one. Whole milliseconds: a device
        that counts these counts the guest's."""

    def take(self, virtual: VirtualClock) -> None:
        """A step was signalled: run what is due by the shared time, then say that it is done."""
        self.step.drain()
        now = read_time(self._clock.words)
        if self._ahead_ns is None:
            self._ahead_ns = max(-(-(virtual.now_ns - now) // _MS) * _MS, 0)
        virtual.advance_to(now + self._ahead_ns)
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


class FreeRunningClock:
    """Lets ``virtual`` follow CLOCK_MONOTONIC, for a client that brings no clock; it stands unless :attr:`runs`."""

    def __init__(self, virtual: VirtualClock) -> None:
        self._virtual = virtual
        self._offset_ns = 0
        self.runs = False

    def run(self, on: bool) -> None:
        """Start, or stand still. Nothing when it does that already."""
        if on and not self.runs:
            self._offset_ns = self._virtual.now_ns - time.monotonic_ns()
        self.runs = on

    def catch_up(self) -> None:
        """Set the time, so that the device reads what it is now; timers wait for :meth:`run_due`."""
        if self.runs:
            self._virtual.now_ns = max(self._virtual.now_ns, time.monotonic_ns() + self._offset_ns)

    def before_due(self, monotonic_ns: int) -> int:
        """``monotonic_ns``, or when the next timer is due if that is earlier."""
        due = self._virtual.next_expiry_ns()
        return monotonic_ns if due is None else min(monotonic_ns, due - self._offset_ns)

    def run_due(self) -> float | None:
        """Run the timers that are due; seconds until the next one, or None when there is none."""
        if not self.runs:
            return None
        self._virtual.advance_to(time.monotonic_ns() + self._offset_ns)
        due = self._virtual.next_expiry_ns()
        return None if due is None else max(due - self._virtual.now_ns, 0) / 1e9


class ProcessSurroundings:
    """A ``DeviceHost`` with an idle hook, memory for BARs, and in a process with a ``loop`` disks and networks."""

    def __init__(self, trace: Trace, loop: Loop | None = None) -> None:
        self.clock = VirtualClock()
        self.free_clock = FreeRunningClock(self.clock)
        self.trace = trace
        self.iommu: IommuPort | None = None
        self.intx = IntxLine()
        self._vectors = {index: Vectors(wraps=index == _MSI) for index in (_MSI, _MSIX, *_EVENTS)}
        self._bars: dict[int, MappedMemory] = {}
        self.awake: Callable[[], bool] = lambda: True
        """Whether the device may do something by itself."""
        self._loop = loop
        self._backends = None if loop is None else DeviceBackends(loop, lambda: self.awake())
        self.idle_work: list[Callable[[], bool]] = []

    def set_intx(self, level: bool) -> None:
        """See ``DeviceHost``."""
        self.intx.set_level(level)

    def msi(self, vector: int) -> None:
        """See ``DeviceHost``."""
        msix = self._vectors[_MSIX]
        (msix if len(msix) else self._vectors[_MSI]).trigger(vector)

    def vectors_of(self, index: int) -> Vectors:
        """The bells of interrupt index ``index``, which is not INTx."""
        return self._vectors[index]

    @property
    def by_message(self) -> bool:
        """Whether the client has set up messages of either kind."""
        return any(len(self._vectors[index]) for index in (_MSI, _MSIX))

    def bar_memory(self, index: int, size: int) -> memoryview:
        """See ``vfio_model.pci.parts.MemoryHost``: a memfd that the client can map."""
        if index not in self._bars:
            self._bars[index] = create_memory(f"bar{index}", size)
        return self._bars[index].view

    def bar_fd(self, index: int) -> int | None:
        """The memfd behind BAR ``index``, if the device has mmap areas there."""
        memory = self._bars.get(index)
        return None if memory is None else memory.fd

    def idle(self, callback: Callable[[], bool]) -> None:
        """Call ``callback()`` whenever there is nothing else to do, until it returns False."""
        self.idle_work.append(callback)

    def unmask_bell(self, event: EventFd) -> Bell:
        """``event`` (taken over) as what rings, and is rung, when INTx is unmasked."""
        return event if self._loop is None else UnmaskBell(self._loop, event, self.intx.unmasked)

    def open_block(self, text: str) -> BlockBackend:
        """See ``vfio_model.backends.opening.BackendHost``."""
        return self._opener(text).open_block(text)

    def open_net(self, text: str, on_frame: OnFrame) -> NetBackend:
        """See ``vfio_model.backends.opening.BackendHost``."""
        return self._opener(text).open_net(text, on_frame)

    def _opener(self, text: str) -> DeviceBackends:
        if self._backends is None:
            raise ConfigError(f"{text!r} cannot be opened here", hint="the device needs a process of its own")
        return self._backends

    def go_on(self) -> None:
        """Between other things: what the device could not hear while it stood, it hears now."""
        if self._backends is not None:
            self._backends.go_on()

    def run_idle(self) -> None:
        """One round of what is to be done when there is nothing else."""
        self.idle_work = [callback for callback in list(self.idle_work) if callback()]

    def drop_irqs(self) -> None:
        """The client is gone: nothing is signalled any more."""
        self.intx.set_event(None)
        self.intx.on_mask(None)
        self.intx.on_unmask(None)
        for vectors in self._vectors.values():
            vectors.clear_all()

    def close(self) -> None:
        """The device is gone, too."""
        for memory in self._bars.values():
            with contextlib.suppress(BufferError):  # the device still holds its views
                memory.close()
        self._bars.clear()
