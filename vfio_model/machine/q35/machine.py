"""The q35 machine: memory, ports, a PCI Express root bus, interrupts and an IOMMU, without a CPU.

What a CPU would do comes in through :meth:`Q35Machine.port_read`, :meth:`~Q35Machine.port_write`, memory and MMIO;
drivers (:mod:`vfio_model.guest_drivers`), qtest and the control socket are such CPUs. The machine is little-endian. It
is what QEMU's ``-machine q35 -accel qtest -nodefaults`` shows, as far as PCI, its IOMMU and their interrupts go. There
is no firmware, and none of: HPET, 8254, RTC, 8259A, 8042, 8237, fw_cfg, ACPI and hot-plug ports; they read as if nobody
were there.

Nothing here waits by itself: a store returns when every follower of a translation that it changed has answered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vfio_model.clock import VirtualClock
from vfio_model.iommu.vtd import regs as vtd
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.unit import IntelIommu
from vfio_model.machine.base import Machine
from vfio_model.machine.device_tree import DeviceTree
from vfio_model.machine.q35 import regs
from vfio_model.machine.q35.chipset import Ich9Ahci, Ich9Lpc, Ich9Smbus, Mch
from vfio_model.machine.q35.config_access import ConfigAddress, ConfigCycles, ConfigData, Ecam
from vfio_model.machine.q35.interrupts import ChipsetConfig, MessageWindow, PinRouter
from vfio_model.machine.q35.ioapic import IoApic
from vfio_model.machine.q35.memory_map import MemoryMap
from vfio_model.machine.q35.ports import PortSpace, ResetControl
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import IORegion, transaction
from vfio_model.pci.bus import BusOptions, PCIBus, Window
from vfio_model.trace import NULL_TRACE, Trace

ROOT_BUS = "pcie.0"


@dataclass(frozen=True, slots=True)
class Q35Options:
    """What the machine is made of besides RAM. ``bypass_iommu``: the devices of the root bus's hierarchy are not
    translated (QEMU's ``default-bus-bypass-iommu``)."""

    iommu: VtdOptions | None = None
    bypass_iommu: bool = False


class Q35Machine(Machine):
    """A machine with ``ram`` (blocks one after another, below 4 GiB and above it). It comes up reset.

    Of ``bus_options`` the idle hook counts, and whether bridges gate DMA."""

    TYPE = "q35"
    big_endian = False
    goes_on = True

    def __init__(
        self,
        ram: Sequence[RAMBlock],
        options: Q35Options | None = None,
        *,
        clock: VirtualClock | None = None,
        bus_options: BusOptions | None = None,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.memory = MemoryMap(ram)
        super().__init__(ram, self.memory.root, clock, trace)
        self.options = options or Q35Options()
        self.ports = PortSpace()
        self.messages = MessageWindow(self.irqs)
        """Where interrupt messages arrive."""
        self.ioapic = IoApic(self._ioapic_message)
        self.chipset = ChipsetConfig()
        self.on_reset_request: Callable[[], None] = self.reset
        """Called when the guest asks for a reset."""
        self.iommu: IntelIommu | None = None
        """The IOMMU of every bus, if there is one."""
        if self.options.iommu is not None:
            self.iommu = IntelIommu(self.options.iommu, self.system, self.messages.deliver, trace=trace)
        self.root_bus = self._root_bus(bus_options or BusOptions())
        self.mch, self.lpc = Mch(self.root_bus.host_for(0)), Ich9Lpc(self.root_bus.host_for(regs.LPC_DEVFN))
        self._pins = PinRouter(self.chipset, self.lpc.route, self.set_gsi)
        self._plug_chipset()
        self._show_registers()
        self.reset()

    # -- building ------------------------------------------------------------------------------------------------

    def _root_bus(self, options: BusOptions) -> PCIBus:
        bus = PCIBus(
            ROOT_BUS,
            memory=Window(self.memory.pci),
            io=Window(self.ports.region),
            system=self.system,
            clock=self.clock,
            options=replace(options, intx=lambda devfn, pin, level: self._pins.set_pin(devfn, pin, level)),
            trace=self.trace,
            express=True,
            bypass_iommu=self.options.bypass_iommu,
        )
        if self.iommu is not None:
            bus.setup_iommu(self.iommu.ops)
        return bus

    def _plug_chipset(self) -> None:
        self.root_bus.attach(self.mch, 0)
        self.root_bus.attach(self.lpc, regs.LPC_DEVFN)
        self.root_bus.plug(Ich9Ahci, regs.AHCI_DEVFN)
        self.root_bus.plug(Ich9Smbus, regs.SMBUS_DEVFN)
        self.mch.on_pciexbar, self.mch.on_pam = self._place_ecam, self.memory.set_pam
        self.lpc.on_rcba = self._place_chipset_config

    def _show_registers(self) -> None:
        address, cycles, root = ConfigAddress(), ConfigCycles(self.bus_numbered), self.memory.root
        ports = self.ports.region
        ports.add_subregion(regs.CONFIG_ADDRESS, IORegion("pci-conf-idx", 4, address))
        ports.add_subregion(regs.CONFIG_DATA, IORegion("pci-conf-data", 4, ConfigData(address, cycles)))
        self.config_address, self.reset_control = address, ResetControl(lambda: self.on_reset_request())
        ports.add_subregion(regs.RESET_CONTROL, IORegion("lpc-reset-control", 1, self.reset_control), priority=1)
        self._ecam = IORegion("pcie-mmcfg-mmio", regs.PCIEXBAR_BUSES[0] << regs.ECAM_BUS_SHIFT, Ecam(cycles))
        self._rcrb = IORegion("lpc-rcrb-mmio", regs.CHIPSET_CONFIG_SIZE, self.chipset)
        for region, base, priority in (
            (self._rcrb, 0, 1),
            (IORegion("ioapic", regs.IOAPIC_SIZE, self.ioapic), regs.IOAPIC_BASE, 0),
            (IORegion("apic-msi", regs.MESSAGES.size, self.messages), regs.MESSAGES.start, 4096),
        ):
            root.add_subregion(base, region, priority)
        if self.iommu is not None:
            root.add_subregion(vtd.BASE, self.iommu.mmio)

    def _place_ecam(self) -> None:
        value = self.mch.config.get("pciexbar")
        buses = regs.PCIEXBAR_BUSES.get(value >> 1 & 3)
        if buses is None:
            return
        with transaction():
            if self._ecam.parent is not None:
                self._ecam.parent.del_subregion(self._ecam)
            if value & regs.PCIEXBAR_ENABLE:
                size = buses << regs.ECAM_BUS_SHIFT
                self._ecam.set_size(size)
                self.memory.root.add_subregion(value & regs.PCIEXBAR_ADDRESS & ~(size - 1), self._ecam)

    def _place_chipset_config(self) -> None:
        value = self.lpc.config.get("rcba")
        with transaction():
            self._rcrb.set_enabled(bool(value & regs.RCBA_ENABLE))
            self._rcrb.set_offset(value & regs.RCBA_ADDRESS)

    def bus_numbered(self, number: int) -> PCIBus | None:
        """The bus that the guest calls ``number`` now."""
        return self.root_bus.find(number)

    @property
    def buses(self) -> dict[str, PCIBus]:
        """Every bus by QEMU's name, the root bus first, then in the order of the tree."""
        return {bus.name: bus for bus in self.root_bus.walk()}

    def reset(self) -> None:
        """Reset in three phases: DMA stops, registers, then the IOMMU and running again. CONFIG_ADDRESS stays."""
        self.root_bus.reset_enter()
        self.root_bus.reset_hold()
        self.chipset.reset()
        self.ioapic.reset()
        self._pins.reset()
        self.irqs.reset()
        if self.iommu is not None:
            self.iommu.reset()
        self.root_bus.reset_exit()

    def device_tree(self) -> DeviceTree:
        """A PC has none."""
        return {}

    # -- interrupts ----------------------------------------------------------------------------------------------

    def set_gsi(self, gsi: int, level: bool) -> None:
        """Drive a GSI, which is a pin of the I/O APIC."""
        self.irqs.set(gsi, level)
        self.ioapic.set_pin(gsi, level)

    def _ioapic_message(self, address: int, data: int) -> None:
        if self.iommu is not None:
            self.iommu.interrupts.platform_request(regs.IOAPIC_SID, address, data)
        else:
            self.messages.deliver(address, data)

    # -- what a CPU does -----------------------------------------------------------------------------------------

    def port_read(self, port: int, size: int) -> int:
        """IN: see :class:`~vfio_model.machine.q35.ports.PortSpace`."""
        return self.ports.read(port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT."""
        self.ports.write(port, size, value)
