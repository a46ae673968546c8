"""Accesses that go on after a piece that failed, as QEMU's do.

What fails reads zero and takes nothing, what comes behind it moves, and the result has the bits of all failures. A
piece is a page of an IOMMU, an access that an I/O region takes, or what of the access lies in one range or one hole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Any

from vfio_model.memory import access
from vfio_model.memory.flatview import FlatView
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.region import IORegion
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

_PAGE = 1 << 12


def build_reader(view: FlatView) -> access.Reader:
    """``read(addr, out)`` over ``view``."""
    return access.with_fast_reads(view, _each_piece(view, access.build_general_reader(view)))


def build_writer(view: FlatView) -> access.Writer:
    """``write(addr, data)`` over ``view``."""
    return access.with_fast_writes(view, _each_piece(view, access.build_general_writer(view)))


def _each_piece(view: FlatView, once: Callable[[int, Any], MemTxResult]) -> Callable[[int, Any], MemTxResult]:
    """``once(addr, buffer)``, piece by piece."""

    def act(addr: int, buffer: Any) -> MemTxResult:
        addr &= U64_MAX
        step = _piece(view, addr, len(buffer))
        if step == len(buffer):
            return once(addr, buffer)
        rest, result = memoryview(buffer), MemTxResult.OK
        while len(rest):
            step = _piece(view, addr, len(rest))
            result |= once(addr, rest[:step])
            rest, addr = rest[step:], (addr + step) & U64_MAX
        return result

    return act


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
