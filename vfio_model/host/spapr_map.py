"""MAP_DMA of one range: the TCEs of many pages, each checked as the kernel checks it, stored a stretch at a time.

A stretch is as many pages as lie in one region and in one segment of memory. What holds for its first page then holds
for all of it, so that the result is that of going page by page. Between two slices of the work memory may be unmapped
and regions may go: what was found before is not relied upon after.
"""

from __future__ import annotations

from collections.abc import Callable
from errno import EINVAL, ENXIO
from typing import NamedTuple

from vfio_model.host.mm import Mm, Region, Run
from vfio_model.host.pending import CALL, Revocation, Work
from vfio_model.host.tce_table import Dropped, PageRun, TceTable, add, take


class MapRequest(NamedTuple):
    """What a ``struct vfio_iommu_type1_dma_map`` asks for, its argsz apart."""

    flags: int
    vaddr: int
    iova: int
    size: int


def find_page(mm: Mm, ua: int, table: TceTable) -> tuple[Region, Run]:
    """The preregistered region and the run that hold the IOMMU page at ``ua``.

    :raise OSError: EINVAL for a page that no region holds or that is larger than its backing, ENXIO for one whose
        region is being torn down.
    """
    region = mm.lookup(ua, table.page)
    if region is None:
        raise OSError(EINVAL, f"{ua:#x} is not registered")
    if region.page_shift < table.page_shift:
        raise OSError(EINVAL, f"{ua:#x} can be mapped by pages up to {1 << region.page_shift:#x}, not {table.page:#x}")
    run = region.run_at(ua)
    if ua + table.page > run.end:
        raise OSError(EINVAL, f"the IOMMU page at {ua:#x} lies in two mappings")
    if region.dying:
        raise OSError(ENXIO, f"the region at {region.ua:#x} is being unregistered")
    return region, run


FindPage = Callable[[Mm, int, TceTable], tuple[Region, Run]]


def map_range(
    table: TceTable, mm: Mm, request: MapRequest, find: FindPage = find_page
) -> tuple[Dropped, OSError | None]:
    """All of :func:`mapping` at once: what TCEs were dropped, and the error that stopped it, if any."""
    dropped = Dropped()
    try:
        for _ in mapping(table, mm, request, dropped, Revocation(), find):
            pass
    except OSError as error:
        return dropped, error
    return dropped, None


def mapping(
    table: TceTable, mm: Mm, request: MapRequest, dropped: Dropped, revocation: Revocation, find: FindPage = find_page
) -> Work:
    """Store the TCEs of ``request``, whose alignment, flags and window are checked already. ``find`` says what holds a
    page in place, or raises the OSError for which it cannot be mapped. What TCEs were replaced is counted in
    ``dropped``; after an error the entries stored before it are cleared and counted there too.

    :raise OSError: that of ``find``, or ENOMEM without table memory.
    """
    first = (request.iova - table.start) >> table.page_shift
    total, done, spend = request.size >> table.page_shift, 0, revocation.spend
    try:
        while done < total:
            ua = request.vaddr + (done << table.page_shift)
            region, run = find(mm, ua, table)
            stop = min(total, done + (min(region.end, run.end) - ua >> table.page_shift))
            used_up = False
            while done < stop and not used_up:
                count = min(stop - done, table.chunk_room(first + done))
                offset = request.vaddr + (done << table.page_shift) + run.delta
                if count == 1:
                    before = table.store_one(first + done, run.hpa.to_hpa(offset) | request.flags, region.id)
                    if before:
                        add(dropped, {before: 1})
                else:
                    pages = PageRun(run.hpa, offset, request.flags)
                    add(dropped, table.fill(first + done, count, pages, region.id))
                take(region, count)
                done += count
                used_up = spend(CALL + count)
            if used_up:
                yield
    except OSError:
        yield from table.clearing(first, done, dropped, revocation)
        raise
