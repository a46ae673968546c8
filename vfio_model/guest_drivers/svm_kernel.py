"""A PC's kernel as far as ``/dev/svm`` needs it: the VT-d unit in scalable mode, memory to give out, the driver.

Guest memory: the driver's message word, then the unit's tables and queues, then page frames.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import Frames
from vfio_model.guest_drivers.pci import ConfigAccess
from vfio_model.guest_drivers.process_tables import KernelSpace
from vfio_model.guest_drivers.svm import SvmDriver
from vfio_model.guest_drivers.vtd import VtdDriver
from vfio_model.guest_drivers.vtd_prq import SIZE_ORDER
from vfio_model.guest_drivers.vtd_sva import Sva
from vfio_model.guest_drivers.vtd_tables import PageAllocator

MAILBOX = 0x8_0000
TABLES, FRAMES = 0x10_0000, 0x80_0000


@dataclass(frozen=True)
class SvmKernel:
    """Booted by :meth:`boot`."""

    cpu: Cpu
    vtd: VtdDriver
    frames: Frames
    driver: SvmDriver

    @property
    def sva(self) -> Sva:
        """Who shares address spaces with devices."""
        return self.driver.sva

    @classmethod
    def boot(
        cls, cpu: Cpu, config: ConfigAccess, devfn: int, bar: int, ram: int, *, order: int = SIZE_ORDER
    ) -> SvmKernel:
        """With the svm device at ``devfn`` of bus 0, whose BAR the CPU sees at ``bar``; ``ram`` bytes from 0 on are
        memory. ``order`` as for :class:`~vfio_model.guest_drivers.vtd_prq.PageRequestQueue`.

        :raise DriverError: unit or device lack what it takes.
        """
        pages = PageAllocator(cpu, TABLES, FRAMES)
        vtd = VtdDriver(cpu, pages, scalable=True, device_tlb=True)
        vtd.start()
        vtd.attach_pass_through(devfn)
        frames = Frames(cpu, FRAMES, ram)
        sva = Sva(cpu, vtd, pages, order=order)
        return cls(cpu, vtd, frames, SvmDriver(cpu, config, devfn, bar, sva, KernelSpace(cpu, frames), MAILBOX))
