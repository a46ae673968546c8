"""The translation half of a VT-d unit with RAM, and sinks that keep what they are given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import RID, Fault
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.translation import Translation
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags, MemTxResult
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace

RO, WO, RW, NONE = IOMMUAccessFlags.RO, IOMMUAccessFlags.WO, IOMMUAccessFlags.RW, IOMMUAccessFlags.NONE
TABLES = 0x1000_0000
"""Where tables are, as in the worked examples."""
TABLE_BYTES = 0x12_0000
LOW_BYTES = 0x10_0000


@dataclass
class Bus:
    """A requester's bus."""

    name: str = "pcie.0"
    number: int = 0


@dataclass
class Faults:
    """Keeps faults."""

    records: list[Fault] = field(default_factory=list)

    def report(self, fault: Fault) -> None:
        self.records.append(fault)

    def take(self) -> list[tuple[int, int, int, bool, int]]:
        """Those since the last time: reason, SID, address, write, PASID."""
        taken, self.records = self.records, []
        return [tuple(fault) for fault in taken]

    def reasons(self) -> list[int]:
        """The same, reasons only."""
        return [fault[0] for fault in self.take()]


@dataclass
class Interrupts:
    """Keeps interrupt requests."""

    requests: list[tuple[int, int, int]] = field(default_factory=list)

    def request(self, sid: int, address: int, data: int) -> MemTxResult:
        self.requests.append((sid, address, data))
        return MemTxResult.OK


class Rig:
    """Function 00:03.0 (``bus``, devfn 0x18) below a unit with ``options``; RAM at 0 and at :data:`TABLES`."""

    def __init__(self, **options: Any) -> None:
        self.options = VtdOptions(**options)
        self.trace, self.faults, self.interrupts = ListTrace(), Faults(), Interrupts()
        self.trace.enabled = False
        self.tables, self.low = bytearray(TABLE_BYTES), bytearray(LOW_BYTES)
        root = MemoryRegion("system", 1 << 64)
        for name, start, ram in (("low", 0, self.low), ("tables", TABLES, self.tables)):
            root.add_subregion(
                start, RAMRegion(name, RAMBlock(name, ram, page_size=4096, hva=Hva(0x7F00_0000_0000 + start)))
            )
        self.root = root
        self.system = AddressSpace("system", root)
        self.translation = Translation(self.options, self.system, self.faults, self.interrupts, self.trace)
        self.bus, self.devfn = Bus(), 0x18
        self._free = TABLES + 0x2_0000

    # -- memory --------------------------------------------------------------------------------------------------

    def store(self, addr: int, value: int) -> None:
        """One word of a table."""
        assert not self.system.write(addr, value.to_bytes(8, "little")), f"{addr:#x} is RAM"

    def load(self, addr: int) -> int:
        """One word."""
        data = bytearray(8)
        assert not self.system.read(addr, data), f"{addr:#x} is RAM"
        return int.from_bytes(data, "little")

    def write_protect_tables(self) -> None:
        """From now on they are a ROM."""
        region = next(each for each in self.root.subregions if each.name == "tables")
        assert isinstance(region, RAMRegion)
        region.set_enabled(False)
        region.readonly = True
        region.set_enabled(True)

    def page(self) -> int:
        """A zeroed page for a table."""
        self._free += 4096
        return self._free - 4096

    def tables_for(self, root: int, levels: int, iova: int, leaf: int, *, level: int = 1, upper: int = 3) -> int:
        """Map ``iova`` by ``leaf`` at ``level``, with tables made on the way whose entries have the bits ``upper``;
        returns where the leaf is."""
        table = root
        for at in range(levels, level, -1):
            slot = table + (iova >> 9 * at & 0xFF8)
            if not self.load(slot):
                self.store(slot, self.page() | upper)
            table = self.load(slot) & 0xF_FFFF_FFFF_F000
        slot = table + (iova >> 9 * level & 0xFF8)
        self.store(slot, leaf)
        return slot

    # -- structures ----------------------------------------------------------------------------------------------

    def legacy(self, *, did: int = 5, tt: int = 0, aw: int = 2, fpd: bool = False, devfn: int | None = None) -> int:
        """The tables of example S: root at TABLES, contexts behind it; returns the page table's address."""
        devfn = self.devfn if devfn is None else devfn
        table = self.page()
        self.store(TABLES, TABLES + 0x1001)
        self.store(TABLES + 0x1000 + devfn * 16, table | tt << 2 | fpd << 1 | 1)
        self.store(TABLES + 0x1000 + devfn * 16 + 8, did << 8 | aw)
        return table

    def scalable(self, pasid: int, *words: int, context: int = 0x1D, rid_pasid: int = 0) -> int:
        """Scalable root, context, PASID directory and the PASID entry ``words``; returns where that is."""
        self.store(TABLES, TABLES + 0x1001)
        self.store(TABLES + 0x1000 + self.devfn * 32, TABLES + 0x2000 | context)
        self.store(TABLES + 0x1000 + self.devfn * 32 + 8, rid_pasid)
        self.store(TABLES + 0x2000 + (pasid >> 6) * 8, TABLES + 0x3001)
        at = TABLES + 0x3000 + (pasid & 63) * 64
        for number, word in enumerate(words):
            self.store(at + number * 8, word)
        return at

    def enable(self) -> None:
        """The root table takes effect, and translation goes on."""
        self.translation.set_root(TABLES, self.options.scalable_mode)
        self.translation.set_enabled(True)

    # -- requests ------------------------------------------------------------------------------------------------

    def space(self, pasid: int = RID, devfn: int | None = None) -> VtdSpace:
        """That of the function."""
        return self.translation.space(self.bus, self.devfn if devfn is None else devfn, pasid)

    def translate(self, iova: int, flag: IOMMUAccessFlags = RO, pasid: int = RID) -> tuple[int, int, int, int]:
        """(iova, translated, mask, permission)."""
        entry = self.space(pasid).region.translate(iova, flag, 0)
        assert entry.target_as is self.system
        return entry.iova, entry.translated_addr, entry.addr_mask, int(entry.perm)

    def blocked(self, iova: int, flag: IOMMUAccessFlags = RO, pasid: int = RID) -> list[int]:
        """The reasons that an access records, which must not get through."""
        self.faults.take()
        entry = self.space(pasid).region.translate(iova, flag, 0)
        assert not entry.perm & flag
        return self.faults.reasons()
