"""The VFIO uapi: ioctl numbers, flags and structures.

Source: Linux ``include/uapi/linux/vfio.h``. Every structure has its size asserted. Numbers 112 and 117 are two ioctls
each; the container's type decides which is meant. Structures are native-endian, as ioctl(2) passes them, without
padding beyond what the header declares. ``argsz`` is the size of the whole argument as the caller sees it, in bytes.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import astuple, dataclass, fields
from enum import IntEnum, IntFlag
from typing import ClassVar, Self

VFIO_API_VERSION = 0
VFIO_TYPE = ord(";")
VFIO_BASE = 100


def _io(nr: int) -> int:
    return (VFIO_TYPE << 8) | (VFIO_BASE + nr)


class Ioctl(IntEnum):
    """``_IO(VFIO_TYPE, VFIO_BASE + n)``."""

    VFIO_GET_API_VERSION = _io(0)
    VFIO_CHECK_EXTENSION = _io(1)
    VFIO_SET_IOMMU = _io(2)
    VFIO_GROUP_GET_STATUS = _io(3)
    VFIO_GROUP_SET_CONTAINER = _io(4)
    VFIO_GROUP_UNSET_CONTAINER = _io(5)
    VFIO_GROUP_GET_DEVICE_FD = _io(6)
    VFIO_DEVICE_GET_INFO = _io(7)
    VFIO_DEVICE_GET_REGION_INFO = _io(8)
    VFIO_DEVICE_GET_IRQ_INFO = _io(9)
    VFIO_DEVICE_SET_IRQS = _io(10)
    VFIO_DEVICE_RESET = _io(11)
    VFIO_IOMMU_GET_INFO = _io(12)
    VFIO_IOMMU_SPAPR_TCE_GET_INFO = _io(12)
    VFIO_IOMMU_MAP_DMA = _io(13)
    VFIO_IOMMU_UNMAP_DMA = _io(14)
    VFIO_IOMMU_ENABLE = _io(15)
    VFIO_IOMMU_DISABLE = _io(16)
    VFIO_IOMMU_DIRTY_PAGES = _io(17)
    VFIO_IOMMU_SPAPR_REGISTER_MEMORY = _io(17)
    VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY = _io(18)
    VFIO_IOMMU_SPAPR_TCE_CREATE = _io(19)
    VFIO_IOMMU_SPAPR_TCE_REMOVE = _io(20)
    VFIO_EEH_PE_OP = _io(21)


_SPAPR_NAMES = {
    Ioctl.VFIO_IOMMU_GET_INFO: "VFIO_IOMMU_SPAPR_TCE_GET_INFO",
    Ioctl.VFIO_IOMMU_DIRTY_PAGES: "VFIO_IOMMU_SPAPR_REGISTER_MEMORY",
}


@functools.lru_cache(256)
def ioctl_name(cmd: int, *, spapr: bool = True) -> str:
    """The name of an ioctl number; ``spapr`` chooses between the two meanings of 112 and 117."""
    try:
        known = Ioctl(cmd)
    except ValueError:
        return f"ioctl({cmd:#x})"
    return _SPAPR_NAMES.get(known, known.name) if spapr else known.name


class IommuType(IntEnum):
    """Arguments of VFIO_SET_IOMMU and VFIO_CHECK_EXTENSION."""

    VFIO_TYPE1_IOMMU = 1
    VFIO_SPAPR_TCE_IOMMU = 2
    VFIO_TYPE1v2_IOMMU = 3
    VFIO_DMA_CC_IOMMU = 4
    VFIO_EEH = 5
    VFIO_SPAPR_TCE_v2_IOMMU = 7
    VFIO_NOIOMMU_IOMMU = 8
    VFIO_UNMAP_ALL = 9
    VFIO_UPDATE_VADDR = 10


class DmaMapFlags(IntFlag):
    VFIO_DMA_MAP_FLAG_READ = 1
    VFIO_DMA_MAP_FLAG_WRITE = 2
    VFIO_DMA_MAP_FLAG_VADDR = 4
    """Give a mapping whose vaddr was invalidated a new one; of a type 1 container."""


class DmaUnmapFlags(IntFlag):
    VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP = 1
    VFIO_DMA_UNMAP_FLAG_ALL = 2
    VFIO_DMA_UNMAP_FLAG_VADDR = 4


class IommuInfoFlags(IntFlag):
    VFIO_IOMMU_INFO_PGSIZES = 1
    VFIO_IOMMU_INFO_CAPS = 2


class IommuInfoCap(IntEnum):
    """``id`` of a capability of VFIO_IOMMU_GET_INFO."""

    VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE = 1
    VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION = 2
    VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL = 3


class DirtyPagesFlags(IntFlag):
    """What VFIO_IOMMU_DIRTY_PAGES is asked to do: exactly one."""

    VFIO_IOMMU_DIRTY_PAGES_FLAG_START = 1
    VFIO_IOMMU_DIRTY_PAGES_FLAG_STOP = 2
    VFIO_IOMMU_DIRTY_PAGES_FLAG_GET_BITMAP = 4


class EehOp(IntEnum):
    """``op`` of VFIO_EEH_PE_OP."""

    VFIO_EEH_PE_DISABLE = 0
    VFIO_EEH_PE_ENABLE = 1
    VFIO_EEH_PE_UNFREEZE_IO = 2
    VFIO_EEH_PE_UNFREEZE_DMA = 3
    VFIO_EEH_PE_GET_STATE = 4
    VFIO_EEH_PE_RESET_DEACTIVATE = 5
    VFIO_EEH_PE_RESET_HOT = 6
    VFIO_EEH_PE_RESET_FUNDAMENTAL = 7
    VFIO_EEH_PE_CONFIGURE = 8
    VFIO_EEH_PE_INJECT_ERR = 9


class EehState(IntEnum):
    """What VFIO_EEH_PE_GET_STATE returns. Stopped is both, I/O and DMA; the header has no 3."""

    VFIO_EEH_PE_STATE_NORMAL = 0
    VFIO_EEH_PE_STATE_RESET = 1
    VFIO_EEH_PE_STATE_STOPPED = 2
    VFIO_EEH_PE_STATE_STOPPED_DMA = 4
    VFIO_EEH_PE_STATE_UNAVAIL = 5


VFIO_IOMMU_SPAPR_INFO_DDW = 1
VFIO_GROUP_FLAGS_VIABLE = 1
VFIO_GROUP_FLAGS_CONTAINER_SET = 2


class DeviceFlags(IntFlag):
    VFIO_DEVICE_FLAGS_RESET = 1
    VFIO_DEVICE_FLAGS_PCI = 2


class RegionFlags(IntFlag):
    VFIO_REGION_INFO_FLAG_READ = 1
    VFIO_REGION_INFO_FLAG_WRITE = 2
    VFIO_REGION_INFO_FLAG_MMAP = 4
    VFIO_REGION_INFO_FLAG_CAPS = 8


class IrqInfoFlags(IntFlag):
    VFIO_IRQ_INFO_EVENTFD = 1
    VFIO_IRQ_INFO_MASKABLE = 2
    VFIO_IRQ_INFO_AUTOMASKED = 4
    VFIO_IRQ_INFO_NORESIZE = 8


class IrqSetFlags(IntFlag):
    VFIO_IRQ_SET_DATA_NONE = 1
    VFIO_IRQ_SET_DATA_BOOL = 2
    VFIO_IRQ_SET_DATA_EVENTFD = 4
    VFIO_IRQ_SET_ACTION_MASK = 8
    VFIO_IRQ_SET_ACTION_UNMASK = 16
    VFIO_IRQ_SET_ACTION_TRIGGER = 32


class PciRegion(IntEnum):
    """Region indices of a vfio-pci device."""

    VFIO_PCI_BAR0_REGION_INDEX = 0
    VFIO_PCI_BAR1_REGION_INDEX = 1
    VFIO_PCI_BAR2_REGION_INDEX = 2
    VFIO_PCI_BAR3_REGION_INDEX = 3
    VFIO_PCI_BAR4_REGION_INDEX = 4
    VFIO_PCI_BAR5_REGION_INDEX = 5
    VFIO_PCI_ROM_REGION_INDEX = 6
    VFIO_PCI_CONFIG_REGION_INDEX = 7
    VFIO_PCI_VGA_REGION_INDEX = 8


VFIO_PCI_NUM_REGIONS = 9


class PciIrq(IntEnum):
    """Interrupt indices of a vfio-pci device."""

    VFIO_PCI_INTX_IRQ_INDEX = 0
    VFIO_PCI_MSI_IRQ_INDEX = 1
    VFIO_PCI_MSIX_IRQ_INDEX = 2
    VFIO_PCI_ERR_IRQ_INDEX = 3
    VFIO_PCI_REQ_IRQ_INDEX = 4


VFIO_PCI_NUM_IRQS = 5


@dataclass(slots=True)
class Struct:
    """A fixed-size uapi structure. ``argsz`` of 0 is filled with the structure's size by :meth:`pack`."""

    FORMAT: ClassVar[struct.Struct]
    SIZE: ClassVar[int]

    def pack(self) -> bytes:
        """The structure as bytes; a field that does not fit raises ``struct.error``."""
        values = list(astuple(self))
        if fields(self)[0].name == "argsz" and values[0] == 0:
            values[0] = self.SIZE
        return self.FORMAT.pack(*values)

    @classmethod
    def unpack(cls, data: bytes | bytearray | memoryview) -> Self:
        """From the first :attr:`SIZE` bytes of ``data``; ``struct.error`` when there are fewer."""
        return cls(*cls.FORMAT.unpack_from(data))


