"""nvme: where a command's data lies in host memory (NVM Express Base Specification 1.4, section 4.3, "Physical Region
Page Entry and List").

PRP 1 may point into a page; every later entry points to the start of one. A second page is named by PRP 2 itself; from
three pages on PRP 2 points to a list, which may begin inside a page. When more pages are to come than entries are
left in the list's page, its last entry points to the next page of the list.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from vfio_model.devices.nvme.regs import Status
from vfio_model.memory.dma import DMASpace

ENTRY_SIZE = 8
_DWORD, _QWORD = 0x3, 0x7


class Pages(NamedTuple):
    """``first_length`` bytes at ``first``, then whole pages, the last of which need not be used up."""

    first: int
    first_length: int
    rest: Sequence[int]


def walk(dma: DMASpace, page_size: int, prp1: int, prp2: int, length: int) -> Pages | Status:
    """The pages of ``length`` (at least 1) bytes.

    :return: INVALID_PRP_OFFSET for an entry that points where it may not, DATA_TRANSFER_ERROR when a list cannot be
        read.
    """
    if prp1 & _DWORD:
        return Status.INVALID_PRP_OFFSET
    first_length = page_size - (prp1 & page_size - 1)
    if length <= first_length:
        return Pages(prp1, length, ())
    if length - first_length <= page_size:
        if prp2 & page_size - 1:
            return Status.INVALID_PRP_OFFSET
        return Pages(prp1, first_length, (prp2,))
    rest = _read_list(dma, page_size, prp2, -(-(length - first_length) // page_size))
    return rest if isinstance(rest, Status) else Pages(prp1, first_length, rest)


def _read_list(dma: DMASpace, page_size: int, pointer: int, count: int) -> Sequence[int] | Status:
    """``count`` entries of the list at ``pointer``."""
    if pointer & _QWORD:
        return Status.INVALID_PRP_OFFSET
    here = (page_size - (pointer & page_size - 1)) // ENTRY_SIZE
    entries: tuple[int, ...] = ()
    while True:
        left = count - len(entries)
        chained = left > here
        chunk = bytearray((here if chained else left) * ENTRY_SIZE)
        if dma.read(pointer, chunk):
            return Status.DATA_TRANSFER_ERROR
        read = struct.unpack(f"<{len(chunk) // ENTRY_SIZE}Q", chunk)
        if not chained:
            entries = entries + read if entries else read
            break
        entries += read[:-1]
        # Only the first page of a list may be entered in its middle, so that each later one has at least 511 entries.
        pointer, here = read[-1], page_size // ENTRY_SIZE
        if pointer & page_size - 1:
            return Status.INVALID_PRP_OFFSET
    mask = page_size - 1
    if any(entry & mask for entry in entries):
        return Status.INVALID_PRP_OFFSET
    return entries


def runs(pages: Pages, page_size: int, length: int) -> list[tuple[int, int]]:
    """``pages`` of ``length`` bytes as (address, bytes), pages that follow each other merged."""
    rest = pages.rest
    if not rest:
        return [(pages.first, length)]
    found = []
    start, end = pages.first, pages.first + pages.first_length
    for page in rest:
        if page != end:
            found.append((start, end - start))
            start = page
        end = page + page_size
    used = sum(size for _, size in found)
    found.append((start, length - used))
    return found
