"""What machines have in common: memory as a CPU sees it, virtual time, interrupt lines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from vfio_model.clock import VirtualClock
from vfio_model.machine.irqs import IrqLines
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.trace import NULL_TRACE, Trace


class Machine(ABC):
    """A machine whose memory is the tree under ``root``, and whose RAM is ``ram``."""

    TYPE: str
    big_endian: bool
    goes_on: ClassVar[bool] = False
    """Whether an access goes on after a piece that nobody takes (:mod:`vfio_model.memory.going_on`)."""

    def __init__(
        self, ram: Sequence[RAMBlock], root: MemoryRegion, clock: VirtualClock | None, trace: Trace = NULL_TRACE
    ) -> None:
        self.clock = clock or VirtualClock()
        self.trace = trace
        self.irqs = IrqLines()
        self.ram = tuple(ram)
        self.system = AddressSpace("memory", root, goes_on=self.goes_on)

    @abstractmethod
    def reset(self) -> None:
        """Reset everything."""

    @property
    def byte_order(self) -> Literal["big", "little"]:
        """Of its CPU."""
        return "big" if self.big_endian else "little"

    def read_memory(self, gpa: int, size: int) -> bytes:
        """``size`` bytes of system memory; what nothing answers reads as zero."""
        data = bytearray(size)
        self.system.read(gpa, data)
        return bytes(data)

    def write_memory(self, gpa: int, data: bytes) -> MemTxResult:
        """Store ``data`` at ``gpa``."""
        return self.system.write(gpa, data)

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of ``size`` bytes in the machine's byte order."""
        return int.from_bytes(self.read_memory(gpa, size), self.byte_order)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of ``size`` bytes in the machine's byte order."""
        self.system.write(gpa, value.to_bytes(size, self.byte_order))

    def clock_step(self, ns: int = 0) -> int:
        """Advance virtual time by ``ns``, or to the next timer when 0. The new time in ns."""
        if ns:
            self.clock.advance(ns)
        else:
            due = self.clock.next_expiry_ns()
            if due is not None:
                self.clock.advance_to(due)
        return self.clock.now_ns
