"""The type 1 container as its user sees it: all within the host's ranges can be mapped, and nothing is to be set up.

Where a guest overwrites a valid entry of its table, a type 1 container still holds the old mapping and refuses the new
one (EEXIST; EBUSY on some kernels). The queue then unmaps what is in the way and maps again, once; that costs two more
messages, for an overwrite alone. QEMU does so for EBUSY only, and leaves the old mapping in place otherwise.

Dirty pages are asked for by bus address. Over the port a bitmap travels behind the structure that asks for it, so that
long ranges are asked for in parts.

Source: ``include/uapi/linux/vfio.h`` ("API for Type1 VFIO IOMMU").
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator

from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.listener import MemoryRegionSection
from vfio_model.ranges import U64_MAX, Hva, Iova
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.uapi.containers import IOMMU_TYPES, ContainerKind
from vfio_model.uapi.vfio import (
    Bitmap,
    CapMigration,
    DirtyBitmap,
    DirtyBitmapGet,
    DirtyPagesFlags,
    DmaMap,
    DmaUnmap,
    DmaUnmapFlags,
    InfoCapHeader,
    Ioctl,
    IommuInfoCap,
    IommuInfoFlags,
    IovaRange,
    Type1Info,
    dirty_bitmap_bytes,
)
from vfio_model.vfio.container import DMA_MAX_MAPPINGS, MappingQueue
from vfio_model.vfio.host_window import HostWindows, VFIOHostDMAWindow
from vfio_model.vfio.ioctl import BatchError, ContainerFile

_MAP, _UNMAP = int(Ioctl.VFIO_IOMMU_MAP_DMA), int(Ioctl.VFIO_IOMMU_UNMAP_DMA)
_DEFAULT_PGSIZES = 1 << 12
_IN_THE_WAY = (errno.EEXIST, errno.EBUSY)
_BITMAP_PAGES = 1 << 22
"""Pages that one question asks for: a bitmap of 512 KiB, which fits one message of the port. Questions begin and end
at multiples of so many pages, and so does every mapping that is larger: none of them is cut by one.
"""


def _parts(iova: int, size: int, longest: int) -> Iterator[tuple[int, int]]:
    """(address, bytes) of the parts of a range between multiples of ``longest`` bytes; one that leaves the 64 bits
    stays one, to be refused.
    """
    end = iova + size
    while iova < end:
        edge = iova - iova % longest + longest
        part = (end if edge > U64_MAX else min(end, edge)) - iova
        yield iova, part
        iova += part


class Type1Queue(MappingQueue):
    """A queue that unmaps what is in the way of a mapping."""

    longest = 0
    """Bytes: no mapping crosses a multiple of so many, if not 0."""

    def map(self, iova: Iova, size: int, vaddr: Hva, *, readonly: bool, writeonly: bool = False) -> None:
        """See ``MappingQueue``; a large one is several."""
        for at, part in _parts(iova, size, self.longest) if self.longest else ((iova, size),):
            super().map(Iova(at), part, Hva(vaddr + at - iova), readonly=readonly, writeonly=writeonly)

    def _send(self, cmd: int, args: bytes | bytearray | memoryview, count: int) -> None:
        done = retried = 0
        size, view = len(args) // count, memoryview(args)
        while True:
            try:
                super()._send(cmd, view[done * size :], count - done)
            except BatchError as error:
                done += error.done
                if cmd != _MAP or error.errno not in _IN_THE_WAY or retried > done:
                    raise BatchError(error.errno or 0, error.strerror or "", done) from error
                retried = done + 1
                self._make_room(view[done * size :], count - done)
            else:
                return

    def _make_room(self, maps: memoryview, count: int) -> None:
        """Unmap where ``count`` structures want to map: all of them are about to be replaced."""
        unmaps = b"".join(
            DmaUnmap.FORMAT.pack(DmaUnmap.SIZE, 0, iova, size)
            for _, _, _, iova, size in DmaMap.FORMAT.iter_unpack(maps[: count * DmaMap.SIZE])
        )
        self._send(_UNMAP, unmaps, count)


class Type1:
    """:class:`~vfio_model.vfio.container.VFIOIOMMU` over a type 1 container; ``kind`` says which version."""

    def __init__(
        self,
        container: ContainerFile,
        *,
        host_page_size: int,
        trace: Trace = NULL_TRACE,
        kind: ContainerKind = "type1v2",
    ) -> None:
        self.container, self.host_page_size, self.kind = container, host_page_size, kind
        self.windows = HostWindows()
        self._queue = Type1Queue(container.port, container.handle, trace=trace)
        self.queue: MappingQueue = self._queue
        self._longest = _BITMAP_PAGES * host_page_size
        if kind == "type1v2":
            self._queue.longest = self._longest
        self.dma_max_mappings = DMA_MAX_MAPPINGS
        self.coalesces = False
        self.write_only = self.whole_windows = False
        self.pgsizes = _DEFAULT_PGSIZES
        """Bitmap of the page sizes that can be mapped, in bytes."""
        self.dirty_pages_supported = False
        self.dirty_pgsizes = 0
        """Bitmap of the page sizes that a dirty bitmap may have."""
        self.max_dirty_bitmap_size = 0

    def set_type(self) -> None:
        """``VFIO_SET_IOMMU``; a group must be attached."""
        self.container.set_iommu(IOMMU_TYPES[self.kind])

    def start(self) -> None:
        """Learn page sizes, IOVA ranges, the number of mappings, and whether dirty pages can be tracked."""
        info = self._info()
        head = Type1Info.unpack(info)
        if head.flags & IommuInfoFlags.VFIO_IOMMU_INFO_PGSIZES:
            self.pgsizes = head.iova_pgsizes
        capabilities = _capabilities(info, head.cap_offset)
        ranges = _iova_ranges(capabilities.get(IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE))
        for first, last in ranges:
            self.windows.add(VFIOHostDMAWindow(first, last, self.pgsizes))
        available = capabilities.get(IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)
        if available is not None:
            self.dma_max_mappings = struct.unpack_from("=I", available)[0]
        migration = capabilities.get(IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION)
        if migration is not None:
            found = CapMigration.unpack(migration)
            self.dirty_pages_supported = bool(found.pgsize_bitmap & self.host_page_size)
            self.dirty_pgsizes, self.max_dirty_bitmap_size = found.pgsize_bitmap, found.max_dirty_bitmap_size

    def _info(self) -> bytes:
        """GET_INFO with as much room as it needs."""
        first = self.container.port.ioctl(self.container.handle, Ioctl.VFIO_IOMMU_GET_INFO, Type1Info().pack())
        room = Type1Info.unpack(first).argsz
        if room <= Type1Info.SIZE:
            return first
        arg = Type1Info(argsz=room).pack().ljust(room, b"\0")
        return self.container.port.ioctl(self.container.handle, Ioctl.VFIO_IOMMU_GET_INFO, arg)

    @property
    def dma_avail(self) -> int:
        """Mappings that can still be made, as the host says now."""
        info = self._info()
        found = _capabilities(info, Type1Info.unpack(info).cap_offset)[IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL]
        value: int = struct.unpack_from("=I", found)[0]
        return value

    def add_window(self, section: MemoryRegionSection) -> None:
        """Make sure that ``section`` can be mapped. Of a whole space no more than what the guest maps there has to be.

        :raise OSError: EINVAL when it leaves the host's IOVA ranges, or its IOMMU has smaller pages than the host.
        """
        if self.queue.lost:
            return
        whole = isinstance(section.mr, IOMMUMemoryRegion) and section.mr.whole_space
        if not whole and self.windows.lookup(section.range) is None:
            raise OSError(errno.EINVAL, f"the container can't map {section.range}: outside the host's IOVA ranges")
        smallest = self.pgsizes & -self.pgsizes
        if isinstance(section.mr, IOMMUMemoryRegion) and section.mr.get_min_page_size() < smallest:
            page = section.mr.get_min_page_size()
            raise OSError(errno.EINVAL, f"IOMMU pages of {page:#x} bytes are smaller than the host's of {smallest:#x}")

    def del_window(self, section: MemoryRegionSection) -> None:
        """There is nothing to give back."""

    # Dirty pages

    def set_dirty_page_tracking(self, start: bool) -> None:
        """Note what devices write from now on, or not. :raise OSError: EACCES for version 1."""
        flag = (
            DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_START
            if start
            else DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP
        )
        self._ioctl(Ioctl.VFIO_IOMMU_DIRTY_PAGES, DirtyBitmap(flags=flag).pack())

    def query_dirty_bitmap(self, iova: int, size: int) -> bytes:
        """One bit for each host page of ``size`` bytes from ``iova``, least significant first: written since it was
        last asked. What is not mapped is clean.

        :raise OSError: EINVAL when an end lies inside a mapping, or tracking is off.
        """
        return self._in_parts(self._query, iova, size)

    def _in_parts(self, ask: Callable[[int, int], bytes], iova: int, size: int) -> bytes:
        """The bitmap of the whole; a part may begin in the middle of a byte of it."""
        found, page = 0, self.host_page_size
        for first, part in _parts(iova, size, self._longest):
            found |= int.from_bytes(ask(first, part), "little") << (first - iova) // page
        return found.to_bytes(dirty_bitmap_bytes(size // page), "little")

    def _query(self, iova: int, size: int) -> bytes:
        count = dirty_bitmap_bytes(size // self.host_page_size)
        at = DirtyBitmap.SIZE + DirtyBitmapGet.SIZE
        head = DirtyBitmap(at, DirtyPagesFlags.VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP).pack()
        head += DirtyBitmapGet(iova, size, self.host_page_size, count, at).pack()
        return self._ioctl(Ioctl.VFIO_IOMMU_DIRTY_PAGES, head + bytes(count))[at:]

    def unmap_dirty_bitmap(self, iova: int, size: int) -> bytes:
        """Unmap, and the bitmap of what was written until then; no write is lost in between."""
        if failed := self.queue.flush():
            raise failed
        return self._in_parts(self._unmap, iova, size)

    def _unmap(self, iova: int, size: int) -> bytes:
        count, at = dirty_bitmap_bytes(size // self.host_page_size), DmaUnmap.SIZE + Bitmap.SIZE
        flag = DmaUnmapFlags.VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP
        arg = DmaUnmap(at, flag, iova, size).pack() + Bitmap(self.host_page_size, count, at).pack()
        return self._ioctl(Ioctl.VFIO_IOMMU_UNMAP_DMA, arg + bytes(count))[at:]

    def _ioctl(self, cmd: int, arg: bytes) -> bytes:
        return self.container.port.ioctl(self.container.handle, cmd, arg)


def _capabilities(info: bytes, at: int) -> dict[int, bytes]:
    """The bodies of the chain that begins at offset ``at``, 0 when there is none, by their id."""
    found: dict[int, bytes] = {}
    while at:
        header = InfoCapHeader.unpack(info[at:])
        found[header.id] = info[at + InfoCapHeader.SIZE :]
        at = header.next
    return found


def _iova_ranges(capability: bytes | None) -> list[tuple[int, int]]:
    """Without the capability everything can be mapped."""
    if capability is None:
        return [(0, U64_MAX)]
    count: int = struct.unpack_from("=I", capability)[0]
    found = [IovaRange.unpack(capability[8 + IovaRange.SIZE * number :]) for number in range(count)]
    return [(each.start, each.end) for each in found]
