"""The sPAPR TCE container, version 2: memory is registered first, windows are made on demand.

What a client registers is pinned and counted once per process; a MAP_DMA then only looks the page up and counts the TCE
against its region, so a mapping can neither sleep nor run into the memlock limit. A window counts its table's pages.

What both versions share is in :mod:`vfio_model.host.spapr_container`. Where the kernel lets a region that still has
mappings be unregistered in appearance only, this container answers EBUSY, as was meant.

Sources: as there.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EBUSY, EINVAL, ENOENT, EPERM
from typing import ClassVar

from vfio_model.host.container import copy_in
from vfio_model.host.group import Group
from vfio_model.host.mm import Mm, Region, Run
from vfio_model.host.pending import Revocation
from vfio_model.host.spapr_container import COMMON_HANDLERS, Handler, SpaprTables
from vfio_model.host.spapr_map import find_page
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import TceTable
from vfio_model.host.topology import GroupSpec
from vfio_model.uapi.vfio import (
    VFIO_IOMMU_SPAPR_INFO_DDW,
    Ioctl,
    SpaprRegisterMemory,
    SpaprTceCreate,
    SpaprTceInfo,
    SpaprTceRemove,
)


class SpaprTceContainer(SpaprTables):
    """``VFIO_SPAPR_TCE_v2_IOMMU``."""

    def __init__(self, memory: TableMemory, host_page: int) -> None:
        super().__init__(memory, host_page)
        self.registered: dict[int, Region] = {}

    def _check_group(self, group: Group) -> None:
        if not group.spec.ddw:
            raise OSError(EINVAL, f"group {group.id} has no dynamic windows, which a v2 container needs")

    def _describe(self, spec: GroupSpec) -> SpaprTceInfo:
        return SpaprTceInfo(
            0,
            VFIO_IOMMU_SPAPR_INFO_DDW,
            spec.dma32_start,
            spec.dma32_size,
            spec.pgsizes,
            spec.max_windows,
            self._levels(),
        )

    def _levels(self) -> int:
        return 1 if self.groups[0].iommu == "pseries" else self._first().levels

    def _find_page(self, mm: Mm, ua: int, table: TceTable) -> tuple[Region, Run]:
        return find_page(mm, ua, table)

    def _find_stretch(self, mm: Mm, ua: int, size: int) -> Region | None:
        return mm.lookup(ua, size)

    def _let_go(self, revocation: Revocation) -> None:
        for region in self.registered.values():
            revocation.later((), self._putting(region))
        self.registered.clear()

    def _putting(self, region: Region) -> Callable[[], None]:
        mm = self._bound()
        return lambda: mm.put(region)

    # Preregistration

    def _register(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        self._bind(mm)
        request = copy_in(SpaprRegisterMemory, arg)
        pages = self._check_region(request)
        known = mm.exact(request.vaddr, pages)
        if known is not None and known.id in self.registered:
            raise OSError(EBUSY, f"{request.vaddr:#x} is registered with this container already")
        if known is None:
            known = mm.register(request.vaddr, pages)
        else:
            known.used += 1
        self.registered[known.id] = known
        self.enabled = True
        return arg

    def _unregister(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if self.mm is None:
            raise OSError(EPERM, "the container was never used to register or create anything")
        request = copy_in(SpaprRegisterMemory, arg)
        region = mm.exact(request.vaddr, self._check_region(request))
        if region is None or region.id not in self.registered:
            raise OSError(ENOENT, f"{request.vaddr:#x}, {request.size:#x} bytes: not registered with this container")
        if region.used == 1 and region.mapped:
            raise OSError(EBUSY, f"{region.mapped} TCEs still point into {request.vaddr:#x}")
        del self.registered[region.id]
        mm.put(region)
        return arg

    def _check_region(self, request: SpaprRegisterMemory) -> int:
        if request.flags:
            raise OSError(EINVAL, f"flags {request.flags:#x} are not known")
        low = self.host_page - 1
        if request.vaddr & low or request.size & low or not request.size or request.vaddr + request.size >= 1 << 64:
            raise OSError(EINVAL, f"{request.vaddr:#x}, {request.size:#x} bytes: not whole host pages")
        return request.size // self.host_page

    # Windows

    def _create(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        self._bind(mm)
        self._first()
        request = copy_in(SpaprTceCreate, arg)
        if request.flags:
            raise OSError(EINVAL, f"flags {request.flags:#x} are not known")
        self._make_default(mm)
        request.start_addr = self._make(mm, request.page_shift, request.window_size, request.levels)
        return request.pack() + arg[SpaprTceCreate.SIZE :]

    def _tce_remove(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        self._bind(mm)
        self._first()
        request = copy_in(SpaprTceRemove, arg)
        if request.flags:
            raise OSError(EINVAL, f"flags {request.flags:#x} are not known")
        if self.default_pending and request.start_addr in (0, self._first().dma32_start):
            self.default_pending = False
            return arg
        table = self._find(request.start_addr)
        if table is None:
            raise OSError(EINVAL, f"{request.start_addr:#x} lies in no window")
        if not self._first().unset_window:
            raise OSError(EPERM, "the platform cannot take a window away")
        self._remove(table, revocation)
        return arg

    handlers: ClassVar[dict[int, Handler]] = COMMON_HANDLERS | {
        Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY: _register,
        Ioctl.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY: _unregister,
        Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE: _create,
        Ioctl.VFIO_IOMMU_SPAPR_TCE_REMOVE: _tce_remove,
    }
