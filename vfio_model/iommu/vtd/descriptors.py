"""Invalidation descriptors: what may be in them, and what each does.

Source: Intel VT-d specification, "Queued Invalidation Interface" (6.5.2) and "Page Group Response Descriptor" (7.7).
A descriptor with reserved bits set, of a type that there is not, or with values that it cannot have is an error; so is
one of the kinds that exist only with 256 bits in a queue of 128-bit descriptors. Nothing of a bad one is carried out.
"""

from __future__ import annotations

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.events import Event
from vfio_model.iommu.vtd.invalidation import Invalidations, device_tlb_range
from vfio_model.iommu.vtd.ports import RID, Granularity
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.trace import Trace

Quads = tuple[int, ...]
"""A descriptor: 2 or 4 quadwords, the lowest first."""

_PASID_ALL, _PASID_PAGES = 2, 3
"""Granularities of a PASID-based IOTLB invalidation."""
_PASID_CACHE = {0: Granularity.DOMAIN, 1: Granularity.SELECTIVE, 3: Granularity.GLOBAL}
_RESPONSES = (0, 1)
_RESPONSE_FAILURE = 15


def type_of(descriptor: Quads) -> int:
    """A number of :class:`.regs.DescriptorType`, or another."""
    return regs.TYPE_LOW.of(descriptor[0]) | regs.TYPE_HIGH.of(descriptor[0]) << 4


