"""Following an address through any number of IOMMUs to the region that answers (``address_space_translate``).

The length is the minimum over all levels, the page masks are AND-ed, and a missing permission ends the walk like an
address that nothing decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.space import Space
from vfio_model.memory.types import MEMTXATTRS_UNSPECIFIED, IOMMUAccessFlags
from vfio_model.ranges import U64_MAX

DISCARDED = "iommu map to discarded memory (e.g., unplugged via virtio-mem)"


@dataclass(frozen=True, slots=True)
class Step:
    """One level: ``address`` in ``space``; ``iommu`` is the region that translated it, at ``iommu_address``; None at
    the end.
    """

    space: Space
    address: int
    iommu: IOMMUMemoryRegion | None = None
    iommu_address: int = 0


@dataclass(frozen=True, slots=True)
class Translation:
    """``length`` bytes are ``region`` from ``offset``. ``page_mask`` is the AND over all levels (all ones without an
    IOMMU).
    """

    region: MemoryRegion
    offset: int
    length: int
    readonly: bool
    page_mask: int
    steps: tuple[Step, ...]
    """Every level, the device's own space first."""

    @property
    def space(self) -> Space:
        """The space where the walk ended."""
        return self.steps[-1].space

    @property
    def address(self) -> int:
        """The address in :attr:`space`."""
        return self.steps[-1].address

    @property
    def direct(self) -> bool:
        """Whether the bytes can be shown in place: ordinary RAM."""
        return isinstance(self.region, RAMRegion) and not self.region.ram_device


def translate(space: Space, addr: int, is_write: bool, length: int) -> Translation | None:
    """Follow ``addr`` for an access of ``length`` bytes (at least 1); None when nothing decodes or a permission is
    missing.
    """
    wanted = IOMMUAccessFlags.WO if is_write else IOMMUAccessFlags.RO
    page_mask = U64_MAX
    steps: list[Step] = []
    while True:
        found = space.view.lookup(addr)
        if found is None:
            return None
        length = min(length, found.last - addr + 1)
        offset = addr - found.start + found.offset
        region = found.region
        if not isinstance(region, IOMMUMemoryRegion):
            steps.append(Step(space, addr))
            return Translation(region, offset, length, found.readonly, page_mask, tuple(steps))
        steps.append(Step(space, addr, region, offset))
        entry = region.translate(offset, wanted, region.attrs_to_index(MEMTXATTRS_UNSPECIFIED))
        if not entry.perm & wanted or entry.target_as is None:
            return None
        mask = entry.addr_mask
        length = min(length, mask - (offset & mask) + 1)
        page_mask &= mask
        addr = (entry.translated_addr & ~mask) | (offset & mask)
        space = entry.target_as


def ram_target(entry: IOMMUTLBEntry) -> Translation | str:
    """The RAM behind ``entry``, which must cover a naturally aligned page; else the reason, in QEMU's words
    (``memory_translate_iotlb``).
    """
    if entry.target_as is None:
        return "iommu map to no address space"
    is_write = bool(entry.perm & IOMMUAccessFlags.WO)
    found = translate(entry.target_as, entry.translated_addr, is_write, entry.addr_mask + 1)
    if found is None or not isinstance(found.region, RAMRegion):
        return f"iommu map to non memory area {entry.translated_addr:x}"
    manager = found.region.discard_manager
    if manager is not None and manager.populated_length(found.offset) < found.length:
        return f"{DISCARDED}: {entry.translated_addr:x}"
    if found.length & entry.addr_mask:
        return "iommu has granularity incompatible with target AS"
    return found
