"""The sPAPR TCE container, version 1: the 32-bit window alone, and every page pinned as it is mapped.

ENABLE counts the whole window against the memlock limit, however little of it will be mapped, because the limit cannot
be consulted at each mapping; so a page that is mapped counts nothing more. A TCE that is replaced or cleared unpins its
page. One container serves one group: its table is not shared among PEs.

What both versions share is in :mod:`vfio_model.host.spapr_container`.

Sources: the kernel's ``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note", items 1 to 3) and
``include/uapi/linux/vfio.h``, ``VFIO_IOMMU_ENABLE``.
"""

from __future__ import annotations

from errno import EBUSY, EFAULT, ENODEV, EPERM
from typing import ClassVar

from vfio_model.host.group import Group
from vfio_model.host.mm import Mm, Region, Run
from vfio_model.host.pending import Revocation
from vfio_model.host.spapr_container import COMMON_HANDLERS, Handler, SpaprTables
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import TceTable
from vfio_model.host.topology import GroupSpec
from vfio_model.uapi.vfio import Ioctl, SpaprTceInfo


class SpaprV1Container(SpaprTables):
    """``VFIO_SPAPR_TCE_IOMMU``."""

    def __init__(self, memory: TableMemory, host_page: int) -> None:
        super().__init__(memory, host_page)
        self.counted = 0
        """Host pages that ENABLE counted."""

    def _check_group(self, group: Group) -> None:
        if self.groups:
            raise OSError(EBUSY, f"group {self.groups[0].id} is attached, and a v1 container serves one group")

    def _describe(self, spec: GroupSpec) -> SpaprTceInfo:
        return SpaprTceInfo(dma32_window_start=spec.dma32_start, dma32_window_size=spec.dma32_size)

    def _find_page(self, mm: Mm, ua: int, table: TceTable) -> tuple[Region, Run]:
        region = mm.pinning(ua, table.page)
        if region is None:
            raise OSError(EFAULT, f"{ua:#x} is not mapped by this process")
        assert region.page_shift >= table.page_shift, "the window has the smallest pages there are"
        return region, region.runs[0]

    def _find_stretch(self, mm: Mm, ua: int, size: int) -> Region | None:
        return mm.pinning(ua, size)

    def _let_go(self, revocation: Revocation) -> None:
        if self.enabled:
            mm, counted = self._bound(), self.counted
            revocation.later((), lambda: mm.unaccount(counted))

    def _enable(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if self.enabled:
            raise OSError(EBUSY, "the container is enabled already")
        if not self.groups:
            raise OSError(ENODEV, "no group is attached")
        size = self.groups[0].spec.dma32_size
        if not size:
            raise OSError(EPERM, f"group {self.groups[0].id} has no 32-bit window")
        self._bind(mm)
        self.counted = size // self.host_page
        mm.account(self.counted)
        self.enabled = True
        return b""

    def _disable(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if self.enabled:
            self.enabled = False
            self._bound().unaccount(self.counted)
        return b""

    handlers: ClassVar[dict[int, Handler]] = COMMON_HANDLERS | {
        Ioctl.VFIO_IOMMU_ENABLE: _enable,
        Ioctl.VFIO_IOMMU_DISABLE: _disable,
    }
