"""A q35 machine for tests, and its configuration space as a guest reaches it by ports."""

from __future__ import annotations

import mmap

from vfio_model.machine.q35 import regs
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace

RAM_SIZE = 64 << 20
MCH, LPC, AHCI, SMBUS = 0, 0xF8, 0xFA, 0xFB


def ram_block(size: int = RAM_SIZE, name: str = "ram") -> RAMBlock:
    """Memory that costs nothing until it is written."""
    return RAMBlock(name, memoryview(mmap.mmap(-1, size)), page_size=4096, hva=Hva(0x7F00_0000_0000))


def q35(size: int = RAM_SIZE) -> Q35Machine:
    """A machine without an IOMMU."""
    return Q35Machine([ram_block(size)], trace=ListTrace())


def config_read(machine: Q35Machine, devfn: int, offset: int, size: int = 4) -> int:
    """By CONFIG_ADDRESS and CONFIG_DATA, on bus 0."""
    machine.port_write(regs.CONFIG_ADDRESS, 4, regs.CONFIG_ENABLE | devfn << 8 | offset & 0xFC)
    return machine.port_read(regs.CONFIG_DATA + (offset & 3), size)


def config_write(machine: Q35Machine, devfn: int, offset: int, value: int, size: int = 4) -> None:
    """The same way."""
    machine.port_write(regs.CONFIG_ADDRESS, 4, regs.CONFIG_ENABLE | devfn << 8 | offset & 0xFC)
    machine.port_write(regs.CONFIG_DATA + (offset & 3), size, value)
