"""Many single MAP_DMA or UNMAP_DMA structs of a type 1 container in one step.

As :mod:`vfio_model.host.spapr_batch`: pages of one size at consecutive bus addresses, about which nothing is unusual;
anything else is left as a whole to the struct-by-struct way. That both ways end the same is tested.
"""

from __future__ import annotations

from errno import ENOMEM

from vfio_model.batch import variant
from vfio_model.batch.dma_map import LEAST, MAP_HEADS, UNMAP_HEAD, look_at_dma_maps, unmap_steps
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.mm import Mm, Run
from vfio_model.host.type1_mappings import Block, Mappings
from vfio_model.host.type1_table import PAGE_SHIFT, IoPageTable
from vfio_model.ranges import U64_MAX

_LARGEST = 1 << 20
"""Pages of this size and below are never leaves above the last level."""


def batch_block(mm: Mm, args: memoryview, count: int) -> tuple[Block, memoryview] | None:
    """The mappings that ``count`` structs ask for as one block, and the entries of their 4 KiB pages; None when
    something about the structs, or the memory behind them, is unusual. Nothing is counted or stored.
    """
    seen = look_at_dma_maps(args, count) if count >= LEAST else None
    flags = MAP_HEADS.get(seen.head) if seen else None
    if seen is None or flags is None or not 0 < seen.size <= _LARGEST or seen.size & (seen.size - 1):
        return None
    size = seen.size
    if size < mm.host_page or (seen.iova | seen.bits) & (size - 1) or seen.iova + count * size > 1 << 64:
        return None
    region = mm.pinning(seen.low, seen.high - seen.low + size)
    if region is None or (not region.runs[0].hpa.contiguous and size > 1 << region.runs[0].hpa.page_shift):
        return None
    tces = _tces(args, count, region.runs[0], flags)
    return Block(seen.iova, size, count, flags, (region,), mm), _spread(tces, size)


def _tces(args: memoryview, count: int, run: Run, flags: int) -> memoryview:
    kernel, hpa, to_offset = variant.kernel(), run.hpa, run.delta & U64_MAX
    if kernel is not None:
        tces = memoryview(bytearray(8 * count)).cast("Q")
        place = hpa.base, hpa.page_shift, hpa.bits, hpa.multiplier, hpa.addend
        kernel.maps_to_tces(args, 0, count, to_offset, flags, *place, tces)
        return tces
    vaddrs = lazy_numpy().frombuffer(args, dtype="u8", count=4 * count)[1::4]
    found: memoryview = (hpa.to_hpa_many(vaddrs + to_offset) | flags).data
    return found.cast("B").cast("Q")


def _spread(tces: memoryview, size: int) -> memoryview:
    """From an entry for every ``size`` bytes to one for every 4 KiB."""
    if size == 1 << PAGE_SHIFT:
        return tces
    np = lazy_numpy()
    within = np.arange(0, size, 1 << PAGE_SHIFT, dtype="u8")
    spread: memoryview = (np.frombuffer(tces, dtype="u8")[:, None] + within).data
    return spread.cast("B").cast("Q")


def store_block(table: IoPageTable, mappings: Mappings, block: Block, tces: memoryview) -> bool:
    """Count and store ``block``; False without table memory or over the memlock limit, then nothing was done."""
    try:
        block.mm.account(block.bytes // block.mm.host_page)
    except OSError:
        return False
    try:
        table.store_pages(block.iova, tces)
    except OSError as error:
        assert error.errno == ENOMEM, "only table memory can run out here"
        block.mm.unaccount(block.bytes // block.mm.host_page)
        return False
    block.regions[0].mapped += block.count
    mappings.add(block)
    return True


def batch_range(mappings: Mappings, args: memoryview, count: int, granule: int) -> tuple[int, int] | None:
    """First and last byte that ``count`` UNMAP_DMA structs cover, page by page; None when that is not plainly so."""
    if count < LEAST:
        return None
    columns = lazy_numpy().frombuffer(args, dtype="u8", count=3 * count).reshape(count, 3)
    head, first, page = (int(number) for number in columns[0])
    if head != UNMAP_HEAD or page < granule or page & (page - 1) or first & (page - 1):
        return None
    last = first + count * page - 1
    if last > U64_MAX:
        return None
    rows = columns - unmap_steps(count, page)
    if rows.tobytes() != rows[0].tobytes() * count:
        return None
    if any(block.size != page or block.iova & (page - 1) for block in mappings.overlapping(first, last)):
        return None
    return first, last
