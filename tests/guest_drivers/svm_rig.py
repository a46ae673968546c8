"""A q35 machine with an svm device behind a VT-d unit, and a kernel that shares address spaces with it."""

from __future__ import annotations

from tests.guest_drivers.vtd_rig import MovableCpu
from tests.machine.q35_boards import ram_block
from vfio_model.devices.svm import regs
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.guest_drivers.mm import Mm
from vfio_model.guest_drivers.pc import enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import bring_up_bus, find_function
from vfio_model.guest_drivers.svm_kernel import SvmKernel
from vfio_model.guest_drivers.svm_process import Process
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.trace import ListTrace

SVM = 0x18
OPTIONS = VtdOptions(device_iotlb=True, scalable_mode=True, fsts=True, pasid_bits=8, svm=True)


class SvmRig:
    """Everything in this process; ``order`` is the size of the page request queue."""

    def __init__(self, ram: int = 64 << 20, *, order: int = 4) -> None:
        self.trace = ListTrace()
        self.machine = Q35Machine([ram_block(ram)], Q35Options(iommu=OPTIONS), trace=self.trace)
        device = self.machine.root_bus.plug(SvmDevice, SVM)
        assert isinstance(device, SvmDevice)
        self.device = device
        self.cpu = MovableCpu(self.machine)
        self.config = enable_ecam(self.cpu)
        functions = bring_up_bus(self.config, mmio_window())
        bar = find_function(functions, regs.VENDOR_ID, regs.DEVICE_ID).bars[0].address
        self.kernel = SvmKernel.boot(self.cpu, self.config, SVM, bar, ram, order=order)
        self.vtd, self.frames, self.driver = self.kernel.vtd, self.kernel.frames, self.kernel.driver
        self.sva = self.kernel.sva

    def process(self) -> Process:
        """A new one, with the device open."""
        process = Process(self.cpu, self.frames, self.driver)
        process.open()
        return process

    def mm(self) -> Mm:
        """An address space of nobody's."""
        return Mm(self.cpu, self.frames, self.driver.kernel)
