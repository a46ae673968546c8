"""What a device may reach by DMA address, as its user maps it: ``VFIO_IOMMU_MAP_DMA`` by message.

One table serves every kind of access. A map is {iova, size, permissions, bytes}: the bytes are a view of the user's
memory, or None where it can be reached by message only. Maps do not overlap; an unmap takes away every map that lies
inside its range, and may not cut one in two. Lookup is a bisection over the sorted first addresses;
what it found is remembered by its page, for whoever comes again.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_IOMMU_MAP_DMA", "VFIO_IOMMU_UNMAP_DMA"); QEMU
``docs/interop/vfio-user.rst`` ("VFIO_USER_DMA_MAP").
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from vfio_model.batch.lazy import lazy_numpy
from vfio_model.ranges import U64_MAX

MAX_MAPS = 65535
"""Maps that are valid at a time."""

PAGE_BITS = 12
_REMEMBERED = 1 << 16
"""Pages at most for which the map is remembered."""
_FEW = 64
"""Pages that are forgotten one by one."""
READ, WRITE = 1, 2
"""What a device may do: ``VFIO_DMA_MAP_FLAG_READ``, ``VFIO_DMA_MAP_FLAG_WRITE``."""

Memory = TypeVar("Memory")


class IovaMap(Generic[Memory]):
    """``size`` bytes from ``iova``, which the device may read (``perm`` 1) and write (2).

    ``view`` holds exactly them (item size 1), or is None. :attr:`readable` and :attr:`writable` are the view where it
    serves that way; where they are None and ``perm`` allows the access, it goes by message. ``memory`` is whatever the
    owner remembers of where the bytes come from, and ``offset`` where in it. A map that was removed has no bytes.
    """

    __slots__ = ("iova", "last", "memory", "offset", "perm", "readable", "size", "writable")

    def __init__(
        self, iova: int, size: int, perm: int, view: memoryview | None, memory: Memory, offset: int = 0
    ) -> None:
        self.iova, self.size, self.perm, self.memory, self.offset = iova, size, perm, memory, offset
        self.last = iova + size - 1
        """Inclusive."""
        self.readable = view if view is not None and perm & READ else None
        self.writable = view if view is not None and perm & WRITE and not view.readonly else None

    def __repr__(self) -> str:
        kind = "direct" if self.readable is not None or self.writable is not None else "by message"
        return f"{self.iova:#x}..{self.last:#x} {permission(self.perm)} {kind}"


def permission(perm: int) -> str:
    """``rw``, ``r-``, ``-w`` or ``--``."""
    return ("r" if perm & READ else "-") + ("w" if perm & WRITE else "-")


class IovaMaps(Generic[Memory]):
    """The maps of one device's user, in order of their addresses."""

    def __init__(self, limit: int = MAX_MAPS) -> None:
        self.limit = limit
        self._starts: list[int] = []
        self._maps: list[IovaMap[Memory]] = []
        self._arrays: tuple[Any, Any, Any] | None = None
        self._sources: tuple[Any, Any] | None = None
        self.near: dict[int, IovaMap[Memory]] = {}
        """Page number (``iova >> PAGE_BITS``) to the map that :meth:`find` found there last. Not every address of the
        page need be the map's."""

    def __len__(self) -> int:
        return len(self._maps)

    def __iter__(self) -> Iterator[IovaMap[Memory]]:
        return iter(self._maps)

    def find(self, iova: int) -> IovaMap[Memory] | None:
        """The map that holds ``iova``, or None."""
        at = bisect_right(self._starts, iova) - 1
        if at < 0:
            return None
        known = self._maps[at]
        if iova > known.last:
            return None
        if len(self.near) >= _REMEMBERED:
            self.near.clear()
        self.near[iova >> PAGE_BITS] = known
        return known

    def segment(self, address: int) -> tuple[int, memoryview] | None:
        """Start and bytes of the map that holds ``address`` when it can be read and written directly, or None."""
        known = self.find(address)
        if known is None or known.readable is None or known.writable is None:
            return None
        return known.iova, known.writable

    def check(self, iova: int, size: int) -> int:
        """Whether ``size`` bytes from ``iova`` can be mapped; the place at which :meth:`insert` puts them.

        :raise OSError: EINVAL for a range that is empty or wraps, EEXIST for an overlap, ENOSPC for too many.
        """
        last = iova + size - 1
        if size <= 0 or iova < 0 or last > U64_MAX:
            raise OSError(errno.EINVAL, f"{size:#x} bytes at {iova:#x} are no range of addresses")
        at = bisect_right(self._starts, last)
        if at and self._maps[at - 1].last >= iova:
            raise OSError(errno.EEXIST, f"{iova:#x}..{last:#x} overlaps the map {self._maps[at - 1]!r}")
        if len(self._maps) >= self.limit:
            raise OSError(errno.ENOSPC, f"{self.limit} maps are there already")
        return at

    def insert(self, place: int, new: IovaMap[Memory]) -> None:
        """Add ``new`` at the ``place`` that :meth:`check` gave for it just now."""
        self._starts.insert(place, new.iova)
        self._maps.insert(place, new)
        self._arrays = self._sources = None

    def add(self, new: IovaMap[Memory]) -> None:
        """Add ``new``. :raise OSError: as :meth:`check`."""
        self.insert(self.check(new.iova, new.size), new)

    def touching(self, start: int, last: int) -> list[IovaMap[Memory]]:
        """The maps that share a byte with ``start``..``last`` (inclusive)."""
        low, high = self._span(start, last)
        return self._maps[low:high]

    def inside(self, start: int, last: int) -> list[IovaMap[Memory]]:
        """The maps in ``start``..``last`` (inclusive).

        :raise OSError: EINVAL when one lies there in part only: it would be cut in two.
        """
        return _whole(self.touching(start, last), start, last)

    def remove(self, start: int, last: int) -> list[IovaMap[Memory]]:
        """Remove the maps in ``start``..``last`` (inclusive) and return them. :raise OSError: as :meth:`inside`."""
        low, high = self._span(start, last)
        found = _whole(self._maps[low:high], start, last)
        if found:
            del self._starts[low:high], self._maps[low:high]
            self._arrays = self._sources = None
            self._forget(found)
        return found

    def _forget(self, gone: list[IovaMap[Memory]]) -> None:
        for known in gone:
            known.readable = known.writable = None
        near = self.near
        if not near:
            return
        if sum(known.size for known in gone) >> PAGE_BITS > _FEW or len(gone) > _FEW:
            near.clear()
            return
        for known in gone:
            for page in range(known.iova >> PAGE_BITS, (known.last >> PAGE_BITS) + 1):
                near.pop(page, None)

    def _span(self, start: int, last: int) -> tuple[int, int]:
        """Places of the maps that share a byte with the range: from the first, to behind the last."""
        low = bisect_right(self._starts, start) - 1
        if low < 0 or self._maps[low].last < start:
            low += 1
        return low, bisect_right(self._starts, last)

    def clear(self) -> list[IovaMap[Memory]]:
        """Remove all, and return them."""
        gone, self._maps, self._starts = self._maps, [], []
        self._arrays = self._sources = None
        self._forget(gone)
        return gone

    def nearest(self, iova: int) -> IovaMap[Memory] | None:
        """The map with the least distance to ``iova``; None when there is none at all. For messages about failures."""
        at = bisect_right(self._starts, iova)
        around = self._maps[max(at - 1, 0) : at + 1]
        return min(around, key=lambda known: max(known.iova - iova, iova - known.last, 0), default=None)

    def arrays(self) -> tuple[Any, Any, Any]:
        """First addresses and sizes of all maps, and how they serve directly (:data:`READ`, :data:`WRITE`), as numpy
        arrays (u64, u64, u8), in order.
        """
        if self._arrays is None:
            np, maps = lazy_numpy(), self._maps
            self._arrays = (
                np.array(self._starts, dtype=np.uint64),
                np.fromiter((known.size for known in maps), np.uint64, len(maps)),
                np.fromiter((_direct(known) for known in maps), np.uint8, len(maps)),
            )
        return self._arrays

    def sources(self) -> tuple[Any, Any]:
        """Where in its memory each map begins, and a number that maps of the same memory share, as numpy arrays (u64,
        i64), in order.
        """
        if self._sources is None:
            np, maps, numbers = lazy_numpy(), self._maps, dict[int, int]()
            owners = (numbers.setdefault(id(known.memory), len(numbers)) for known in maps)
            self._sources = (
                np.fromiter((known.offset for known in maps), np.uint64, len(maps)),
                np.fromiter(owners, np.int64, len(maps)),
            )
        return self._sources

    def at(self, place: int) -> IovaMap[Memory]:
        """The map at ``place`` in the order of addresses."""
        return self._maps[place]


def _whole(found: list[IovaMap[Memory]], start: int, last: int) -> list[IovaMap[Memory]]:
    """``found``, of which only the first and the last can leave the range."""
    if found and (found[0].iova < start or found[-1].last > last):
        cut = found[0] if found[0].iova < start else found[-1]
        raise OSError(errno.EINVAL, f"{start:#x}..{last:#x} cuts the map {cut!r} in two")
    return found


def _direct(known: IovaMap[Any]) -> int:
    return (READ if known.readable is not None else 0) | (WRITE if known.writable is not None else 0)
