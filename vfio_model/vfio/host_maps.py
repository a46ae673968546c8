"""What a host has mapped of a device's whole address space, followed call by call, with the RAM behind it.

For :mod:`.dirty`: an IOMMU that translates everything a function can address has no table of a known size, and may be
told of several changes before any of them is carried out. So what counts here are the calls that succeeded, not what
the guest's tables say: whatever the host finds written at a bus address went to the RAM that was mapped there then.
"""

from __future__ import annotations

from collections.abc import Iterator

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import Gpa
from vfio_model.vfio.ram_span import RAMSpan, ram_span
from vfio_model.vfio.sent_maps import SentMap, SentMaps

_RW = 3


class HostMaps:
    """Of one ``section``."""

    def __init__(self, section: MemoryRegionSection) -> None:
        self.section = section
        self.maps = SentMaps()

    def learn(self, system: AddressSpace) -> None:
        """What the mapping listener has mapped before anybody counted; ``system`` is where RAM lies."""
        region, section = self.section.mr, self.section
        assert isinstance(region, IOMMUMemoryRegion), "the section of an IOMMU"
        first = section.offset_within_region
        kinds = IOMMUNotifierFlag.IOTLB_EVENTS
        notifier = IOMMUNotifier(lambda _, entry: self._known(entry, system), kinds, first, first + section.size - 1)
        region.register_notifier(notifier)
        try:
            region.replay(notifier)
        finally:
            region.unregister_notifier(notifier)

    def _known(self, entry: IOMMUTLBEntry, system: AddressSpace) -> None:
        size, perm = entry.addr_mask + 1, int(entry.perm) & _RW
        span = ram_span(system, Gpa(entry.translated_addr)) if perm else None
        if span is not None and span.size >= size:
            bus = entry.iova + self.section.offset_within_address_space - self.section.offset_within_region
            self.maps.add(SentMap(bus, size, perm, span.hva))

    def mapped(self, iova: int, size: int, perm: int, vaddr: int) -> None:
        """The host has mapped it."""
        self.unmapped(iova, iova + size - 1)
        self.maps.add(SentMap(iova, size, perm, vaddr))

    def unmapped(self, first: int, last: int) -> None:
        """The host has nothing mapped in these bytes any more; ``last`` is inclusive."""
        for known in self.maps.take(first, last):
            if known.iova < first:
                self.maps.add(known._replace(size=first - known.iova))
            if known.last > last:
                assert known.vaddr is not None, "RAM is mapped"
                into = last + 1 - known.iova
                self.maps.add(SentMap(last + 1, known.size - into, known.perm, known.vaddr + into))

    def stretches(self, first: int, last: int, longest: int) -> Iterator[tuple[int, int]]:
        """(bus address, size) of what is mapped in ``first``..``last`` (inclusive), together where it follows one
        another. None goes across a multiple of ``longest``, but for a mapping that does."""
        start = end = -1
        for known in self.maps.touching(first, last):
            low, high = max(known.iova, first), min(known.last, last) + 1
            if low != end or high > start - start % longest + longest:
                if end > start:
                    yield start, end - start
                start = low
            end = high
        if end > start:
            yield start, end - start

    def ram(self, iova: int, system: AddressSpace) -> RAMSpan | None:
        """The RAM that ``iova`` leads to, as far as one mapping goes; None where nothing is mapped."""
        for known in self.maps.touching(iova, iova):
            assert known.vaddr is not None, "RAM is mapped"
            into = iova - known.iova
            block = _block(system, known.vaddr)
            offset = known.vaddr - block.hva + into
            return RAMSpan(block, offset, known.size - into, not known.perm & 2)
        return None


def _block(system: AddressSpace, vaddr: int) -> RAMBlock:
    for each in system.view.ranges:
        if isinstance(each.region, RAMRegion) and 0 <= vaddr - each.region.block.hva < each.region.block.size:
            return each.region.block
    raise AssertionError(f"{vaddr:#x} was mapped: it is RAM")
