"""The q35 machine's memory: RAM below and above 4 GiB, PCI memory under everything, the ROM areas below 1 MiB.

There is no firmware in the ROM areas: they read zero and take no writes. PAM registers put RAM in their place. SMRAM
has no effect on memory: a machine without a CPU has no system management mode.
"""

from __future__ import annotations

from collections.abc import Iterable

from vfio_model.machine.q35 import regs
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion, RAMRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

_ROM_SIZE = 0x4_0000
_FLASH_BASE = 0xFFFC_0000


class _EmptyRom:
    """The ops of a ROM with nothing in it."""

    min_access_size, max_access_size = 1, 8

    def read(self, addr: int, size: int) -> int | None:
        """Zero."""
        return 0

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """Not decoded."""
        return MemTxResult.DECODE_ERROR


class MemoryMap:
    """``root`` shows everything; ``pci`` is the bus's memory space."""

    def __init__(self, ram: Iterable[RAMBlock]) -> None:
        blocks = tuple(ram)
        self.size = sum(block.size for block in blocks)
        self.below_4g = regs.LOW_RAM_SPLIT if self.size >= regs.LARGE_RAM else self.size
        self.root = MemoryRegion("system", U64_MAX + 1)
        self.pci = MemoryRegion("pci", U64_MAX + 1)
        self._ram = MemoryRegion("ram", max(self.size, 1))
        at = 0
        for block in blocks:
            self._ram.add_subregion(at, RAMRegion(block.name, block))
            at += block.size
        self.root.add_subregion(0, self.pci, priority=-1)
        self._show_ram(0, 0, self.below_4g, "ram-below-4g")
        self._show_ram(regs.ABOVE_4G, self.below_4g, self.size - self.below_4g, "ram-above-4g")
        self.pci.add_subregion(_FLASH_BASE, IORegion("pc.bios", _ROM_SIZE, _EmptyRom()))
        self._rom = {start: self._hole(start, size) for start, size in _pam_areas()}

    def _show_ram(self, gpa: int, offset: int, size: int, name: str) -> None:
        if size:
            self.root.add_subregion(gpa, AliasRegion(name, self._ram, offset, size))

    def _hole(self, start: int, size: int) -> MemoryRegion:
        rom = IORegion(f"pam-rom@{start:x}", size, _EmptyRom())
        self.root.add_subregion(start, rom, priority=1)
        return rom

    def set_pam(self, number: int, value: int) -> None:
        """PAM register ``number`` was written: what its areas show."""
        if number:
            first = regs.PAM_BASE + (number - 1) * 2 * regs.PAM_UNIT
            self._rom[first].set_enabled(not value & regs.PAM_RAM)
            self._rom[first + regs.PAM_UNIT].set_enabled(not value >> 4 & regs.PAM_RAM)
        else:
            self._rom[regs.BIOS_BASE].set_enabled(not value >> 4 & regs.PAM_RAM)


def _pam_areas() -> list[tuple[int, int]]:
    units = range(regs.PAM_BASE, regs.BIOS_BASE, regs.PAM_UNIT)
    return [*((start, regs.PAM_UNIT) for start in units), (regs.BIOS_BASE, regs.BIOS_AREA)]
