"""Gathering and scattering equal-sized pieces of RAM, reference and numpy.

Pieces that are all aligned to their size are rows of a matrix: one ``take`` or one indexed assignment moves them (of
repeated rows the last wins, as in a loop). Others are copied slice by slice, which is exact also where pieces overlap
in part. ``B[:] = rows[i]`` makes a temporary and is a trap: ``take`` with ``out`` and ``mode="clip"`` does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Offsets = Sequence[int] | Any
"""Byte offsets into RAM: a sequence of ints or a numpy uint64 array. Every piece lies inside."""


def gather_reference(ram: memoryview, offsets: Offsets, size: int, out: memoryview) -> None:
    """Copy the pieces of ``size`` bytes at ``offsets`` into ``out``, one after another."""
    at = 0
    for offset in _ints(offsets):
        out[at : at + size] = ram[offset : offset + size]
        at += size


def scatter_reference(ram: memoryview, offsets: Offsets, size: int, data: memoryview) -> None:
    """Copy consecutive pieces of ``size`` bytes of ``data`` to ``offsets``, in order."""
    at = 0
    for offset in _ints(offsets):
        ram[offset : offset + size] = data[at : at + size]
        at += size


def gather(ram: memoryview, offsets: Offsets, size: int, out: memoryview) -> None:
    """As :func:`gather_reference`, by numpy where that pays."""
    rows = _rows(offsets, size)
    if rows is None:
        gather_reference(ram, offsets, size, out)
        return
    import numpy as np  # noqa: PLC0415  heavy, and optional until the first batch

    usable = len(ram) // size * size
    pages = np.frombuffer(ram[:usable], dtype=np.uint8).reshape(-1, size)
    np.take(pages, rows, 0, out=np.frombuffer(out, dtype=np.uint8).reshape(-1, size), mode="clip")


def scatter(ram: memoryview, offsets: Offsets, size: int, data: memoryview) -> None:
    """As :func:`scatter_reference`, by numpy where that pays."""
    rows = _rows(offsets, size)
    if rows is None:
        scatter_reference(ram, offsets, size, data)
        return
    import numpy as np  # noqa: PLC0415  heavy, and optional until the first batch

    usable = len(ram) // size * size
    pages = np.frombuffer(ram[:usable], dtype=np.uint8).reshape(-1, size)
    pages[rows] = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)


def _rows(offsets: Offsets, size: int) -> Any:
    """Row numbers (numpy, signed) when every offset is a multiple of ``size``, a power of two; else None."""
    if size & (size - 1) or not len(offsets):
        return None
    import numpy as np  # noqa: PLC0415  heavy, and optional until the first batch

    array = np.asarray(offsets, dtype=np.uint64)
    if int(np.bitwise_or.reduce(array)) & (size - 1):
        return None
    return (array >> np.uint64(size.bit_length() - 1)).view(np.int64)


def _ints(offsets: Offsets) -> Sequence[int]:
    return offsets.tolist() if hasattr(offsets, "tolist") else offsets
