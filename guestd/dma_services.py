"""What the guest does for a remote device's DMA: translation requests, and DMA by message.

Both are answered from the live vIOMMU through the device's own address space, and never wait. A translation covers
the page that the vIOMMU says and gives guest-physical addresses of RAM; what is not RAM is not translated, so that
nobody caches it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from protocols.vfio_user.messages import TranslateRequest, TranslationEntry
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.types import IOMMUAccessFlags, MemTxResult
from vfio_model.ranges import Gpa, wrap64
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.ram_span import ram_span

MAX_ENTRIES: Final = 64
"""Translations in one answer; fewer than asked for is legal."""
_PAGE_MASK: Final = 0xFFF
_RW = int(IOMMUAccessFlags.RW)


class DmaServices:
    """For one device: ``space`` is its DMA address space, ``system`` where RAM lies. ``allowed()``: bus mastering
    is on.
    """

    def __init__(
        self, space: AddressSpace, system: AddressSpace, allowed: Callable[[], bool], *, trace: Trace = NULL_TRACE
    ) -> None:
        self._space, self._system, self._allowed, self._trace = space, system, allowed, trace
        self.translations = 0
        """Translation requests answered."""

    def translate(self, request: TranslateRequest) -> list[TranslationEntry]:
        """One entry for each page from ``request.iova`` on, until its length is covered; the last one may be a
        refusal.
        """
        self.translations += 1
        entries: list[TranslationEntry] = []
        iova, end = request.iova, request.iova + max(request.length, 1)
        while iova < end and len(entries) < MAX_ENTRIES:
            entry = self.translate_page(wrap64(iova))
            entries.append(entry)
            if not entry.perm:
                break
            iova = (iova | entry.mask) + 1
        if self._trace.enabled:
            perm = entries[0].perm if entries else 0
            self._trace("ats_translate", iova=request.iova, length=request.length, entries=len(entries), perm=perm)
        return entries

    def translate_page(self, iova: int) -> TranslationEntry:
        """The page around ``iova``; perm 0 when it is not RAM, or nothing."""
        found = self._space.view.lookup(iova) if self._allowed() else None
        refusal = TranslationEntry(iova & ~_PAGE_MASK, 0, _PAGE_MASK, 0)
        if found is None or not isinstance(found.region, IOMMUMemoryRegion):
            return self._identity(iova) if found is not None and self._space is self._system else refusal
        offset = iova - found.start + found.offset
        entry = found.region.translate(offset, IOMMUAccessFlags.NONE, 0)
        perm, mask = int(entry.perm) & _RW, entry.addr_mask
        page = entry.translated_addr & ~mask
        if not perm or entry.target_as is not self._system or not self._is_ram(page, mask):
            return refusal
        return TranslationEntry(iova & ~mask, page, mask, perm)

    def _is_ram(self, page: int, mask: int) -> bool:
        span = ram_span(self._system, Gpa(page))
        return span is not None and span.size > mask

    def _identity(self, iova: int) -> TranslationEntry:
        page = iova & ~_PAGE_MASK
        return TranslationEntry(page, page, _PAGE_MASK, _RW if self._is_ram(page, _PAGE_MASK) else 0)

    def dma_read(self, address: int, count: int) -> bytes | None:
        """A DMA read by message."""
        data = bytearray(count)
        if not self._allowed() or self._space.read(address, data) != MemTxResult.OK:
            return None
        return bytes(data)

    def dma_write(self, address: int, data: bytes) -> bool:
        """A DMA write by message."""
        return self._allowed() and self._space.write(address, data) == MemTxResult.OK
