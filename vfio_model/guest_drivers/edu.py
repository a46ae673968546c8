"""A driver for edu, QEMU's teaching device (QEMU ``docs/specs/edu.rst``, "EDU device").

Its registers have the machine's own byte order, so that no value is swapped here. A transfer takes 100 ms of virtual
time, which the driver steps.
"""

from __future__ import annotations

from vfio_model.devices.edu import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError

MS = 1_000_000


class EduDriver:
    """``bar`` is where the CPU sees the registers."""

    def __init__(self, cpu: Cpu, bar: int) -> None:
        self._cpu, self._bar = cpu, bar
        if self.identification() & 0xFFFF != regs.IDENTIFICATION_VALUE & 0xFFFF:
            raise DriverError(f"no edu at {bar:#x}: it says {self.identification():#x}")

    def _read(self, offset: int) -> int:
        return self._cpu.mmio_read(self._bar + offset, 4)

    def _write(self, offset: int, value: int, size: int = 4) -> None:
        self._cpu.mmio_write(self._bar + offset, size, value)

    def identification(self) -> int:
        """Version and 0xed."""
        return self._read(regs.IDENTIFICATION)

    def invert(self, value: int) -> int:
        """The liveness check: ``value`` comes back inverted."""
        self._write(regs.INVERSION, value)
        return self._read(regs.INVERSION)

    def factorial(self, n: int) -> int:
        """n! modulo 2**32.

        :raise DriverError: when the device keeps computing.
        """
        self._write(regs.FACTORIAL, n)
        for _ in range(100):
            if not self._read(regs.STATUS) & regs.STATUS_COMPUTING:
                return self._read(regs.FACTORIAL)
            self._cpu.clock_step()
        raise DriverError("edu computes for ever")

    def interrupts(self) -> int:
        """The causes that are pending, which this acknowledges."""
        causes = self._read(regs.IRQ_STATUS)
        if causes:
            self._write(regs.IRQ_ACK, causes)
        return causes

    def start_dma(self, source: int, target: int, count: int, *, to_ram: bool, irq: bool = False) -> None:
        """Start a transfer of ``count`` bytes; one side is a bus address, the other lies in the device's buffer."""
        self._write(regs.DMA_SRC, source, 8)
        self._write(regs.DMA_DST, target, 8)
        self._write(regs.DMA_COUNT, count, 8)
        command = regs.DMA_RUN | (regs.DMA_TO_RAM if to_ram else 0) | (regs.DMA_IRQ if irq else 0)
        self._write(regs.DMA_COMMAND, command)

    def finish_dma(self) -> None:
        """Step virtual time until the transfer is over.

        :raise DriverError: when it does not end.
        """
        for _ in range(3):
            if not self._read(regs.DMA_COMMAND) & regs.DMA_RUN:
                return
            self._cpu.clock_step((regs.DMA_DELAY_MS + 1) * MS)
        raise DriverError("edu's transfer does not end")

    def load(self, iova: int, count: int, *, at: int = 0) -> None:
        """Move ``count`` bytes from bus address ``iova`` into the device's buffer, from byte ``at`` on."""
        self.start_dma(iova, regs.BUFFER_ADDRESS + at, count, to_ram=False)
        self.finish_dma()

    def store(self, iova: int, count: int, *, at: int = 0) -> None:
        """Move ``count`` bytes of the device's buffer to bus address ``iova``."""
        self.start_dma(regs.BUFFER_ADDRESS + at, iova, count, to_ram=True)
        self.finish_dma()

    def copy(self, source: int, target: int, count: int) -> None:
        """Through the buffer, from one bus address to another; at most 4096 bytes."""
        self.load(source, count)
        self.store(target, count)
