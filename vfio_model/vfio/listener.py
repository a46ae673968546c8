"""The memory listeners of a container: what makes the host follow the guest's memory.

Two listeners with two jobs. :class:`PreregListener` watches the *system* address space and preregisters RAM with
an sPAPR v2 container; it must be registered first, because nothing can be mapped before. :class:`VFIOListener`
watches the *device's* address space: an IOMMU section gets a host window, a notifier and a replay; a RAM section
is mapped as it is, or as far as it is populated when parts of its region may be absent.

An error before ``initialized`` is kept (the first one) and fails the device's realize. Later, the section that the
host refused stays without mappings and its notifier's flush reports the refusal, so that the hypercall that made
the section can undo it and answer with an error; QEMU would exit there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from vfio_model.errors import PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.region import RAMRegion
from vfio_model.ranges import Hva, Iova, Range, align_down, align_up, is_aligned
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.container import MappingBackend
from vfio_model.vfio.guest_iommu import VFIOGuestIOMMU
from vfio_model.vfio.managed_ram import ManagedRAM, too_many
from vfio_model.vfio.spapr import SpaprV2

BIT63 = 1 << 63


def ram_of(section: MemoryRegionSection) -> RAMRegion | None:
    """The section's RAM region, or None when it is something else."""
    return section.mr if isinstance(section.mr, RAMRegion) else None


class PreregListener(MemoryListener):
    """Preregisters every RAM section of the system address space with an sPAPR v2 container."""

    priority = 0

    def __init__(self, backend: SpaprV2, *, trace: Trace = NULL_TRACE) -> None:
        self._backend, self._trace = backend, trace
        self.error: OSError | None = None

    def _wanted(self, section: MemoryRegionSection) -> Range | None:
        """The host-virtual range to register, or None when the section is not for preregistration."""
        region = ram_of(section)
        if region is None or region.ram_device:
            if isinstance(section.mr, IOMMUMemoryRegion):
                self._trace("vfio_prereg_listener_region_add_skip", reason="Cannot possibly preregister IOMMU memory")
            return None
        page = self._backend.host_page_size
        if not all(
            is_aligned(value, page)
            for value in (section.offset_within_address_space, section.offset_within_region, section.size)
        ):
            self._trace(
                "vfio_prereg_listener_region_add_skip", reason="received unaligned region", start=section.range.start
            )
            return None
        return Range.sized(region.block.hva + section.offset_within_region, section.size)

    def region_add(self, section: MemoryRegionSection) -> None:
        """Register; the first error is kept in :attr:`error`."""
        wanted = self._wanted(section)
        region = ram_of(section)
        if wanted is None or region is None or self._backend.queue.lost:
            return
        result = 0
        try:
            self._backend.container.register_memory(Hva(wanted.start), wanted.size)
        except PeerLost as gone:
            self._backend.queue.gone(gone)
        except OSError as error:
            self.error = self.error or error
            result = -(error.errno or 0)
        else:
            self._backend.smallest_ram_page = min(self._backend.smallest_ram_page, region.block.page_size)
        self._trace("vfio_prereg_register", va=wanted.start, size=wanted.size, ret=result)

    def region_del(self, section: MemoryRegionSection) -> None:
        """Unregister; the result is only traced."""
        wanted = self._wanted(section)
        if wanted is None or self._backend.queue.lost:
            return
        result = 0
        try:
            self._backend.container.unregister_memory(Hva(wanted.start), wanted.size)
        except PeerLost as gone:
            self._backend.queue.gone(gone)
        except OSError as error:
            result = -(error.errno or 0)
        self._trace("vfio_prereg_unregister", va=wanted.start, size=wanted.size, ret=result)