@dataclass(slots=True)
class GroupStatus(Struct):
    """``struct vfio_group_status``."""

    FORMAT = struct.Struct("=II")
    SIZE = 8
    argsz: int = 0
    flags: int = 0


@dataclass(slots=True)
class DeviceInfo(Struct):
    """``struct vfio_device_info`` up to ``num_irqs``."""

    FORMAT = struct.Struct("=IIII")
    SIZE = 16
    argsz: int = 0
    flags: int = 0
    num_regions: int = 0
    num_irqs: int = 0


@dataclass(slots=True)
class RegionInfo(Struct):
    """``struct vfio_region_info`` without capabilities."""

    FORMAT = struct.Struct("=IIIIQQ")
    SIZE = 32
    argsz: int = 0
    flags: int = 0
    index: int = 0
    cap_offset: int = 0
    size: int = 0
    offset: int = 0


@dataclass(slots=True)
class IrqInfo(Struct):
    """``struct vfio_irq_info``."""

    FORMAT = struct.Struct("=IIII")
    SIZE = 16
    argsz: int = 0
    flags: int = 0
    index: int = 0
    count: int = 0


@dataclass(slots=True)
class IrqSet(Struct):
    """``struct vfio_irq_set`` without its data."""

    FORMAT = struct.Struct("=IIIII")
    SIZE = 20
    argsz: int = 0
    flags: int = 0
    index: int = 0
    start: int = 0
    count: int = 0


