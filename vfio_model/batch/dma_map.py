"""Many ``struct vfio_iommu_type1_dma_map`` at once, from an array of page addresses.

Source of the layout: ``include/uapi/linux/vfio.h``; :class:`vfio_model.uapi.vfio.DmaMap` is the same structure for one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import DmaMap, DmaMapFlags

_READ = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ)
_READ_WRITE = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)


@functools.cache
def _numpy() -> Any:
    import numpy  # noqa: PLC0415 - 200 ms of import that a process without batches never pays

    return numpy


@functools.lru_cache(maxsize=16)
def _template(count: int, page_shift: int, flags: int) -> Any:
    """The structures of ``count`` pages from IOVA 0, their addresses missing. Not to be written."""
    np = _numpy()
    words = np.zeros((count, DmaMap.SIZE // 8), dtype=np.uint64)
    words[:, 0] = int.from_bytes(DmaMap.FORMAT.pack(DmaMap.SIZE, flags, 0, 0, 0)[:8], sys.byteorder)
    words[:, 2] = np.arange(count, dtype=np.uint64) << np.uint64(page_shift)
    words[:, 3] = 1 << page_shift
    return words


def pack_dma_maps(pages: Any, to_vaddr: int, first_iova: int, page_shift: int, *, writable: bool) -> memoryview:
    """One structure for each of ``pages`` (u64 guest-physical page addresses), at consecutive IOVAs.

    ``to_vaddr`` is added to each page address, modulo 2**64; sizes are one page of ``1 << page_shift`` bytes.
    """
    np = _numpy()
    addresses = np.asarray(pages, dtype=np.uint64)
    words = _template(len(addresses), page_shift, _READ_WRITE if writable else _READ).copy()
    np.add(addresses, np.uint64(to_vaddr & U64_MAX), out=words[:, 1])
    words[:, 2] += np.uint64(first_iova)
    return memoryview(words).cast("B")


def page_bounds(pages: Any) -> tuple[int, int]:
    """The lowest and the highest of ``pages`` (u64, at least one)."""
    np = _numpy()
    array = np.asarray(pages, dtype=np.uint64)
    return int(np.minimum.reduce(array)), int(np.maximum.reduce(array))


def uniform_value(values: Any) -> int | None:
    """The value that all of ``values`` (at least one) have, or None."""
    array = _numpy().asarray(values)
    first = int(array[0])
    return first if bool((array == first).all()) else None
