"""A q35 machine with a VT-d unit, devices, and the driver on it."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.machine.q35_boards import ram_block
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.iommu_testdev import IommuTestdevDriver
from vfio_model.guest_drivers.pc import enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import PciFunction, bring_up_bus, find_function
from vfio_model.guest_drivers.vtd import VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import ListTrace

RAM_SIZE = 64 << 20
TABLES, TABLES_END = 0x10_0000, 0x80_0000
DATA = 0x100_0000
EDU, TESTDEV = 0x10, 0x18
WIDE_EDU = {"dma_mask": (1 << 64) - 1}


class MovableCpu:
    """A CPU of ``machine``, which migrates: its drivers do not notice."""

    big_endian = False

    def __init__(self, machine: Q35Machine) -> None:
        self.move(machine)

    def move(self, machine: Q35Machine) -> None:
        """Run on ``machine`` from now on."""
        self.read_memory, self.write_memory = machine.read_memory, machine.write_memory
        self.mmio_read, self.mmio_write = machine.mmio_read, machine.mmio_write
        self.port_read, self.port_write = machine.port_read, machine.port_write
        self.clock_step = machine.clock_step


@dataclass
class Rig:
    """Brought up as firmware would; the VT-d driver has started, and nobody is attached."""

    options: VtdOptions = field(default_factory=VtdOptions)
    queued: bool = True
    scalable: bool = False
    more: dict[int, type[PCIDevice]] = field(default_factory=dict)
    device_tlb: bool = False

    def __post_init__(self) -> None:
        self.machine = Q35Machine([ram_block(RAM_SIZE)], Q35Options(iommu=self.options), trace=ListTrace())
        self.machine.root_bus.plug(EduDevice, EDU, **WIDE_EDU)
        self.machine.root_bus.plug(IOMMUTestDevice, TESTDEV)
        for devfn, kind in self.more.items():
            self.machine.root_bus.plug(kind, devfn)
        self.cpu = MovableCpu(self.machine)
        self.config = enable_ecam(self.cpu)
        self.functions = bring_up_bus(self.config, mmio_window())
        self.pages = PageAllocator(self.cpu, TABLES, TABLES_END)
        self.vtd = VtdDriver(
            self.cpu, self.pages, queued=self.queued, scalable=self.scalable, device_tlb=self.device_tlb
        )
        self.edu = EduDriver(self.cpu, self.bar(0x1234, 0x11E8))
        self.testdev = IommuTestdevDriver(self.cpu, self.bar(0x1B36, 0x0005))
        self.vtd.start()

    def function(self, vendor: int, device: int) -> PciFunction:
        """What firmware found."""
        return find_function(self.functions, vendor, device)

    def bar(self, vendor: int, device: int) -> int:
        """Where BAR 0 is."""
        return self.function(vendor, device).bars[0].address
