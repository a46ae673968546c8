"""The sPAPR TCE container, version 1, as its user sees it: one window, the host's 32-bit one, of 4 KiB pages.

ENABLE counts that window against the memlock limit; then GET_INFO says where it is. Nothing is preregistered: the host
pins each page when it is mapped. A guest's window can be followed where it lies within the host's; one that does not
(a dynamic one at its 64-bit address) is refused.

Source: Linux ``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note") and
``include/uapi/linux/vfio.h``.
"""

from __future__ import annotations

import errno

from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.vfio import IommuType, SpaprTceInfo
from vfio_model.vfio.container import DMA_MAX_MAPPINGS, MappingQueue
from vfio_model.vfio.host_window import HostWindows, VFIOHostDMAWindow
from vfio_model.vfio.ioctl import SpaprContainer

IOMMU_PAGE_SIZE = 1 << 12
"""Of the 32-bit window; a v1 container has no way to ask."""


class SpaprV1:
    """:class:`~vfio_model.vfio.container.VFIOIOMMU` over a v1 container."""

    kind: ContainerKind = "spapr-v1"

    def __init__(self, container: SpaprContainer, *, host_page_size: int, trace: Trace = NULL_TRACE) -> None:
        self.container = container
        self.host_page_size = host_page_size
        self.windows = HostWindows()
        self.queue = MappingQueue(container.port, container.handle, trace=trace)
        self.dma_max_mappings = DMA_MAX_MAPPINGS
        self.coalesces = True
        self.write_only = self.whole_windows = False
        self.info = SpaprTceInfo()

    def set_type(self) -> None:
        """``VFIO_SET_IOMMU``; a group must be attached."""
        self.container.set_iommu(IommuType.VFIO_SPAPR_TCE_IOMMU)

    def start(self) -> None:
        """``VFIO_IOMMU_ENABLE``, then learn where the window is."""
        self.container.enable()
        self.info = self.container.get_info()
        start, size = self.info.dma32_window_start, self.info.dma32_window_size
        self.windows.add(VFIOHostDMAWindow(start, start + size - 1, IOMMU_PAGE_SIZE))

    def add_window(self, section: MemoryRegionSection) -> None:
        """Make sure that the host's window holds ``section``.

        :raise OSError: EINVAL when it does not.
        """
        if not self.queue.lost and self.windows.lookup(section.range) is None:
            raise OSError(errno.EINVAL, f"the container can't map {section.range}: no host window holds it")

    def del_window(self, section: MemoryRegionSection) -> None:
        """The host's window stays."""