@dataclass(slots=True)
class DmaMap(Struct):
    """``struct vfio_iommu_type1_dma_map``; sizes and addresses in bytes."""

    FORMAT = struct.Struct("=IIQQQ")
    SIZE = 32
    argsz: int = 0
    flags: int = 0
    vaddr: int = 0
    iova: int = 0
    size: int = 0


@dataclass(slots=True)
class DmaUnmap(Struct):
    """``struct vfio_iommu_type1_dma_unmap`` without a bitmap."""

    FORMAT = struct.Struct("=IIQQ")
    SIZE = 24
    argsz: int = 0
    flags: int = 0
    iova: int = 0
    size: int = 0


@dataclass(slots=True)
class Bitmap(Struct):
    """``struct vfio_bitmap``: one bit for each page of ``pgsize`` bytes, ``size`` bytes of bitmap at ``data``.

    ``data`` is an address of the caller's; over the port it is an offset in the argument, where the bytes travel.
    """

    FORMAT = struct.Struct("=QQQ")
    SIZE = 24
    pgsize: int = 0
    size: int = 0
    data: int = 0


IOMMU_INFO_MIN_SIZE = 16
"""``offsetofend(struct vfio_iommu_type1_info, iova_pgsizes)``."""


@dataclass(slots=True)
class Type1Info(Struct):
    """``struct vfio_iommu_type1_info``; capabilities follow at ``cap_offset``, 0 when there are none."""

    FORMAT = struct.Struct("=IIQII")
    SIZE = 24
    argsz: int = 0
    flags: int = 0
    iova_pgsizes: int = 0
    cap_offset: int = 0
    pad: int = 0


@dataclass(slots=True)
class InfoCapHeader(Struct):
    """``struct vfio_info_cap_header``; ``next`` is an offset from the start of the info, 0 at the last."""

    FORMAT = struct.Struct("=HHI")
    SIZE = 8
    id: int = 0
    version: int = 1
    next: int = 0


