"""What both invalidation faces of a VT-d unit, registers and queue, ask of the translation half.

Source: Intel VT-d specification, "Context Command Register", "IOTLB Invalidate Register" (11.4) and "Queued
Invalidation Interface" (6.5.2).
"""

from __future__ import annotations

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.ports import Granularity, Translator
from vfio_model.ranges import U64_MAX
from vfio_model.trace import Trace


def device_tlb_range(word: int, s_bit: int) -> tuple[int, int]:
    """The bytes, first and last, that the address quadword of a device-TLB invalidation names.

    Without S (mask ``s_bit``) they are 4 KiB; with it 8 KiB, doubled for each of the lowest address bits, from bit 12
    upward, that is one. Address bits 62:12 all ones name the whole space.
    """
    page = word >> 12
    if not word & s_bit:
        return page << 12, page << 12 | regs.PAGE
    ones = (~page & page + 1).bit_length() - 1
    size = 1 << 13 + ones
    first = (page << 12) & -size
    return (first, first + size - 1) if size <= 1 << 63 else (0, U64_MAX)


class Invalidations:
    """Tells the translation half what to drop, and when to see that nobody uses it any more."""

    def __init__(self, translator: Translator, trace: Trace) -> None:
        self.translator = translator
        self._trace = trace

    def contexts(self, granularity: int, did: int, sid: int, mask: int) -> int:
        """The context cache; the granularity that was carried out, 0 for none. By domain is done globally."""
        trace, traced = self._trace, self._trace.enabled
        if granularity == Granularity.SELECTIVE:
            if traced:
                trace("vtd_inv_desc_cc_devices", sid=sid, fmask=mask)
            self.translator.invalidate_contexts(Granularity.SELECTIVE, did, sid, mask)
            return Granularity.SELECTIVE
        if granularity not in (Granularity.GLOBAL, Granularity.DOMAIN):
            return 0
        if traced:
            if granularity == Granularity.DOMAIN:
                trace("vtd_inv_desc_cc_domain", domain=did)
            trace("vtd_inv_desc_cc_global")
        self.translator.invalidate_contexts(Granularity.GLOBAL)
        return Granularity.GLOBAL

    def iotlb(self, granularity: int, did: int, addr: int, am: int) -> int:
        """The IOTLB; the granularity that was carried out, 0 for none. ``addr`` is a page address."""
        trace, traced = self._trace, self._trace.enabled
        if granularity == Granularity.GLOBAL:
            if traced:
                trace("vtd_inv_desc_iotlb_global")
            self.translator.invalidate_iotlb(Granularity.GLOBAL)
        elif granularity == Granularity.DOMAIN:
            if traced:
                trace("vtd_inv_desc_iotlb_domain", domain=did)
            self.translator.invalidate_iotlb(Granularity.DOMAIN, did)
        elif granularity == Granularity.SELECTIVE and am <= regs.MAMV:
            if traced:
                trace("vtd_inv_desc_iotlb_pages", domain=did, addr=addr, mask=am)
            self.translator.invalidate_iotlb(Granularity.SELECTIVE, did, addr, am)
        else:
            return 0
        return granularity

    def flush(self) -> OSError | None:
        """See :meth:`~vfio_model.iommu.vtd.ports.Translator.flush`."""
        error = self.translator.flush()
        if error is not None and self._trace.enabled:
            self._trace("vtd_flush_failed", errno=error.errno)
        return error
