"""The two ways of a PC to configuration space: CONFIG_ADDRESS and CONFIG_DATA, and the memory-mapped ECAM.

PCI Local Bus Specification 3.0, 3.2.2.3.2, "Software Generation of Configuration Transactions"; PCI Express Base
Specification, 7.2.2, "PCI Express Enhanced Configuration Access Mechanism (ECAM)". As on QEMU, CONFIG_ADDRESS is
changed by whole dwords alone, keeps reserved bits, and its low two bits count (they are OR-ed to the port's); what
crosses a dword is carried out byte by byte.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.machine.q35 import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bus import PCIBus

FindBus = Callable[[int], "PCIBus | None"]
"""The bus that has a number now."""


class ConfigCycles:
    """Configuration cycles on the buses that ``find`` finds."""

    def __init__(self, find: FindBus) -> None:
        self._find = find

    def read(self, bus: int, devfn: int, offset: int, size: int) -> int:
        """All ones where nothing answers; what leaves a function's space over its end is zero there."""
        found = self._find(bus)
        if found is None:
            return (1 << 8 * size) - 1
        if offset % 4 + size <= 4:
            return found.config_read(devfn, offset, size)
        device = found.devices.get(devfn)
        end = device.config.size if device is not None else offset
        there = size if offset >= end else min(size, end - offset)
        return sum(found.config_read(devfn, offset + at, 1) << 8 * at for at in range(there))

    def write(self, bus: int, devfn: int, offset: int, size: int, value: int) -> None:
        """Lost where nothing answers."""
        found = self._find(bus)
        if found is None:
            return
        if offset % 4 + size <= 4:
            found.config_write(devfn, offset, size, value)
            return
        for at in range(size):
            found.config_write(devfn, offset + at, 1, value >> 8 * at & 0xFF)


class ConfigAddress:
    """The ops of CONFIG_ADDRESS: a read of any part gives the register's low bytes."""

    min_access_size, max_access_size = 1, 4

    def __init__(self) -> None:
        self.value = 0

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return self.value

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        if size == 4:
            self.value = value
        return MemTxResult.OK


class ConfigData:
    """The ops of CONFIG_DATA."""

    min_access_size, max_access_size = 1, 4

    def __init__(self, address: ConfigAddress, cycles: ConfigCycles) -> None:
        self._address, self._cycles = address, cycles

    def read(self, addr: int, size: int) -> int | None:
        """All ones while the address has no enable bit."""
        at = self._address.value
        if not at & regs.CONFIG_ENABLE:
            return (1 << 8 * size) - 1
        return self._cycles.read(at >> 16 & 0xFF, at >> 8 & 0xFF, at & 0xFF | addr, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        at = self._address.value
        if at & regs.CONFIG_ENABLE:
            self._cycles.write(at >> 16 & 0xFF, at >> 8 & 0xFF, at & 0xFF | addr, size, value)
        return MemTxResult.OK


class Ecam:
    """The ops of the ECAM: bus << 20 | devfn << 12 | offset."""

    min_access_size, max_access_size = 1, 4

    def __init__(self, cycles: ConfigCycles) -> None:
        self._cycles = cycles

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return self._cycles.read(addr >> 20, addr >> 12 & 0xFF, addr & 0xFFF, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        self._cycles.write(addr >> 20, addr >> 12 & 0xFF, addr & 0xFFF, size, value)
        return MemTxResult.OK
