"""What an IOMMU says: a translation (entry), a change of one (event), and a run of changes in consecutive pages.

Names and numbers are QEMU's (``IOMMUTLBEntry``, ``IOMMUTLBEvent``). The run is ours: a hypercall that changes 512
TCEs tells its notifiers once, with arrays. Addresses here are relative to the IOMMU memory region.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vfio_model.memory.space import Space
from vfio_model.memory.types import PCI_NO_PASID, IOMMUAccessFlags, IOMMUNotifierFlag

_MAP = IOMMUNotifierFlag.MAP

U64Array = Any
"""A sequence of u64: ``memoryview`` of format ``Q``, numpy uint64 array, or a list of ints."""

Permissions = Any
"""A sequence of permission numbers, one per page: ``bytes``, a list, or an integer array."""


class IOMMUTLBEntry(NamedTuple):
    """One translation. It covers ``iova`` to ``iova | addr_mask`` (mask 0xfff: 4 KiB). ``perm`` NONE: no translation.

    After cropping to a notifier's range ``addr_mask`` is just the length minus one, not necessarily a power of two
    minus one.
    """

    target_as: Space | None
    iova: int
    translated_addr: int
    addr_mask: int
    perm: IOMMUAccessFlags
    pasid: int = PCI_NO_PASID

    @property
    def last(self) -> int:
        """Last byte covered, inclusive."""
        return self.iova + self.addr_mask

    def cropped(self, start: int, last: int) -> IOMMUTLBEntry | None:
        """The part inside ``start``..``last`` (inclusive), or None; ``translated_addr`` moves along."""
        if self.iova >= start and self.last <= last:
            return self
        lo, hi = max(self.iova, start), min(self.last, last)
        if lo > hi:
            return None
        shift = lo - self.iova if self.perm else 0
        return self._replace(iova=lo, addr_mask=hi - lo, translated_addr=self.translated_addr + shift)


class IOMMUTLBEvent(NamedTuple):
    """``type`` (exactly one kind) happened to ``entry``. An UNMAP of any kind has perm NONE."""

    type: IOMMUNotifierFlag
    entry: IOMMUTLBEntry


@dataclass(slots=True)
class IOMMUTLBRun:
    """Events of ``count`` consecutive pages of ``1 << page_shift`` bytes from ``iova``. Nobody changes a run; that it
    could be makes it cheap to make.

    ``translated`` holds the page addresses (None for an UNMAP run). ``perms`` is one value for all pages or one per
    page; in a MAP run a page with perm NONE stands for its UNMAP.
    """

    type: IOMMUNotifierFlag
    target_as: Space | None
    iova: int
    page_shift: int
    count: int
    translated: U64Array = None
    perms: IOMMUAccessFlags | Permissions = IOMMUAccessFlags.NONE
    pasid: int = PCI_NO_PASID

    @property
    def last(self) -> int:
        """Last byte covered, inclusive."""
        return self.iova + (self.count << self.page_shift) - 1

    @property
    def uniform(self) -> bool:
        """Whether one permission holds for every page."""
        return isinstance(self.perms, int)

    @property
    def types(self) -> IOMMUNotifierFlag:
        """Every kind of event in the run: a MAP run with holes also unmaps."""
        perms = self.perms
        if self.type is _MAP and not isinstance(perms, int) and not all(perms):
            return IOMMUNotifierFlag.IOTLB_EVENTS
        return self.type

    def cropped(self, start: int, last: int) -> IOMMUTLBRun | None:
        """The whole pages inside ``start``..``last`` (inclusive), or None.

        The bounds must fall on page boundaries of the run where they cut it.
        """
        if self.iova >= start and self.last <= last:
            return self
        lo, hi = max(self.iova, start), min(self.last, last)
        if lo > hi:
            return None
        shift = self.page_shift
        first, stop = (lo - self.iova) >> shift, (hi + 1 - self.iova) >> shift
        return replace(
            self,
            iova=lo,
            count=stop - first,
            translated=None if self.translated is None else self.translated[first:stop],
            perms=self.perms if isinstance(self.perms, int) else self.perms[first:stop],
        )

    def events(self) -> Iterator[IOMMUTLBEvent]:
        """The run page by page."""
        size = 1 << self.page_shift
        for i in range(self.count):
            perm = IOMMUAccessFlags(self.perms if isinstance(self.perms, int) else int(self.perms[i]))
            kind = self.type
            if kind is IOMMUNotifierFlag.MAP and not perm:
                kind = IOMMUNotifierFlag.UNMAP
            address = int(self.translated[i]) if self.translated is not None and perm else 0
            entry = IOMMUTLBEntry(self.target_as, self.iova + i * size, address, size - 1, perm, self.pasid)
            yield IOMMUTLBEvent(kind, entry)
