"""The type 1 container, versions 1 and 2: every mapping pins its memory and counts it against the memlock limit.

There is one domain with one IO page table behind all groups; a mapping is made and removed as a whole. Version 2
refuses an unmap that would cut one; version 1 does nothing for a range that begins inside one, and removes any other
that the range touches. The smallest page is the host's: the IOMMU's smaller ones are used, not shown.

The order of the checks is the interface here as much as the effects are. Where a dirty bitmap is passed by address, the
bytes travel behind the structure, and the address is an offset in the argument.

Who waits for whom: nothing here waits. What takes a right away stores the new entries and puts the rest on the
:class:`~vfio_model.host.pending.Revocation`; so does switching dirty tracking on.

Sources: ``include/uapi/linux/vfio.h`` ("API for Type1 VFIO IOMMU", version 2 and dirty page tracking) and the kernel's
``Documentation/driver-api/vfio.rst``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EACCES, EBUSY, EEXIST, EFAULT, EINVAL, ENODEV, ENOENT, ENOSPC, ENOTTY, EOVERFLOW

from vfio_model.host.container import fields_in
from vfio_model.host.group import Group
from vfio_model.host.mm import Mm, Region
from vfio_model.host.pending import Revocation, Work
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.type1_batch import batch_block, batch_range, store_block
from vfio_model.host.type1_dirty import DirtyTracking, bitmap_of_unmap
from vfio_model.host.type1_info import get_info
from vfio_model.host.type1_mappings import Block, Mappings
from vfio_model.host.type1_table import PGSIZES, IoPageTable
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import (
    DmaMap,
    DmaMapFlags,
    DmaUnmap,
    DmaUnmapFlags,
    Ioctl,
)

DMA_ENTRY_LIMIT = 65535
"""Mappings that one container may have (the module parameter ``dma_entry_limit``)."""
ALL_IOVAS = ((0, U64_MAX),)

_PERM = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)
_MAP_VADDR = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_VADDR)
_GET_BITMAP, _ALL, _UNMAP_VADDR = (
    int(DmaUnmapFlags.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP),
    int(DmaUnmapFlags.VFIO_DMA_UNMAP_FLAG_ALL),
    int(DmaUnmapFlags.VFIO_DMA_UNMAP_FLAG_VADDR),
)
_MAP_DMA, _UNMAP_DMA = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)

_Handler = Callable[["Type1Container", Mm, bytes, Revocation], bytes]


class Type1Container:
    """``VFIO_TYPE1_IOMMU``, with ``v2`` ``VFIO_TYPE1v2_IOMMU``.

    Table memory comes from ``memory``; ``host_page`` in bytes; ``iova_ranges`` are the bus addresses that can be
    mapped, first and last byte of each, in order and apart.

    :raise OSError: ENOMEM when the table does not fit ``memory``.
    """

    def __init__(
        self,
        memory: TableMemory,
        host_page: int,
        *,
        v2: bool = True,
        iova_ranges: Sequence[tuple[int, int]] = ALL_IOVAS,
    ) -> None:
        self.memory, self.host_page, self.v2 = memory, host_page, v2
        self.iova_ranges = tuple((first, last) for first, last in iova_ranges)
        self.domain_words = memory.words
        self.groups: list[Group] = []
        self.mm: Mm | None = None
        self.table = IoPageTable(memory, self.iova_ranges[-1][1].bit_length())
        self.mappings = Mappings()
        self.dirty = DirtyTracking(self.table, self.mappings, self.groups, host_page)

    # Groups

    @property
    def lanes(self) -> list[str]:
        """Devices that can walk the table."""
        return [name for group in self.groups for name in group.lanes]

    @property
    def pgsizes(self) -> int:
        """Sizes that can be mapped, as far as a client is told."""
        return (PGSIZES & -self.host_page) | self.host_page

    @property
    def dma_avail(self) -> int:
        """Mappings that can still be made."""
        return DMA_ENTRY_LIMIT - self.mappings.count

    def attach(self, group: Group) -> None:
        """Give ``group`` the table.

        :raise OSError: ENODEV for a group without an IOMMU, EBUSY for one that is in already, or while the address
            behind a mapping is not known.
        """
        if group.iommu == "none":
            raise OSError(ENODEV, f"group {group.id} has no IOMMU")
        if group in self.groups:
            raise OSError(EBUSY, f"group {group.id} is attached already")
        if any(block.vaddr_invalid for block in self.mappings):
            raise OSError(EBUSY, "a mapping has no valid address")
        self.dirty.group_comes(group)
        self.groups.append(group)
        group.set_window(0, self.table.record)

    def detach(self, group: Group, revocation: Revocation) -> None:
        """Take the table from ``group``; its devices' DMA faults from now on. What they had written stays so."""
        group.set_window(0, 0)
        self.groups.remove(group)
        self.dirty.group_goes(group)
        revocation.later(group.lanes, lambda: group.set_dirty(False))

    def release(self, revocation: Revocation) -> None:
        """Unmap everything and let go of the groups."""
        self.dirty.stop()
        for group in self.groups:
            group.set_window(0, 0)
        if self.lanes:
            revocation.later(self.lanes, lambda: None)
        self._drop(self.mappings.take(0, U64_MAX), revocation)
        self.groups.clear()

    # Entry

    def ioctl(self, mm: Mm, cmd: int, arg: bytes, revocation: Revocation) -> bytes:
        """:raise OSError: ENOTTY for what is no ioctl of type 1."""
        handler = _HANDLERS.get(cmd)
        if handler is None:
            raise OSError(ENOTTY, f"ioctl {cmd:#x} is none of a type 1 container")
        return handler(self, mm, arg, revocation)

    def ioctl_many(self, mm: Mm, cmd: int, args: memoryview, count: int, revocation: Revocation) -> bool:
        """Many single pages at once, where nothing about them is unusual."""
        if cmd == _MAP_DMA:
            return self._map_many(mm, args, count)
        if cmd == _UNMAP_DMA:
            span = batch_range(self.mappings, args, count, self.host_page)
            if span is not None:
                self._drop(self.mappings.take(*span), revocation)
                return True
        return False

    def _map_many(self, mm: Mm, args: memoryview, count: int) -> bool:
        made = batch_block(mm, args, count) if count <= self.dma_avail else None
        if made is None:
            return False
        block, tces = made
        if self.mappings.overlapping(block.iova, block.end - 1) or not self._reachable(block.iova, block.end - 1):
            return False
        self._bind(mm)
        return store_block(self.table, self.mappings, block, tces)

    def _dirty_pages(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        if not self.v2:
            raise OSError(EACCES, "dirty pages are tracked by version 2")
        return self.dirty.ioctl(arg, revocation)

    def _bind(self, mm: Mm) -> None:
        if self.mm is None:
            self.mm = mm

    # Mappings

    def _reachable(self, first: int, last: int) -> bool:
        return any(start <= first and last <= end for start, end in self.iova_ranges)

    def _map(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        _, flags, vaddr, iova, size = fields_in(DmaMap, arg)
        if flags & ~(_PERM | _MAP_VADDR):
            raise OSError(EINVAL, f"flags {flags:#x} are not all known")
        if not size:
            raise OSError(EINVAL, "size is 0")
        last = iova + size - 1
        if last > U64_MAX or vaddr + size - 1 > U64_MAX:
            raise OSError(EOVERFLOW, f"{size:#x} bytes from {iova:#x} or {vaddr:#x} are beyond 2^64")
        perm = flags & _PERM
        if bool(perm) == bool(flags & _MAP_VADDR):
            raise OSError(EINVAL, "neither READ nor WRITE" if not perm else "VADDR keeps the permissions")
        if (size | iova | vaddr) & self.host_page - 1:
            raise OSError(EINVAL, f"size {size:#x}, iova {iova:#x} or vaddr {vaddr:#x}: not whole pages")
        if flags & _MAP_VADDR:
            self._new_vaddr(iova, last)
            return arg
        if self.mappings.overlapping(iova, last):
            raise OSError(EEXIST, f"something is mapped in {iova:#x}..{last:#x}")
        if not self.dma_avail:
            raise OSError(ENOSPC, f"{DMA_ENTRY_LIMIT} mappings are all that there may be")
        if not self._reachable(iova, last):
            raise OSError(EINVAL, f"{iova:#x}..{last:#x} is not in the valid IOVA ranges")
        revocation.run(self._storing(mm, Block(iova, size, 1, perm, (), mm), vaddr, revocation))
        return arg

    def _storing(self, mm: Mm, block: Block, vaddr: int, revocation: Revocation) -> Work:
        """What is pinned stays so between the slices."""
        pages = block.size // mm.host_page
        mm.account(pages)
        try:
            block.regions = _regions(mm, vaddr, vaddr + block.size)
        except OSError:
            mm.unaccount(pages)
            raise
        for region in block.regions:
            region.mapped += 1
        try:
            yield from self._store_runs(block, vaddr, revocation)
        except OSError:
            _unpin(block)
            self._retire(revocation)
            raise
        self._bind(mm)
        self.mappings.add(block)

    def _store_runs(self, block: Block, vaddr: int, revocation: Revocation) -> Work:
        done = 0
        for region in block.regions:
            count = min(region.end - vaddr, block.size) - done
            run, at = region.runs[0], vaddr + done
            try:
                yield from self.table.store(block.iova + done, count, run.hpa, at + run.delta, block.perm, revocation)
            except OSError:
                yield from self.table.clearing(block.iova, done, revocation)
                raise
            done += count

    def _new_vaddr(self, iova: int, last: int) -> None:
        if not self.mappings.overlapping(iova, last):
            raise OSError(ENOENT, f"nothing is mapped at {iova:#x}")
        blocks = self.mappings.overlapping(iova, last)
        if self.mappings.at(iova) != (iova, last) or not blocks[0].vaddr_invalid:
            raise OSError(EINVAL, f"{iova:#x}..{last:#x} is no mapping whose address was invalidated")
        for block in self.mappings.take(iova, last):
            block.vaddr_invalid = False
            self.mappings.add(block)

    # Unmapping

    def _unmap(self, mm: Mm, arg: bytes, revocation: Revocation) -> bytes:
        argsz, flags, iova, size = fields_in(DmaUnmap, arg)
        if flags & ~(_GET_BITMAP | _ALL | _UNMAP_VADDR) or (flags & _GET_BITMAP and flags & (_ALL | _UNMAP_VADDR)):
            raise OSError(EINVAL, f"flags {flags:#x} are not known, or not together")
        bitmap = bitmap_of_unmap(argsz, size, arg) if flags & _GET_BITMAP else None
        first, last = self._unmap_range(flags, iova, size)
        if bitmap is not None and (not self.dirty.on or bitmap.pgsize != self.host_page):
            raise OSError(EINVAL, f"dirty tracking is off, or pages of {bitmap.pgsize:#x} are not tracked")
        if self.v2 and not flags & _ALL and self.mappings.bisected(first, last):
            raise OSError(EINVAL, f"{first:#x}..{last:#x} would cut a mapping")
        covering = self.mappings.at(first)
        if not self.v2 and covering is not None and covering[0] != first:
            return DmaUnmap(argsz, flags, iova, 0).pack() + arg[DmaUnmap.SIZE :]
        if flags & _UNMAP_VADDR:
            return DmaUnmap(argsz, flags, iova, self._invalidate(first, last)).pack() + arg[DmaUnmap.SIZE :]
        taken = self.mappings.take(first, last)
        answer = DmaUnmap(argsz, flags, iova, sum(block.bytes for block in taken)).pack() + arg[DmaUnmap.SIZE :]
        if bitmap is not None:
            self.dirty.collect_later(taken, first, bitmap, answer, revocation)
        self._drop(taken, revocation)
        return answer

    def _unmap_range(self, flags: int, iova: int, size: int) -> tuple[int, int]:
        low = self.host_page - 1
        if flags & _UNMAP_VADDR and any(group.iommu == "emulated" for group in self.groups):
            raise OSError(EBUSY, "a device with an emulated IOMMU needs the addresses")
        if flags & _ALL:
            if iova or size:
                raise OSError(EINVAL, "ALL with an address or a size")
            return 0, U64_MAX
        if iova & low or size & low or not size:
            raise OSError(EINVAL, f"{iova:#x}, {size:#x} bytes: not whole pages")
        if iova + size - 1 > U64_MAX:
            raise OSError(EOVERFLOW, f"{size:#x} bytes from {iova:#x} are beyond 2^64")
        return iova, iova + size - 1

    def _invalidate(self, first: int, last: int) -> int:
        """The addresses behind these mappings are not valid until MAP_DMA with VADDR says new ones; returns bytes."""
        if any(block.vaddr_invalid for block in self.mappings.overlapping(first, last)):
            raise OSError(EINVAL, "an address is invalid already")
        taken = self.mappings.take(first, last)
        for block in taken:
            block.vaddr_invalid = True
            self.mappings.add(block)
        return sum(block.bytes for block in taken)

    def _drop(self, blocks: list[Block], revocation: Revocation) -> None:
        """Clear the entries of ``blocks`` now; unpin when no device can be in the middle of using them."""
        if not blocks:
            return
        revocation.run(self._clearing(blocks, self.lanes, revocation))

    def _clearing(self, blocks: list[Block], lanes: list[str], revocation: Revocation) -> Work:
        for block in blocks:
            yield from self.table.clearing(block.iova, block.bytes, revocation)
        self._retire(revocation, lanes)

        def finish() -> None:
            for block in blocks:
                _unpin(block)

        revocation.later(lanes, finish)

    def _retire(self, revocation: Revocation, lanes: Sequence[str] | None = None) -> None:
        retired = self.table.take_retired()
        if retired:
            revocation.later(self.lanes if lanes is None else lanes, lambda: self.table.give_back(retired))


def _unpin(block: Block) -> None:
    block.mm.unaccount(block.bytes // block.mm.host_page)
    for region in block.regions:
        block.mm.unmapped(region, block.count)


def _regions(mm: Mm, ua: int, end: int) -> tuple[Region, ...]:
    """What pins ``ua``..``end`` (exclusive). :raise OSError: EFAULT where nothing is mapped by the process."""
    regions = []
    while ua < end:
        vma = mm.find(ua)
        region = mm.pinning(ua, min(end, vma.end) - ua) if vma is not None else None
        if region is None:
            raise OSError(EFAULT, f"{ua:#x} is not mapped by this process")
        regions.append(region)
        ua = region.end
    return tuple(regions)


_HANDLERS: dict[int, _Handler] = {
    Ioctl.VFIO_IOMMU_GET_INFO: lambda self, mm, arg, revocation: get_info(
        arg, self.pgsizes, self.iova_ranges, self.dma_avail
    ),
    Ioctl.VFIO_IOMMU_MAP_DMA: Type1Container._map,
    Ioctl.VFIO_IOMMU_UNMAP_DMA: Type1Container._unmap,
    Ioctl.VFIO_IOMMU_DIRTY_PAGES: Type1Container._dirty_pages,
}
