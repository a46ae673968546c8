"""What a guest sets in motion by the registers of a VT-d unit.

Source: Intel VT-d specification, "Register Descriptions" (11.4). Reads and writes have 4 or 8 bytes at a multiple of 4;
an access to half of a 64-bit register works on that half. One-shot commands of GCMD (SRTP, SIRTP) act on every write
that has the bit; the others act on a change. While the queue is on, register-based invalidation is refused: its bit
stays set.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from vfio_model.iommu.vtd import quirks, regs
from vfio_model.iommu.vtd.descriptors import Descriptors
from vfio_model.iommu.vtd.events import Event
from vfio_model.iommu.vtd.faults import FaultRecording
from vfio_model.iommu.vtd.invalidation import Invalidations
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.page_requests import PageRequests
from vfio_model.iommu.vtd.ports import Message, Translator
from vfio_model.iommu.vtd.queue import InvalidationQueue
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.iommu.vtd.remapping import InterruptRemapping
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.trace import Trace


class VtdParts:
    """What reports to the registers from elsewhere: faults, interrupt messages, page requests, and the registers'
    values themselves. It stands without a translation half, which is given some of it.
    """

    def __init__(self, options: VtdOptions, system: AddressSpace, message: Message, trace: Trace) -> None:
        self.options, self.system, self.trace = options, system, trace
        resets = {regs.CAP: options.cap, regs.ECAP: options.ecap}
        self.file = RegisterFile(resets, page_requests=options.svm)
        self.fault_event, self.completion_event, self.page_event = (
            Event(self.file, control, message, trace) for control in (regs.FECTL, regs.IECTL, regs.PECTL)
        )
        self.faults = FaultRecording(self.file, self.fault_event, trace)
        self.remapping = InterruptRemapping(options, self.file, self.faults, system, message, trace)
        self.page_requests = PageRequests(self.file, self.page_event, system, options.address_mask)


class VtdRegisters:
    """The register region's ops (a :class:`~vfio_model.memory.region.RegionOps`), in command of ``translator``."""

    min_access_size = 4
    max_access_size = 8

    def __init__(self, parts: VtdParts, translator: Translator) -> None:
        self.parts, self.translator = parts, translator
        self.options, self._trace, self.file = parts.options, parts.trace, parts.file
        self.faults, self.remapping, self.page_requests = parts.faults, parts.remapping, parts.page_requests
        self._do = Invalidations(translator, parts.trace)
        descriptors = Descriptors(
            self.file,
            self._do,
            parts.completion_event,
            parts.system,
            parts.trace,
            drain=parts.options.svm,
            interrupt_anyway=parts.options.has(quirks.WAIT_INTERRUPT_ANYWAY),
        )
        self.queue = InvalidationQueue(
            parts.options, self.file, parts.faults, descriptors, self._do, parts.system, parts.trace
        )
        self.root, self.scalable, self.enabled = 0, False, False
        """As SRTP latched them; whether translation is on."""
        self._on_write: dict[int, Callable[[], None]] = {
            regs.GCMD: self._gcmd,
            regs.CCMD: self._ccmd,
            regs.CCMD + 4: self._ccmd,
            regs.FSTS: self._fsts,
            regs.FECTL: self._fectl,
            regs.IQT: self.queue.tail_written,
            regs.IQA: self.queue.address_written,
            regs.ICS: self._ics,
            regs.IECTL: self._iectl,
            regs.PRS: self.page_requests.status_written,
            regs.PECTL: parts.page_event.unmasked,
            regs.IOTLB: self._iotlb,
            regs.IOTLB + 4: self._iotlb,
            regs.FRCD + 8: self.faults.cleared,
            regs.FRCD + 12: self.faults.cleared,
        }
        self._narrow = {each.offset for each in regs.REGISTERS if each.narrow}

    def reset(self) -> None:
        """As at power-on."""
        if self._trace.enabled:
            self._trace("vtd_reset_exit")
        self.file.reset()
        self.faults.reset()
        self.remapping.reset()
        self.queue.reset()
        self.root, self.scalable, self.enabled = 0, False, False
        self.translator.reset()
        self._do.flush()

    # -- accesses

    def read(self, addr: int, size: int) -> int:
        """See :class:`~vfio_model.memory.region.RegionOps`."""
        if self._trace.enabled:
            self._trace("vtd_reg_read", addr=addr, size=size)
        if addr == regs.IQA:
            return self.queue.read_address() & (1 << 8 * size) - 1
        if addr == regs.IQA + 4:
            return self.queue.read_address() >> 32
        return self.file.read(addr, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See :class:`~vfio_model.memory.region.RegionOps`."""
        if self._trace.enabled:
            self._trace("vtd_reg_write", addr=addr, size=size, value=value)
        before = self.file.get(regs.FSTS)
        self.file.write(addr, 4 if addr in self._narrow else size, value)
        handler = self._on_write.get(addr)
        if handler is not None:
            handler()
        if before & ~self.file.get(regs.FSTS) & regs.FSTS_ITE:
            self.queue.timeout_cleared()
        return MemTxResult.OK

    def _fsts(self) -> None:
        self.faults.status_written()

    def _fectl(self) -> None:
        if self._trace.enabled:
            self._trace("vtd_reg_write_fectl", value=self.file.get(regs.FECTL))
        self.parts.fault_event.unmasked()

    def _ics(self) -> None:
        if self.file.get(regs.ICS) & regs.ICS_IWC:
            return
        if self.parts.completion_event.serviced() and self._trace.enabled:
            self._trace("vtd_reg_ics_clear_ip")

    def _iectl(self) -> None:
        if self._trace.enabled:
            self._trace("vtd_reg_write_iectl", value=self.file.get(regs.IECTL))
        self.parts.completion_event.unmasked()

    # -- global commands

    def _gcmd(self) -> None:
        status, command = self.file.get(regs.GSTS), self.file.get(regs.GCMD)
        if self._trace.enabled:
            self._trace("vtd_reg_write_gcmd", status=status, value=command)
        changed = status ^ command
        if changed & regs.GCMD_TE and self.options.dma_translation:
            self._enable(bool(command & regs.GCMD_TE))
        if command & regs.GCMD_SRTP:
            self._latch_root()
        if changed & regs.GCMD_QIE:
            if command & regs.GCMD_QIE:
                self.queue.enable()
            else:
                self.queue.disable()
        if command & regs.GCMD_SIRTP:
            self.remapping.latch_root()
        if changed & regs.GCMD_IRE and self.options.intremap:
            self.remapping.set_enabled(bool(command & regs.GCMD_IRE))
        if changed & regs.GCMD_CFI and self._has_compatibility_format():
            self.file.change(regs.GSTS, regs.GCMD_CFI, command & regs.GCMD_CFI)

    def _has_compatibility_format(self) -> bool:
        return self.options.intremap and not self.options.has(quirks.COMPATIBILITY_FORMAT)

    def _enable(self, on: bool) -> None:
        if self._trace.enabled:
            self._trace("vtd_dmar_enable", enable=int(on))
        self.enabled = on
        if not on:
            self.faults.reset()
        self.file.change(regs.GSTS, regs.GCMD_TE, regs.GCMD_TE if on else 0)
        self.translator.set_enabled(on)
        self._do.flush()

    def _latch_root(self) -> None:
        rtaddr = self.file.get_quad(regs.RTADDR)
        self.root = rtaddr & self.options.address_mask
        self.scalable = self.options.scalable_mode and bool(rtaddr & regs.RTADDR_SMT)
        if self._trace.enabled:
            self._trace("vtd_reg_dmar_root", addr=self.root, scalable=int(self.scalable))
        self.file.change(regs.GSTS, set_=regs.GCMD_SRTP)
        self.translator.set_root(self.root, self.scalable)
        self._do.flush()

    # -- invalidation by registers

    def _ccmd(self) -> None:
        command = self.file.get_quad(regs.CCMD)
        if not command & regs.CCMD_ICC or self.queue.enabled:
            return
        did, sid, mask = regs.CCMD_DID.of(command), regs.CCMD_SID.of(command), regs.CCMD_FM.of(command)
        done = self._do.contexts(regs.CCMD_CIRG.of(command), did, sid, mask)
        if self._completed():
            command &= ~(regs.CCMD_ICC | regs.CCMD_CAIG.mask)
            self.file.put_quad(regs.CCMD, command | regs.CCMD_CAIG.put(done))

    def _iotlb(self) -> None:
        command, address = self.file.get_quad(regs.IOTLB), self.file.get_quad(regs.IVA)
        if not command & regs.IOTLB_IVT or self.queue.enabled:
            return
        did, am = regs.IOTLB_DID.of(command), regs.IVA_AM.of(address)
        done = self._do.iotlb(regs.IOTLB_IIRG.of(command), did, address & ~regs.PAGE, am)
        if self._completed():
            command &= ~(regs.IOTLB_IVT | regs.IOTLB_IAIG.mask)
            self.file.put_quad(regs.IOTLB, command | regs.IOTLB_IAIG.put(done))

    def _completed(self) -> bool:
        """Registers have no time-out: an invalidation that somebody does not follow is never done."""
        error = self._do.flush()
        return error is None or error.errno != errno.ETIMEDOUT
