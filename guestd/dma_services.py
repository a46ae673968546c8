"""What the guest does for a remote device's DMA: translation requests, and DMA by message.

Both are answered from the live vIOMMU through the device's own address space, and never wait. A translation covers
the page that the vIOMMU says and gives guest-physical addresses of RAM; what is not RAM goes by message, so that
nobody caches it. The page that the device is about to access is translated for that access: what fails is a fault.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from guestd.function_iommu import FunctionIommu
from protocols.vfio_user.messages import Payload, TranslateRequest, TranslationEntry
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.flatview import FlatRange
from vfio_model.memory.iommu_region import IOMMUMemoryRegion
from vfio_model.memory.types import IOMMUAccessFlags, MemTxResult
from vfio_model.ranges import Gpa, wrap64
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vfio.ram_span import ram_span

MAX_ENTRIES: Final = 64
"""Translations in one answer; fewer than asked for is legal."""
_PAGE_MASK: Final = 0xFFF
_LARGE_MASK: Final = 0x1F_FFFF
_NO_WRITE: Final = 1
_NONE, _RO, _WO = IOMMUAccessFlags.NONE, IOMMUAccessFlags.RO, IOMMUAccessFlags.WO
_RW = int(IOMMUAccessFlags.RW)
_BY_MESSAGE = int(IOMMUAccessFlags.UNTRANSLATED_ONLY)


class DmaServices:
    """For one device: ``space`` is its DMA address space, ``system`` where RAM lies. ``allowed()``: bus mastering
    is on. ``cacheable()``: all that becomes of a translation is heard of.
    """

    def __init__(
        self,
        space: AddressSpace,
        system: AddressSpace,
        allowed: Callable[[], bool],
        *,
        cacheable: Callable[[], bool] = lambda: True,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self._space, self._system, self._allowed, self._trace = space, system, allowed, trace
        self._cacheable = cacheable
        self.function: FunctionIommu | None = None
        """What the IOMMU does for the device beside that."""
        self.translations = 0
        """Translation requests answered."""

    def translate(self, request: TranslateRequest) -> list[TranslationEntry]:
        """One entry for each page from ``request.iova`` on, until its length is covered; the last one may be a
        refusal.
        """
        self.translations += 1
        entries: list[TranslationEntry] = []
        iova, end = request.iova, request.iova + max(request.length, 1)
        access = _RO if request.flags & _NO_WRITE else _WO
        while iova < end and len(entries) < MAX_ENTRIES:
            entry = self.translate_page(wrap64(iova), _NONE if entries else access)
            entries.append(entry)
            if not entry.perm:
                break
            iova = (iova | entry.mask) + 1
        if self._trace.enabled:
            perm = entries[0].perm if entries else 0
            self._trace("ats_translate", iova=request.iova, length=request.length, entries=len(entries), perm=perm)
        return entries

    def translate_page(self, iova: int, access: IOMMUAccessFlags = _NONE) -> TranslationEntry:
        """The page around ``iova``; perm 0 when nothing is there. Without an ``access`` nothing is a fault."""
        found = self._space.view.lookup(iova) if self._allowed() else None
        if found is None:
            return _page(iova, 0)
        if not isinstance(found.region, IOMMUMemoryRegion):
            return self._untranslated(iova, found)
        entry = found.region.translate(iova - found.start + found.offset, access, 0)
        perm, mask = int(entry.perm) & _RW, entry.addr_mask
        if not perm:
            return _page(iova, 0)
        if access is _RO and found.region.marks_writes:
            perm &= int(_RO)
        page = entry.translated_addr & ~mask
        if entry.target_as is not self._system or not self._is_ram(page, mask) or not self._cacheable():
            return _page(iova, perm | _BY_MESSAGE)
        return TranslationEntry(iova & ~mask, page, mask, perm)

    def _is_ram(self, page: int, mask: int) -> bool:
        span = ram_span(self._system, Gpa(page))
        return span is not None and span.size > mask

    def _untranslated(self, iova: int, found: FlatRange) -> TranslationEntry:
        """What the space shows as it is: system memory at its own address, or something else."""
        there = self._system.view.lookup(iova)
        if (
            there is None
            or there.region is not found.region
            or there.start - there.offset != found.start - found.offset
        ):
            return _page(iova, _RW | _BY_MESSAGE)
        for mask in (_LARGE_MASK, _PAGE_MASK):
            page = iova & ~mask
            if found.start <= page and page + mask < found.start + found.size and self._is_ram(page, mask):
                return TranslationEntry(page, page, mask, _RW)
        return _page(iova, _RW | _BY_MESSAGE)

    def iommu(self, request: Payload) -> Payload:
        """What a device with a cache of translations asks of the IOMMU. :raise OSError: it refuses."""
        if self.function is None:
            raise OSError(errno.ENODEV, "no IOMMU with services for devices")
        return self.function.serve(request)

    def dma_read(self, address: int, count: int) -> bytes | None:
        """A DMA read by message."""
        data = bytearray(count)
        if not self._allowed() or self._space.read(address, data) != MemTxResult.OK:
            return None
        return bytes(data)

    def dma_write(self, address: int, data: bytes) -> bool:
        """A DMA write by message."""
        return self._allowed() and self._space.write(address, data) == MemTxResult.OK


def _page(iova: int, perm: int) -> TranslationEntry:
    """A page whose address nobody is told."""
    return TranslationEntry(iova & ~_PAGE_MASK, 0, _PAGE_MASK, perm)
