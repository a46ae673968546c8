"""The numpy variant of :mod:`vfio_model.batch.walks`.

A chunk goes down level by level as long as all of its addresses do the same: every entry is there, has the same
permission, and is a table, or is a page. That costs five passes over memory a level, and two reductions that see it.
Otherwise the whole chunk goes the general way, with a mask of those that are still on theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from vfio_model.batch.walks import LARGE, WalkSpec

U64 = npt.NDArray[np.uint64]

CHUNK = 32768
"""Addresses per chunk."""
_PERM_MASK = 3
_or_all: Any = np.bitwise_or.reduce
_and_all: Any = np.bitwise_and.reduce
_greatest: Any = np.maximum.reduce
_INDEX = np.uint64(0xFF8)
_WORD = np.uint64(3)


def walk_vectors(spec: WalkSpec, base: int, words: Any, iovas: U64) -> tuple[U64, npt.NDArray[np.uint8]]:
    """See :func:`~vfio_model.batch.walk_variant.walk`."""
    table = np.frombuffer(words, dtype=np.uint64)
    out, perms = np.zeros(len(iovas), dtype=np.uint64), np.zeros(len(iovas), dtype=np.uint8)
    if not len(table):
        return out, perms
    for at in range(0, len(iovas), CHUNK):
        part = slice(at, at + CHUNK)
        perm = _alike(spec, base, table, iovas[part], out[part])
        if perm is None:
            _each(spec, base, table, iovas[part], out[part], perms[part])
        else:
            perms[part] = perm
    return out, perms


def _alike(spec: WalkSpec, base: int, table: U64, iovas: U64, out: U64) -> int | None:
    """Addresses into ``out`` and the permission of all; None when they are not alike."""
    if not _inside(spec, iovas).all():
        return None
    perm = _PERM_MASK
    start: Any = np.uint64((spec.root - base) % (1 << 64))
    where, entries = np.empty_like(iovas), out
    for level in range(spec.levels, 0, -1):
        np.right_shift(iovas, np.uint64(9 * level), where)
        np.bitwise_and(where, _INDEX, where)
        np.add(where, start, where)
        np.right_shift(where, _WORD, where)
        if int(_greatest(where)) >= len(table):
            return None
        table.take(where.view(np.int64), 0, entries, "clip")
        some, every = int(_or_all(entries)), int(_and_all(entries))
        leaf = level == 1 or bool(every & LARGE)
        reserved = (spec.large if level > 1 and leaf else spec.plain)[level] | (0 if leaf else LARGE)
        needed = spec.required | (spec.leaf_required if leaf else 0)
        perm &= every
        if needed & ~every or some & reserved or spec.want & ~perm or not perm or (some ^ every) & _PERM_MASK:
            return None
        if leaf:
            return perm if _pages(spec, level, iovas, entries) else None
        np.bitwise_and(entries, np.uint64(spec.address), entries)
        start = np.subtract(entries, np.uint64(base), entries)
    raise AssertionError("level 1 has leaves only")


def _pages(spec: WalkSpec, level: int, iovas: U64, entries: U64) -> bool:
    """Turn leaf entries into addresses; False: one meets the hole."""
    low = (1 << 3 + 9 * level) - 1
    np.bitwise_and(entries, np.uint64(spec.address & ~low), entries)
    if bool(((entries <= np.uint64(spec.hole_last)) & (entries >= np.uint64(spec.hole_first & ~low))).any()):
        return False
    np.bitwise_or(entries, iovas & np.uint64(low), entries)
    return True


def _inside(spec: WalkSpec, iovas: U64) -> npt.NDArray[np.bool_]:
    if spec.width == 64:
        return np.ones(len(iovas), dtype=bool)
    above = iovas >> np.uint64(spec.width - spec.signed)
    inside: npt.NDArray[np.bool_] = above == 0
    if spec.signed:
        inside |= above == np.uint64((1 << 65 - spec.width) - 1)
    return inside


def _each(spec: WalkSpec, base: int, table: U64, iovas: U64, out: U64, perms: npt.NDArray[np.uint8]) -> None:
    """Each on its own: ``going`` are the numbers of those that have not arrived nor failed."""
    out[:] = 0
    going = np.flatnonzero(_inside(spec, iovas))
    at = np.full(len(going), spec.root, dtype=np.uint64)
    perm = np.full(len(going), _PERM_MASK, dtype=np.uint64)
    for level in range(spec.levels, 0, -1):
        where = (at + (iovas[going] >> np.uint64(9 * level) & _INDEX) - np.uint64(base)) >> _WORD
        there = where < np.uint64(len(table))
        entries = table[np.where(there, where, np.uint64(0)).astype(np.intp)]
        leaf = (entries & np.uint64(LARGE) != 0) | (level == 1)
        reserved = np.where(leaf & (level > 1), np.uint64(spec.large[level]), np.uint64(spec.plain[level]))
        needed = np.where(leaf, np.uint64(spec.required | spec.leaf_required), np.uint64(spec.required))
        perm &= entries
        good = there & (needed & ~entries == 0) & (entries & reserved == 0)
        good &= (np.uint64(spec.want) & ~perm == 0) & (perm != 0)
        low = (1 << 3 + 9 * level) - 1
        page = entries & np.uint64(spec.address & ~low)
        hole = (page <= np.uint64(spec.hole_last)) & (page >= np.uint64(spec.hole_first & ~low))
        done = good & leaf & ~hole
        arrived = going[done]
        out[arrived] = page[done] | iovas[arrived] & np.uint64(low)
        perms[arrived] = perm[done]
        on = good & ~leaf
        going, perm, at = going[on], perm[on], entries[on] & np.uint64(spec.address)