class VFIOListener(MemoryListener):
    """Maps a device's address space into a container."""

    priority = 10

    def __init__(
        self, backend: MappingBackend, system: AddressSpace, *, host_page_size: int, trace: Trace = NULL_TRACE
    ) -> None:
        self._backend, self._system, self._host_page_size, self._trace = backend, system, host_page_size, trace
        self._guest_iommus: list[VFIOGuestIOMMU] = []
        self._managed: list[ManagedRAM] = []
        self.error: OSError | None = None
        self.initialized = False
        self.link: Callable[[IOMMUMemoryRegion], bool] = lambda _region: False
        """Links the table behind a region to the window that was just made for it: whether it did, and the host serves
        this container itself. Raises OSError."""

    @property
    def guest_iommus(self) -> tuple[VFIOGuestIOMMU, ...]:
        """The IOMMU sections followed at present."""
        return tuple(self._guest_iommus)

    def _skipped(self, section: MemoryRegionSection) -> bool:
        known = isinstance(section.mr, IOMMUMemoryRegion) or ram_of(section) is not None
        return not known or bool(section.offset_within_address_space & BIT63)

    def _failed(self, error: OSError) -> None:
        if not self.initialized:
            self.error = self.error or error

    def region_add(self, section: MemoryRegionSection) -> None:
        """Follow a section that appeared."""
        if self._skipped(section):
            self._trace("vfio_listener_region_add_skip", start=section.range.start, end=section.range.last)
        elif isinstance(section.mr, IOMMUMemoryRegion):
            self._add_iommu(section, section.mr)
        else:
            self._map_ram(section)

    def _add_iommu(self, section: MemoryRegionSection, region: IOMMUMemoryRegion) -> None:
        giommu = VFIOGuestIOMMU(self._backend, section, self._system, trace=self._trace)
        try:
            self._backend.add_window(section)
            giommu.linked = self._linked(section, region)
        except OSError as error:
            giommu.refused = error
        if not self._backend.whole_windows:
            self._register(giommu)
        if giommu.refused is not None:
            self._failed(giommu.refused)
        self._trace(
            "vfio_listener_region_add_iommu",
            start=section.range.start,
            end=section.range.last,
            refused=str(giommu.refused) if giommu.refused else "",
        )
        self._guest_iommus.append(giommu)
        if giommu.refused is None and not self._backend.whole_windows:
            region.replay(giommu.notifier)
            if failed := giommu.notifier.flush():
                self._failed(failed)

    def _register(self, giommu: VFIOGuestIOMMU) -> None:
        """One whose IOMMU tells nobody of what is mapped is refused, as one without a window is."""
        try:
            giommu.iommu_mr.register_notifier(giommu.notifier)
        except OSError as error:
            if giommu.refused is None:
                self._backend.del_window(giommu.section)
                giommu.refused = error

    def _linked(self, section: MemoryRegionSection, region: IOMMUMemoryRegion) -> bool:
        """:raise OSError: KVM does not link the table; the window is gone again then."""
        try:
            return self.link(region)
        except PeerLost as error:
            self._backend.queue.gone(error)
            return False
        except OSError:
            self._backend.del_window(section)
            raise

    def link_again(self) -> None:
        """A group joined the container: it stands behind every table that is linked. :raise OSError: the host
        refuses."""
        for giommu in self._guest_iommus:
            if giommu.linked:
                self.link(giommu.iommu_mr)

    def region_del(self, section: MemoryRegionSection) -> None:
        """Stop following a section that goes; one unmap covers all of it."""
        if self._skipped(section):
            return
        self._trace("vfio_listener_region_del", start=section.range.start, end=section.range.last)
        if not isinstance(section.mr, IOMMUMemoryRegion):
            self._unmap_ram(section)
            return
        giommu = next(
            (g for g in self._guest_iommus if g.iommu_mr is section.mr and g.section.range == section.range), None
        )
        if giommu is None:
            return
        self._guest_iommus.remove(giommu)
        if giommu.notifier in section.mr.notifiers:
            section.mr.unregister_notifier(giommu.notifier)
        if giommu.refused is None:
            self._backend.queue.unmap(Iova(section.range.start), section.size)
            self._backend.queue.flush()
            self._backend.del_window(section)

    def _interior(self, section: MemoryRegionSection) -> Range | None:
        """The host-page-aligned interior of a RAM section, or None when nothing of it can be mapped."""
        page = self._host_page_size
        start, size = section.offset_within_address_space, section.size
        if (start ^ section.offset_within_region) & (page - 1):
            return None
        first, end = align_up(start, page), align_down(start + size, page)
        return Range(first, end - 1) if first < end else None

    def _map_ram(self, section: MemoryRegionSection) -> None:
        region, wanted = ram_of(section), self._interior(section)
        if region is None or wanted is None:
            return
        error: OSError | None
        if self._backend.windows.lookup(wanted) is None:
            error = OSError(errno.EINVAL, f"no host window holds {wanted}")
        elif region.discard_manager is not None:
            error = self._follow(section, wanted)
        else:
            into_region = wanted.start - section.offset_within_address_space + section.offset_within_region
            vaddr = Hva(region.block.hva + into_region)
            self._backend.queue.map(Iova(wanted.start), wanted.size, vaddr, readonly=section.readonly)
            error = self._backend.queue.flush()
        if error and not region.ram_device:  # a device's own RAM may stay unmapped: only peer-to-peer DMA is lost
            self._failed(error)
        self._trace(
            "vfio_listener_region_add_ram",
            iova_start=wanted.start,
            iova_end=wanted.last,
            ret=error.errno if error else 0,
        )

    def _follow(self, section: MemoryRegionSection, wanted: Range) -> OSError | None:
        """Map what is populated of ``wanted``, now and from now on."""
        into = wanted.start - section.offset_within_address_space
        inner = replace(
            section,
            offset_within_region=section.offset_within_region + into,
            offset_within_address_space=wanted.start,
            size=wanted.size,
        )
        managed = ManagedRAM(self._backend, inner)
        window = self._backend.windows.lookup(wanted)
        assert window is not None, "a window was looked up before"
        smallest = window.iova_pgsizes & -window.iova_pgsizes
        assert managed.manager.get_min_granularity() >= smallest > 0, "a granule is at least one page of the IOMMU"
        if too_many(self._backend, [*self._managed, managed]):
            limit = self._backend.dma_max_mappings
            return OSError(errno.ENOSPC, f"{wanted} may need more mappings than the host allows ({limit})")
        try:
            managed.manager.register_listener(managed, inner)
        except OSError as error:
            return error
        self._managed.append(managed)
        return None

    def _unmap_ram(self, section: MemoryRegionSection) -> None:
        wanted = self._interior(section)
        region = ram_of(section)
        if region is not None and region.discard_manager is not None:
            for managed in [m for m in self._managed if m.section.mr is region and m.section.range == wanted]:
                self._managed.remove(managed)
                managed.manager.unregister_listener(managed)
            return
        if wanted is not None and self._backend.windows.lookup(wanted) is not None:
            self._backend.queue.unmap(Iova(wanted.start), wanted.size)
            self._backend.queue.flush()
