"""``VFIO_IOMMU_DIRTY_PAGES``, and the dirty bitmap of an unmap.

Switching tracking on is a revocation: a section that began before it notes nothing, and must be over before the answer.
Looking at what was written goes in slices, as all work that may be long; that of an unmap waits for its end, and is as
long as one question.
Sources: ``include/uapi/linux/vfio.h``, ``VFIO_IOMMU_DIRTY_PAGES`` and ``VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from errno import EFAULT, EINVAL

from vfio_model.host.container import copy_in
from vfio_model.host.dirty import Collection, Extent, collect, extents
from vfio_model.host.group import Group, HostDevice
from vfio_model.host.pending import Revocation, Work
from vfio_model.host.type1_mappings import Block, Mappings
from vfio_model.host.type1_table import IoPageTable
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import (
    DIRTY_BITMAP_SIZE_MAX,
    Bitmap,
    DirtyBitmap,
    DirtyBitmapGet,
    DirtyPagesFlags,
    DmaUnmap,
    dirty_bitmap_bytes,
)

_START, _STOP, _GET = (
    int(DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_START),
    int(DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP),
    int(DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP),
)

_PAGES_OF_AN_ENTRY = 2
"""Shift: so many pages of 4 KiB are looked at in the time that storing an entry of a table takes."""


class DirtyTracking:
    """Of one container: ``table``, ``mappings`` and ``groups`` are its own, ``page`` its smallest page in bytes."""

    def __init__(self, table: IoPageTable, mappings: Mappings, groups: list[Group], page: int) -> None:
        self.table, self.mappings, self.groups, self.page = table, mappings, groups, page
        self.on = False
        self._closes = 0
        """How often devices of the groups had been closed at the last look."""

    # Groups

    def group_comes(self, group: Group) -> None:
        """``group`` is about to be attached."""
        self._look_for_closed()
        group.set_dirty(self.on)
        self._closes += _closes([group])

    def group_goes(self, group: Group) -> None:
        """``group`` is not attached any more: what its devices had written stays written."""
        if self.on:
            self._mark_all()
        self._closes = _closes(self.groups)

    def _look_for_closed(self) -> None:
        """A device that was closed since the last look may have died between writing and noting it."""
        closes = _closes(self.groups)
        if self.on and closes != self._closes:
            self._mark_all()
        self._closes = closes

    def _mark_all(self) -> None:
        for block in self.mappings:
            block.dirty = True

    def _devices(self) -> list[HostDevice]:
        return [device for group in self.groups for device in group.devices.values()]

    # Entry

    def ioctl(self, arg: bytes, revocation: Revocation) -> bytes:
        """``VFIO_IOMMU_DIRTY_PAGES``. :raise OSError: EINVAL, EFAULT."""
        request = copy_in(DirtyBitmap, arg)
        if request.flags == _START:
            if not self.on:
                self._start(revocation)
        elif request.flags == _STOP:
            self.stop()
        elif request.flags == _GET:
            self._get(request.argsz, arg, revocation)
        else:
            raise OSError(EINVAL, f"flags {request.flags:#x}: one of START, STOP and GET_BITMAP")
        return arg

    def _start(self, revocation: Revocation) -> None:
        self.on = True
        self._closes = _closes(self.groups)
        revocation.run(self._begin(revocation))
        revocation.later(self._lanes, lambda: None)

    def _begin(self, revocation: Revocation) -> Work:
        for block in list(self.mappings):  # what was noted when tracking was on before
            yield from self._collect([block], block.iova, bytearray(self._bytes(block)), revocation)
        for group in self.groups:
            group.set_dirty(True)

    def _collect(self, blocks: Iterable[Block], first: int, bits: bytearray, revocation: Revocation) -> Work:
        collection = Collection(self._devices, self.page, first, bits)
        for extent in extents(self.table, blocks):
            collection.take(extent)
            if revocation.spend((extent.pages >> _PAGES_OF_AN_ENTRY) + 1):
                yield
        collection.end()

    def stop(self) -> None:
        """Note nothing any more. Harmless twice."""
        self.on = False
        for group in self.groups:
            group.set_dirty(False)

    @property
    def _lanes(self) -> list[str]:
        return [name for group in self.groups for name in group.lanes]

    def _bytes(self, block: Block) -> int:
        return dirty_bitmap_bytes(block.bytes // self.page)

    def _get(self, argsz: int, arg: bytes, revocation: Revocation) -> None:
        whole = DirtyBitmap.SIZE + DirtyBitmapGet.SIZE
        if argsz < whole:
            raise OSError(EINVAL, f"argsz {argsz} is below {whole}")
        if len(arg) < whole:
            raise OSError(EFAULT, f"DirtyBitmapGet: {len(arg)} bytes of {whole} can be read")
        wanted = DirtyBitmapGet.unpack(arg[DirtyBitmap.SIZE :])
        if wanted.iova + wanted.size > U64_MAX + 1:
            raise OSError(EINVAL, f"{wanted.size:#x} bytes from {wanted.iova:#x} are beyond 2^64")
        bitmap = Bitmap(wanted.pgsize, wanted.bitmap_size, wanted.data)
        _check_bitmap(bitmap, wanted.size, arg)
        low = self.page - 1
        if bitmap.pgsize != self.page or wanted.iova & low or wanted.size & low or not wanted.size:
            raise OSError(EINVAL, f"pages of {self.page:#x} bytes are tracked")
        if not self.on:
            raise OSError(EINVAL, "dirty tracking is off")
        last = wanted.iova + wanted.size - 1
        if self.mappings.bisected(wanted.iova, last):
            raise OSError(EINVAL, f"{wanted.iova:#x}..{last:#x} would cut a mapping")
        self._look_for_closed()
        bits = bytearray(arg[bitmap.data : bitmap.data + bitmap.size])
        self.mappings.split(wanted.iova, last)
        blocks, closes = list(self.mappings.overlapping(wanted.iova, last)), self._closes
        revocation.run(self._collect(blocks, wanted.iova, bits, revocation))

        def answer() -> bytes:
            if _closes(self.groups) != closes:  # between two slices, and what it wrote it may not have noted
                self._look_for_closed()
                collect(extents(self.table, blocks), self._devices(), self.page, wanted.iova, bits)
            return arg[: bitmap.data] + bits + arg[bitmap.data + bitmap.size :]

        # The barrier between clearing the bytes that were seen, and copying the pages.
        revocation.answer_later(self._lanes, answer)

    def collect_later(
        self, blocks: Sequence[Block], first: int, bitmap: Bitmap, answer: bytes, revocation: Revocation
    ) -> None:
        """``blocks`` are about to be unmapped: when no write to them can be under way any more, put what was written
        into the bitmap of ``answer``; its bit 0 is the page at ``first``.
        """
        self._look_for_closed()
        before, closes = list(extents(self.table, blocks)), _closes(self.groups)

        def finish() -> bytes:
            if _closes(self.groups) != closes:
                _all_of(before)
            bits = bytearray(answer[bitmap.data : bitmap.data + bitmap.size])
            collect(before, self._devices(), self.page, first, bits)
            return answer[: bitmap.data] + bits + answer[bitmap.data + bitmap.size :]

        revocation.answer_later(self._lanes, finish)


def _closes(groups: Iterable[Group]) -> int:
    return sum(device.closes for group in groups for device in group.devices.values())


def _all_of(before: Sequence[Extent]) -> None:
    for extent in before:
        extent.block.dirty = True


def bitmap_of_unmap(argsz: int, size: int, arg: bytes) -> Bitmap:
    """The ``struct vfio_bitmap`` behind a ``struct vfio_iommu_type1_dma_unmap`` of ``size`` bytes.

    :raise OSError: EINVAL, EFAULT.
    """
    whole = DmaUnmap.SIZE + Bitmap.SIZE
    if argsz < whole:
        raise OSError(EINVAL, f"argsz {argsz} leaves no room for a bitmap")
    if len(arg) < whole:
        raise OSError(EFAULT, f"{len(arg)} bytes of {whole} can be read")
    bitmap = Bitmap.unpack(arg[DmaUnmap.SIZE :])
    _check_bitmap(bitmap, size, arg)
    return bitmap


def _check_bitmap(bitmap: Bitmap, size: int, arg: bytes) -> None:
    """:raise OSError: EINVAL for a bitmap without pages or bytes, too large a one, or one too small for ``size`` bytes
    of memory; EFAULT for one outside of ``arg``.
    """
    shift = (bitmap.pgsize & -bitmap.pgsize).bit_length() - 1 if bitmap.pgsize else 0
    pages = size >> shift
    if not pages or not bitmap.size or not dirty_bitmap_bytes(pages) <= bitmap.size <= DIRTY_BITMAP_SIZE_MAX:
        raise OSError(EINVAL, f"a bitmap of {bitmap.size:#x} bytes for {pages:#x} pages")
    if bitmap.data + bitmap.size > len(arg):
        raise OSError(EFAULT, f"the bitmap at {bitmap.data:#x} is not in the argument")
