"""What an address translation cache holds: entries of any page size over guest RAM, found by page, dropped by range.

A translated address (ATS) is a guest-physical address; a device process that has guest RAM mapped turns it into
bytes. An entry therefore keeps the *view* of its bytes. For untranslated requests only RAM is cached, and an entry
whose block is larger than the RAM it lies in is kept as the largest naturally aligned part that fits. What a device
asked for by ATS is kept whole, where its bytes are not here as the address alone.

Entries live by size (a dict per page shift). In front of them are two tables by smallest page, one of pages that may
be read and one of pages that may be written: a hit is one lookup, whatever the entry's size and whatever else is
cached.
"""

from __future__ import annotations

from typing import Protocol

from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUAccessFlags

PAGE_SHIFT = 12
"""The smallest page that is cached (ATS: 4 KiB)."""

_READ, _WRITE = int(IOMMUAccessFlags.RO), int(IOMMUAccessFlags.WO)
_UNTRANSLATED_ONLY = int(IOMMUAccessFlags.UNTRANSLATED_ONLY)

Hit = tuple[int, int, memoryview]
"""First address, address behind the last (exclusive), and the bytes from the first on."""


class Front(Protocol):
    """What is looked at first: a dict, or what takes its place (``_atc.c``)."""

    def get(self, page: int, /) -> Hit | None:
        """The entry that was used for ``page``, if any."""

    def __setitem__(self, page: int, hit: Hit, /) -> None:
        """``page`` lies in ``hit``."""

    def pop(self, page: int, default: None, /) -> Hit | None:
        """Forget ``page``."""

    def clear(self) -> None:
        """Forget everything."""


class GuestRam(Protocol):
    """Guest RAM by guest-physical address, as this process has it mapped."""

    def segment(self, address: int) -> tuple[int, memoryview] | None:
        """Start and bytes (writable) of the segment that holds ``address``, or None."""


class CachedEntry:
    """``start`` to ``stop`` (exclusive) with its bytes, if they are here; ``pages`` are the front entries that were
    made from it. ``address`` is what ``start`` translates to, ``stamp`` the mark of whoever translated it.
    """

    __slots__ = ("address", "pages", "perm", "stamp", "start", "stop", "view")

    def __init__(self, start: int, stop: int, address: int, perm: int, view: memoryview | None, stamp: int = 0) -> None:
        self.start, self.stop, self.address, self.stamp = start, stop, address, stamp
        self.view, self.perm = view, perm
        self.pages: set[int] = set()


class EntryTable:
    """The entries of one cache. Not for several threads: each DMA lane has its own. ``required`` are permissions that
    each use needs, besides that to read or to write; ``fronts`` (empty) are of pages that may be read and written.
    """

    def __init__(
        self, required: IOMMUAccessFlags = IOMMUAccessFlags.NONE, fronts: tuple[Front, Front] | None = None
    ) -> None:
        self._required = int(required)
        readable, writable = fronts or (dict[int, Hit](), dict[int, Hit]())
        self.readable: Front = readable
        """By ``iova >> PAGE_SHIFT``; the fast path looks here alone."""
        self.writable: Front = writable
        self._by_shift: dict[int, dict[int, CachedEntry]] = {}

    def __len__(self) -> int:
        return sum(len(entries) for entries in self._by_shift.values())

    def find(self, iova: int, is_write: bool) -> Hit | None:
        """The bytes of the entry that lets ``iova`` be accessed, now also in front; None is a miss."""
        front = self.writable if is_write else self.readable
        page = iova >> PAGE_SHIFT
        hit = front.get(page)
        if hit is not None:
            return hit
        entry = self.lookup(iova)
        if entry is None or entry.view is None or not self.allows(entry, is_write):
            return None
        entry.pages.add(page)
        hit = front[page] = (entry.start, entry.stop, entry.view)
        return hit

    def lookup(self, iova: int) -> CachedEntry | None:
        """What is cached of ``iova``, whatever it allows."""
        for shift, entries in self._by_shift.items():
            entry = entries.get(iova >> shift)
            if entry is not None:
                return entry
        return None

    def allows(self, entry: CachedEntry, is_write: bool) -> bool:
        """Whether ``entry`` has every permission that a translated access needs."""
        wanted = (_WRITE if is_write else _READ) | self._required
        return entry.perm & (wanted | _UNTRANSLATED_ONLY) == wanted

    def insert(self, iova: int, entry: IOMMUTLBEntry, ram: GuestRam) -> bool:
        """Keep what ``entry`` says about ``iova``; it replaces what it overlaps. False: it is not cacheable."""
        block = _block(iova, entry, ram)
        if block is None:
            return False
        self._keep(block)
        return True

    def insert_whole(self, entry: IOMMUTLBEntry, ram: GuestRam | None, stamp: int = 0) -> None:
        """Keep all of ``entry``, whose size is a power of two; it replaces what it overlaps."""
        mask = entry.addr_mask
        start, address = entry.iova & ~mask, entry.translated_addr & ~mask
        view = None if ram is None else _view(address, mask + 1, ram)
        self._keep(CachedEntry(start, start + mask + 1, address, int(entry.perm), view, stamp))

    def _keep(self, block: CachedEntry) -> None:
        self.drop(block.start, block.stop - 1)
        shift = (block.stop - block.start).bit_length() - 1
        self._by_shift.setdefault(shift, {})[block.start >> shift] = block

    def drop(self, start: int, last: int) -> None:
        """Forget every entry that shares a byte with ``start``..``last`` (inclusive), larger or smaller."""
        for shift, entries in list(self._by_shift.items()):
            first, final = start >> shift, last >> shift
            if final - first < len(entries):
                gone = [page for page in range(first, final + 1) if page in entries]
            else:
                gone = [page for page in entries if first <= page <= final]
            for page in gone:
                self._forget(entries.pop(page))
            if not entries:
                del self._by_shift[shift]

    def clear(self) -> None:
        """Forget everything. The fronts stay the same objects: fast paths have them bound."""
        self._by_shift.clear()
        self.readable.clear()
        self.writable.clear()

    def _forget(self, entry: CachedEntry) -> None:
        for page in entry.pages:
            self.readable.pop(page, None)
            self.writable.pop(page, None)


def _block(iova: int, entry: IOMMUTLBEntry, ram: GuestRam) -> CachedEntry | None:
    """The largest naturally aligned block around ``iova`` that ``entry`` maps to one RAM segment, or None."""
    mask = entry.addr_mask
    if mask & (mask + 1) or (mask >> PAGE_SHIFT == 0 and mask != (1 << PAGE_SHIFT) - 1):
        return None
    gpa = entry.translated_addr & ~mask | iova & mask
    segment = ram.segment(gpa)
    if segment is None:
        return None
    base, view = segment
    shift = min(mask.bit_length(), (len(view)).bit_length())
    while shift >= PAGE_SHIFT:
        mask = (1 << shift) - 1
        first = (gpa - (iova & mask)) - base
        if first >= 0 and first + mask < len(view):
            start = iova & ~mask
            return CachedEntry(start, start + mask + 1, base + first, int(entry.perm), view[first : first + mask + 1])
        shift -= 1
    return None


def _view(address: int, size: int, ram: GuestRam) -> memoryview | None:
    """The bytes from ``address`` on, if one RAM segment holds them all."""
    segment = ram.segment(address)
    if segment is None or address - segment[0] + size > len(segment[1]):
        return None
    return segment[1][address - segment[0] : address - segment[0] + size]
