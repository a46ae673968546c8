"""What Linux's intel-iommu driver does to a VT-d unit, small: domains of page tables, functions and PASIDs attached to
them, maps and unmaps with the invalidations that they need, faults, interrupt remapping.

Intel VT-d specification, chapters 3 (DMA remapping), 5 (interrupt remapping), 6 (caching), 7 (faults), section 11.4
(registers). Tables are in :mod:`.vtd_tables`, interrupts in :mod:`.vtd_interrupts`, invalidation in
:mod:`.vtd_invalidation`. In scalable mode a domain is attached by a PASID table entry, RID_PASID for requests without a
PASID.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_interrupts import MESSAGE_BASE, InterruptTable
from vfio_model.guest_drivers.vtd_invalidation import (
    Invalidation,
    QueuedInvalidation,
    RegisterInvalidation,
    Registers,
)
from vfio_model.guest_drivers.vtd_tables import (
    CONTEXT_DTE,
    CONTEXT_PASIDE,
    CONTEXT_PDTS_SHIFT,
    CONTEXT_PRE,
    PASID_DIRECTORY_PDTS,
    PRESENT,
    READ,
    RID_PASID,
    WRITE,
    PageAllocator,
    PageTable,
    PasidEntry,
    PasidTable,
    Pgtt,
    RootTable,
    Stage,
    TranslationType,
)
from vfio_model.iommu.vtd import regs

FIRST_DID = 1
"""Domain 0 tags what is not present while caching mode is on."""
PASS_THROUGH_DID = FIRST_DID


class FaultRecord(NamedTuple):
    """A fault that the unit recorded. ``pasid`` None: of a request without one."""

    reason: int
    sid: int
    address: int
    is_read: bool
    pasid: int | None


@dataclass
class Domain:
    """An address space of devices: page table ``table`` under domain id ``did``."""

    did: int
    table: PageTable
    attached: set[tuple[int, int]] = field(default_factory=set)
    """(requester, PASID) of everyone in it; RID_PASID without one."""


class VtdDriver:
    """A unit at ``base``; tables and queues come from ``pages``. ``queued``: invalidations by the queue.

    ``scalable``: scalable mode, which needs the queue. ``device_tlb``: functions may cache translations.
    """

    def __init__(
        self,
        cpu: Cpu,
        pages: PageAllocator,
        *,
        base: int = regs.BASE,
        queued: bool = True,
        scalable: bool = False,
        device_tlb: bool = False,
    ) -> None:
        """:raise DriverError: the unit cannot do what is asked."""
        self._cpu, self._pages = cpu, pages
        self.registers = Registers(cpu, base)
        self.cap, self.ecap = self.registers.read(regs.CAP, 8), self.registers.read(regs.ECAP, 8)
        self.scalable, self._device_tlb = scalable, device_tlb
        if scalable and not (queued and self.ecap & regs.ECAP_SMTS):
            raise DriverError("scalable mode needs a unit that has it, and its queue")
        self._queued = queued
        self._root = RootTable(cpu, pages, scalable=scalable)
        self._pasids: dict[int, PasidTable] = {}
        self._next_did = FIRST_DID + 1
        self._invalidation: Invalidation | None = None

    # -- life

    @property
    def caching_mode(self) -> bool:
        """Whether the unit may cache what is not present, so that new mappings are invalidated, too."""
        return bool(self.cap & regs.CAP_CM)

    @property
    def invalidation(self) -> Invalidation:
        """How caches are invalidated; once started."""
        assert self._invalidation is not None, "the driver has started"
        return self._invalidation

    @property
    def levels(self) -> int:
        """Of a second-stage table: as many as the unit takes, 4 if it can."""
        sagaw = regs.CAP_SAGAW.of(self.cap)
        return 4 if sagaw & 4 else 3

    def start(self) -> None:
        """Root table, invalidation, faults cleared, translation on. Functions without a context are blocked."""
        mode = regs.RTADDR_SMT if self.scalable else 0
        self.registers.write(regs.RTADDR, self._root.root | mode, 8)
        self._command(regs.GCMD_SRTP, True)
        if self._queued:
            self._invalidation = QueuedInvalidation(self._cpu, self.registers, self._pages, wide=self.scalable)
            self._command(regs.GCMD_QIE, True)
        else:
            self._invalidation = RegisterInvalidation(self.registers)
        self.invalidation.contexts()
        self.invalidation.iotlb()
        self.clear_faults()
        self._command(regs.GCMD_TE, True)

    def stop(self) -> None:
        """Translation, and the queue, off."""
        self._command(regs.GCMD_TE, False)
        if self._queued:
            self._command(regs.GCMD_QIE, False)

    def _command(self, bit: int, on: bool) -> None:
        """One bit of GCMD; the states that stay are written back (one-shot bits are not states)."""
        one_shot = regs.GCMD_SRTP | regs.GCMD_SIRTP
        state = self.registers.read(regs.GSTS) & ~one_shot
        self.registers.write(regs.GCMD, state | bit if on else state & ~bit)
        self.registers.wait(f"GCMD {bit:#x}", lambda: bool(self.registers.read(regs.GSTS) & bit) is on)

    # -- domains

    def domain(self, stage: Stage = Stage.SECOND, *, levels: int | None = None) -> Domain:
        """A new, empty domain."""
        did, self._next_did = self._next_did, self._next_did + 1
        count = (self.levels if stage is Stage.SECOND else 4) if levels is None else levels
        return Domain(did, PageTable(self._cpu, self._pages, stage, count))

    def shared_domain(self, table: PageTable) -> Domain:
        """A new domain of a first-stage ``table`` that somebody else keeps: a process's."""
        did, self._next_did = self._next_did, self._next_did + 1
        return Domain(did, table)

    def map(self, domain: Domain, iova: int, gpa: int, size: int, perm: int = READ | WRITE, *, level: int = 1) -> None:
        """Map ``size`` bytes by pages of ``level`` (1: 4 KiB); nothing was mapped there."""
        domain.table.map(iova, gpa, size, perm, level=level)
        if self.caching_mode:
            self.flush(domain, iova, size)

    def unmap(self, domain: Domain, iova: int, size: int) -> int:
        """Take away every page that lies in ``size`` bytes, then invalidate; the bytes that were mapped."""
        gone = sum(step for _, step in domain.table.unmap(iova, size))
        if gone:
            self.flush(domain, iova, size)
        return gone

    def flush(self, domain: Domain, iova: int, size: int) -> None:
        """Have everyone forget what ``domain`` had in ``size`` bytes from ``iova``."""
        if self.scalable and domain.table.stage is Stage.FIRST:
            for pasid in {pasid for _, pasid in domain.attached}:
                self.invalidation.pasid_iotlb(domain.did, pasid, iova, size)
        else:
            self.invalidation.pages(domain.did, iova, size)
        if self._device_tlb:
            for sid, pasid in sorted(domain.attached):
                if pasid == RID_PASID:
                    self.invalidation.device_tlb(sid, iova, size)
                else:
                    self.invalidation.pasid_device_tlb(sid, pasid, iova, size)

    # -- functions

    def attach(self, domain: Domain, sid: int) -> None:
        """Requests of ``sid`` without a PASID are translated by ``domain``; it was in none."""
        domain.attached.add((sid, RID_PASID))
        if self.scalable:
            self._set_pasid(sid, RID_PASID, self._pasid_entry(domain))
        else:
            kind = TranslationType.DEVICE_TLB if self._device_tlb else TranslationType.UNTRANSLATED
            self._set_context(sid, domain.table.root, kind, domain.table.levels, domain.did)

    def attach_pass_through(self, sid: int) -> None:
        """Requests of ``sid`` without a PASID are not translated."""
        if self.scalable:
            self._set_pasid(sid, RID_PASID, PasidEntry(Pgtt.PASS_THROUGH, PASS_THROUGH_DID, levels=self.levels))
        else:
            self._set_context(sid, 0, TranslationType.PASS_THROUGH, self.levels, PASS_THROUGH_DID)

    def attach_pasid(self, domain: Domain, sid: int, pasid: int) -> None:
        """Requests of ``sid`` with ``pasid`` are translated by ``domain``. Scalable mode."""
        domain.attached.add((sid, pasid))
        self._set_pasid(sid, pasid, self._pasid_entry(domain))

    def detach(self, domain: Domain, sid: int, pasid: int = RID_PASID) -> None:
        """Requests are blocked again; nothing of ``domain`` is cached for them."""
        domain.attached.discard((sid, pasid))
        if self.scalable:
            self._pasids[sid].set(pasid, None)
            self.invalidation.pasid_cache(domain.did, pasid)
            if domain.table.stage is Stage.FIRST:
                self.invalidation.pasid_iotlb(domain.did, pasid)
            else:
                self.invalidation.iotlb(domain.did)
        else:
            self._root.clear(sid)
            self._forget_context(sid, domain.did)

    def detach_pass_through(self, sid: int) -> None:
        """Requests are blocked again."""
        if self.scalable:
            self._pasids[sid].set(RID_PASID, None)
            self.invalidation.pasid_cache(PASS_THROUGH_DID, RID_PASID)
            self.invalidation.iotlb(PASS_THROUGH_DID)
        else:
            self._root.clear(sid)
            self._forget_context(sid, PASS_THROUGH_DID)

    def _set_context(self, sid: int, root: int, kind: TranslationType, levels: int, did: int) -> None:
        if self._root.present(sid):
            raise DriverError(f"requester {sid:#x} is attached already")
        self._root.set(sid, root | kind << 2 | PRESENT, did << 8 | levels - 2)
        if self.caching_mode:
            self._forget_context(sid, 0)
            self.invalidation.iotlb(did)

    def _forget_context(self, sid: int, did: int) -> None:
        self.invalidation.contexts(did, sid)
        self.invalidation.iotlb(did)

    def _set_pasid(self, sid: int, pasid: int, entry: PasidEntry) -> None:
        table = self._pasids.get(sid)
        if table is None:
            table = self._pasids[sid] = PasidTable(self._cpu, self._pages)
            more = CONTEXT_DTE | CONTEXT_PRE if self._device_tlb else 0
            lo = table.directory | PASID_DIRECTORY_PDTS << CONTEXT_PDTS_SHIFT | CONTEXT_PASIDE | more | PRESENT
            self._root.set(sid, lo, RID_PASID)
            if self.caching_mode:
                self._forget_context(sid, 0)
        table.set(pasid, entry)
        if self.caching_mode:
            self.invalidation.pasid_cache(entry.did, pasid)
            self.invalidation.pasid_iotlb(entry.did, pasid)

    def _pasid_entry(self, domain: Domain) -> PasidEntry:
        table = domain.table
        if table.stage is Stage.FIRST:
            return PasidEntry(Pgtt.FIRST, domain.did, first_root=table.root, first_levels=table.levels)
        return PasidEntry(Pgtt.SECOND, domain.did, second_root=table.root, levels=table.levels)

    # -- faults

    def fault_event(self, vector: int, destination: int = 0) -> None:
        """Have faults interrupt as message ``vector`` to APIC ``destination``."""
        self.registers.write(regs.FEDATA, vector)
        self.registers.write(regs.FEADDR, MESSAGE_BASE | destination << 12)
        self.registers.write(regs.FECTL, 0)

    def faults(self) -> list[FaultRecord]:
        """The recorded faults, oldest first; they are cleared."""
        at = regs.CAP_FRO.of(self.cap) << 4
        count = regs.CAP_NFR.of(self.cap) + 1
        first = regs.FSTS_FRI.of(self.registers.read(regs.FSTS))
        found = []
        for n in range(count):
            record = at + 16 * ((first + n) % count)
            low, high = self.registers.read(record, 8), self.registers.read(record + 8, 8)
            if not high & regs.FRCD_F:
                break
            pasid = regs.FRCD_PV.of(high) if high & regs.FRCD_PP else None
            reason, sid = regs.FRCD_REASON.of(high), regs.FRCD_SID.of(high)
            found.append(FaultRecord(reason, sid, low, bool(high & regs.FRCD_T), pasid))
            self.registers.write(record + 12, regs.FRCD_F >> 32)
        self.registers.write(regs.FSTS, regs.FSTS_PFO)
        return found

    def clear_faults(self) -> None:
        """Forget what is recorded."""
        while self.faults():
            pass

    # -- interrupt remapping

    def remap_interrupts(self) -> InterruptTable:
        """Interrupt remapping on, with an empty table: messages in remappable form go through it from now on."""
        if not (self._queued and self.ecap & regs.ECAP_IR):
            raise DriverError("interrupt remapping needs a unit that has it, and its queue")
        table = InterruptTable(self._cpu, self._pages, self.invalidation)
        self.registers.write(regs.IRTA, table.base | table.size_field, 8)
        self._command(regs.GCMD_SIRTP, True)
        self.invalidation.interrupt_entries()
        self._command(regs.GCMD_IRE, True)
        return table
