"""Hundreds of single-page MAP_DMA or UNMAP_DMA structs in one step.

A guest's H_PUT_TCE_INDIRECT or H_STUFF_TCE becomes up to 512 of them: one page each, at consecutive bus addresses.
Where every struct is of that kind and nothing can go wrong, the columns are handled as arrays. Anything odd, an error
to come or a mapping that would be replaced, is left alone as a whole: the caller then goes struct by struct and has the
exact semantics. That both ways end the same is tested.

Layout of the structs: ``include/uapi/linux/vfio.h``, as 8-byte columns (argsz and flags share the first).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import ENOMEM

from vfio_model.batch import variant
from vfio_model.batch.dma_map import LEAST, MAP_HEADS, UNMAP_HEAD, look_at_dma_maps, unmap_steps
from vfio_model.batch.lazy import lazy_numpy
from vfio_model.host.mm import Mm, Region, Run
from vfio_model.host.tce_table import Dropped, TceTable, take

Lookup = Callable[[Mm, int, int], Region | None]

_U64_MASK = (1 << 64) - 1


def map_pages(
    tables: Sequence[TceTable | None], mm: Mm, args: memoryview, count: int, lookup: Lookup = Mm.lookup
) -> bool:
    """Store all ``count`` mappings; False when something about them is unusual: then nothing was done.

    ``lookup(mm, ua, size)``: what holds all of these bytes in place, if it is one region.
    """
    if count < LEAST:
        return False
    seen = look_at_dma_maps(args, count)
    flags = MAP_HEADS.get(seen.head) if seen else None
    if seen is None or flags is None:
        return False
    table = _table_of(tables, seen.iova, count * seen.size)
    if table is None or seen.size != table.page or (seen.iova | seen.bits) & (table.page - 1):
        return False
    region = lookup(mm, seen.low, seen.high - seen.low + table.page)
    if region is None or region.dying or region.page_shift < table.page_shift or len(region.runs) > 1:
        return False
    index = (seen.iova - table.start) >> table.page_shift
    if not table.vacant(index, count) or not _ready(table, index, count):
        return False
    _store(table, index, _tces(args, count, region.runs[0], flags), region.id)
    take(region, count)
    return True


def _tces(args: memoryview, count: int, run: Run, flags: int) -> memoryview:
    """The entries of ``count`` structs whose vaddrs lie in ``run``."""
    kernel, hpa, to_offset = variant.kernel(), run.hpa, run.delta & _U64_MASK
    if kernel is not None:
        tces = memoryview(bytearray(8 * count)).cast("Q")
        place = hpa.base, hpa.page_shift, hpa.bits, hpa.multiplier, hpa.addend
        kernel.maps_to_tces(args, 0, count, to_offset, flags, *place, tces)
        return tces
    vaddrs = lazy_numpy().frombuffer(args, dtype="u8", count=4 * count)[1::4]
    found: memoryview = (hpa.to_hpa_many(vaddrs + to_offset) | flags).data
    return found.cast("B").cast("Q")


def _store(table: TceTable, index: int, tces: memoryview, region: int) -> None:
    done, count = 0, len(tces)
    while done < count:
        step = min(count - done, table.chunk_room(index + done))
        table.store(index + done, tces[done : done + step], region)
        done += step


def unmap_pages(tables: Sequence[TceTable | None], args: memoryview, count: int) -> Dropped | None:
    """Clear all ``count`` pages; None when something about the structs is unusual: then nothing was done."""
    if count < LEAST:
        return None
    columns = lazy_numpy().frombuffer(args, dtype="u8", count=3 * count).reshape(count, 3)
    head, first, page = (int(number) for number in columns[0])
    table = _table_of(tables, first, count * page) if head == UNMAP_HEAD else None
    if table is None or page != table.page or first & (page - 1):
        return None
    rows = columns - unmap_steps(count, page)
    if rows.tobytes() != rows[0].tobytes() * count:
        return None
    return table.clear((first - table.start) >> table.page_shift, count)


def _table_of(tables: Sequence[TceTable | None], first: int, size: int) -> TceTable | None:
    """The window that holds all ``size`` bytes from bus address ``first``."""
    for table in tables:
        if table is not None and table.start <= first <= table.last:
            return table if first + size - 1 <= table.last else None
    return None


def _ready(table: TceTable, index: int, count: int) -> bool:
    """Whether the tables for these entries are there or can be made."""
    try:
        table.prepare(index, count)
    except OSError as error:
        assert error.errno == ENOMEM, "only table memory can run out here"
        return False
    return True
