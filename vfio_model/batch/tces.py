"""Many TCEs at once: what a hypercall over a list, a replay or a scattered DMA needs of a TCE table.

A TCE holds a page address and, in bits 1:0, what the device may do (LoPAPR "TCE Tables and TCE"). The plain-Python
meaning of each function is in its docstring; results equal it entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vfio_model.batch import variant
from vfio_model.batch.lazy import lazy_numpy

_PERM_MASK = 3
_CHUNK = 1 << 20


def zeroed_words(count: int) -> memoryview:
    """``count`` u64 zeros whose pages are touched only when used (``calloc``), for tables of any size.

    :raise MemoryError: the machine has not got that much.
    """
    return memoryview(lazy_numpy().zeros(count, dtype=lazy_numpy().uint64)).cast("B").cast("Q")


def fill_words(words: memoryview, value: int) -> memoryview | None:
    """Store ``value`` in all of ``words`` (u64): the words that were there, None when every one had it already.

    In that case nothing is written, so that memory which was never used stays so.
    """
    np = lazy_numpy()
    there = np.frombuffer(words, dtype=np.uint64)
    if bool((there == np.uint64(value)).all()):
        return None
    before = memoryview(there.copy()).cast("B").cast("Q")
    there[:] = value
    return before


def changed_stretches(before: memoryview, now: memoryview) -> list[tuple[int, int]]:
    """Stretches ``(start, end)`` (end exclusive) of indices at which two arrays of u64 differ, in order."""
    np = lazy_numpy()
    differ = np.frombuffer(before, dtype=np.uint64) != np.frombuffer(now, dtype=np.uint64)
    edges = np.flatnonzero(np.diff(np.concatenate(([False], differ, [False])).astype(np.int8)))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2], strict=True)]


def split_tces(tces: memoryview, page_shift: int) -> tuple[Any, Any]:
    """Page addresses, and permissions: ``[t & page_mask for t in tces], [t & 3 for t in tces]``.

    ``tces`` is a memoryview of u64. The permissions are one int when all entries (at least one) have the same.
    """
    kernel = variant.kernel()
    if kernel is not None:
        out = memoryview(bytearray(tces.nbytes)).cast("Q")
        some, every = kernel.split_tces(tces, page_shift, out)
        if some == every:
            return out, some
    np = lazy_numpy()
    words = np.frombuffer(tces, dtype=np.uint64)
    pages = words & np.uint64(-(1 << page_shift) & (1 << 64) - 1)
    some, every = int(np.bitwise_or.reduce(words)) & _PERM_MASK, int(np.bitwise_and.reduce(words)) & _PERM_MASK
    if some == every:
        return pages, some
    return pages, (words & np.uint64(_PERM_MASK)).astype(np.uint8)


def nonzero_perm_runs(tces: Any, first: int, stop: int) -> Iterator[tuple[int, int]]:
    """Runs ``(start, end)`` (end exclusive) that together cover the indices in ``first``..``stop`` whose TCE has a
    permission.

    A run ends where an entry without permission comes, or every 2**20 entries.
    """
    np = lazy_numpy()
    words = np.frombuffer(tces, dtype=np.uint64)
    for base in range(first, stop, _CHUNK):
        valid = (words[base : min(base + _CHUNK, stop)] & np.uint64(_PERM_MASK)) != 0
        if not valid.any():
            continue
        edges = np.flatnonzero(np.diff(np.concatenate(([False], valid, [False])).astype(np.int8)))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            yield base + int(start), base + int(end)


def as_tces(translated: Any, perms: Any) -> memoryview:
    """TCEs (u64) of page addresses with their permissions, one for all or one each; 0 where there is no permission."""
    np = lazy_numpy()
    words = np.array(translated, dtype=np.uint64)
    bits = np.asarray(perms, dtype=np.uint64) & np.uint64(_PERM_MASK)
    words = np.where(bits != 0, words | bits, np.uint64(0))
    return memoryview(words).cast("B").cast("Q")


def translate_tces(tces: Any, page_shift: int, addrs: Any) -> tuple[Any, Any]:
    """Translated addresses and permissions of ``addrs`` (numpy uint64, relative to the window).

    Beyond the table, and where the TCE has no permission, the permission is 0 and the address means nothing.
    """
    np = lazy_numpy()
    table = np.frombuffer(tces, dtype=np.uint64)
    index = addrs >> np.uint64(page_shift)
    inside = index < np.uint64(len(table))
    found = table[np.where(inside, index, np.uint64(0)).astype(np.intp)]
    low = np.uint64((1 << page_shift) - 1)
    return found & ~low | addrs & low, np.where(inside, found & np.uint64(_PERM_MASK), np.uint64(0)).astype(np.uint8)
