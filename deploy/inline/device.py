"""A device model beside the guest that uses it: its surroundings, its lane, and the connection that shows it.

What a device process has, without the process: the clock that the guest steps, interrupts that ring a handler instead
of an eventfd, idle work, and one DMA lane in a lane area that the revoking side looks at. Its DMA is bound by whoever
makes it, over the same words that a device process maps.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hostd.device_regions import DeviceRegions
from hostd.device_surroundings import ProcessSurroundings
from protocols.vfio_user import messages as wire
from vfio_model.devices import DEVICES
from vfio_model.errors import ConfigError, PeerLost
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.trace import Trace
from vfio_model.uapi.vfio import DeviceInfo, IrqInfo, IrqSetFlags, PciIrq, RegionInfo
from vfio_model.vfio.region import IrqHandler

_INTX = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
_TRIGGER_NONE = int(IrqSetFlags.VFIO_IRQ_SET_DATA_NONE | IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER)

Soon = Callable[[Callable[[], None]], None]
"""Calls a function when the present command of the CPU is over, as an event loop does with an eventfd."""


class InlineDevice:
    """A device of ``model`` called ``name``. :attr:`lanes` is what a revoke looks at, :attr:`lane` what the DMA holds.

    :raise ConfigError: for an unknown model, or properties that do not fit.
    """

    def __init__(self, name: str, model: str, props: Mapping[str, object], trace: Trace, now_ns: int) -> None:
        if model not in DEVICES:
            raise ConfigError(f"no device model {model!r}", hint="known: " + ", ".join(sorted(DEVICES)))
        self.name, self.trace = name, trace
        self.around = ProcessSurroundings(trace)
        self.around.clock.advance_to(now_ns)
        self.device = DEVICES[model](self.around, **props)
        self.regions = DeviceRegions(self.device, self.around)
        words = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(words)
        self.lane = Lane(words, 0)
        self.lanes = LaneArea(name, words, lambda: self.running)
        self.running = False

    def start(self, impl: DMAImpl) -> None:
        """Realize the device; its DMA goes through ``impl``."""
        self.running = True
        self.device.realize()
        self.device.attach_dma(impl)
        self.trace("device_ready", name=self.name, dma=type(impl).__name__)

    def stop(self) -> None:
        """No DMA, timer or interrupt of it from now on. Harmless twice."""
        if self.running:
            self.running = False
            self.device.reset_enter()
            self.device.unrealize()
            self.around.drop_irqs()
            self.around.idle_work.clear()
            self.trace("device_end", name=self.name)


@dataclass(frozen=True)
class HandlerBell:
    """An interrupt's bell that calls a handler of this process."""

    handler: IrqHandler
    soon: Soon

    def ring(self) -> None:
        """The handler is called after the present command, not from inside the device."""
        self.soon(self.handler)

    def close(self) -> None:
        """A ring that is under way still arrives, as an eventfd that was rung does."""


class InlineConnection:
    """``unit`` as a :class:`~vfio_model.vfio.region.DeviceConnection`; ``on_close`` ends it."""

    def __init__(self, unit: InlineDevice, soon: Soon, on_close: Callable[[], None]) -> None:
        self._unit, self._soon, self._on_close = unit, soon, on_close
        self._closed = False

    @property
    def _regions(self) -> DeviceRegions:
        if self._closed or not self._unit.running:
            raise PeerLost(self._unit.name, "it was closed")
        return self._unit.regions

    def get_info(self) -> DeviceInfo:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        info = self._regions.info()
        return DeviceInfo(info.argsz, info.flags, info.num_regions, info.num_irqs)

    def get_region_info(self, index: int) -> RegionInfo:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        info, _ = self._regions.region_info(index)
        return RegionInfo(info.argsz, info.flags, info.index, info.cap_offset, info.size, info.offset)

    def get_irq_info(self, index: int) -> IrqInfo:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        info = self._regions.irq_info(index)
        return IrqInfo(info.argsz, info.flags, info.index, info.count)

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        return self._regions.read(index, offset, size)

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Posted: the device refuses it without anybody noticing."""
        with contextlib.suppress(OSError):
            self._regions.write(index, offset, data)

    def set_irqs(self, index: int, handlers: Sequence[IrqHandler]) -> None:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        regions = self._regions
        if not handlers:
            regions.set_irqs(wire.SetIrqs(flags=_TRIGGER_NONE, index=index), [])
            return
        if len(handlers) > regions.irq_info(index).count:
            raise OSError(errno.EINVAL, f"{self._unit.name}: interrupt {index} has no {len(handlers)} vectors")
        regions.set_events(index, 0, [HandlerBell(handler, self._soon) for handler in handlers])

    def unmask_irq(self, index: int) -> None:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        if self._regions and index == _INTX:
            self._unit.around.intx.unmask()

    def reset(self) -> None:
        """See :class:`~vfio_model.vfio.region.DeviceConnection`."""
        self._regions.reset()

    def close(self) -> None:
        """Close the device file. Harmless twice."""
        if not self._closed:
            self._closed = True
            self._on_close()