@dataclass(slots=True)
class CapMigration(Struct):
    """``struct vfio_iommu_type1_info_cap_migration`` behind its header."""

    FORMAT = struct.Struct("=I4xQQ")
    SIZE = 24
    flags: int = 0
    pgsize_bitmap: int = 0
    max_dirty_bitmap_size: int = 0


@dataclass(slots=True)
class IovaRange(Struct):
    """``struct vfio_iova_range``, both ends inclusive."""

    FORMAT = struct.Struct("=QQ")
    SIZE = 16
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class DirtyBitmap(Struct):
    """``struct vfio_iommu_type1_dirty_bitmap`` without its data."""

    FORMAT = struct.Struct("=II")
    SIZE = 8
    argsz: int = 0
    flags: int = 0


@dataclass(slots=True)
class DirtyBitmapGet(Struct):
    """``struct vfio_iommu_type1_dirty_bitmap_get``: which bytes, and their ``vfio_bitmap``."""

    FORMAT = struct.Struct("=QQQQQ")
    SIZE = 40
    iova: int = 0
    size: int = 0
    pgsize: int = 0
    bitmap_size: int = 0
    data: int = 0


DIRTY_BITMAP_PAGES_MAX = (1 << 31) - 1
"""Pages in one dirty bitmap."""


def dirty_bitmap_bytes(pages: int) -> int:
    """Bytes of the bitmap of ``pages`` pages: whole 64-bit words."""
    return (pages + 63) // 64 * 8


DIRTY_BITMAP_SIZE_MAX = dirty_bitmap_bytes(DIRTY_BITMAP_PAGES_MAX)

SPAPR_TCE_INFO_MIN_SIZE = 16
"""``offsetofend(struct vfio_iommu_spapr_tce_info, dma32_window_size)``: all that a caller from before DDW knows."""


@dataclass(slots=True)
class SpaprTceInfo(Struct):
    """``struct vfio_iommu_spapr_tce_info``; ``pgsizes`` is a bitmap of page sizes in bytes."""

    FORMAT = struct.Struct("=IIIIQII")
    SIZE = 32
    argsz: int = 0
    flags: int = 0
    dma32_window_start: int = 0
    dma32_window_size: int = 0
    pgsizes: int = 0
    max_dynamic_windows_supported: int = 0
    levels: int = 0


@dataclass(slots=True)
class SpaprRegisterMemory(Struct):
    """``struct vfio_iommu_spapr_register_memory``."""

    FORMAT = struct.Struct("=IIQQ")
    SIZE = 24
    argsz: int = 0
    flags: int = 0
    vaddr: int = 0
    size: int = 0


@dataclass(slots=True)
class SpaprTceCreate(Struct):
    """``struct vfio_iommu_spapr_tce_create``; ``start_addr`` is filled by the kernel."""

    FORMAT = struct.Struct("=IIIIQIIQ")
    SIZE = 40
    argsz: int = 0
    flags: int = 0
    page_shift: int = 0
    resv1: int = 0
    window_size: int = 0
    levels: int = 0
    resv2: int = 0
    start_addr: int = 0


@dataclass(slots=True)
class SpaprTceRemove(Struct):
    """``struct vfio_iommu_spapr_tce_remove``."""

    FORMAT = struct.Struct("=IIQ")
    SIZE = 16
    argsz: int = 0
    flags: int = 0
    start_addr: int = 0


EEH_PE_OP_MIN_SIZE = 12
"""``offsetofend(struct vfio_eeh_pe_op, op)``: all that the operations without an error to inject need."""


@dataclass(slots=True)
class EehPeOp(Struct):
    """``struct vfio_eeh_pe_op``; from ``type`` on the ``struct vfio_eeh_pe_err`` of its union."""

    FORMAT = struct.Struct("=III4xIIQQ")
    SIZE = 40
    argsz: int = 0
    flags: int = 0
    op: int = 0
    type: int = 0
    func: int = 0
    addr: int = 0
    mask: int = 0


for _struct in (GroupStatus, DeviceInfo, RegionInfo, IrqInfo, IrqSet, DmaMap, DmaUnmap, SpaprTceInfo,
                SpaprRegisterMemory, SpaprTceCreate, SpaprTceRemove, EehPeOp, Bitmap, Type1Info, InfoCapHeader,
                CapMigration, IovaRange, DirtyBitmap, DirtyBitmapGet):  # fmt: skip
    assert _struct.FORMAT.size == _struct.SIZE, _struct.__name__
