"""A recorded PC with ``intel-iommu``: registers, invalidations and translations again, on a unit in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from deploy.check_report import CheckReport
from deploy.sparse_ram import sparse_ram
from vfio_model.guest_drivers.vtd_trace import LogLine, VtdReplayer
from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.unit import IntelIommu
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.ranges import Hva, align_up
from vfio_model.trace_text import VTD, line

_HVA: Final = Hva(0x7F00_0000_0000)
_ALIGN: Final = 1 << 30
_TABLES: Final = 1 << 36
"""For tables: as many as a log can name."""
_ADDRESSES: Final = ("slpte", "low", "gpa", "addr")
_ADDRESS: Final = (1 << 52) - 1 & ~0xFFF


def replay(log: Sequence[LogLine], report: CheckReport) -> None:
    """Replay ``log`` and put what became of it into ``report``."""
    highest = max((one.fields[name] & _ADDRESS for one in log for name in _ADDRESSES if name in one.fields), default=0)
    report.take_over(VtdReplayer(_Unit(align_up(highest + 1, _ALIGN))).replay(log))


@dataclass
class _Bus:
    """A bus by its number."""

    number: int

    @property
    def name(self) -> str:
        """For traces."""
        return f"bus {self.number:#x}"


class _Lines:
    """A trace that keeps the lines that QEMU would print."""

    def __init__(self) -> None:
        self.enabled, self.cause = True, 0
        self.lines: list[str] = []

    def __call__(self, event: str, **fields: object) -> None:
        """One event."""
        if event in VTD:
            self.lines.append(line(event, fields).strip())


class _Unit:
    """See :class:`vfio_model.guest_drivers.vtd_trace.Unit`. QEMU's quirks are on: the log is QEMU's."""

    def __init__(self, scratch: int) -> None:
        self.scratch = scratch
        self._trace = _Lines()
        root = MemoryRegion("system", 1 << 64)
        size = scratch + _TABLES
        root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", sparse_ram(size), page_size=4096, hva=_HVA)))
        self._system = AddressSpace("memory", root)
        options = VtdOptions(quirks=quirks.selected(["qemu"]))
        self._unit = IntelIommu(options, self._system, lambda _address, _data: None, trace=self._trace)
        self._registers = AddressSpace("registers", self._unit.mmio)
        self._buses: dict[int, _Bus] = {}

    def reset(self) -> None:
        """Of the machine."""
        self._unit.reset()

    def read(self, offset: int, size: int) -> None:
        """A register."""
        self._registers.read(offset, bytearray(size))

    def write(self, offset: int, size: int, value: int) -> None:
        """A register."""
        self._registers.write(offset, value.to_bytes(8, "little")[:size])

    def store(self, gpa: int, data: bytes) -> None:
        """Guest memory."""
        self._system.write(gpa, data)

    def _space(self, sid: int) -> AddressSpace:
        bus = self._buses.setdefault(sid >> 8, _Bus(sid >> 8))
        return self._unit.ops.get_address_space(bus, sid & 0xFF)

    def add_function(self, sid: int) -> None:
        """There is a function ``sid``."""
        self._space(sid)

    def translate(self, sid: int, iova: int, is_write: bool) -> None:
        """A function's DMA."""
        self._space(sid).translate(iova, is_write)

    def interrupt(self, address: int, data: int) -> None:
        """An interrupt request."""
        self._unit.interrupts.request(0, address, data)

    def lines(self) -> list[str]:
        """Since the last call."""
        lines, self._trace.lines = self._trace.lines, []
        return lines
