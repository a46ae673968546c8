"""Which guest RAM the devices behind a container have written, for a machine that migrates.

Who tracks writes (:mod:`vfio_model.vfio.dirty_source`) knows bus addresses, the machine wants its RAM. In between are
the guest's translations: this listener follows them as the mapping listener does, and remembers each until it was
unmapped on the host, or another took its place there. For while writes are tracked an unmap collects what was written
until it took effect; that belongs to the RAM that the entry led to, which the guest's table does not know any more.
Of an IOMMU that translates all that a function can address, what the host carried out is followed instead
(:mod:`.host_maps`).

Source: QEMU's ``docs/devel/migration/vfio.rst`` ("System memory dirty pages tracking when vIOMMU is enabled").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from vfio_model.batch.tces import as_tces, nonzero_perm_runs, zeroed_words
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX, Gpa, Range
from vfio_model.uapi.vfio import DmaMap
from vfio_model.vfio.container import MappingBackend
from vfio_model.vfio.dirty_source import DirtySource
from vfio_model.vfio.host_maps import HostMaps
from vfio_model.vfio.ram_span import RAMSpan, ram_span

Mark = Callable[[RAMBlock, int, int], None]
"""``mark(block, offset, size)``: these bytes were written."""
_RW = int(IOMMUAccessFlags.RW)
_LONGEST = 1 << 34
"""Bytes that one question is about; a multiple of every page size."""


class _Followed:
    """One IOMMU section. ``words`` holds for each of its pages what a TCE would: the guest-physical address with the
    permissions, or 0; ``going`` the same of pages that the host has still mapped there, or had: bus address of the page
    → guest-physical address.
    """

    def __init__(self, section: MemoryRegionSection, region: IOMMUMemoryRegion) -> None:
        self.section, self.region = section, region
        self.page = region.get_min_page_size()
        self._shift = self.page.bit_length() - 1
        self._first = section.offset_within_address_space
        self._start = section.offset_within_region
        self.words = zeroed_words(section.size >> self._shift)
        self.going: dict[int, int] = {}
        last = self._start + section.size - 1
        kinds = IOMMUNotifierFlag.IOTLB_EVENTS
        self.notifier = IOMMUNotifier(self._notify, kinds, self._start, last, fn_run=self._notify_run)

    def _index(self, iova: int) -> int:
        return (iova - self._first) >> self._shift

    def _bus(self, index: int) -> int:
        return (self._first + (index << self._shift)) & U64_MAX

    def _leave(self, index: int, end: int) -> None:
        """The entries are about to be overwritten: where they lead is kept."""
        for low, high in nonzero_perm_runs(self.words, index, end):
            for at in range(low, high):
                self.going.setdefault(self._bus(at), self.words[at] & -self.page)

    def _notify(self, _notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        index, perm = (entry.iova - self._start) >> self._shift, int(entry.perm) & _RW
        end = min(index + (entry.addr_mask + 1 >> self._shift), len(self.words))
        self._leave(index, end)
        if perm:
            for at in range(index, end):
                self.words[at] = entry.translated_addr + ((at - index) << self._shift) | perm
        else:
            self._clear(index, end)

    def _clear(self, index: int, end: int) -> None:
        self.words[index:end] = zeroed_words(end - index)

    def _notify_run(self, notifier: IOMMUNotifier, run: IOMMUTLBRun) -> None:
        if run.page_shift != self._shift:
            for event in run.events():
                self._notify(notifier, event.entry)
            return
        index = (run.iova - self._start) >> self._shift
        self._leave(index, index + run.count)
        if run.type is IOMMUNotifierFlag.UNMAP:
            self._clear(index, index + run.count)
        else:
            self.words[index : index + run.count] = as_tces(run.translated, run.perms)

    def known(self, first: int, last: int) -> list[tuple[int, int]]:
        """(bus address, size) of the stretches in the range that lead somewhere, at most :data:`_LONGEST` each."""
        index, end = max(self._index(first), 0), min(self._index(last) + 1, len(self.words))
        found = []
        for low, high in nonzero_perm_runs(self.words, index, end) if index < end else ():
            for at in range(self._bus(low), self._bus(low) + (high - low << self._shift), _LONGEST):
                found.append((at, min(_LONGEST, self._bus(low) + (high - low << self._shift) - at)))
        return found

    def leads(self, page: int) -> bool:
        """Whether the page at a bus address leads somewhere now."""
        return bool(self.words[self._index(page)] & _RW)

    def ram(self, iova: int, system: AddressSpace) -> RAMSpan | None:
        """The RAM that the host's mapping of ``iova`` leads to, as far as one page goes."""
        gpa = self._gpa(iova)
        span = ram_span(system, Gpa(gpa)) if gpa is not None else None
        return span and span._replace(size=min(span.size, self.page - (iova & self.page - 1)))

    def _gpa(self, iova: int) -> int | None:
        page, within = iova & -self.page, iova & self.page - 1
        found = self.going.get(page)
        if found is None:
            word = self.words[self._index(page)]
            found = word & -self.page if word & _RW else None
        return None if found is None else found + within


