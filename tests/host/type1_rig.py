"""A type 1 container over a host in this process, with one open device, its path, and a model of what is mapped."""

from __future__ import annotations

import struct
from collections.abc import Callable

from vfio_model.host.dma import AssignedImpl
from vfio_model.host.group import HostDevice
from vfio_model.host.host import Host
from vfio_model.host.hpa import Placement
from vfio_model.host.layout import DIRTY_BYTES
from vfio_model.host.pending import Revocation
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.host.type1 import ALL_IOVAS, Type1Container
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.revoke import NoFence, Revoke
from vfio_model.ranges import Hva
from vfio_model.uapi.vfio import (
    Bitmap,
    DirtyBitmap,
    DirtyBitmapGet,
    DmaMap,
    DmaUnmap,
    Ioctl,
    dirty_bitmap_bytes,
)
from vfio_model.vfio.direct import DirectPort

MIB, GIB = 1 << 20, 1 << 30
HVA = 0x7F00_0000_0000
DEVICE = "0000:01:00.0"
PAGE = 4096


class Type1Rig:
    """One RAM block of ``size`` bytes backed by pages of ``backing`` bytes; the container is driven without a port."""

    def __init__(
        self,
        *,
        v2: bool = True,
        size: int = 4 * MIB,
        backing: int = PAGE,
        hpa: Placement = "contiguous",
        host_page: int = PAGE,
        memlock: int | None = None,
        iova_ranges: tuple[tuple[int, int], ...] = ALL_IOVAS,
        domain_bytes: int = 16 * MIB,
        dirty_map: bool = True,
    ) -> None:
        spec = GroupSpec(26, (DeviceSpec(DEVICE, "edu"),))
        self.host = Host(HostTopology(groups=(spec,), hpa=hpa, host_page_size=host_page, domain_bytes=MIB))
        self.mm = self.host.create_mm(memlock, "guest")
        self.port = DirectPort(self.host, self.mm)
        import numpy  # noqa: PLC0415

        self.ram = RAMBlock("ram", numpy.zeros(size, "u1").data, page_size=backing, hva=Hva(HVA))
        self.port.declare_memory(self.ram)
        words = numpy.zeros(domain_bytes, "u1").data.cast("B").cast("Q")
        self.memory = TableMemory(words, host_page)
        self.free_at_first = self.memory.free_bytes
        self.container = Type1Container(self.memory, host_page, v2=v2, iova_ranges=iova_ranges)
        self.free_with_root = self.memory.free_bytes
        self.group = self.host.groups[26]
        self.device: HostDevice = self.host.device(DEVICE)
        self.device.token = 1
        self.device.pe.set_bus_master(True)
        self.dirty = numpy.zeros(DIRTY_BYTES, "u1").data
        self.device.dirty = self.dirty if dirty_map else None
        self.container.attach(self.group)
        area = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(area)
        self.lane, self._lanes = Lane(area, 0), LaneArea(DEVICE, area)
        self.on_wait: Callable[[], None] = lambda: None

    def run(self, cmd: int, arg: bytes) -> bytes:
        """One ioctl, as the host does it."""
        revocation = Revocation()
        try:
            result = self.container.ioctl(self.mm, cmd, arg, revocation)
        finally:
            self.settle(revocation)
        return result if revocation.answer is None else revocation.answer

    def run_many(self, cmd: int, args: bytes, count: int) -> bool:
        revocation = Revocation()
        done = self.container.ioctl_many(self.mm, cmd, memoryview(args), count, revocation)
        self.settle(revocation)
        return done

    def settle(self, revocation: Revocation) -> None:
        while revocation.work:
            revocation.step()
        if not revocation.actions:
            return
        self.on_wait()
        assert Revoke(NoFence(), [self._lanes]).start()
        actions, revocation.actions = revocation.actions, []
        for action in actions:
            action()

    def map(self, iova: int, offset: int, size: int = PAGE, flags: int = 3) -> None:
        self.run(Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, flags, HVA + offset, iova, size).pack())

    def unmap(self, iova: int, size: int, flags: int = 0) -> int:
        answer = self.run(Ioctl.VFIO_IOMMU_UNMAP_DMA, DmaUnmap(0, flags, iova, size).pack())
        return DmaUnmap.unpack(answer).size

    def unmap_dirty(self, iova: int, size: int, pgsize: int = PAGE) -> set[int]:
        """Unmap; numbers of the pages that were written."""
        count = dirty_bitmap_bytes(size // pgsize)
        head = DmaUnmap(DmaUnmap.SIZE + Bitmap.SIZE, 1, iova, size).pack()
        arg = head + Bitmap(pgsize, count, len(head) + Bitmap.SIZE).pack() + bytes(count)
        answer = self.run(Ioctl.VFIO_IOMMU_UNMAP_DMA, arg)
        assert DmaUnmap.unpack(answer).size == size
        return bits(answer[-count:])

    def track(self, flags: int) -> None:
        self.run(Ioctl.VFIO_IOMMU_DIRTY_PAGES, DirtyBitmap(0, flags).pack())

    def written(self, iova: int, size: int, pgsize: int = PAGE, into: bytes = b"") -> set[int]:
        """Numbers of the pages that were written since the last question."""
        count = dirty_bitmap_bytes(size // pgsize)
        at = DirtyBitmap.SIZE + DirtyBitmapGet.SIZE
        arg = struct.pack("=II", at, 4) + DirtyBitmapGet(iova, size, pgsize, count, at).pack()
        answer = self.run(Ioctl.VFIO_IOMMU_DIRTY_PAGES, arg + into.ljust(count, b"\0"))
        return bits(answer[at:])

    def impl(self, *, compiled: bool = True) -> AssignedImpl:
        pe, domain = self.device.pe.words.toreadonly(), self.memory.words.toreadonly()
        return AssignedImpl(pe, domain, self.port.segments, self.lane, compiled=compiled, dirty=self.dirty)

    def sizes(self) -> dict[int, int]:
        """How many leaves there are of each size."""
        found: dict[int, int] = {}
        for _, size, _ in self.container.table.mapped():
            found[size] = found.get(size, 0) + 1
        return found


def bits(bitmap: bytes) -> set[int]:
    return {8 * at + bit for at, byte in enumerate(bitmap) if byte for bit in range(8) if byte >> bit & 1}
