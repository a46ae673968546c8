"""Interrupt remapping as a VT-d driver sets it up: a table of entries, and the messages that select them.

Intel VT-d specification, "Interrupt Remapping" (5.1): requests in remappable format 5.1.2.2, "I/OxAPIC Programming"
5.1.5.1, "Interrupt Remapping Table Entry" 9.9.
"""

from __future__ import annotations

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_invalidation import Invalidation
from vfio_model.guest_drivers.vtd_tables import PageAllocator
from vfio_model.iommu.vtd import regs

MESSAGE_BASE = 0xFEE0_0000


class InterruptTable:
    """One page of interrupt remapping table entries."""

    ENTRIES = 256
    size_field = 7

    def __init__(self, cpu: Cpu, pages: PageAllocator, invalidation: Invalidation) -> None:
        self._cpu, self._invalidation = cpu, invalidation
        self.base = pages.take()
        self._next = 0

    def allocate(self, sid: int, vector: int, destination: int = 0, *, level: bool = False) -> int:
        """An entry for interrupts of ``sid`` alone, as ``vector`` to APIC ``destination``; its index.

        :raise DriverError: the table is full.
        """
        if self._next == self.ENTRIES:
            raise DriverError("no interrupt remapping entry is free")
        index, self._next = self._next, self._next + 1
        low = regs.IRTE_P | regs.IRTE_VECTOR.put(vector) | regs.IRTE_XAPIC_DEST.put(destination)
        low |= regs.IRTE_TM if level else 0
        self._write(index, low, regs.IRTE_SVT.put(1) | regs.IRTE_SID.put(sid))
        return index

    def free(self, index: int) -> None:
        """Interrupts of ``index`` are blocked from now on."""
        self._write(index, 0, 0)

    def _write(self, index: int, low: int, high: int) -> None:
        at = self.base + index * regs.IRTE_SIZE
        self._cpu.mmio_write(at, 8, 0)
        self._cpu.mmio_write(at + 8, 8, high)
        self._cpu.mmio_write(at, 8, low)
        self._invalidation.interrupt_entries()


def remappable_message(index: int) -> tuple[int, int]:
    """(address, data) of a message that selects entry ``index``."""
    return MESSAGE_BASE | (index & 0x7FFF) << 5 | 1 << 4 | (index >> 15) << 2, 0


def remappable_pin(index: int, vector: int, *, level: bool = False) -> int:
    """The I/O APIC redirection table entry that selects entry ``index``; ``vector`` is for end-of-interrupt."""
    return (index & 0x7FFF) << 49 | 1 << 48 | (index >> 15) << 11 | (1 << 15 if level else 0) | vector
