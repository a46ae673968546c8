"""A driver for iommu-testdev (QEMU ``docs/specs/iommu-testdev.rst``): one DMA through the IOMMU, read back behind it.

Its registers are little-endian; on a big-endian machine this driver swaps, as ``readl`` and ``writel`` do in Linux.
"""

from __future__ import annotations

from vfio_model.devices.iommu_testdev import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.ranges import U32_MAX


class IommuTestdevDriver:
    """``bar`` is where the CPU sees the registers."""

    def __init__(self, cpu: Cpu, bar: int) -> None:
        self._cpu, self._bar = cpu, bar

    def _order(self, value: int) -> int:
        return int.from_bytes(value.to_bytes(4, "little"), "big") if self._cpu.big_endian else value

    def _read(self, offset: int) -> int:
        return self._order(self._cpu.mmio_read(self._bar + offset, 4))

    def _write(self, offset: int, value: int) -> None:
        self._cpu.mmio_write(self._bar + offset, 4, self._order(value))

    def result(self) -> int:
        """What the result register holds; 0 is success."""
        return self._read(regs.RESULT)

    def run(self, iova: int, gpa: int, length: int = 4, *, attributes: int = regs.ATTRIBUTES_RESET) -> int:
        """Write ``length`` bytes of the pattern to ``iova`` and compare at ``gpa``; the result code."""
        self._write(regs.IOVA_LO, iova & U32_MAX)
        self._write(regs.IOVA_HI, iova >> 32)
        self._write(regs.GPA_LO, gpa & U32_MAX)
        self._write(regs.GPA_HI, gpa >> 32)
        self._write(regs.LENGTH, length)
        self._write(regs.ATTRIBUTES, attributes)
        self._write(regs.DOORBELL, regs.DOORBELL_ARM)
        self._read(regs.TRIGGER)
        return self.result()
