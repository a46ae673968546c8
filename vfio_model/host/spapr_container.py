"""What both versions of the sPAPR TCE container have in common: groups, windows and their tables, mappings, EEH.

The versions differ in how memory may come to be mapped. Version 2 (:mod:`vfio_model.host.spapr_tce`) registers it
before and makes windows on demand; version 1 (:mod:`vfio_model.host.spapr_v1`) pins each page as it is mapped, and has
the 32-bit window. In both that window is made when it is first needed.

The order of the checks is the interface here as much as the effects are: clients tell errors apart by it. Where the
kernel's own macros return 1 for a misaligned address, this container answers EINVAL, as was meant.

Who waits for whom: nothing here waits. What takes a right away stores the new entries and puts the rest on the
:class:`~vfio_model.host.pending.Revocation`.

Sources: ``include/uapi/linux/vfio.h`` ("API for SPAPR TCE VFIO IOMMU") and the kernel's
``Documentation/driver-api/vfio.rst`` ("PPC64 sPAPR implementation note").
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from errno import EBUSY, EFAULT, EINVAL, ENODEV, ENOSPC, ENOTTY, ENXIO, EPERM
from typing import Any, ClassVar

from vfio_model.host.container import fields_in, pack_int
from vfio_model.host.eeh import pe_op
from vfio_model.host.group import Group
from vfio_model.host.mm import Mm, Region, Run
from vfio_model.host.pending import Revocation, Work
from vfio_model.host.platform import PlatformName, table_geometry, table_pages
from vfio_model.host.spapr_batch import map_pages, unmap_pages
from vfio_model.host.spapr_map import MapRequest, mapping
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import Dropped, TceTable, give_back
from vfio_model.host.topology import MAX_WINDOWS, GroupSpec
from vfio_model.uapi.vfio import (
    SPAPR_TCE_INFO_MIN_SIZE,
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    Ioctl,
    SpaprTceInfo,
)

_MAP_FLAGS = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)
_MAP_DMA, _UNMAP_DMA = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
DEFAULT_PAGE_SHIFT = 12
"""The 32-bit window has IOMMU pages of 4 KiB."""

Handler = Callable[[Any, Mm, bytes, Revocation], bytes]
"""A method of a container: one ioctl."""


class SpaprTables(ABC):
    """A container of either version. Table memory comes from ``memory``; ``host_page`` in bytes."""

    handlers: ClassVar[dict[int, Handler]]
    """What ioctls there are."""

    def __init__(self, memory: TableMemory, host_page: int) -> None:
        self.memory, self.host_page = memory, host_page
        self.domain_words = memory.words
        self.groups: list[Group] = []
        self.tables: list[TceTable | None] = [None] * MAX_WINDOWS
        self.mm: Mm | None = None
        self.enabled = False
        self.default_pending = False
        """The 32-bit window is to be made when it is first needed."""

    # What the versions do each in their way

    @abstractmethod
    def _check_group(self, group: Group) -> None:
        """:raise OSError: when ``group`` has tables and still does not fit this version."""

    @abstractmethod
    def _describe(self, spec: GroupSpec) -> SpaprTceInfo:
        """What GET_INFO says, argsz apart."""

    @abstractmethod
    def _find_page(self, mm: Mm, ua: int, table: TceTable) -> tuple[Region, Run]:
        """What holds the IOMMU page of ``table`` at ``ua`` in place. :raise OSError: when it cannot be mapped."""

    @abstractmethod
    def _find_stretch(self, mm: Mm, ua: int, size: int) -> Region | None:
        """What holds all ``size`` bytes from ``ua``, if it is one thing."""

    @abstractmethod
    def _let_go(self, revocation: Revocation) -> None:
        """The container ends and has no tables any more: give back what memory was held."""

    # Groups

    @property
    def lanes(self) -> list[str]:
        """Devices that can walk these tables."""
        return [name for group in self.groups for name in group.lanes]

    def attach(self, group: Group) -> None:
        """Program the windows there are into ``group``.

        :raise OSError: EINVAL for a group without hardware tables, ENODEV for one without a table group, then what the
            version says, EBUSY for one that is in already, EPERM when its tables are of another kind than the others'.
        """
        if group.iommu == "emulated":
            raise OSError(EINVAL, f"group {group.id} has an emulated IOMMU")
        if group.iommu == "none":
            raise OSError(ENODEV, f"group {group.id} has no table group")
        self._check_group(group)
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
        """Free every table, and give back what memory was held."""
        self.default_pending = False
        for table in self.tables:
            if table is not None:
                self._remove(table, revocation)
        for group in self.groups:
            if group.lanes:
                revocation.later(group.lanes, _nothing)
        self.groups.clear()
        self._let_go(revocation)
        self.enabled = False

    # Entry

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """One ioctl.

        :raise OSError: EPERM when the container serves another process, ENOTTY for what is no ioctl of its version.
        """
        if self.mm is not None and self.mm is not mm:
            raise OSError(EPERM, "the container belongs to another process")
        handler = self.handlers.get(cmd)
        if handler is None:
            raise OSError(ENOTTY, f"ioctl {cmd:#x} is none of this version of the container")
        return handler(self, mm, arg, revocation)

    def ioctl_many(self, mm: Mm, cmd: int, args: memoryview, count: int, revocation: Revocation) -> bool:
        """Many single pages at once, where nothing about them is unusual."""
        if self.mm is not mm or not self.enabled or self.default_pending:
            return False
        if cmd == _MAP_DMA:
            return map_pages(self.tables, mm, args, count, self._find_stretch)
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
        answer = self._describe(spec)
        answer.argsz = argsz
        known = SpaprTceInfo.SIZE if argsz >= SpaprTceInfo.SIZE else SPAPR_TCE_INFO_MIN_SIZE
        if len(arg) < known:
            raise OSError(EFAULT, f"SpaprTceInfo: {known} bytes do not fit {len(arg)}")
        return answer.pack()[:known] + arg[known:]

    # Mappings

    def _map(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if not self.enabled:
            raise OSError(EPERM, "the container is not enabled")
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
        revocation.run(self._mapping(table, mm, MapRequest(flags, vaddr, iova, size), revocation))
        return arg

    def _mapping(self, table: TceTable, mm: Mm, request: MapRequest, revocation: Revocation) -> Work:
        dropped: Dropped = {}
        try:
            yield from mapping(table, mm, request, dropped, revocation, self._find_page)
        finally:
            self._give_back_later(dropped, revocation)

    def _unmap(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if not self.enabled:
            raise OSError(EPERM, "the container is not enabled")
        _, flags, iova, size = fields_in(DmaUnmap, arg)
        if flags:
            raise OSError(EINVAL, f"flags {flags:#x} are not known")
        table = self._find(iova)
        if table is None:
            raise OSError(ENXIO, f"{iova:#x} lies in no window")
        if (size | iova) & table.page - 1 or iova + size - 1 > table.last:
            raise OSError(EINVAL, f"{iova:#x}, {size:#x} bytes: not whole pages of the window")
        first, count = iova - table.start >> table.page_shift, size >> table.page_shift
        if count == 1:
            self._give_back_later(table.clear(first, 1), revocation)
        else:
            revocation.run(self._unmapping(table, first, count, revocation))
        return arg

    def _unmapping(self, table: TceTable, first: int, count: int, revocation: Revocation) -> Work:
        dropped: Dropped = {}
        yield from table.clearing(first, count, dropped, revocation)
        self._give_back_later(dropped, revocation)

    # Windows

    def _make_default(self, mm: Mm) -> None:
        if self.default_pending:
            if not self.groups:
                raise OSError(ENODEV, "no group is attached")
            self._make(mm, DEFAULT_PAGE_SHIFT, self._first().dma32_size, 1)
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

    def _remove(self, table: TceTable, revocation: Revocation) -> None:
        lanes, mm = self.lanes, self._bound()
        for group in self.groups:
            group.set_window(table.slot, 0)
        self.tables[table.slot] = None
        dropped: Dropped = {}
        revocation.run(table.clearing(0, table.entries, dropped, revocation))

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


COMMON_HANDLERS: dict[int, Handler] = {
    Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO: SpaprTables._get_info,
    Ioctl.VFIO_IOMMU_MAP_DMA: SpaprTables._map,
    Ioctl.VFIO_IOMMU_UNMAP_DMA: SpaprTables._unmap,
    Ioctl.VFIO_EEH_PE_OP: SpaprTables._eeh_pe_op,
}
"""The ioctls of both versions."""
