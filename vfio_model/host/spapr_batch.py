"""Hundreds of single-page MAP_DMA or UNMAP_DMA structs in one step.

A guest's H_PUT_TCE_INDIRECT or H_STUFF_TCE becomes up to 512 of them: one page each, at consecutive bus addresses.
Where every struct is of that kind and nothing can go wrong, the columns are handled as arrays. Anything odd, an error
to come or a mapping that would be replaced, is left alone as a whole: the caller then goes struct by struct and has the
exact semantics. That both ways end the same is tested.

Layout of the structs: ``include/uapi/linux/vfio.h``, as 8-byte columns (argsz and flags share the first).
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from errno import ENOMEM
from typing import Any

from vfio_model.host.mm import Mm
from vfio_model.host.tce_table import Dropped, TceTable, take
from vfio_model.uapi.vfio import DmaMap, DmaMapFlags, DmaUnmap

_LEAST = 8
"""Fewer structs are faster one by one."""
_U64_MASK = (1 << 64) - 1


def _head(argsz: int, flags: int) -> int:
    word: int = struct.unpack("=Q", struct.pack("=II", argsz, flags))[0]
    return word


_MAP_HEADS = {_head(DmaMap.SIZE, int(flags)): int(flags) for flags in map(DmaMapFlags, (1, 2, 3))}
_UNMAP_HEAD = _head(DmaUnmap.SIZE, 0)


@functools.cache
def _numpy() -> Any:
    import numpy  # noqa: PLC0415 - 200 ms of import that a host without batches never pays

    return numpy


@functools.lru_cache(maxsize=16)
def _steps(count: int, page: int, iova_column: int) -> Any:
    """By how much ``count`` structs of one page each, at consecutive IOVAs, differ from the first. Only to be read."""
    steps = _numpy().zeros((count, iova_column + 2), dtype="u8")
    steps[:, iova_column] = _numpy().arange(0, count * page, page, dtype="u8")
    return steps


def map_pages(tables: Sequence[TceTable | None], mm: Mm, args: memoryview, count: int) -> bool:
    """Store all ``count`` mappings; False when something about them is unusual: then nothing was done."""
    if count < _LEAST:
        return False
    columns = _numpy().frombuffer(args, dtype="u8", count=4 * count).reshape(count, 4)
    flags = _MAP_HEADS.get(int(columns[0, 0]))
    place = _consecutive(tables, columns, 2) if flags else None
    if flags is None or place is None:
        return False
    table, index = place
    np, vaddrs = _numpy(), columns[:, 1]
    low, high = int(np.minimum.reduce(vaddrs)), int(np.maximum.reduce(vaddrs))
    region = mm.lookup(low, high - low + table.page)
    if region is None or region.dying or region.page_shift < table.page_shift or len(region.runs) > 1:
        return False
    run = region.runs[0]
    tces = run.hpa.to_hpa_many(vaddrs + (run.delta & _U64_MASK)) | flags
    if int(np.bitwise_or.reduce(vaddrs)) & (table.page - 1):
        return False
    if not table.vacant(index, count) or not _ready(table, index, count):
        return False
    words, done = tces.data.cast("B").cast("Q"), 0
    while done < count:
        step = min(count - done, table.chunk_room(index + done))
        table.store(index + done, words[done : done + step], region.id)
        done += step
    take(region, count)
    return True


def unmap_pages(tables: Sequence[TceTable | None], args: memoryview, count: int) -> Dropped | None:
    """Clear all ``count`` pages; None when something about the structs is unusual: then nothing was done."""
    if count < _LEAST:
        return None
    columns = _numpy().frombuffer(args, dtype="u8", count=3 * count).reshape(count, 3)
    if int(columns[0, 0]) != _UNMAP_HEAD:
        return None
    place = _consecutive(tables, columns, 1)
    return None if place is None else place[0].clear(place[1], count)


def _consecutive(tables: Sequence[TceTable | None], columns: Any, iova_column: int) -> tuple[TceTable, int] | None:
    """The window and first entry of structs with one head that are one page each and follow one another.

    The size comes behind the IOVA. A column between the head and these is not looked at.
    """
    count = len(columns)
    first, last = int(columns[0, iova_column]), int(columns[-1, iova_column])
    table = next((table for table in tables if table is not None and table.start <= first <= table.last), None)
    if table is None or first & (table.page - 1) or last > table.last or columns[0, iova_column + 1] != table.page:
        return None
    rows = columns - _steps(count, table.page, iova_column)
    rows[:, 1:iova_column] = 0
    if rows.tobytes() != rows[0].tobytes() * count:
        return None
    return table, (first - table.start) >> table.page_shift


def _ready(table: TceTable, index: int, count: int) -> bool:
    """Whether the tables for these entries are there or can be made."""
    try:
        table.prepare(index, count)
    except OSError as error:
        assert error.errno == ENOMEM, "only table memory can run out here"
        return False
    return True
