"""One IOMMU section of a guest, followed by a VFIO container: QEMU's ``VFIOGuestIOMMU``.

A notification's IOVA is relative to the IOMMU *region*; the host wants it relative to the device's address space,
so the record keeps ``iommu_offset`` = section offset in the address space - section offset in the region, and adds
it. An entry that does not translate to the guest's RAM is reported and not mapped: a guest may write any TCE it
likes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from vfio_model.batch.dma_map import consecutive, pack_dma_maps, page_bounds, uniform_value
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX, Gpa, Iova
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.container import MappingBackend
from vfio_model.vfio.ram_span import RAMSpan, ram_span, refusal

_UNMAP = IOMMUNotifierFlag.UNMAP
_RO, _WO = int(IOMMUAccessFlags.RO), int(IOMMUAccessFlags.WO)
_CHUNK_SHIFT = 21
_RW = int(IOMMUAccessFlags.RW)


class _MappedChunks:
    """Where anything was mapped, in coarse chunks: what was never mapped need not be unmapped.

    A guest clears its whole table when it boots; QEMU's VT-d model keeps a tree of what it mapped for the same reason.
    A chunk is forgotten when an unmap covers all of it. Kept are the stretches of chunks, so that a guest which maps
    all of its memory costs no more than one that maps a page.
    """

    def __init__(self, page_size: int) -> None:
        self._shift = max(_CHUNK_SHIFT, page_size.bit_length() - 1)
        self._starts: list[int] = []
        self._ends: list[int] = []
        """Numbers of chunks, ends exclusive; stretches are in order and do not touch."""

    def mapped(self, first: int, size: int) -> None:
        """``size`` bytes from ``first`` are about to be mapped."""
        starts, ends = self._starts, self._ends
        low, high = first >> self._shift, (first + size - 1 >> self._shift) + 1
        at, stop = bisect_left(ends, low), bisect_right(starts, high)
        if at < stop:
            if starts[at] <= low and high <= ends[at]:
                return
            low, high = min(low, starts[at]), max(high, ends[stop - 1])
        starts[at:stop], ends[at:stop] = [low], [high]

    def unmapped(self, first: int, size: int) -> bool:
        """Whether anything was mapped near these bytes, which are about to be unmapped."""
        starts, ends, shift = self._starts, self._ends, self._shift
        at, stop = bisect_right(ends, first >> shift), bisect_left(starts, (first + size - 1 >> shift) + 1)
        if at >= stop:
            return False
        low, high = -(-first >> shift), first + size >> shift
        if low < high:
            near = list(zip(starts[at:stop], ends[at:stop], strict=True))
            left = [(start, min(end, low)) for start, end in near if start < low]
            left += [(max(start, high), end) for start, end in near if end > high]
            starts[at:stop], ends[at:stop] = [start for start, _ in left], [end for _, end in left]
        return True


class VFIOGuestIOMMU:
    """Shadows one IOMMU section into ``backend``; ``system`` is the guest's system address space."""

    def __init__(
        self,
        backend: MappingBackend,
        section: MemoryRegionSection,
        system: AddressSpace,
        *,
        trace: Trace = NULL_TRACE,
    ) -> None:
        region = section.mr
        assert isinstance(region, IOMMUMemoryRegion), "a guest IOMMU follows an IOMMU region"
        self.section = section
        self.iommu_mr = region
        self.iommu_offset = (section.offset_within_address_space - section.offset_within_region) & U64_MAX
        self.refused: OSError | None = None
        """Set when the host gave no window for this section: nothing is mapped, and every flush says so."""
        self._backend, self._system, self._trace = backend, system, trace
        self._mapped = _MappedChunks(region.get_min_page_size())
        start = section.offset_within_region
        self.notifier = IOMMUNotifier(
            self._map_notify,
            IOMMUNotifierFlag.IOTLB_EVENTS,
            start,
            start + section.size - 1,
            fn_run=self._map_notify_run,
            flush=self._flush,
        )

    @property
    def linked(self) -> bool:
        """Whether the host maps and unmaps by itself what the guest asks it for (KVM_DEV_VFIO_GROUP_SET_SPAPR_TCE)."""
        return self.notifier.in_kernel

    @linked.setter
    def linked(self, linked: bool) -> None:
        self.notifier.in_kernel = linked

    def _flush(self) -> OSError | None:
        return self.refused or self._backend.queue.flush(go_on=self.iommu_mr.whole_space)

    def _map_notify(self, _notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        if self.refused:
            return
        iova = Iova((entry.iova + self.iommu_offset) & U64_MAX)
        size = entry.addr_mask + 1
        perm = int(entry.perm)
        if self._trace.enabled:
            self._trace(
                "vfio_iommu_map_notify",
                op="MAP" if perm & _RW else "UNMAP",
                iova_start=iova,
                iova_end=iova + entry.addr_mask,
            )
        if not perm & _RW:
            self._unmap(iova, size)
            return
        if entry.target_as is not self._system:
            self._trace("vfio_error", reason="Wrong target AS, only system memory is allowed", iova=iova)
            self._unmap(iova, size)
            return
        span = ram_span(self._system, Gpa(entry.translated_addr))
        if span is None or span.size < size:
            reason = refusal(self._system, Gpa(entry.translated_addr), size)
            self._trace("vfio_error", reason=reason, iova=iova, gpa=entry.translated_addr)
            self._unmap(iova, size)  # whatever the entry was before, it is that no longer
            return
        readonly, writeonly = self._permission(perm, span)
        if readonly and writeonly:
            self._unmap(iova, size)
            return
        self._mapped.mapped(iova, size)
        self._backend.queue.map(iova, size, span.hva, readonly=readonly, writeonly=writeonly)

    def _map_notify_run(self, notifier: IOMMUNotifier, run: IOMMUTLBRun) -> None:
        """Like :meth:`_map_notify` for entries at consecutive IOVAs, in one array."""
        if self.refused:
            return
        first = Iova((run.iova + self.iommu_offset) & U64_MAX)
        if run.type is _UNMAP:
            size = run.count << run.page_shift
            if self._trace.enabled:
                self._trace("vfio_iommu_map_notify", op="UNMAP", iova_start=first, iova_end=first + size - 1)
            self._unmap(first, size)
            return
        if run.target_as is not self._system or not self._queue_run(first, run):
            # more than one block, holes, or mixed permissions: one by one
            for event in run.events():
                self._map_notify(notifier, event.entry)
            return
        if self._trace.enabled:
            last = first + (run.count << run.page_shift) - 1
            self._trace("vfio_iommu_map_notify", op="MAP", iova_start=first, iova_end=last, entries=run.count)
        self._mapped.mapped(first, run.count << run.page_shift)

    def _permission(self, perm: int, span: RAMSpan) -> tuple[bool, bool]:
        """Whether the mapping is for reading alone, for writing alone; both: it permits nothing."""
        return not perm & _WO or span.readonly, self._backend.write_only and not perm & _RO

    def _unmap(self, iova: Iova, size: int) -> None:
        if self._mapped.unmapped(iova, size) or self.notifier.in_kernel:
            self._backend.queue.unmap(iova, size)

    def _queue_run(self, first: Iova, run: IOMMUTLBRun) -> bool:
        """Queue the run, when all of it lies in one RAM block with one permission: a MAP_DMA for each page, or a single
        one for pages in order.
        """
        perm = int(run.perms) if isinstance(run.perms, int) else uniform_value(run.perms)
        if perm is None or not perm & _RW:
            return False
        pages, page = run.translated, 1 << run.page_shift
        linear = self._backend.coalesces and consecutive(pages, page)
        lowest, highest = (int(pages[0]), int(pages[-1])) if linear else page_bounds(pages)
        span = ram_span(self._system, Gpa(lowest))
        size = highest - lowest + page
        if span is None or not 0 < size <= span.size:
            return False
        queue, (readonly, writeonly) = self._backend.queue, self._permission(perm, span)
        if linear and not (readonly and writeonly):
            queue.map(first, size, span.hva, readonly=readonly, writeonly=writeonly)
        elif writeonly:
            return False
        else:
            to_vaddr = span.hva - lowest
            packed = pack_dma_maps(pages, to_vaddr, first, run.page_shift, writable=not readonly)
            queue.map_packed(packed, run.count)
        return True