class Descriptors:
    """Checks descriptors and carries them out. ``drain``: wait descriptors may ask for page-request drain, which needs
    nothing here: a page request is in its queue when it was made.
    """

    def __init__(
        self,
        registers: RegisterFile,
        invalidations: Invalidations,
        completion: Event,
        system: AddressSpace,
        trace: Trace,
        *,
        drain: bool,
        interrupt_anyway: bool = False,
    ) -> None:
        self._registers, self._completion, self._system, self._trace = registers, completion, system, trace
        self._do = invalidations
        self._drain, self._interrupt_anyway = drain, interrupt_anyway
        self._handlers = {
            regs.DescriptorType.CONTEXT_CACHE: self._contexts,
            regs.DescriptorType.IOTLB: self._iotlb,
            regs.DescriptorType.DEVICE_TLB: self._device_tlb,
            regs.DescriptorType.INTERRUPT_ENTRY_CACHE: self._interrupt_entries,
            regs.DescriptorType.WAIT: self._wait,
            regs.DescriptorType.PASID_IOTLB: self._pasid_iotlb,
            regs.DescriptorType.PASID_CACHE: self._pasid_cache,
            regs.DescriptorType.PASID_DEVICE_TLB: self._pasid_device_tlb,
            regs.DescriptorType.PAGE_GROUP_RESPONSE: self._response,
        }

    def acceptable(self, descriptor: Quads) -> bool:
        """Whether its type exists in such a queue and its reserved bits are zero. Traces what it is."""
        kind = regs.DESCRIPTORS.get(type_of(descriptor))
        if kind is None:
            return False
        if self._trace.enabled:
            self._trace("vtd_inv_desc", type=kind.trace, high=descriptor[1], low=descriptor[0])
        if kind.wide and len(descriptor) == 2:
            return False
        low, high = kind.reserved
        if kind.type == regs.DescriptorType.WAIT and not self._drain:
            low |= regs.WAIT_PD
        above = any(quad & kind.reserved_above for quad in descriptor[2:])
        return not (descriptor[0] & low or descriptor[1] & high or above)

    def execute(self, descriptor: Quads) -> bool:
        """Carry out an acceptable one; False: it is an error after all."""
        return self._handlers[type_of(descriptor)](descriptor[0], descriptor[1])

    def _contexts(self, low: int, _high: int) -> bool:
        fields = regs.CC_DID.of(low), regs.CC_SID.of(low), regs.CC_FM.of(low)
        return self._do.contexts(regs.CC_G.of(low), *fields) != 0

    def _iotlb(self, low: int, high: int) -> bool:
        return self._do.iotlb(regs.TLB_G.of(low), regs.TLB_DID.of(low), high & ~regs.PAGE, regs.TLB_AM.of(high)) != 0

    def _device_tlb(self, low: int, high: int) -> bool:
        first, last = device_tlb_range(high, regs.DEV_S)
        self._do.translator.invalidate_device_tlb(regs.DEV_SID.of(low), RID, first, last)
        return True

    def _pasid_device_tlb(self, low: int, high: int) -> bool:
        first, last = device_tlb_range(high, regs.PASID_DEV_S)
        pasid = None if high & regs.PASID_DEV_GLOBAL else regs.PASID_DEV_PASID.of(low)
        self._do.translator.invalidate_device_tlb(regs.PASID_DEV_SID.of(low), pasid, first, last)
        return True

    def _interrupt_entries(self, low: int, _high: int) -> bool:
        if self._trace.enabled:
            index, mask = regs.IEC_IIDX.of(low), regs.IEC_IM.of(low)
            self._trace("vtd_inv_desc_iec", granularity=int(bool(low & regs.IEC_G)), index=index, mask=mask)
        return True

    def _pasid_iotlb(self, low: int, high: int) -> bool:
        granularity, am = regs.TLB_G.of(low), regs.TLB_AM.of(high)
        did, pasid = regs.TLB_DID.of(low), regs.PASID_TLB_PASID.of(low)
        if granularity == _PASID_ALL:
            self._do.translator.invalidate_pasid_iotlb(did, pasid)
        elif granularity == _PASID_PAGES and am <= regs.MAMV:
            self._do.translator.invalidate_pasid_iotlb(did, pasid, high & ~regs.PAGE, am)
        else:
            return False
        return True

    def _pasid_cache(self, low: int, _high: int) -> bool:
        granularity = _PASID_CACHE.get(regs.PASID_CACHE_G.of(low))
        if granularity is None:
            return False
        did, pasid = regs.TLB_DID.of(low), regs.PASID_TLB_PASID.of(low)
        if self._trace.enabled:
            self._trace_pasid_cache(granularity, did, pasid)
        self._do.translator.invalidate_pasid_cache(granularity, did, pasid)
        return True

    def _trace_pasid_cache(self, granularity: Granularity, did: int, pasid: int) -> None:
        if granularity is Granularity.GLOBAL:
            self._trace("vtd_inv_desc_pasid_cache_gsi")
        elif granularity is Granularity.DOMAIN:
            self._trace("vtd_inv_desc_pasid_cache_dsi", domain=did)
        else:
            self._trace("vtd_inv_desc_pasid_cache_psi", domain=did, pasid=pasid)

    def _response(self, low: int, high: int) -> bool:
        """Only page requests with a PASID are ever in the queue, so a response without one answers nothing."""
        if not low & regs.RESPONSE_PP:
            return False
        code = regs.RESPONSE_CODE.of(low)
        self._do.translator.page_response(
            regs.RESPONSE_RID.of(low),
            regs.RESPONSE_PASID.of(low),
            regs.RESPONSE_PRGI.of(high),
            code if code in _RESPONSES else _RESPONSE_FAILURE,
        )
        return True

    # -- the wait descriptor

    def _wait(self, low: int, high: int) -> bool:
        """Everything before it has been completed. A fence (FN alone) is nothing more than that."""
        if not low & (regs.WAIT_SW | regs.WAIT_IF | regs.WAIT_FN):
            return False
        written = not low & regs.WAIT_SW or self._write_status(low, high)
        if low & regs.WAIT_IF and (written or self._interrupt_anyway):
            self._complete()
        return written

    def _write_status(self, low: int, high: int) -> bool:
        """False: nobody takes it. The unit does not, either: it is busy with the queue."""
        data = regs.WAIT_DATA.of(low)
        if self._trace.enabled:
            self._trace("vtd_inv_desc_wait_sw", addr=high, data=data)
        own = regs.BASE <= high < regs.BASE + regs.SIZE
        if not own and self._system.write(high, data.to_bytes(4, "little")) == MemTxResult.OK:
            return True
        if self._trace.enabled:
            self._trace("vtd_inv_desc_wait_write_fail", hi=high, lo=low)
        return False

    def _complete(self) -> None:
        """The invalidation completion event; a guest that has not taken the last one gets no second."""
        if self._registers.get(regs.ICS) & regs.ICS_IWC:
            self._trace_completion("One pending, skip current")
            return
        self._registers.change(regs.ICS, set_=regs.ICS_IWC)
        masked = self._completion.masked
        self._trace_completion(
            "IM in IECTL_REG is set, new event not generated" if masked else "Generating complete event"
        )
        self._completion.generate()

    def _trace_completion(self, msg: str) -> None:
        if self._trace.enabled:
            self._trace("vtd_inv_desc_wait_irq", msg=msg)
