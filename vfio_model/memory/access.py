"""Reading and writing through a flat view: closures that are built once per commit and run on every access.

The *fast path* serves the dominant RAM range (the largest) with two comparisons and one slice copy. Everything else
goes the general way, range by range: RAM is copied, I/O is split into the accesses that its ops take, an IOMMU
translates page by page and hands each piece to its target space (which may translate again). An access stops at its
first failing piece: bytes before it have moved, the rest of a read is zero. Addresses wrap at 2**64, visibly, as a
64-bit bus does.

A reader or writer of one range is given the absolute address and a piece that lies inside the range.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable

from vfio_model.memory.flatview import FlatRange, FlatView
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.region import IORegion, RAMRegion
from vfio_model.memory.types import (
    MEMTXATTRS_UNSPECIFIED,
    IOMMUAccessFlags,
    MemTxResult,
    ReadBuffer,
    WriteBuffer,
)
from vfio_model.ranges import U64_MAX

Reader = Callable[[int, WriteBuffer], MemTxResult]
Writer = Callable[[int, ReadBuffer], MemTxResult]

_OK = MemTxResult.OK
_ERROR = MemTxResult.ERROR
_DECODE_ERROR = MemTxResult.DECODE_ERROR
_bits = int.__and__
"""``&`` of two ints without the cost of IntFlag's own operator."""


def build_reader(view: FlatView) -> Reader:
    """``read(addr, out)`` over ``view``."""
    return with_fast_reads(view, build_general_reader(view))


def build_writer(view: FlatView) -> Writer:
    """``write(addr, data)`` over ``view``."""
    return with_fast_writes(view, build_general_writer(view))


def build_general_reader(view: FlatView) -> Reader:
    """The same without a fast path."""
    return _general_reader(view.starts, [r.last for r in view.ranges], [_range_reader(r) for r in view.ranges])


def build_general_writer(view: FlatView) -> Writer:
    """The same without a fast path."""
    return _general_writer(view.starts, [r.last for r in view.ranges], [_range_writer(r) for r in view.ranges])


def with_fast_reads(view: FlatView, general: Reader) -> Reader:
    """``general``, but what lies in the dominant RAM range is copied at once."""
    dominant = dominant_ram(view, for_write=False)
    return general if dominant is None else _fast_reader(dominant, general)


def with_fast_writes(view: FlatView, general: Writer) -> Writer:
    """The same for writes, while nobody keeps a log of them."""
    dominant = dominant_ram(view, for_write=True)
    return general if dominant is None or is_logged(dominant) else _fast_writer(dominant, general)


def dominant_ram(view: FlatView, *, for_write: bool) -> FlatRange | None:
    """The largest range of ordinary RAM, writable if ``for_write``; None when there is none."""
    candidates = [
        r
        for r in view.ranges
        if isinstance(r.region, RAMRegion) and not r.region.ram_device and not (for_write and r.readonly)
    ]
    return max(candidates, key=lambda r: r.size, default=None)


def takes(view: FlatView, addr: int, size: int) -> bool:
    """Whether an access of ``size`` bytes (a power of two) at ``addr`` can be made in one, as a CPU's load or store is:
    one range answers all of it, and I/O has accesses so large. RAM need not be aligned.
    """
    r = view.lookup(addr)
    if r is None or addr + size - 1 > r.last:
        return False
    if not isinstance(r.region, IORegion):
        return True
    ops = r.region.ops
    return ops.min_access_size <= size <= ops.max_access_size and not (addr - r.start + r.offset) % size


def is_logged(r: FlatRange) -> bool:
    """Whether writes to a range are noted at present."""
    return isinstance(r.region, RAMRegion) and r.region.block.dirty is not None


def ram_view(r: FlatRange) -> memoryview:
    """The bytes that a RAM range shows."""
    assert isinstance(r.region, RAMRegion), "only RAM has bytes"
    return r.region.block.view[r.offset : r.offset + r.size]


