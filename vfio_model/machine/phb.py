"""A pseries PCI host bridge: its windows in the CPU's address space, its bus, its devices' DMA address space, its
interrupts.

All functions of a PHB share one DMA address space ("one PE per PHB"): the TCE windows and, at 0x400_0000_0000, a
write-only page where a 32-bit write is a message interrupt, its data the interrupt number. Pin changes become one of
four level lines after the usual swizzle. Placement follows QEMU's ``spapr-pci-host-bridge``.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.clock import VirtualClock
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.ddw import PhbDma
from vfio_model.iommu.spapr.regs import DmaOptions
from vfio_model.machine.irqs import IrqLines
from vfio_model.machine.msi import MsiNumbers, PhbMsi
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bus import BusOptions, PCIBus, Window
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.iommu_ops import PCIIOMMUOps, RequesterBus
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.vfio import EehOp, EehState

EehPort = Callable[[EehOp], EehState]
"""``VFIO_EEH_PE_OP`` on the one group of the one container behind a bridge; raises ``OSError`` as the ioctl does."""


class MsiWindow:
    """The ops of the message page: the data written names the interrupt."""

    min_access_size = 4
    max_access_size = 4

    def __init__(self, irqs: IrqLines, trace: Trace) -> None:
        self._irqs, self._trace = irqs, trace

    def read(self, addr: int, size: int) -> int | None:
        """Write-only."""
        return None

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """Pulse interrupt ``value``."""
        if self._trace.enabled:
            self._trace("spapr_pci_msi_write", addr=addr, data=value, dt_irq=value)
        self._irqs.pulse(value)
        return MemTxResult.OK


class _PhbIommu(PCIIOMMUOps):
    """One address space for all functions, whichever bus they are on; nothing for caches in devices."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space

    def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
        """See :class:`PCIIOMMUOps`."""
        return self._space


class SpaprPhb:
    """PHB ``index`` in the machine whose memory is ``system``."""

    def __init__(
        self,
        index: int,
        options: DmaOptions,
        *,
        system: AddressSpace,
        irqs: IrqLines,
        clock: VirtualClock,
        bus: BusOptions,
        msi: MsiNumbers,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.index, self.buid = index, regs.phb_buid(index)
        self.name = f"pci@{self.buid:x}"
        self._irqs, self._trace = irqs, trace
        self._asserting: tuple[set[int], ...] = tuple(set() for _ in range(regs.PCI_PINS))
        self.dma = PhbDma(index, options, system, trace=trace)
        self.msi = PhbMsi(msi)
        """The message interrupts of its functions."""
        self.eeh: Callable[[], EehPort | None] = lambda: None
        """The way to EEH, if there is one now; set by whoever connects containers."""
        messages = IORegion("msi", regs.MSI_WINDOW_SIZE, MsiWindow(irqs, trace))
        self.dma.root.add_subregion(regs.MSI_WINDOW, messages)
        self.address_space = AddressSpace(self.name, self.dma.root)
        self.memory = MemoryRegion(f"{self.name}.mmio", 1 << 64)
        self.io = MemoryRegion(f"{self.name}.io", regs.PCI_IO_SIZE)
        bus.intx = self._intx
        self.bus = PCIBus(
            self.name,
            memory=Window(self.memory),
            io=Window(self.io),
            system=system,
            clock=clock,
            options=bus,
            trace=trace,
        )
        self.bus.setup_iommu(_PhbIommu(self.address_space))
        self._show(system)

    def _show(self, system: AddressSpace) -> None:
        """Let the CPU see the bus's spaces."""
        root, index = system.root, self.index
        assert root is not None, "a machine's memory lives as long as its bridges"
        mem32 = AliasRegion(f"{self.name}.mmio32-alias", self.memory, regs.PCI_MEM32_BUS, regs.PCI_MEM32_SIZE)
        mem64 = AliasRegion(f"{self.name}.mmio64-alias", self.memory, regs.pci_mem64_window(index), regs.PCI_MEM64_SIZE)
        root.add_subregion(regs.pci_mem32_window(index), mem32)
        root.add_subregion(regs.pci_mem64_window(index), mem64)
        root.add_subregion(regs.pci_io_window(index), self.io)

    def _intx(self, devfn: int, pin: int, level: bool) -> None:
        line = ((devfn >> 3) + pin - 1) % regs.PCI_PINS
        asserting = self._asserting[line]
        if level:
            asserting.add(devfn)
        else:
            asserting.discard(devfn)
        irq = regs.LSI_BASE + self.index * regs.PCI_PINS + line
        self._trace("spapr_pci_lsi_set", busname=self.name, pin=line, irq=irq)
        self._irqs.set(irq, bool(asserting))

    def function(self, config_addr: int) -> PCIDevice | None:
        """The function that a ``config_addr`` cell names, or None."""
        if config_addr >> 16 & 0xFF != self.bus.number:
            return None
        return self.bus.devices.get(config_addr >> 8 & 0xFF)

    def reset(self) -> None:
        """PHB reset: windows first, then the devices with their TCE tables, in three phases, then EEH is enabled again,
        and nobody has a message interrupt.
        """
        self.bus.reset_enter()
        self.dma.dma_reset()
        for table in self.dma.tables:
            table.reset()
        self.bus.reset_hold()
        self.bus.reset_exit()
        self._enable_eeh()
        self.msi.reset()

    def _enable_eeh(self) -> None:
        port = self.eeh()
        if port is not None:
            try:
                port(EehOp.VFIO_EEH_PE_ENABLE)
            except OSError as error:
                self._trace("warning", reason=f"{self.name}: EEH was not enabled: {error}")
