"""Which guest RAM the devices behind a container have written, for a machine that migrates.

Who tracks writes (:mod:`vfio_model.vfio.dirty_source`) knows bus addresses, the machine wants its RAM. In between are
the guest's translations: this listener follows them as the mapping listener does, and remembers each until it was
unmapped on the host, or another took its place there. For while writes are tracked an unmap collects what was written
until it took effect; that belongs to the RAM that the entry led to, which the guest's table does not know any more.

Source: QEMU's ``docs/devel/migration/vfio.rst`` ("System memory dirty pages tracking when vIOMMU is enabled").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX, Gpa, Range
from vfio_model.vfio.container import VFIOIOMMU
from vfio_model.vfio.dirty_source import DirtySource
from vfio_model.vfio.ram_span import ram_span

Mark = Callable[[RAMBlock, int, int], None]
"""``mark(block, offset, size)``: these bytes were written."""
_RW = int(IOMMUAccessFlags.RW)
_LONGEST = 1 << 34
"""Bytes that one question is about; a multiple of every page size."""


class _Followed:
    """One IOMMU section: bus address of each page → guest-physical address, and the same of pages that are going."""

    def __init__(self, section: MemoryRegionSection, region: IOMMUMemoryRegion) -> None:
        self.section, self.region = section, region
        self.page = region.get_min_page_size()
        self.known: dict[int, int] = {}
        self.going: dict[int, int] = {}
        self._offset = section.offset_within_address_space - section.offset_within_region
        start = section.offset_within_region
        last = start + section.size - 1
        self.notifier = IOMMUNotifier(self._notify, IOMMUNotifierFlag.IOTLB_EVENTS, start, last)

    def _notify(self, _notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        first, size = (entry.iova + self._offset) & U64_MAX, entry.addr_mask + 1
        if size > self.page and not int(entry.perm) & _RW:
            pages = [iova for iova in self.known if first <= iova < first + size]
        else:
            pages = list(range(first, first + size, self.page))
        for iova in pages:
            before = self.known.pop(iova, None)
            if before is not None:
                self.going.setdefault(iova, before)
            if int(entry.perm) & _RW:
                self.known[iova] = entry.translated_addr + iova - first

    def pages(self, first: int, last: int) -> list[int]:
        """Bus addresses of the pages in the range that the host may have mapped, in order."""
        both = self.known.keys() | self.going.keys()
        return sorted(iova for iova in both if first <= iova <= last)

    def gpa(self, iova: int) -> int | None:
        """Where the host's mapping of ``iova`` leads."""
        page, within = iova & -self.page, iova & self.page - 1
        found = self.going.get(page, self.known.get(page))
        return None if found is None else found + within


