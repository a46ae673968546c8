"""Translating many addresses through one single-level table of TCE-like entries.

An entry is a u64: page address | permission (1 the device may read, 2 it may write), 0 for none; the low
``page_shift`` bits beyond the permission are not address (LoPAPR, "TCE table"). This is the plain-Python reference;
the numpy variant (:mod:`vfio_model.batch.table_vectors`) and the compiled one give the same numbers.
:mod:`vfio_model.batch.variant` chooses.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vfio_model.ranges import U64_MAX

PERM_MASK = 3
"""The permission bits of an entry."""


def translate_reference(
    table: Sequence[int], start: int, page_shift: int, iovas: Iterable[int]
) -> tuple[list[int], bool, int]:
    """Addresses, whether every iova lies in the table's window, and the AND of all permissions (3 for no iova).

    ``start`` is the first iova of the window. Addresses are meaningful only where the flag is true; the address of an
    entry without permission is whatever the entry holds. Outside the window: no addresses, permissions 0.
    """
    offset_mask = (1 << page_shift) - 1
    addresses, perms = [], PERM_MASK
    for iova in iovas:
        index = ((iova - start) & U64_MAX) >> page_shift
        if index >= len(table):
            return [], False, 0
        entry = table[index]
        perms &= entry
        addresses.append((entry & ~offset_mask) | (iova & offset_mask))
    return addresses, True, perms


def translate_each_reference(
    table: Sequence[int], start: int, page_shift: int, iovas: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Address and permission of each iova on its own; outside the window both are 0."""
    offset_mask = (1 << page_shift) - 1
    addresses, perms = [], []
    for iova in iovas:
        index = ((iova - start) & U64_MAX) >> page_shift
        entry = table[index] if index < len(table) else 0
        perms.append(entry & PERM_MASK)
        addresses.append((entry & ~offset_mask) | (iova & offset_mask) if index < len(table) else 0)
    return addresses, perms


def move_reference(
    table: Sequence[int],
    start: int,
    page_shift: int,
    base: int,
    ram: memoryview,
    iovas: Sequence[int],
    size: int,
    pieces: memoryview,
    first: int,
    stop: int,
    *,
    to_ram: bool,
) -> int:
    """Move pieces ``first``..``stop`` - 1, ``size`` bytes each, between their places in ``pieces`` and the places in
    ``ram`` that the table gives; byte 0 of ``ram`` has the address ``base``.

    Returns how many went, in order, before one that lies outside the window, has not the permission (1 to read from
    ``ram``, 2 to write to it), leaves its page, or is not in ``ram`` as a whole.
    """
    low = (1 << page_shift) - 1
    for number in range(first, stop):
        iova = iovas[number]
        index, within = ((iova - start) & U64_MAX) >> page_shift, iova & low
        if index >= len(table) or not table[index] & (2 if to_ram else 1) or within + size > low + 1:
            return number - first
        at = ((table[index] & ~low) - base + within) & U64_MAX
        if at + size > len(ram):
            return number - first
        piece = slice(number * size, (number + 1) * size)
        if to_ram:
            ram[at : at + size] = pieces[piece]
        else:
            pieces[piece] = ram[at : at + size]
    return stop - first
