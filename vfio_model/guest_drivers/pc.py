"""A PC's ways to configuration space: CONFIG_ADDRESS and CONFIG_DATA by ports, and the memory-mapped ECAM, which the
memory controller hub shows where firmware has put it (PCIEXBAR).

PCI Local Bus Specification 3.0, 3.2.2.3.2; PCI Express Base Specification, 7.2.2; Intel 3 Series Express Chipset Family
datasheet, "PCIEXBAR". Everything else that a PCI driver does is :mod:`vfio_model.guest_drivers.pci`.
"""

from __future__ import annotations

from vfio_model.guest_drivers.cpu import Cpu, PcCpu
from vfio_model.guest_drivers.pci import MmioWindow
from vfio_model.ranges import U32_MAX

CONFIG_ADDRESS, CONFIG_DATA = 0xCF8, 0xCFC
CONFIG_ENABLE = 1 << 31
ECAM_BASE = 0xB000_0000
"""Where firmware puts it: 256 buses."""
PCIEXBAR, PCIEXBAR_ENABLE = 0x60, 1
MMIO_FIRST, MMIO_END = 0xC000_0000, 0xFEC0_0000
"""The window for BARs below 4 GiB: between the ECAM and the I/O APIC."""


class PortConfig:
    """Configuration cycles on bus ``bus`` by ports; offsets up to 255."""

    def __init__(self, cpu: PcCpu, bus: int = 0) -> None:
        self._cpu, self._bus = cpu, bus

    def _select(self, devfn: int, offset: int) -> int:
        self._cpu.port_write(CONFIG_ADDRESS, 4, CONFIG_ENABLE | self._bus << 16 | devfn << 8 | offset & 0xFC)
        return CONFIG_DATA + (offset & 3)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """All ones where nothing answers."""
        return self._cpu.port_read(self._select(devfn, offset), size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Lost where nothing answers."""
        self._cpu.port_write(self._select(devfn, offset), size, value)


class EcamConfig:
    """Configuration cycles on bus ``bus`` by the ECAM at ``base``; offsets up to 4095."""

    def __init__(self, cpu: Cpu, bus: int = 0, *, base: int = ECAM_BASE) -> None:
        self._cpu, self._base = cpu, base + (bus << 20)

    def read(self, devfn: int, offset: int, size: int) -> int:
        """All ones where nothing answers."""
        return self._cpu.mmio_read(self._base + (devfn << 12) + offset, size)

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Lost where nothing answers."""
        self._cpu.mmio_write(self._base + (devfn << 12) + offset, size, value)


def enable_ecam(cpu: PcCpu, base: int = ECAM_BASE) -> EcamConfig:
    """Have the hub show the ECAM at ``base``, a multiple of 256 MiB, as firmware does; the way to bus 0."""
    ports = PortConfig(cpu)
    ports.write(0, PCIEXBAR, 4, 0)
    ports.write(0, PCIEXBAR + 4, 4, base >> 32)
    ports.write(0, PCIEXBAR, 4, base & U32_MAX | PCIEXBAR_ENABLE)
    return EcamConfig(cpu, base=base)


def mmio_window() -> MmioWindow:
    """Where BARs go; a PC's bus addresses are the CPU's."""
    return MmioWindow(MMIO_FIRST, MMIO_FIRST, MMIO_END - MMIO_FIRST)