class DirtySync(MemoryListener):
    """Register it with the devices' address space of the container while writes are tracked: between :meth:`start` and
    :meth:`stop`, which do that. ``system`` is where RAM lies.
    """

    priority = 5  # sections come here first, and go here when the mapping listener has unmapped them

    def __init__(
        self, source: DirtySource, backend: VFIOIOMMU, space: AddressSpace, system: AddressSpace, mark: Mark
    ) -> None:
        self._source, self._backend = source, backend
        self._space, self._system, self._mark = space, system, mark
        self._followed: list[_Followed] = []
        self._ram: list[MemoryRegionSection] = []

    def start(self) -> None:
        """Every write from now on will be reported. :raise OSError, PeerLost: tracking cannot start."""
        self._source.start()
        self._space.register_listener(self)
        self._backend.queue.tracker = self

    def stop(self) -> None:
        """Report nothing more; what was not asked for is forgotten. :raise OSError: as the host does."""
        self._backend.queue.tracker = None
        self._space.unregister_listener(self)
        if not self._backend.queue.lost:
            self._source.stop()

    def region_add(self, section: MemoryRegionSection) -> None:
        """Follow a section."""
        if isinstance(section.mr, IOMMUMemoryRegion):
            followed = _Followed(section, section.mr)
            self._followed.append(followed)
            section.mr.register_notifier(followed.notifier)
            section.mr.replay(followed.notifier)
        elif isinstance(section.mr, RAMRegion):
            self._ram.append(section)

    def region_del(self, section: MemoryRegionSection) -> None:
        """Forget a section: it is unmapped."""
        for followed in [f for f in self._followed if f.section == section]:
            self._followed.remove(followed)
            followed.region.unregister_notifier(followed.notifier)
        if section in self._ram:
            self._ram.remove(section)

    def sync(self) -> None:
        """Report what was written since the last time. :raise OSError: as the host does."""
        for followed in self._followed:
            for first, size in _stretches(list(followed.known), followed.page):
                self._report(followed, first, self._source.query(first, size))
        for section in self._ram:
            for part in _populated(section):
                self._report_ram(section, part, self._source.query(_to_bus(section, part), part.size))

    def unmap(self, iova: int, size: int) -> None:
        """In the queue's place: unmap with the bitmaps of what is mapped there, then whatever else there may be."""
        for followed in self._followed:
            pages = followed.pages(iova, iova + size - 1)
            for first, length in _stretches(pages, followed.page):
                self._report(followed, first, self._source.unmap(first, length))
            for page in pages:
                followed.going.pop(page, None)
        for section in self._ram:
            met = section.range.intersect(Range.sized(iova, size))
            if met is not None:
                part = Range.sized(met.start - _to_bus(section), met.size)
                self._report_ram(section, part, self._source.unmap(met.start, met.size))
        self._backend.container.unmap_dma(iova, size)

    def mapped(self) -> None:
        """Entries that were overwritten in place (sPAPR) lead elsewhere now. What is written at their addresses from
        now on cannot be told from what was written before: both pages count.
        """
        for followed in self._followed:
            overwritten = [page for page in followed.going if page in followed.known]
            for first, length in _stretches(overwritten, followed.page):
                bitmap = self._source.query(first, length)
                self._report(followed, first, bitmap)
                for page in range(first, first + length, followed.page):
                    del followed.going[page]
                self._report(followed, first, bitmap)

    def _report(self, followed: _Followed, first: int, bitmap: bytes) -> None:
        page = self._source.page
        for number, count in _runs(bitmap):
            iova, end = first + number * page, first + (number + count) * page
            while iova < end:
                size = min(end, (iova | followed.page - 1) + 1) - iova
                gpa = followed.gpa(iova)
                span = ram_span(self._system, Gpa(gpa)) if gpa is not None else None
                if span is not None:
                    self._mark(span.block, span.offset, min(size, span.size))
                iova += size

    def _report_ram(self, section: MemoryRegionSection, part: Range, bitmap: bytes) -> None:
        """Bit 0 is the first page of ``part``, which lies in the region of ``section``."""
        region, page = section.mr, self._source.page
        assert isinstance(region, RAMRegion), "only RAM is kept here"
        for number, count in _runs(bitmap):
            at = part.start + number * page
            self._mark(region.block, at, min(count * page, part.last - at + 1))


def _populated(section: MemoryRegionSection) -> list[Range]:
    """The parts of the region of ``section`` that are there: others are not mapped."""
    region = section.mr
    assert isinstance(region, RAMRegion), "only RAM is kept here"
    whole = Range.sized(section.offset_within_region, section.size)
    if region.discard_manager is None:
        return [whole]
    parts: list[Range] = []
    region.discard_manager.replay_populated(section, parts.append)
    return parts


def _to_bus(section: MemoryRegionSection, part: Range | None = None) -> int:
    """What is added to an offset in the region; or the bus address of ``part``."""
    offset = section.offset_within_address_space - section.offset_within_region
    return offset if part is None else part.start + offset


def _stretches(pages: list[int], page: int) -> Iterator[tuple[int, int]]:
    """(first, size) of pages that follow one another, at most :data:`_LONGEST` bytes each."""
    first = end = -1
    for iova in sorted(pages):
        if iova != end or end - first >= _LONGEST:
            if end > first:
                yield first, end - first
            first = iova
        end = iova + page
    if end > first:
        yield first, end - first


def _runs(bitmap: bytes) -> Iterator[tuple[int, int]]:
    """(first, count) of set bits that follow one another."""
    bits = f"{int.from_bytes(bitmap, 'little'):b}"[::-1]
    at = bits.find("1")
    while at >= 0:
        end = bits.find("0", at)
        end = len(bits) if end < 0 else end
        yield at, end - at
        at = bits.find("1", end)