class DirtySync(MemoryListener):
    """Register it with the devices' address space of the container while writes are tracked: between :meth:`start` and
    :meth:`stop`, which do that. ``system`` is where RAM lies.
    """

    priority = 5  # sections come here first, and go here when the mapping listener has unmapped them

    def __init__(
        self, source: DirtySource, backend: MappingBackend, space: AddressSpace, system: AddressSpace, mark: Mark
    ) -> None:
        self._source, self._backend = source, backend
        self._space, self._system, self._mark = space, system, mark
        self._followed: list[_Followed] = []
        self._whole: list[HostMaps] = []
        self._started = False
        self._ram: list[MemoryRegionSection] = []

    def start(self) -> None:
        """Every write from now on will be reported. :raise OSError, PeerLost: tracking cannot start."""
        for each in self._space.view.ranges:
            if isinstance(each.region, IOMMUMemoryRegion):
                each.region.flush()
        self._source.start()
        self._space.register_listener(self)
        self._backend.queue.tracker = self
        self._started = True

    def stop(self) -> None:
        """Report nothing more; what was not asked for is forgotten. :raise OSError: as the host does."""
        self._backend.queue.tracker = None
        self._space.unregister_listener(self)
        if not self._backend.queue.lost:
            self._source.stop()

    def region_add(self, section: MemoryRegionSection) -> None:
        """Follow a section."""
        if isinstance(section.mr, IOMMUMemoryRegion) and section.mr.whole_space:
            self._whole.append(HostMaps(section))
            if not self._started:
                self._whole[-1].learn(self._system)
        elif isinstance(section.mr, IOMMUMemoryRegion):
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
        self._whole = [maps for maps in self._whole if maps.section != section]
        if section in self._ram:
            self._ram.remove(section)

    def sync(self) -> None:
        """Report what was written since the last time. :raise OSError: as the host does."""
        for followed in self._followed:
            for first, size in followed.known(followed.section.range.start, followed.section.range.last):
                self._report(followed, first, self._source.query(first, size))
        for maps in self._whole:
            for first, size in maps.stretches(maps.section.range.start, maps.section.range.last, _LONGEST):
                self._report(maps, first, self._source.query(first, size))
        for section in self._ram:
            for part in _populated(section):
                self._report_ram(section, part, self._source.query(_to_bus(section, part), part.size))

    def unmap(self, iova: int, size: int) -> None:
        """In the queue's place: unmap with the bitmaps of what is mapped there, then whatever else there may be."""
        for followed in self._followed:
            going = [page for page in followed.going if iova <= page < iova + size]
            gone = [page for page in going if not followed.leads(page)]
            for first, length in (*followed.known(iova, iova + size - 1), *_stretches(gone, followed.page)):
                self._report(followed, first, self._source.unmap(first, length))
            for page in going:
                del followed.going[page]
        for maps in self._whole:
            for first, length in list(maps.stretches(iova, iova + size - 1, _LONGEST)):
                self._report(maps, first, self._source.unmap(first, length))
            maps.unmapped(iova, iova + size - 1)
        for section in self._ram:
            met = section.range.intersect(Range.sized(iova, size))
            if met is not None:
                part = Range.sized(met.start - _to_bus(section), met.size)
                self._report_ram(section, part, self._source.unmap(met.start, met.size))
        self._backend.container.unmap_dma(iova, size)

    def mapped(self, maps: memoryview) -> None:
        """Entries that were overwritten in place (sPAPR) lead elsewhere now. What is written at their addresses from
        now on cannot be told from what was written before: both pages count.
        """
        for whole in self._whole:
            for _, flags, vaddr, iova, size in DmaMap.FORMAT.iter_unpack(maps):
                if whole.section.range.start <= iova <= whole.section.range.last:
                    whole.mapped(iova, size, flags & _RW, vaddr)
        for followed in self._followed:
            overwritten = [page for page in followed.going if followed.leads(page)]
            for first, length in _stretches(overwritten, followed.page):
                bitmap = self._source.query(first, length)
                self._report(followed, first, bitmap)
                for page in range(first, first + length, followed.page):
                    del followed.going[page]
                self._report(followed, first, bitmap)

    def _report(self, followed: _Followed | HostMaps, first: int, bitmap: bytes) -> None:
        page = self._source.page
        for number, count in _runs(bitmap):
            iova, end = first + number * page, first + (number + count) * page
            while iova < end:
                span = followed.ram(iova, self._system)
                size = min(end - iova, span.size if span is not None else page)
                if span is not None:
                    self._mark(span.block, span.offset, size)
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
