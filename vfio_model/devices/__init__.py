"""Device models, one folder each: ``regs.py`` for facts, ``device.py`` for behaviour.

A device sees its address spaces and its host (:mod:`vfio_model.pci.device`), never an IOMMU or VFIO. :data:`DEVICES` is
what ``-device NAME`` may say.
"""

from __future__ import annotations

from collections.abc import Mapping

from vfio_model.devices.dma_burst.device import DMABurstDevice
from vfio_model.devices.e1000.device import E1000Device
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.pci.device import PCIDevice

DEVICES: Mapping[str, type[PCIDevice]] = {
    # QEMU's teaching device: factorial, interrupts, a DMA engine with its own buffer and a delay.
    "edu": EduDevice,
    # QEMU's IOMMU test device: writes through the IOMMU and checks behind it, at once.
    "iommu-testdev": IOMMUTestDevice,
    # This project's DMA load generator: any number of accesses for one register write, also in the background.
    "dma-burst": DMABurstDevice,
    # Intel's 82540EM network card, QEMU's default one.
    "e1000": E1000Device,
    # NVM Express with one namespace on a disk in memory or in a file, as QEMU's nvme.
    "nvme": NvmeDevice,
    # A device that works on a process's own addresses: ATS, page requests, PASIDs.
    "svm": SvmDevice,
}
