"""A driver for dma-burst, the load generator (:mod:`vfio_model.devices.dma_burst.regs`).

Its registers are little-endian, so that values are swapped on a big-endian machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.devices.dma_burst import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError


@dataclass(frozen=True, slots=True)
class BurstResult:
    """How a run stands: accesses (batches, for a batch run) done and refused."""

    status: int
    completed: int
    failed: int
    first_failed: int


class DmaBurstDriver:
    """``bar`` is where the CPU sees the registers."""

    def __init__(self, cpu: Cpu, bar: int) -> None:
        self._cpu, self._bar = cpu, bar
        found = self._read(regs.IDENTIFICATION)
        if found != regs.IDENTIFICATION_VALUE:
            raise DriverError(f"no dma-burst at {bar:#x}: it says {found:#x}")

    def _swap(self, value: int) -> int:
        return int.from_bytes(value.to_bytes(8, "little"), "big") if self._cpu.big_endian else value

    def _read(self, offset: int) -> int:
        return self._swap(self._cpu.mmio_read(self._bar + offset, 8))

    def _write(self, offset: int, value: int) -> None:
        self._cpu.mmio_write(self._bar + offset, 8, self._swap(value))

    def start(self, iova: int, length: int, count: int, *, stride: int = 0, span: int = 0, pattern: int = 0,
              command: int = regs.COMMAND_WRITE) -> None:  # fmt: skip
        """Start ``count`` accesses of ``length`` bytes; without COMMAND_BACKGROUND they are over when this returns."""
        for offset, value in (
            (regs.IOVA, iova),
            (regs.LENGTH, length),
            (regs.COUNT, count),
            (regs.STRIDE, stride),
            (regs.SPAN, span),
            (regs.PATTERN, pattern),
            (regs.COMMAND, command | regs.COMMAND_START),
        ):
            self._write(offset, value)

    def stop(self) -> BurstResult:
        """End the run in progress."""
        self._write(regs.COMMAND, regs.COMMAND_STOP)
        return self.result()

    def result(self) -> BurstResult:
        """How the run stands."""
        return BurstResult(*(self._read(o) for o in (regs.STATUS, regs.COMPLETED, regs.FAILED, regs.FIRST_FAILED)))

    def load(self, iova: int, count: int) -> None:
        """Read ``count`` bytes at ``iova``; see :meth:`result`."""
        self.start(iova, count, 1, command=0)

    def store(self, iova: int, count: int, *, pattern: int = 0) -> None:
        """Write ``count`` bytes of the pattern at ``iova``; see :meth:`result`."""
        self.start(iova, count, 1, pattern=pattern)
