"""A remote emulated device: it lives as long as its server, whoever uses it.

One client at a time owns it. A client that goes takes with it what was its own: the maps of its memory, its interrupts,
its clock, a migration that it began. Registers stay as they are, and the device waits, without DMA and without time,
for the next one; a client that wants a fresh device resets it, as QEMU does.
"""

from __future__ import annotations

from collections.abc import Callable

from hostd.device_migration import DeviceMigration
from hostd.device_regions import DeviceRegions
from hostd.device_surroundings import ProcessSurroundings
from protocols.transport.loop import Loop
from vfio_model.memory.dma import BLOCKED, DMAImpl
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace


class RemoteDevice:
    """The device that ``make`` makes, realized."""

    def __init__(self, make: Callable[[ProcessSurroundings], PCIDevice], loop: Loop, trace: Trace) -> None:
        """:raise ConfigError: when its properties do not fit."""
        self._trace = trace
        self.used = False
        """Whether it has a client."""
        self.around = ProcessSurroundings(trace, loop)
        self.device = make(self.around)
        self.regions = DeviceRegions(self.device, self.around)
        self.migration = DeviceMigration(self.device, trace, logs=True)
        self.around.awake = lambda: self.used and self.migration.runs
        self.device.realize()
        self.migration.check()

    def bind(self, impl: DMAImpl, *, system: DMAImpl = BLOCKED) -> None:
        """Its DMA goes through ``impl`` from now on, and what it does behind the IOMMU's back through ``system``."""
        self.migration.attach_dma(impl)
        self.device.system.bind(system)
        self._trace("remote_dma", through=type(impl).__name__)

    def abandon(self) -> None:
        """Its client has gone. Mappings that the device still holds were invalidated when this returns."""
        self.used = False
        self.around.free_clock.run(False)
        self.migration.abandon()
        self.bind(BLOCKED)
        self.regions.drop_irqs()

    def work(self, *, clock: bool) -> float | None:
        """What the device does by itself: timers that are due (of its own ``clock``), a round of idle work.

        Seconds until it wants to be called again; None: when something happens.
        """
        around, runs = self.around, self.around.awake()
        around.free_clock.run(clock and runs)
        around.go_on()
        pause = around.free_clock.run_due()
        if around.idle_work and runs:
            around.run_idle()
            return 0.0
        return pause

    def close(self) -> None:
        """The end of the server."""
        self.abandon()
        self.device.reset_enter()
        self.device.unrealize()
        self.around.close()