def zero(out: WriteBuffer, start: int = 0) -> None:
    """Clear ``out`` from ``start`` on."""
    rest = len(out) - start
    if rest > 0:
        out[start:] = bytes(rest)


# -- the fast path


def _fast_reader(r: FlatRange, general: Reader) -> Reader:
    ram, start, stop, ok = ram_view(r), r.start, r.last + 1, _OK

    def read_low(addr: int, out: WriteBuffer) -> MemTxResult:
        end = addr + len(out)
        if addr >= 0 and end <= stop:
            out[:] = ram[addr:end]
            return ok
        return general(addr, out)

    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        end = addr + len(out)
        if start <= addr and end <= stop:
            out[:] = ram[addr - start : end - start]
            return ok
        return general(addr, out)

    return read if start else read_low


def _fast_writer(r: FlatRange, general: Writer) -> Writer:
    ram, start, stop, ok = ram_view(r), r.start, r.last + 1, _OK

    def write_low(addr: int, data: ReadBuffer) -> MemTxResult:
        end = addr + len(data)
        if addr >= 0 and end <= stop:
            ram[addr:end] = data
            return ok
        return general(addr, data)

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        end = addr + len(data)
        if start <= addr and end <= stop:
            ram[addr - start : end - start] = data
            return ok
        return general(addr, data)

    return write if start else write_low


# -- the general way


def _general_reader(starts: list[int], lasts: list[int], readers: list[Reader]) -> Reader:
    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        addr &= U64_MAX
        total = len(out)
        i = bisect_right(starts, addr) - 1
        if i >= 0 and addr + total - 1 <= lasts[i]:
            return readers[i](addr, out)
        rest = memoryview(out)
        while len(rest):
            i = bisect_right(starts, addr) - 1
            if i < 0 or addr > lasts[i]:
                zero(rest)
                return _DECODE_ERROR
            step = min(len(rest), lasts[i] - addr + 1)
            result = readers[i](addr, rest[:step])
            rest = rest[step:]
            if result:
                zero(rest)
                return result
            addr = (addr + step) & U64_MAX
        return _OK

    return read


def _general_writer(starts: list[int], lasts: list[int], writers: list[Writer]) -> Writer:
    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        addr &= U64_MAX
        total = len(data)
        i = bisect_right(starts, addr) - 1
        if i >= 0 and addr + total - 1 <= lasts[i]:
            return writers[i](addr, data)
        rest = memoryview(data)
        while len(rest):
            i = bisect_right(starts, addr) - 1
            if i < 0 or addr > lasts[i]:
                return _DECODE_ERROR
            step = min(len(rest), lasts[i] - addr + 1)
            result = writers[i](addr, rest[:step])
            if result:
                return result
            rest = rest[step:]
            addr = (addr + step) & U64_MAX
        return _OK

    return write


def _range_reader(r: FlatRange) -> Reader:
    if isinstance(r.region, RAMRegion):
        return _ram_reader(r)
    if isinstance(r.region, IOMMUMemoryRegion):
        return _iommu_reader(r.region, r.start - r.offset)
    assert isinstance(r.region, IORegion), "a terminating region is RAM, I/O or an IOMMU"
    return _io_reader(r.region, r.start - r.offset)


def _range_writer(r: FlatRange) -> Writer:
    if isinstance(r.region, RAMRegion):
        return _undecoded_write if r.readonly else _logging_ram_writer(r) if is_logged(r) else _ram_writer(r)
    if isinstance(r.region, IOMMUMemoryRegion):
        return _iommu_writer(r.region, r.start - r.offset)
    assert isinstance(r.region, IORegion), "a terminating region is RAM, I/O or an IOMMU"
    return _io_writer(r.region, r.start - r.offset)


# -- RAM


def _ram_reader(r: FlatRange) -> Reader:
    ram, start = ram_view(r), r.start

    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        at = addr - start
        out[:] = ram[at : at + len(out)]
        return _OK

    return read


