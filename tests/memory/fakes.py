"""Stand-ins with a dict inside: an IOMMU whose table is a dict of pages, and registers that remember accesses."""

from __future__ import annotations

from typing import Any

import numpy as np

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUTLBEntry, TranslatedPieces
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag, MemTxResult
from vfio_model.ranges import Hva

PAGE = 4096


def ram_block(size: int, name: str = "ram", fill: int = 0) -> RAMBlock:
    return RAMBlock(name, bytearray([fill]) * size, page_size=PAGE, hva=Hva(0x7F00_0000_0000))


def system_memory(size: int, at: int = 0) -> tuple[AddressSpace, RAMBlock]:
    """A space of 2**64 bytes with ``size`` bytes of RAM at ``at``."""
    block = ram_block(size)
    root = MemoryRegion("system", 1 << 64)
    root.add_subregion(at, RAMRegion("ram", block))
    return AddressSpace("memory", root), block


class DictIOMMU(IOMMUMemoryRegion):
    """``pages``: page number -> (address in ``target``, permission)."""

    def __init__(self, target: AddressSpace, size: int = 1 << 32, *, vectors: bool = False, page: int = PAGE) -> None:
        super().__init__("iommu", size)
        self.target = target
        self.page = page
        self.pages: dict[int, tuple[int, int]] = {}
        self.vectors = vectors
        self.translations: list[int] = []
        self.flag_changes: list[tuple[IOMMUNotifierFlag, IOMMUNotifierFlag]] = []
        self.refused = IOMMUNotifierFlag.NONE
        self.refusal: OSError | None = None

    def translate(self, addr: int, flag: IOMMUAccessFlags, idx: int) -> IOMMUTLBEntry:
        self.translations.append(addr)
        address, perm = self.pages.get(addr // self.page, (0, 0))
        return IOMMUTLBEntry(self.target, addr & -self.page, address, self.page - 1, IOMMUAccessFlags(perm))

    def translate_many(self, iovas: Any, flag: IOMMUAccessFlags, idx: int) -> TranslatedPieces | None:
        if not self.vectors:
            return None
        found = [self.pages.get(int(iova) // self.page, (0, 0)) for iova in iovas]
        addresses = [a + int(iova) % self.page for (a, _), iova in zip(found, iovas, strict=True)]
        return self.target, np.array(addresses, dtype=np.uint64), np.array([p for _, p in found], dtype=np.uint8)

    def get_min_page_size(self) -> int:
        return self.page

    def notify_flag_changed(self, old: IOMMUNotifierFlag, new: IOMMUNotifierFlag) -> None:
        if self.refusal is not None and new & self.refused:
            raise self.refusal
        self.flag_changes.append((old, new))


def iommu_space(size: int = 1 << 20, *, vectors: bool = False) -> tuple[AddressSpace, DictIOMMU, RAMBlock]:
    """A device's space that is one IOMMU region of 4 GiB over ``size`` bytes of RAM."""
    system, block = system_memory(size)
    iommu = DictIOMMU(system, vectors=vectors)
    return AddressSpace("device", iommu), iommu, block


class Registers:
    """64 registers of bytes; keeps every access as (kind, addr, size, value)."""

    def __init__(self, size: int = 64, low: int = 1, high: int = 4) -> None:
        self.min_access_size, self.max_access_size = low, high
        self.data = bytearray(range(size))
        self.log: list[tuple[str, int, int, int]] = []
        self.broken: set[int] = set()

    def read(self, addr: int, size: int) -> int | None:
        if addr in self.broken:
            return None
        value = int.from_bytes(self.data[addr : addr + size], "little")
        self.log.append(("r", addr, size, value))
        return value

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        if addr in self.broken:
            return MemTxResult.ERROR
        self.data[addr : addr + size] = value.to_bytes(size, "little")
        self.log.append(("w", addr, size, value))
        return MemTxResult.OK
