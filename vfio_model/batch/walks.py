"""Translating many addresses through tables of several levels, 512 entries of 8 bytes each, that lie in RAM.

An entry is a u64: address of a table or page | bit 7 in a page above the lowest level | permission (1 the device may
read, 2 it may write). This is the plain-Python reference; numpy (:mod:`vfio_model.batch.walk_vectors`) and the compiled
variant (``walk`` in ``_compiled.pyi``) give the same numbers; :mod:`vfio_model.batch.walk_variant` chooses. Nothing but
``out`` and ``perms`` is written.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

from vfio_model.ranges import U64_MAX

LARGE = 1 << 7
_PERM_MASK = 3


class WalkSpec(NamedTuple):
    """What a walk looks at. Its fields are the words of the compiled variant's ``spec``, in this order."""

    root: int
    """Address of the topmost table."""
    levels: int
    """1..5."""
    width: int
    """Bits of an input address, 1..64."""
    signed: int
    """1: the bits above ``width`` - 1 equal it; 0: those above ``width`` are zero."""
    want: int
    """Permissions that every entry on the way must have; 0: any one."""
    required: int
    """Bits that every entry must have."""
    leaf_required: int
    """Bits that an entry for a page must have besides."""
    address: int
    """Bits of an entry that are an address."""
    hole_first: int
    """A page that meets ``hole_first``..``hole_last`` (inclusive) is none."""
    hole_last: int
    plain: tuple[int, ...]
    """By level, from 0 (unused) to 5: bits that must be zero in an entry for a table or the smallest page."""
    large: tuple[int, ...]
    """The same in one for a larger page."""

    def words(self) -> array[int]:
        """For the compiled variant."""
        return array("Q", (*self[:10], *self.plain, *self.large))


def walk_reference(spec: WalkSpec, base: int, words: Any, iovas: Any) -> tuple[list[int], list[int]]:
    """Address and permission of each of ``iovas``; both 0 where there is none, or where a table is not in ``words``
    (u64), whose first byte has the address ``base``.
    """
    found = [_walk_one(spec, base, words, int(iova)) for iova in iovas]
    return [address for address, _ in found], [perm for _, perm in found]


def _walk_one(spec: WalkSpec, base: int, words: Any, iova: int) -> tuple[int, int]:
    above = iova >> spec.width - spec.signed
    if above and not (spec.signed and above == U64_MAX >> spec.width - 1):
        return 0, 0
    table, perm = spec.root, _PERM_MASK
    for level in range(spec.levels, 0, -1):
        at = (table + (iova >> 9 * level & 0xFF8) - base & U64_MAX) >> 3
        if at >= len(words):
            return 0, 0
        entry = int(words[at])
        leaf = level == 1 or bool(entry & LARGE)
        reserved = (spec.large if level > 1 and leaf else spec.plain)[level]
        needed = spec.required | (spec.leaf_required if leaf else 0)
        perm &= entry
        if needed & ~entry or entry & reserved or spec.want & ~perm or not perm:
            return 0, 0
        table = entry & spec.address
        if leaf:
            low = (1 << 3 + 9 * level) - 1
            page = table & ~low
            if page <= spec.hole_last and page | low >= spec.hole_first:
                return 0, 0
            return page | iova & low, perm
    raise AssertionError("level 1 has leaves only")
