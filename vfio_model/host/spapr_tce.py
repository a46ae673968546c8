"""The sPAPR TCE container, version 2: memory is registered first, windows are made on demand.

What a client registers is pinned and counted once per process; a MAP_DMA then only looks the page up and counts the TCE
against its region, so a mapping can neither sleep nor run into the memlock limit. A window counts its table's pages.

The order of the checks is the interface here as much as the effects are: clients tell errors apart by it. Where the
kernel's own macros return 1 for a misaligned address, and where a region that still has mappings can be unregistered in
appearance only, this container answers EINVAL and EBUSY, as was meant.

Who waits for whom: nothing here waits. What takes a right away stores the new entries and puts the rest on the
:class:`~vfio_model.host.pending.Revocation`.

Sources: ``include/uapi/linux/vfio.h`` ("API for SPAPR TCE VFIO IOMMU") and the kernel's
``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note").
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from errno import EBUSY, EFAULT, EINVAL, ENODEV, ENOENT, ENOSPC, ENOTTY, ENXIO, EPERM

from vfio_model.host.container import copy_in, fields_in, pack_int
from vfio_model.host.eeh import pe_op
from vfio_model.host.group import Group
from vfio_model.host.mm import Mm, Region
from vfio_model.host.pending import Revocation
from vfio_model.host.platform import PlatformName, table_geometry, table_pages
from vfio_model.host.spapr_batch import map_pages, unmap_pages
from vfio_model.host.spapr_map import MapRequest, map_range
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import Dropped, TceTable, give_back
from vfio_model.host.topology import MAX_WINDOWS, GroupSpec
from vfio_model.uapi.vfio import (
    SPAPR_TCE_INFO_MIN_SIZE,
    VFIO_IOMMU_SPAPR_INFO_DDW,
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    Ioctl,
    SpaprRegisterMemory,
    SpaprTceCreate,
    SpaprTceInfo,
    SpaprTceRemove,
)

_MAP_FLAGS = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)
_MAP_DMA, _UNMAP_DMA = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
_DEFAULT_PAGE_SHIFT = 12

_Handler = Callable[["SpaprTceContainer", Mm, bytes, Revocation], bytes]


class SpaprTceContainer:
    """``VFIO_SPAPR_TCE_v2_IOMMU``. Table memory comes from ``memory``; ``host_page`` in bytes."""

    def __init__(self, memory: TableMemory, host_page: int) -> None:
        self.memory, self.host_page = memory, host_page
        self.domain_words = memory.words
        self.groups: list[Group] = []
        self.tables: list[TceTable | None] = [None] * MAX_WINDOWS
        self.mm: Mm | None = None
        self.enabled = False
        self.default_pending = False
        """The 32-bit window is to be made when it is first needed."""
        self.registered: dict[int, Region] = {}

    # Groups

    @property
    def lanes(self) -> list[str]:
        """Devices that can walk these tables."""
        return [name for group in self.groups for name in group.lanes]

    def attach(self, group: Group) -> None:
        """Program the windows there are into ``group``.

        :raise OSError: EINVAL for a group without hardware tables or without dynamic windows, ENODEV for one without a
            table group, EBUSY for one that is in already, EPERM when its tables are of another kind than the others'.
        """
        if group.iommu == "emulated":
            raise OSError(EINVAL, f"group {group.id} has an emulated IOMMU")
        if group.iommu == "none":
            raise OSError(ENODEV, f"group {group.id} has no table group")
        if not group.spec.ddw:
            raise OSError(EINVAL, f"group {group.id} has no dynamic windows, which a v2 container needs")
        if group in self.groups:
            raise OSError(EBUSY, f"group {group.id} is attached already")
        if self.groups and group.iommu != self.groups[0].iommu:
            raise OSError(EPERM, f"group {group.id} has {group.iommu} tables, the container {self.groups[0].iommu}")
        if not self.groups and self.tables[0] is None:
            self.default_pending = True
        self.groups.append(group)
        for table in self.tables:
            if table is not None:
                group.set_window(table.slot, table.record)

    def detach(self, group: Group, revocation: Revocation) -> None:
        """Take all windows from ``group``; its devices' DMA faults from now on."""
        lanes = group.lanes
        for table in self.tables:
            if table is not None:
                group.set_window(table.slot, 0)
                revocation.later(lanes, _nothing)
        self.groups.remove(group)

    def release(self, revocation: Revocation) -> None:
        """Free every table and let go of every registered region."""
        self.default_pending = False
        for table in self.tables:
            if table is not None:
                self._remove(table, revocation)
        for group in self.groups:
            if group.lanes:
                revocation.later(group.lanes, _nothing)
        self.groups.clear()
        for region in self.registered.values():
            revocation.later((), self._putting(region))
        self.registered.clear()
        self.enabled = False

    def _putting(self, region: Region) -> Callable[[], None]:
        mm = self._bound()
        return lambda: mm.put(region)

    # Entry

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """:raise OSError: EPERM when the container serves another process, ENOTTY for what is no ioctl of version 2."""
        if self.mm is not None and self.mm is not mm:
            raise OSError(EPERM, "the container belongs to another process")
        handler = _HANDLERS.get(cmd)
        if handler is None:
            raise OSError(ENOTTY, f"ioctl {cmd:#x} is none of a v2 container")
        return handler(self, mm, arg, revocation)

    def ioctl_many(self, mm: Mm, cmd: int, args: memoryview, count: int, revocation: Revocation) -> bool:
        """Many single pages at once, where nothing about them is unusual."""
        if self.mm is not mm or not self.enabled or self.default_pending:
            return False
        if cmd == _MAP_DMA:
            return map_pages(self.tables, mm, args, count)
        if cmd == _UNMAP_DMA:
            dropped = unmap_pages(self.tables, args, count)
            if dropped is None:
                return False
            self._give_back_later(dropped, revocation)
            return True
        return False

    def _bound(self) -> Mm:
        assert self.mm is not None, "what has mappings or regions is bound to a process"
        return self.mm

    def _bind(self, mm: Mm) -> None:
        if self.mm is None:
            self.mm = mm

    def _first(self) -> GroupSpec:
        if not self.groups:
            raise OSError(ENXIO, "no group is attached")
        return self.groups[0].spec

    def _give_back_later(self, dropped: Dropped, revocation: Revocation) -> None:
        if dropped:
            mm = self._bound()
            revocation.later(self.lanes, lambda: give_back(mm, dropped))

    def _find(self, iova: int) -> TceTable | None:
        for table in self.tables:
            if table is not None and table.start <= iova <= table.last:
                return table
        return None

    # Information

    def _get_info(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        spec = self._first()
        if len(arg) < SPAPR_TCE_INFO_MIN_SIZE:
            raise OSError(EFAULT, f"SpaprTceInfo: {len(arg)} bytes of {SPAPR_TCE_INFO_MIN_SIZE} can be read")
        argsz = int.from_bytes(arg[:4], sys.byteorder)
        if argsz < SPAPR_TCE_INFO_MIN_SIZE:
            raise OSError(EINVAL, f"argsz {argsz} is below {SPAPR_TCE_INFO_MIN_SIZE}")
        answer = SpaprTceInfo(
            argsz,
            VFIO_IOMMU_SPAPR_INFO_DDW,
            spec.dma32_start,
            spec.dma32_size,
            spec.pgsizes,
            spec.max_windows,
            self._levels(),
        ).pack()
        known = SpaprTceInfo.SIZE if argsz >= SpaprTceInfo.SIZE else SPAPR_TCE_INFO_MIN_SIZE
        if len(arg) < known:
            raise OSError(EFAULT, f"SpaprTceInfo: {known} bytes do not fit {len(arg)}")
        return answer[:known] + arg[known:]

    def _levels(self) -> int:
        return 1 if self.groups[0].iommu == "pseries" else self._first().levels

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

    # Mappings

    def _map(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if not self.enabled:
            raise OSError(EPERM, "nothing was registered yet")
        _, flags, vaddr, iova, size = fields_in(DmaMap, arg)
        if flags & ~_MAP_FLAGS:
            raise OSError(EINVAL, f"flags {flags:#x} are not all known")
        self._make_default(mm)
        table = self._find(iova)
        if table is None:
            raise OSError(ENXIO, f"{iova:#x} lies in no window")
        low = table.page - 1
        if size & low or vaddr & low:
            raise OSError(EINVAL, f"size {size:#x} or vaddr {vaddr:#x}: not whole IOMMU pages")
        if not flags:
            raise OSError(EINVAL, "neither READ nor WRITE")
        if iova & low or iova + size - 1 > table.last:
            raise OSError(EINVAL, f"iova {iova:#x} is misaligned or the end is beyond the window")
        dropped, error = map_range(table, mm, MapRequest(flags, vaddr, iova, size))
        self._give_back_later(dropped, revocation)
        if error is not None:
            raise error
        return arg

    def _unmap(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if not self.enabled:
            raise OSError(EPERM, "nothing was registered yet")
        _, flags, iova, size = fields_in(DmaUnmap, arg)
        if flags:
            raise OSError(EINVAL, f"flags {flags:#x} are not known")
        table = self._find(iova)
        if table is None:
            raise OSError(ENXIO, f"{iova:#x} lies in no window")
        if (size | iova) & table.page - 1 or iova + size - 1 > table.last:
            raise OSError(EINVAL, f"{iova:#x}, {size:#x} bytes: not whole pages of the window")
        dropped = table.clear(iova - table.start >> table.page_shift, size >> table.page_shift)
        self._give_back_later(dropped, revocation)
        return arg

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

    def _make_default(self, mm: Mm) -> None:
        if self.default_pending:
            if not self.groups:
                raise OSError(ENODEV, "no group is attached")
            self._make(mm, _DEFAULT_PAGE_SHIFT, self._first().dma32_size, 1)
            self.default_pending = False

    def _make(self, mm: Mm, page_shift: int, window_size: int, levels: int) -> int:
        spec = self._first()
        platform: PlatformName = "pseries" if self.groups[0].iommu == "pseries" else "powernv"
        slot = next((slot for slot in range(spec.max_windows) if self.tables[slot] is None), -1)
        if slot < 0:
            raise OSError(ENOSPC, f"all {spec.max_windows} windows are in use")
        if page_shift > 63 or not spec.pgsizes & 1 << page_shift:
            raise OSError(EINVAL, f"page shift {page_shift} is not among the page sizes {spec.pgsizes:#x}")
        if not spec.create_window:
            raise OSError(EPERM, "the platform cannot create windows")
        if platform == "powernv" and levels > spec.levels:
            raise OSError(EINVAL, f"levels {levels} exceed the group's {spec.levels}")
        geometry = table_geometry(platform, page_shift, window_size, levels, self.host_page)
        pages = table_pages(platform, geometry, self.host_page)
        mm.account(pages)
        try:
            table = TceTable(self.memory, geometry, spec.dma64_start if slot else spec.dma32_start, slot, pages)
        except OSError:
            mm.unaccount(pages)
            raise
        self.tables[slot] = table
        for group in self.groups:
            group.set_window(slot, table.record)
        return table.start

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

    def _remove(self, table: TceTable, revocation: Revocation) -> None:
        lanes, mm = self.lanes, self._bound()
        for group in self.groups:
            group.set_window(table.slot, 0)
        self.tables[table.slot] = None
        dropped = table.clear_all()

        def finish() -> None:
            give_back(mm, dropped)
            table.free()
            mm.unaccount(table.accounted)

        revocation.later(lanes, finish)

    # Errors

    def _eeh_pe_op(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        """On each group in turn; the first that fails or is not in the normal state ends it."""
        state = 0
        for group in self.groups:
            state = pe_op(group, arg, revocation)
            if state:
                break
        return pack_int(state)


def _nothing() -> None:
    """The end of a revocation that only has to wait."""


_HANDLERS: dict[int, _Handler] = {
    Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO: SpaprTceContainer._get_info,
    Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY: SpaprTceContainer._register,
    Ioctl.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY: SpaprTceContainer._unregister,
    Ioctl.VFIO_IOMMU_MAP_DMA: SpaprTceContainer._map,
    Ioctl.VFIO_IOMMU_UNMAP_DMA: SpaprTceContainer._unmap,
    Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE: SpaprTceContainer._create,
    Ioctl.VFIO_IOMMU_SPAPR_TCE_REMOVE: SpaprTceContainer._tce_remove,
    Ioctl.VFIO_EEH_PE_OP: SpaprTceContainer._eeh_pe_op,
}
