"""The array side of :mod:`vfio_model.memory.pieces`; imports numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vfio_model.batch import pages
from vfio_model.memory.access import dominant_ram, is_logged, ram_view
from vfio_model.memory.dma import Iovas
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.space import Space
from vfio_model.memory.types import MEMTXATTRS_UNSPECIFIED, IOMMUAccessFlags, ReadBuffer, WriteBuffer

U64 = npt.NDArray[np.uint64]


def gather(space: Space, iovas: Iovas, size: int, out: WriteBuffer) -> int:
    """Read as many leading pieces as arrays can serve; returns how many."""
    ram, offsets = _locate(space, iovas, size, is_write=False)
    if len(offsets):
        pages.gather(ram, offsets, size, memoryview(out)[: len(offsets) * size])
    return len(offsets)


def scatter(space: Space, iovas: Iovas, size: int, data: ReadBuffer) -> int:
    """Write as many leading pieces as arrays can serve; returns how many."""
    ram, offsets = _locate(space, iovas, size, is_write=True)
    if len(offsets):
        pages.scatter(ram, offsets, size, memoryview(data)[: len(offsets) * size])
    return len(offsets)


def _locate(space: Space, iovas: Iovas, size: int, *, is_write: bool) -> tuple[memoryview, U64]:
    """RAM and the offsets in it of the leading pieces that lie in it as a whole."""
    try:
        addrs = np.asarray(iovas, dtype=np.uint64)
    except OverflowError:  # an address that has still to wrap
        return memoryview(b""), np.empty(0, dtype=np.uint64)
    while True:
        dominant = dominant_ram(space.view, for_write=is_write)
        if dominant is not None:
            if is_write and is_logged(dominant):  # one by one: each write is noted
                return memoryview(b""), addrs[:0]
            offsets = addrs - np.uint64(dominant.start)
            if size > dominant.size:
                return ram_view(dominant), offsets[:0]
            return ram_view(dominant), offsets[: _leading(offsets <= np.uint64(dominant.size - size))]
        step = _through_iommu(space, addrs, size, is_write)
        if step is None:
            return memoryview(b""), addrs[:0]
        space, addrs = step


def _through_iommu(space: Space, addrs: U64, size: int, is_write: bool) -> tuple[Space, U64] | None:
    """One level down, for the leading pieces that translate and stay inside a page."""
    iommus = [r for r in space.view.ranges if isinstance(r.region, IOMMUMemoryRegion)]
    found = max(iommus, key=lambda r: r.size, default=None)
    if found is None:
        return None
    region = found.region
    assert isinstance(region, IOMMUMemoryRegion), "chosen by kind"
    wanted = IOMMUAccessFlags.WO if is_write else IOMMUAccessFlags.RO
    page = region.get_min_page_size()
    if size > page:
        return None
    rel = addrs - np.uint64(found.start)
    inside = (rel <= np.uint64(found.size - size)) if size <= found.size else np.zeros(len(rel), dtype=bool)
    rel += np.uint64(found.offset)
    inside &= (rel & np.uint64(page - 1)) <= np.uint64(page - size)
    rel = rel[: _leading(inside)]
    answer = region.translate_many(rel, wanted, region.attrs_to_index(MEMTXATTRS_UNSPECIFIED)) if len(rel) else None
    if answer is None:
        return None
    target, translated, perms = answer
    good = _leading(np.broadcast_to((np.asarray(perms) & int(wanted)) != 0, rel.shape))
    return target, np.asarray(translated, dtype=np.uint64)[:good]


def _leading(good: Any) -> int:
    """How many leading elements are true."""
    return len(good) if good.all() else int(good.argmin())
