"""The IOTLB, and the cached context entries.

Source: Intel Virtualization Technology for Directed I/O specification, "Caching Translation Information" (6.2),
"IOTLB" (6.2.4) and "Invalidation of Translation Caches" (6.5): second-level translations are tagged with the domain,
first-level and nested ones with domain and PASID. Quirk ``iotlb-by-source``: with requester ID and PASID.

A page is cached once, whatever its size. In front of this a requester has a :class:`Front` of its own, in which an
address is found with one look and which holds nothing that the IOTLB does not. Either may be emptied at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

from vfio_model.iommu.vtd.walk import page_mask
from vfio_model.memory.iotlb import IOMMUTLBEntry

MAX_PAGES = 1024
"""Pages that the IOTLB holds; one more empties it."""
MAX_FRAMES = 8192
"""4 KiB frames that a front holds."""


class Page(NamedTuple):
    """A cached translation: of the page at ``iova`` of ``level`` to ``page``. ``tagged``: by a PASID (first level and
    nested). ``dirty`` as in :class:`.walk.Walk`."""

    iova: int
    level: int
    page: int
    perm: int
    pte: int
    dirty: bool
    did: int
    pasid: int
    tagged: bool

    def meets(self, first: int, last: int) -> bool:
        """Whether a byte of it is in ``first``..``last`` (inclusive)."""
        return self.iova <= last and first <= self.iova | page_mask(self.level)


Key = tuple[Hashable, int, int]
"""Who, level, and number of the page of that size. Who: the PASID or RID; by quirk requester ID and PASID."""
Doomed = Callable[[Page], bool]
"""Which pages of a domain an invalidation takes."""


class Iotlb:
    """Pages by domain. ``by_source``: the quirk. ``overflowed`` is called when all were dropped for want of room."""

    def __init__(self, by_source: bool, overflowed: Callable[[], None]) -> None:
        self._by_source = by_source
        self._overflowed = overflowed
        self._domains: dict[int, dict[Key, Page]] = {}
        self._count = 0
        self._levels: tuple[int, ...] = ()
        """Of the pages that were cached since all were dropped."""
        self._owners: dict[int, set[Hashable]] = {}
        """Whose pages a domain may have."""
        self._tagged: set[int] = set()
        """Domains that may have pages tagged by a PASID."""

    def __len__(self) -> int:
        return self._count

    def find(self, did: int, who: Hashable, iova: int) -> Page | None:
        """The page that holds ``iova``, the smallest."""
        if self._by_source:
            found = (self._find(pages, who, iova) for pages in self._domains.values())
            return next((page for page in found if page is not None), None)
        pages = self._domains.get(did)
        return None if pages is None else self._find(pages, who, iova)

    def _find(self, pages: dict[Key, Page], who: Hashable, iova: int) -> Page | None:
        for level in self._levels:
            page = pages.get((who, level, iova >> 3 + 9 * level))
            if page is not None:
                return page
        return None

    def add(self, who: Hashable, page: Page) -> None:
        """Cache ``page``."""
        if self._count >= MAX_PAGES:
            self.clear()
            self._overflowed()
        if page.level not in self._levels:
            self._levels = tuple(sorted((*self._levels, page.level)))
        key = who, page.level, page.iova >> 3 + 9 * page.level
        if self._by_source:
            self._count -= sum(pages.pop(key, None) is not None for pages in self._domains.values())
        pages = self._domains.setdefault(page.did, {})
        before = len(pages)
        pages[key] = page
        self._count += len(pages) - before
        self._owners.setdefault(page.did, set()).add(who)
        if page.tagged:
            self._tagged.add(page.did)

    def clear(self) -> None:
        """Drop all."""
        self._domains.clear()
        self._count = 0
        self._levels = ()
        self._owners.clear()
        self._tagged.clear()

    def drop(self, did: int, doomed: Doomed) -> None:
        """Drop the pages of ``did`` that are ``doomed``."""
        pages = self._domains.get(did)
        if pages:
            gone = [key for key, page in pages.items() if doomed(page)]
            self._remove(did, pages, gone)

    def drop_range(self, did: int, first: int, last: int, doomed: Doomed, *, tagged_too: bool) -> None:
        """As :meth:`drop`; what is doomed has a byte in ``first``..``last`` (inclusive), or with ``tagged_too`` is
        tagged by a PASID.
        """
        pages = self._domains.get(did)
        if not pages:
            return
        owners = self._owners[did]
        looks = ((last - first >> 12) + 1 + len(self._levels)) * len(owners)
        if looks >= len(pages) or (tagged_too and did in self._tagged):
            self.drop(did, doomed)
            return
        keys = (
            (who, level, number)
            for level in self._levels
            for number in range(first >> 3 + 9 * level, (last >> 3 + 9 * level) + 1)
            for who in owners
        )
        gone = [key for key in keys if (page := pages.get(key)) is not None and doomed(page)]
        self._remove(did, pages, gone)

    def _remove(self, did: int, pages: dict[Key, Page], gone: list[Key]) -> None:
        for key in gone:
            del pages[key]
        self._count -= len(gone)
        if not pages:
            self._owners.pop(did, None)
            self._tagged.discard(did)


class Front:
    """What one requester with one PASID finds at once: 4 KiB frame number to translation.

    ``readable`` and ``writable`` hold what serves a read, and a write, with nothing left to do: a page whose dirty bit
    is not set yet is not writable here.
    """

    __slots__ = ("_large", "_owners", "_tagged", "readable", "writable")

    def __init__(self) -> None:
        self.readable: dict[int, IOMMUTLBEntry] = {}
        self.writable: dict[int, IOMMUTLBEntry] = {}
        self._owners: dict[int, Page] = {}
        self._large = self._tagged = False
        """Whether some may be of large pages, or of pages tagged by a PASID."""

    def add(self, frame: int, entry: IOMMUTLBEntry, page: Page) -> None:
        """``entry`` is what ``page`` says of ``frame``."""
        if len(self._owners) >= MAX_FRAMES:
            self.clear()
        self._owners[frame] = page
        self._large = self._large or page.level > 1
        self._tagged = self._tagged or page.tagged
        if page.perm & 1:
            self.readable[frame] = entry
        if page.perm & 2 and page.dirty:
            self.writable[frame] = entry

    def owner(self, frame: int) -> Page | None:
        """The page that is known of ``frame``."""
        return self._owners.get(frame)

    def clear(self) -> None:
        """Forget all."""
        self.readable.clear()
        self.writable.clear()
        self._owners.clear()
        self._large = self._tagged = False

    def drop(self, did: int, doomed: Doomed) -> None:
        """Forget the frames of pages of ``did`` that are ``doomed``."""
        for frame in [frame for frame, page in self._owners.items() if page.did == did and doomed(page)]:
            self._forget(frame)

    def drop_range(self, did: int, first: int, last: int, doomed: Doomed, *, tagged_too: bool) -> None:
        """As :meth:`Iotlb.drop_range`."""
        low, high = first >> 12, last >> 12
        if self._large or (tagged_too and self._tagged) or high - low >= len(self._owners):
            self.drop(did, doomed)
            return
        for frame in range(low, high + 1):
            page = self._owners.get(frame)
            if page is not None and page.did == did and doomed(page):
                self._forget(frame)

    def _forget(self, frame: int) -> None:
        del self._owners[frame]
        self.readable.pop(frame, None)
        self.writable.pop(frame, None)
