"""``VFIO_IOMMU_GET_INFO`` of a type 1 container: page sizes, and the chain of capabilities behind them.

Source: ``include/uapi/linux/vfio.h``, ``struct vfio_iommu_type1_info`` and the capabilities named there.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from errno import EFAULT, EINVAL

from vfio_model.ranges import align_up
from vfio_model.uapi.vfio import (
    DIRTY_BITMAP_SIZE_MAX,
    IOMMU_INFO_MIN_SIZE,
    CapMigration,
    InfoCapHeader,
    IommuInfoCap,
    IommuInfoFlags,
    IovaRange,
    Type1Info,
)


def get_info(arg: bytes, pgsizes: int, iova_ranges: Sequence[tuple[int, int]], dma_avail: int) -> bytes:
    """The answer to ``arg``: as much of the structure as the caller knows, and the capabilities if they fit; else argsz
    says how much room they need.

    :raise OSError: EFAULT for fewer bytes than argsz says, EINVAL for an argsz below the first version's.
    """
    if len(arg) < IOMMU_INFO_MIN_SIZE:
        raise OSError(EFAULT, f"Type1Info: {len(arg)} bytes of {IOMMU_INFO_MIN_SIZE} can be read")
    argsz = int.from_bytes(arg[:4], sys.byteorder)
    if argsz < IOMMU_INFO_MIN_SIZE:
        raise OSError(EINVAL, f"argsz {argsz} is below {IOMMU_INFO_MIN_SIZE}")
    caps = _chain(
        [
            (IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_CAP_MIGRATION, _migration(pgsizes)),
            (IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL, struct.pack("=I", dma_avail)),
            (IommuInfoCap.VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, _iova_ranges(iova_ranges)),
        ]
    )
    fits = argsz >= Type1Info.SIZE + len(caps)
    info = Type1Info(
        argsz if fits else Type1Info.SIZE + len(caps),
        IommuInfoFlags.VFIO_IOMMU_INFO_PGSIZES | IommuInfoFlags.VFIO_IOMMU_INFO_CAPS,
        pgsizes,
        Type1Info.SIZE if fits else 0,
    )
    answer = info.pack()[: min(argsz, Type1Info.SIZE)] + (caps if fits else b"")
    if len(arg) < len(answer):
        raise OSError(EFAULT, f"Type1Info: {len(answer)} bytes do not fit {len(arg)}")
    return answer + arg[len(answer) :]


def _migration(pgsizes: int) -> bytes:
    return CapMigration(pgsize_bitmap=pgsizes & -pgsizes, max_dirty_bitmap_size=DIRTY_BITMAP_SIZE_MAX).pack()


def _iova_ranges(ranges: Sequence[tuple[int, int]]) -> bytes:
    return struct.pack("=II", len(ranges), 0) + b"".join(IovaRange(*pair).pack() for pair in ranges)


def _chain(capabilities: Sequence[tuple[IommuInfoCap, bytes]]) -> bytes:
    """Each capability with its header, in whole 8-byte words."""
    chain = b""
    for number, (kind, body) in enumerate(capabilities):
        size = align_up(InfoCapHeader.SIZE + len(body), 8)
        following = Type1Info.SIZE + len(chain) + size if number + 1 < len(capabilities) else 0
        chain += (InfoCapHeader(kind, 1, following).pack() + body).ljust(size, b"\0")
    return chain
