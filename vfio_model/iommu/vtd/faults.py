"""Primary fault logging of a VT-d unit: the fault recording register, fault status, and the fault event.

Source: Intel VT-d specification, "Primary Fault Logging" (7.2.1), "Fault Status Register" and "Fault Recording
Registers" (11.4). There is one recording register, so the index of the next one is always 0. A fault of a source that
has one recorded collapses into that; a fault for which there is no room sets PFO, and as long as it is set no fault is
recorded.
"""

from __future__ import annotations

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.events import Event
from vfio_model.iommu.vtd.ports import RID, Fault
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.trace import Trace

_RECORDS = 1
_CONDITIONS = regs.FSTS_PFO | regs.FSTS_PPF | regs.FSTS_IQE | regs.FSTS_ITE
_HIGH = 8
"""Of a record, the offset of the upper half."""


class FaultRecording:
    """Implements :class:`~vfio_model.iommu.vtd.ports.FaultSink`."""

    def __init__(self, registers: RegisterFile, event: Event, trace: Trace) -> None:
        self._registers, self._event, self._trace = registers, event, trace
        self.next = 0
        """The recording register that is used next."""

    def reset(self) -> None:
        """The first register comes next."""
        self.next = 0

    @property
    def status(self) -> int:
        """FSTS."""
        return self._registers.get(regs.FSTS)

    def report(self, fault: Fault) -> None:
        """See :class:`~vfio_model.iommu.vtd.ports.FaultSink`."""
        if self._trace.enabled:
            write = int(fault.is_write)
            self._trace("vtd_dmar_fault", sid=fault.sid, fault=fault.reason, addr=fault.address, write=write)
        high = regs.FRCD_SID.put(fault.sid) | regs.FRCD_REASON.put(fault.reason)
        high |= 0 if fault.is_write else regs.FRCD_T
        if fault.pasid != RID:
            high |= regs.FRCD_PP | regs.FRCD_PV.put(fault.pasid)
        self._record(fault.sid, high, fault.address & ~regs.PAGE)

    def report_interrupt(self, reason: int, sid: int, index: int) -> None:
        """A fault of interrupt remapping; ``index`` is of the remapping table's entry, 16 bits."""
        self._record(sid, regs.FRCD_SID.put(sid) | regs.FRCD_REASON.put(reason), (index & 0xFFFF) << 48)

    def _record(self, sid: int, high: int, low: int) -> None:
        status = self.status
        if status & regs.FSTS_PFO or self._collapses(sid):
            return
        at = regs.FRCD + 16 * self.next
        if self._registers.get_quad(at + _HIGH) & regs.FRCD_F:
            self._registers.change(regs.FSTS, set_=regs.FSTS_PFO)
            return
        if self._trace.enabled:
            self._trace("vtd_frr_new", index=self.next, high=high, low=low)
        self._registers.put_quad(at, low)
        if not status & regs.FSTS_PPF:
            self._registers.change(regs.FSTS, regs.FSTS_FRI.mask, regs.FSTS_FRI.put(self.next))
        self._registers.put_quad(at + _HIGH, high | regs.FRCD_F)
        self.next = (self.next + 1) % _RECORDS
        self.cleared()
        if not status & regs.FSTS_PPF:
            self._generate(status)

    def _collapses(self, sid: int) -> bool:
        highs = (self._registers.get_quad(regs.FRCD + 16 * i + _HIGH) for i in range(_RECORDS))
        return any(high & regs.FRCD_F and regs.FRCD_SID.of(high) == sid for high in highs)

    def queue_failed(self, condition: int) -> None:
        """The invalidation queue stopped: ``condition`` is FSTS_IQE or FSTS_ITE."""
        status = self.status
        self._registers.change(regs.FSTS, set_=condition)
        self._generate(status)

    def _generate(self, before: int) -> None:
        """A condition arose; the event says so unless it still says so of an earlier one."""
        if not before & _CONDITIONS:
            self._event.generate()

    # -- what the guest does

    def cleared(self) -> None:
        """F bits were written: PPF says whether one is set."""
        highs = (self._registers.get_quad(regs.FRCD + 16 * i + _HIGH) for i in range(_RECORDS))
        pending = any(high & regs.FRCD_F for high in highs)
        self._registers.change(regs.FSTS, regs.FSTS_PPF, regs.FSTS_PPF if pending else 0)
        if self._trace.enabled:
            self._trace("vtd_fsts_ppf", ppf=int(pending))

    def status_written(self) -> None:
        """FSTS was: without a condition nothing is pending."""
        if not self.status & _CONDITIONS and self._event.serviced() and self._trace.enabled:
            self._trace("vtd_fsts_clear_ip")
