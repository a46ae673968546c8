"""Accesses that go on after a piece that failed, as QEMU's do.

What fails reads zero and takes nothing, what comes behind it moves, and the result has the bits of all failures. A
piece is a page of an IOMMU, an access that an I/O region takes, or what of the access lies in one range or one hole.
"""

from __future__ import annotations

from bisect import bisect_right

from vfio_model.memory import access
from vfio_model.memory.flatview import FlatView
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.region import IORegion
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer
from vfio_model.ranges import U64_MAX

_PAGE = 1 << 12


def build_reader(view: FlatView) -> access.Reader:
    """``read(addr, out)`` over ``view``."""
    once = access.build_general_reader(view)

    def read(addr: int, out: WriteBuffer) -> MemTxResult:
        addr &= U64_MAX
        step = _piece(view, addr, len(out))
        if step == len(out):
            return once(addr, out)
        rest, result = memoryview(out), MemTxResult.OK
        while len(rest):
            step = _piece(view, addr, len(rest))
            result |= once(addr, rest[:step])
            rest, addr = rest[step:], (addr + step) & U64_MAX
        return result

    return access.with_fast_reads(view, read)


def build_writer(view: FlatView) -> access.Writer:
    """``write(addr, data)`` over ``view``."""
    once = access.build_general_writer(view)

    def write(addr: int, data: ReadBuffer) -> MemTxResult:
        addr &= U64_MAX
        step = _piece(view, addr, len(data))
        if step == len(data):
            return once(addr, data)
        rest, result = memoryview(data), MemTxResult.OK
        while len(rest):
            step = _piece(view, addr, len(rest))
            result |= once(addr, rest[:step])
            rest, addr = rest[step:], (addr + step) & U64_MAX
        return result

    return access.with_fast_writes(view, write)


def _piece(view: FlatView, addr: int, length: int) -> int:
    """Bytes from ``addr`` on, at most ``length``, that succeed or fail together."""
    r = view.lookup(addr)
    if r is None:
        behind = bisect_right(view.starts, addr)
        return min(length, (view.starts[behind] if behind < len(view.starts) else U64_MAX + 1) - addr)
    length = min(length, r.last - addr + 1)
    if isinstance(r.region, IOMMUMemoryRegion):
        return min(length, _PAGE - addr % _PAGE)
    if isinstance(r.region, IORegion) and length:
        return access.access_size(addr - r.start + r.offset, length, r.region.ops.max_access_size)
    return length
