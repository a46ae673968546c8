"""The sPAPR TCE v2 container as its user sees it: preregistered memory and windows made on demand.

Set-up follows the order that the kernel demands: attach the group, set the type, preregister all RAM (nothing can be
mapped before), ask for the capabilities, remove the default window. From then on each IOMMU section of the guest
gets a host window of its own, created when the section appears and removed with it.

Source: Linux ``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note") and
``include/uapi/linux/vfio.h``.
"""

from __future__ import annotations

import errno

from vfio_model.errors import PeerLost
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.ranges import Range
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.vfio import IommuType, SpaprTceInfo
from vfio_model.vfio.container import DMA_MAX_MAPPINGS, MappingQueue
from vfio_model.vfio.host_window import HostWindows, VFIOHostDMAWindow
from vfio_model.vfio.ioctl import SpaprContainer

_EINVAL_HINT = "use a larger IOMMU page size, or a host with more table levels"


def table_levels(entries: int, host_page_size: int, host_levels: int) -> int:
    """How many levels to ask for: one level indexes ``log2(host page) + 8`` bits; at least one level.

    :raise OSError: EINVAL when one level is all the host has and the table needs more.
    """
    bits_total = (entries * 8).bit_length() - 1
    bits_per_level = host_page_size.bit_length() - 1 + 8
    needed = max(1, -(-bits_total // bits_per_level))
    if host_levels <= 1 and bits_total // bits_per_level > 1:
        raise OSError(errno.EINVAL, f"the table needs {needed} levels, the host has one: {_EINVAL_HINT}")
    return needed if host_levels > 1 else 1


class SpaprV2:
    """:class:`~vfio_model.vfio.container.VFIOIOMMU` over a v2 container."""

    kind: ContainerKind = "spapr-v2"

    def __init__(self, container: SpaprContainer, *, host_page_size: int, trace: Trace = NULL_TRACE) -> None:
        self.container = container
        self.host_page_size = host_page_size
        self.windows = HostWindows()
        self.queue = MappingQueue(container.port, container.handle, trace=trace)
        self.dma_max_mappings = DMA_MAX_MAPPINGS
        self.coalesces = True
        self.write_only = self.whole_windows = False
        self.info = SpaprTceInfo()
        self.smallest_ram_page = 1 << 63
        self._trace = trace

    def set_type(self) -> None:
        """``VFIO_SET_IOMMU``; a group must be attached."""
        self.container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)

    def start(self) -> None:
        """Read the capabilities and remove the default window; RAM is preregistered already."""
        self.info = self.container.get_info()
        self.container.tce_remove(self.info.dma32_window_start)

    def page_shift_for(self, guest_page_size: int) -> int:
        """The largest page the host offers that is no larger than the guest's IOMMU page and every RAM back end's page.

        :raise OSError: EINVAL when there is none.
        """
        limit = min(guest_page_size, self.smallest_ram_page)
        fitting = self.info.pgsizes & ((limit << 1) - 1)
        if not fitting:
            raise OSError(
                errno.EINVAL,
                f"host doesn't support page size {limit:#x}, the supported mask is {self.info.pgsizes:#x}",
            )
        return fitting.bit_length() - 1

    def add_window(self, section: MemoryRegionSection) -> None:
        """Create a host window that is exactly ``section``; see :class:`~vfio_model.vfio.container.VFIOIOMMU`."""
        if self.queue.lost:
            return
        try:
            self._add_window(section)
        except PeerLost as error:
            self.queue.gone(error)

    def _add_window(self, section: MemoryRegionSection) -> None:
        wanted = section.range
        if other := self.windows.overlapping(wanted):
            raise OSError(errno.EINVAL, f"region {wanted} overlaps the host window {other.range}")
        region = section.mr
        assert isinstance(region, IOMMUMemoryRegion), "only IOMMU sections get a window"
        page_shift = self.page_shift_for(region.get_min_page_size())
        levels = table_levels(wanted.size >> page_shift, self.host_page_size, self.info.levels)
        start = self._create(page_shift, wanted.size, levels)
        if start != wanted.start:
            self.container.tce_remove(start)
            start = self._create_behind(page_shift, wanted.size, levels)
        if start != wanted.start:
            self.container.tce_remove(start)
            raise OSError(
                errno.EINVAL, f"the host put the window at {start:#x}, the guest needs it at {wanted.start:#x}"
            )
        self._trace("vfio_spapr_create_window", ps=page_shift, levels=levels, ws=wanted.size, off=start)
        self.windows.add(VFIOHostDMAWindow(wanted.start, wanted.last, 1 << page_shift))

    def _create(self, page_shift: int, size: int, levels: int) -> int:
        """TCE_CREATE, retried with one more level while the host refuses and has more to give."""
        most = (
            max(levels, (64 - page_shift) // (self.host_page_size.bit_length() - 1)) if self.info.levels > 1 else levels
        )
        while True:
            try:
                return self.container.tce_create(page_shift, size, levels)
            except OSError as error:
                if levels >= most or error.errno not in (errno.EINVAL, errno.ENOMEM):
                    raise
                levels += 1

    def _create_behind(self, page_shift: int, size: int, levels: int) -> int:
        """Create a window while another one holds the first place.

        A host numbers its windows from the first free place on, and the place decides the address. A guest that has
        removed its first window keeps the second one where it is; a container that is connected after that needs it
        there too.
        """
        first = self._create(page_shift, 1 << page_shift, 1)
        try:
            return self._create(page_shift, size, levels)
        finally:
            self.container.tce_remove(first)

    def del_window(self, section: MemoryRegionSection) -> None:
        """Remove the window that :meth:`add_window` created for this section."""
        if self.queue.lost:
            return
        wanted: Range = section.range
        self.windows.remove(wanted)
        try:
            self.container.tce_remove(wanted.start)
        except PeerLost as error:
            self.queue.gone(error)
        self._trace("vfio_spapr_remove_window", off=wanted.start)
