"""The CPU that driver models run on: what a processor does to a machine, as small interfaces.

A driver is plain synchronous code over a :class:`Cpu`, or over that of its platform. Underneath may be a machine in
the same process (every machine is such a CPU; :class:`DirectCpu` binds its methods), a control socket to one elsewhere,
or qtest. Guest-side outcomes are values: a hypercall's return code, an RTAS status. A CPU that cannot carry a command
out at all raises one of the project's errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Cpu(Protocol):
    """A processor. Addresses are guest-physical, values numbers in the machine's byte order."""

    @property
    def big_endian(self) -> bool:
        """Byte order of the machine; a driver of a little-endian device swaps on a big-endian one."""

    def read_memory(self, gpa: int, size: int) -> bytes:
        """``size`` bytes of memory."""

    def write_memory(self, gpa: int, data: bytes) -> object:
        """Store ``data``."""

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""

    def clock_step(self, ns: int = 0) -> int:
        """Advance virtual time by ``ns``, or to the next timer when 0; the new time in ns."""


class PcCpu(Cpu, Protocol):
    """That of a PC."""

    def port_read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""


class PseriesCpu(Cpu, Protocol):
    """That of a guest on pseries, which knows what it runs on."""

    def hcall(self, nr: int, *args: int) -> tuple[int, list[int]]:
        """Hypercall ``nr``: the signed return code and the output registers."""

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        """RTAS call: the return cells that were written, unsigned 32 bits, the status first; at most ``nret``."""

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        """Probe: what the DMA window of ``liobn`` makes of bus address ``ioba``, as (page address, permission bits,
        address mask).
        """


class DirectCpu:
    """A CPU on a pseries machine in this process; ``machine`` offers the same methods."""

    def __init__(self, machine: PseriesCpu) -> None:
        self._machine = machine
        self.big_endian = machine.big_endian
        self.hcall = machine.hcall
        self.rtas = machine.rtas
        self.read_memory = machine.read_memory
        self.write_memory = machine.write_memory
        self.mmio_read = machine.mmio_read
        self.mmio_write = machine.mmio_write
        self.translate = machine.translate
        self.clock_step = machine.clock_step
