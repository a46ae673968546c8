"""Drivers of the devices that scenarios probe with, as :class:`deploy.system.DmaDriver`."""

from __future__ import annotations

from collections.abc import Callable

from deploy.system import DmaDriver
from vfio_model.devices.edu import regs
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.pci import DriverError, PciFunction


class SwappedCpu:
    """``cpu``, with the registers of a device whose byte order is not the machine's.

    The regions of a VFIO device are little-endian, as PCI is: a big-endian guest sees the registers of an assigned
    edu swapped, while those of an emulated one, which QEMU declares native-endian, are not.
    """

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self.big_endian = cpu.big_endian
        self.read_memory, self.write_memory, self.clock_step = cpu.read_memory, cpu.write_memory, cpu.clock_step

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load, its bytes reversed."""
        return int.from_bytes(self._cpu.mmio_read(gpa, size).to_bytes(size, "little"), "big")

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store, its bytes reversed."""
        self._cpu.mmio_write(gpa, size, int.from_bytes(value.to_bytes(size, "little"), "big"))


class EduDma:
    """edu's DMA engine, whose buffer has 4096 bytes."""

    max_length = 4096

    def __init__(self, cpu: Cpu, bar: int) -> None:
        swapped = SwappedCpu(cpu)
        reads_swapped = swapped.mmio_read(bar + regs.IDENTIFICATION, 4) == regs.IDENTIFICATION_VALUE
        self._driver = EduDriver(swapped if reads_swapped else cpu, bar)

    def load(self, iova: int, length: int) -> bool:
        """Memory to the buffer; False when the device does not end the transfer, as a dead one."""
        return _ends(self._driver.load, iova, length)

    def store(self, iova: int, length: int) -> bool:
        """The buffer to memory; False as above."""
        return _ends(self._driver.store, iova, length)


def _ends(transfer: Callable[[int, int], None], iova: int, length: int) -> bool:
    try:
        transfer(iova, length)
    except DriverError:
        return False
    return True


_DRIVERS: dict[str, Callable[[Cpu, int], DmaDriver]] = {"edu": EduDma}


def bind(cpu: Cpu, device: str, model: str, function: PciFunction, to_cpu: Callable[[int], int]) -> DmaDriver:
    """The driver of ``device``; ``to_cpu`` says where the CPU sees a bus address.

    :raise ConfigError: when the model has no driver that can do DMA on command.
    """
    if model not in _DRIVERS:
        raise ConfigError(f"{device}: no driver here makes a {model} do DMA", hint=f"use one of {', '.join(_DRIVERS)}")
    return _DRIVERS[model](cpu, to_cpu(function.bars[0].address))
