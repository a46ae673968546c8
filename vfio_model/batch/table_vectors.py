"""The numpy variant of :mod:`vfio_model.batch.tables`.

What it costs is passes over memory and calls into numpy, so: chunks that stay in the second-level cache, constants as
0-d arrays, ``out`` by position (half the price of keywords and scalars), methods instead of functions. A small batch
leaves the bounds check to ``take``; a large one checks by a maximum, because only ``mode="clip"`` fills ``out`` without
a copy. The index is an unsigned difference shifted right by at least two: an iova below the window becomes a huge
positive index, never a negative one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vfio_model.batch.tables import PERM_MASK

U64 = npt.NDArray[np.uint64]

CHUNK = 32768
"""Addresses per chunk: 256 KiB of scratch."""
SMALL = 4096
"""Up to so many addresses a batch is small."""

_and, _or, _sub, _shift = np.bitwise_and, np.bitwise_or, np.subtract, np.right_shift
_and_all: Any = np.bitwise_and.reduce
_greatest: Any = np.maximum.reduce


class TableTranslator:
    """Translates through ``table`` (numpy uint64 or a buffer of format ``Q``, shared, not copied), whose window
    starts at ``start`` and has pages of ``1 << page_shift`` bytes. One translator serves one thread: its scratch is
    its own.
    """

    def __init__(self, table: U64 | memoryview, start: int, page_shift: int) -> None:
        assert page_shift >= 2, "two bits of an entry are its permission"
        self.table: U64 = table if isinstance(table, np.ndarray) else np.frombuffer(table, dtype=np.uint64)
        self._take: Any = self.table.take
        self._start = np.array(start, dtype=np.uint64)
        self._page_shift = np.array(page_shift, dtype=np.uint64)
        self._offset_mask = np.array((1 << page_shift) - 1, dtype=np.uint64)
        self._page_mask = ~self._offset_mask
        self._index = np.empty(CHUNK, dtype=np.uint64)
        self._scratch: tuple[U64, npt.NDArray[np.int64]] = self._cut(CHUNK)

    def _cut(self, count: int) -> tuple[U64, npt.NDArray[np.int64]]:
        """Scratch for ``count`` addresses, also as signed integers: ``take`` wants those."""
        index = self._index[:count]
        self._scratch = index, index.view(np.int64)
        return self._scratch

    def translate(self, iovas: U64, out: U64) -> tuple[bool, int]:
        """Addresses of ``iovas`` into ``out`` (same length, not the same array). Returns as
        :func:`~vfio_model.batch.tables.translate_reference`: whether all lie in the window, and the AND of their
        permissions. When one lies outside, ``out`` holds rubbish.
        """
        count = len(iovas)
        try:
            if count <= SMALL:
                return True, self._small(iovas, out, count)
            perms = PERM_MASK
            for at in range(0, count, CHUNK):
                perms &= self._large(iovas[at : at + CHUNK], out[at : at + CHUNK])
        except IndexError:
            return False, 0
        return True, perms

    def _small(self, iovas: U64, out: U64, count: int) -> int:
        index, signed = self._scratch
        if len(index) != count:
            index, signed = self._cut(count)
        _sub(iovas, self._start, index)
        _shift(index, self._page_shift, index)
        entries = self._take(signed)
        perms = int(_and_all(entries)) & PERM_MASK
        _and(iovas, self._offset_mask, index)
        _and(entries, self._page_mask, entries)
        _or(entries, index, out)
        return perms

    def _large(self, iovas: U64, out: U64) -> int:
        index, signed = self._scratch
        if len(index) != len(iovas):
            index, signed = self._cut(len(iovas))
        _sub(iovas, self._start, index)
        _shift(index, self._page_shift, index)
        if int(_greatest(index)) >= len(self.table):
            raise IndexError
        self._take(signed, 0, out, "clip")
        perms = int(_and_all(out)) & PERM_MASK
        _and(iovas, self._offset_mask, index)
        _and(out, self._page_mask, out)
        _or(out, index, out)
        return perms

    def translate_each(self, iovas: U64) -> tuple[U64, npt.NDArray[np.uint8]]:
        """Address and permission of each iova on its own; outside the window both are 0."""
        index = (iovas - self._start) >> self._page_shift
        inside = index < np.uint64(len(self.table))
        if not len(self.table):
            return np.zeros(len(iovas), dtype=np.uint64), np.zeros(len(iovas), dtype=np.uint8)
        entries = self.table.take(index.view(np.int64), mode="clip")
        addresses = (entries & self._page_mask) | (iovas & self._offset_mask)
        perms = (entries & np.uint64(PERM_MASK)).astype(np.uint8)
        return np.where(inside, addresses, np.uint64(0)), np.where(inside, perms, np.uint8(0))