def _ram_writer(r: FlatRange) -> Writer:
    ram, start = ram_view(r), r.start

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        at = addr - start
        ram[at : at + len(data)] = data
        return _OK

    return write


def _logging_ram_writer(r: FlatRange) -> Writer:
    assert isinstance(r.region, RAMRegion) and r.region.block.dirty is not None, "a logged range is RAM"
    ram, start, offset, mark = ram_view(r), r.start, r.offset, r.region.block.dirty.mark

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        at = addr - start
        ram[at : at + len(data)] = data
        mark(offset + at, len(data))
        return _OK

    return write


def _undecoded_write(addr: int, data: ReadBuffer) -> MemTxResult:
    return _DECODE_ERROR if len(data) else _OK


# -- I/O


def access_size(addr: int, length: int, max_size: int) -> int:
    """Bytes of the next access: a power of two, at most ``max_size`` and ``length``, and ``addr`` aligned to it."""
    size = min(max_size, length)
    if addr:
        size = min(size, addr & -addr)
    return 1 << (size.bit_length() - 1)


def _io_reader(region: IORegion, base: int) -> Reader:
    ops, big = region.ops, region.big_endian
    low, high = ops.min_access_size, ops.max_access_size

    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        done, total = 0, len(out)
        addr -= base
        while done < total:
            size = access_size(addr + done, total - done, high)
            value = ops.read(addr + done, size) if size >= low else None
            if value is None:
                zero(out, done)
                return _ERROR if size >= low else _DECODE_ERROR
            masked = value & ((1 << 8 * size) - 1)
            out[done : done + size] = masked.to_bytes(size, "big" if big else "little")
            done += size
        return _OK

    return read


def _io_writer(region: IORegion, base: int) -> Writer:
    ops, big = region.ops, region.big_endian
    low, high = ops.min_access_size, ops.max_access_size

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        done, total = 0, len(data)
        addr -= base
        while done < total:
            size = access_size(addr + done, total - done, high)
            if size < low:
                return _DECODE_ERROR
            value = int.from_bytes(data[done : done + size], "big" if big else "little")
            result = ops.write(addr + done, size, value)
            if result:
                return result
            done += size
        return _OK

    return write


# -- IOMMU


def _iommu_reader(region: IOMMUMemoryRegion, base: int) -> Reader:
    translate, wanted = region.translate, IOMMUAccessFlags.RO
    idx = region.attrs_to_index(MEMTXATTRS_UNSPECIFIED)

    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        addr -= base
        rest: WriteBuffer = out
        while total := len(rest):
            entry = translate(addr, wanted, idx)
            if not _bits(entry.perm, 1) or entry.target_as is None:
                zero(rest)
                return _DECODE_ERROR
            mask = entry.addr_mask
            room = mask - (addr & mask) + 1
            target = (entry.translated_addr & ~mask) | (addr & mask)
            if total <= room:
                return entry.target_as.read(target, rest)
            rest = memoryview(rest)
            result = entry.target_as.read(target, rest[:room])
            rest = rest[room:]
            if result:
                zero(rest)
                return result
            addr += room
        return _OK

    return read


def _iommu_writer(region: IOMMUMemoryRegion, base: int) -> Writer:
    translate, wanted = region.translate, IOMMUAccessFlags.WO
    idx = region.attrs_to_index(MEMTXATTRS_UNSPECIFIED)

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        addr -= base
        rest: ReadBuffer = data
        while total := len(rest):
            entry = translate(addr, wanted, idx)
            if not _bits(entry.perm, 2) or entry.target_as is None:
                return _DECODE_ERROR
            mask = entry.addr_mask
            room = mask - (addr & mask) + 1
            target = (entry.translated_addr & ~mask) | (addr & mask)
            if total <= room:
                return entry.target_as.write(target, rest)
            rest = memoryview(rest)
            result = entry.target_as.write(target, rest[:room])
            if result:
                return result
            rest = rest[room:]
            addr += room
        return _OK

    return write
