"""Many ``struct vfio_iommu_type1_dma_map`` at once: made from an array of page addresses, and looked at.

Source of the layout: ``include/uapi/linux/vfio.h``; :class:`vfio_model.uapi.vfio.DmaMap` is the same structure for one.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

from vfio_model.batch import variant
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import DmaMap, DmaMapFlags, DmaUnmap

_READ = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ)
_READ_WRITE = int(DmaMapFlags.VFIO_DMA_MAP_FLAG_READ | DmaMapFlags.VFIO_DMA_MAP_FLAG_WRITE)


@functools.lru_cache(maxsize=16)
def _template(count: int, page_shift: int, flags: int) -> Any:
    """The structures of ``count`` pages from IOVA 0, their addresses missing. Not to be written."""
    np = lazy_numpy()
    words = np.zeros((count, DmaMap.SIZE // 8), dtype=np.uint64)
    words[:, 0] = map_head(flags)
    words[:, 2] = np.arange(count, dtype=np.uint64) << np.uint64(page_shift)
    words[:, 3] = 1 << page_shift
    return words


@functools.lru_cache(maxsize=16)
def _steps(count: int, size: int) -> Any:
    """By how much ``count`` structures of ``size`` bytes, one behind the other, differ from the first. Not to be
    written.
    """
    np = lazy_numpy()
    steps = np.zeros((count, DmaMap.SIZE // 8), dtype=np.uint64)
    steps[:, 2] = np.arange(count, dtype=np.uint64) * np.uint64(size)
    return steps


def map_head(flags: int) -> int:
    """argsz and ``flags`` of one structure, as the word that they share."""
    return int.from_bytes(DmaMap.FORMAT.pack(DmaMap.SIZE, flags, 0, 0, 0)[:8], sys.byteorder)


LEAST = 8
"""Fewer structures are faster one by one."""
MAP_HEADS = {map_head(flags): flags for flags in (1, 2, 3)}
"""The flags by the head."""
UNMAP_HEAD = int.from_bytes(DmaUnmap.FORMAT.pack(DmaUnmap.SIZE, 0, 0, 0)[:8], sys.byteorder)
"""The head of a ``struct vfio_iommu_type1_dma_unmap`` without flags."""


@functools.lru_cache(maxsize=16)
def unmap_steps(count: int, page: int) -> Any:
    """By how much ``count`` UNMAP_DMA structures of one page each, at consecutive IOVAs, differ from the first. Not to
    be written.
    """
    steps = lazy_numpy().zeros((count, DmaUnmap.SIZE // 8), dtype="u8")
    steps[:, 1] = lazy_numpy().arange(0, count * page, page, dtype="u8")
    return steps


def pack_dma_maps(pages: Any, to_vaddr: int, first_iova: int, page_shift: int, *, writable: bool) -> bytes | memoryview:
    """One structure for each of ``pages`` (u64 guest-physical page addresses), at consecutive IOVAs.

    ``to_vaddr`` is added to each page address, modulo 2**64; sizes are one page of ``1 << page_shift`` bytes.
    """
    kernel, flags = variant.kernel(), _READ_WRITE if writable else _READ
    if kernel is not None and not isinstance(pages, list):
        packed: bytes = kernel.pack_dma_maps(pages, to_vaddr & U64_MAX, first_iova, page_shift, map_head(flags))
        return packed
    np = lazy_numpy()
    addresses = np.asarray(pages, dtype=np.uint64)
    words = _template(len(addresses), page_shift, flags).copy()
    np.add(addresses, np.uint64(to_vaddr & U64_MAX), out=words[:, 1])
    words[:, 2] += np.uint64(first_iova)
    return memoryview(words).cast("B")


def page_bounds(pages: Any) -> tuple[int, int]:
    """The lowest and the highest of ``pages`` (u64, at least one)."""
    kernel = variant.kernel()
    if kernel is not None and not isinstance(pages, list):
        bounds: tuple[int, int] = kernel.page_bounds(pages)
        return bounds
    np = lazy_numpy()
    array = np.asarray(pages, dtype=np.uint64)
    return int(np.minimum.reduce(array)), int(np.maximum.reduce(array))


def consecutive(pages: Any, step: int) -> bool:
    """Whether each of ``pages`` (u64, at least one) is ``step`` beyond the one before it, modulo 2**64."""
    kernel = variant.kernel()
    if kernel is not None and not isinstance(pages, list):
        return bool(kernel.consecutive(pages, step))
    np = lazy_numpy()
    array = np.asarray(pages, dtype=np.uint64)
    return bool((array[1:] - array[:-1] == np.uint64(step)).all())


def uniform_value(values: Any) -> int | None:
    """The value that all of ``values`` (at least one) have, or None."""
    array = lazy_numpy().asarray(values)
    first = int(array[0])
    return first if bool((array == first).all()) else None


class UniformMaps(NamedTuple):
    """What structures say of which each has the same ``head`` and ``size`` and begins where the one before ends."""

    head: int
    iova: int
    """Of the first one."""
    size: int
    """Of each."""
    low: int
    """The lowest vaddr."""
    high: int
    """The highest vaddr."""
    bits: int
    """All vaddrs or-ed together."""


def look_at_dma_maps(maps: memoryview, count: int) -> UniformMaps | None:
    """What ``count`` structures (at least one) have in common; None when they are not as :class:`UniformMaps` says.

    IOVAs follow one another modulo 2**64.
    """
    kernel = variant.kernel()
    if kernel is not None:
        seen = kernel.look_at_dma_maps(maps, count)
        return UniformMaps._make(seen) if seen else None
    np = lazy_numpy()
    columns = np.frombuffer(maps, dtype=np.uint64, count=4 * count).reshape(count, 4)
    head, _, iova, size = (int(number) for number in columns[0])
    rows, vaddrs = columns - _steps(count, size), columns[:, 1]
    rows[:, 1] = 0
    if rows.tobytes() != rows[0].tobytes() * count:
        return None
    low, high = int(np.minimum.reduce(vaddrs)), int(np.maximum.reduce(vaddrs))
    return UniformMaps(head, iova, size, low, high, int(np.bitwise_or.reduce(vaddrs)))
