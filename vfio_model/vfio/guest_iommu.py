"""One IOMMU section of a guest, followed by a VFIO container: QEMU's ``VFIOGuestIOMMU``.

A notification's IOVA is relative to the IOMMU *region*; the host wants it relative to the device's address space,
so the record keeps ``iommu_offset`` = section offset in the address space - section offset in the region, and adds
it. An entry that does not translate to the guest's RAM is reported and not mapped: a guest may write any TCE it
likes.
"""

from __future__ import annotations

from vfio_model.batch.dma_map import pack_dma_maps, page_bounds, uniform_value
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX, Gpa, Iova
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.container import VFIOIOMMU
from vfio_model.vfio.ram_span import ram_span, refusal

_UNMAP = IOMMUNotifierFlag.UNMAP
_WO = int(IOMMUAccessFlags.WO)
_CHUNK_SHIFT = 21
_RW = int(IOMMUAccessFlags.RW)


class _MappedChunks:
    """Where anything was mapped, in coarse chunks: what was never mapped need not be unmapped.

    A guest clears its whole table when it boots; QEMU's VT-d model keeps a tree of what it mapped for the same reason.
    A chunk is forgotten when an unmap covers all of it.
    """

    def __init__(self, page_size: int) -> None:
        self._shift = max(_CHUNK_SHIFT, page_size.bit_length() - 1)
        self._chunks: set[int] = set()

    def mapped(self, first: int, size: int) -> None:
        """``size`` bytes from ``first`` are about to be mapped."""
        self._chunks.update(range(first >> self._shift, (first + size - 1 >> self._shift) + 1))

    def unmapped(self, first: int, size: int) -> bool:
        """Whether anything was mapped near these bytes, which are about to be unmapped."""
        low, high = first >> self._shift, first + size - 1 >> self._shift
        touched = (
            [chunk for chunk in self._chunks if low <= chunk <= high]
            if high - low > 8
            else [chunk for chunk in range(low, high + 1) if chunk in self._chunks]
        )
        for chunk in touched:
            if chunk << self._shift >= first and chunk + 1 << self._shift <= first + size:
                self._chunks.discard(chunk)
        return bool(touched)


class VFIOGuestIOMMU:
    """Shadows one IOMMU section into ``backend``; ``system`` is the guest's system address space."""

    def __init__(
        self,
        backend: VFIOIOMMU,
        section: MemoryRegionSection,
        system: AddressSpace,
        *,
        refused: OSError | None = None,
        trace: Trace = NULL_TRACE,
    ) -> None:
        region = section.mr
        assert isinstance(region, IOMMUMemoryRegion), "a guest IOMMU follows an IOMMU region"
        self.section = section
        self.iommu_mr = region
        self.iommu_offset = (section.offset_within_address_space - section.offset_within_region) & U64_MAX
        self.refused = refused
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
        return self.refused or self._backend.queue.flush()

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
        self._mapped.mapped(iova, size)
        self._backend.queue.map(iova, size, span.hva, readonly=not perm & _WO or span.readonly)

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
        packed = self._pack(first, run) if run.target_as is self._system else None
        if packed is None:  # more than one block, holes, or mixed permissions: one by one
            for event in run.events():
                self._map_notify(notifier, event.entry)
            return
        if self._trace.enabled:
            last = first + (run.count << run.page_shift) - 1
            self._trace("vfio_iommu_map_notify", op="MAP", iova_start=first, iova_end=last, entries=run.count)
        self._mapped.mapped(first, run.count << run.page_shift)
        self._backend.queue.map_packed(packed, run.count)

    def _unmap(self, iova: Iova, size: int) -> None:
        if self._mapped.unmapped(iova, size) or self.notifier.in_kernel:
            self._backend.queue.unmap(iova, size)

    def _pack(self, first: Iova, run: IOMMUTLBRun) -> bytes | memoryview | None:
        """The run as MAP_DMA structures, when all of it lies in one RAM block with one permission."""
        perm = int(run.perms) if isinstance(run.perms, int) else uniform_value(run.perms)
        if perm is None or not perm & _RW:
            return None
        lowest, highest = page_bounds(run.translated)
        span = ram_span(self._system, Gpa(lowest))
        if span is None or highest - lowest + (1 << run.page_shift) > span.size:
            return None
        to_vaddr = span.hva - lowest
        writable = bool(perm & _WO) and not span.readonly
        return pack_dma_maps(run.translated, to_vaddr, first, run.page_shift, writable=writable)
