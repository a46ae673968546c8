"""One translation, from the caches or through all tables, and the fault when there is none.

The order of "Caching Translation Information" (6.2): what the requester knows of the page, its context entry, the
IOTLB by the domain that this names, the tables. A cached page that does not permit the access, or whose dirty bit a
write has still to set, is walked again; with quirk ``no-fault-on-hit`` missing permission blocks at once. A context
entry is cached once it was good; PASID entries are read anew with each walk.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.caches import Doomed, Iotlb, Page
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.pasid_cache import Words
from vfio_model.iommu.vtd.ports import RID, Fault, FaultSink
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import (
    RECOVERABLE,
    RID_PASID,
    UNQUALIFIED,
    Binding,
    Context,
    Reason,
    Structures,
    TableType,
)
from vfio_model.iommu.vtd.table_memory import TableMemory
from vfio_model.iommu.vtd.walk import WRITE, Walker, page_mask
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.trace import Trace

_PERMS = tuple(IOMMUAccessFlags(bits) for bits in range(4))
_NONE, _RW = IOMMUAccessFlags.NONE, IOMMUAccessFlags.RW
_LOW = 0xFFF


class Lookup:
    """Translates for every space of a unit."""

    def __init__(self, options: VtdOptions, system: AddressSpace, faults: FaultSink, trace: Trace) -> None:
        self.system, self._faults, self._trace = system, faults, trace
        self.memory = TableMemory(system)
        self.structures = Structures(options, self.memory)
        self.walker = Walker(options, self.memory)
        self.enabled = False
        self.generation = 1
        """Of the context cache; traces show it."""
        self.by_source = options.has(quirks.IOTLB_BY_SOURCE)
        self._silent = options.has(quirks.NO_FAULT_ON_HIT)
        self._marks = not options.has(quirks.FLAGS_SET_ONCE)
        self.iotlb = Iotlb(self.by_source, self._overflowed)
        self.may_switch: Callable[[], bool] = lambda: True
        """Whether an address space may change in the middle of an access: not where those who follow it cannot be told
        now. It is then translated for longer."""
        self.spaces: dict[tuple[int, int, int], VtdSpace] = {}
        """By identity of the bus (the space keeps it alive), devfn and PASID."""

    def _overflowed(self) -> None:
        self._trace("vtd_iotlb_reset", reason="iotlb exceeds size limit")
        for space in self.spaces.values():
            space.front.clear()

    def drop_pages(
        self, did: int, doomed: Doomed, within: tuple[int, int] | None = None, *, tagged_too: bool = False
    ) -> None:
        """Forget the pages of ``did`` that are ``doomed``. ``within``: these have a byte in that range (inclusive), or
        with ``tagged_too`` are tagged by a PASID."""
        if within is None:
            self.iotlb.drop(did, doomed)
            for space in self.spaces.values():
                space.front.drop(did, doomed)
            return
        self.iotlb.drop_range(did, *within, doomed, tagged_too=tagged_too)
        for space in self.spaces.values():
            space.front.drop_range(did, *within, doomed, tagged_too=tagged_too)

    # -- what translates -----------------------------------------------------------------------------------------

    def context(self, space: VtdSpace) -> tuple[Reason, bool, Context | None]:
        """The context entry, cached or not."""
        cached = space.context
        if cached is not None:
            if self._trace.enabled:
                self._trace("vtd_iotlb_cc_hit", **self._context_fields(space, cached), gen=self.generation)
            return Reason.NONE, cached.fpd, cached
        return self.structures.context(space.bus.number, space.devfn)

    def _cache_context(self, space: VtdSpace, context: Context) -> None:
        space.context = context
        if self._trace.enabled:
            fields = self._context_fields(space, context)
            self._trace("vtd_iotlb_cc_update", **fields, old=0, gen=self.generation)

    @staticmethod
    def _context_fields(space: VtdSpace, context: Context) -> dict[str, int]:
        return {"bus": space.bus.number, "devfn": space.devfn, "high": context.hi, "low": context.lo}

    def binding(self, space: VtdSpace) -> tuple[Reason, bool, Binding | None]:
        """What translates the space's requests; a good context entry is cached."""
        reason, fpd, context = self.context(space)
        if context is None:
            return reason, fpd, None
        reason, fpd, binding = self.structures.binding(context, space.pasid, cached=space.context is not None)
        if binding is not None and space.context is None:
            self._cache_context(space, context)
        return reason, fpd, binding

    def peek(self, space: VtdSpace) -> Binding | None:
        """The same from the tables as they are, without a trace in the caches."""
        reason, _, context = self.structures.context(space.bus.number, space.devfn)
        return None if context is None or reason else self.structures.binding(context, space.pasid)[2]

    def pasid_words(self, space: VtdSpace) -> Words | None:
        """The PASID entry of the space as it is in the tables, None if it is not there or not good."""
        context = self.structures.context(space.bus.number, space.devfn)[2]
        return None if context is None else self.structures.pasid_words(context, space.pasid)

    # -- translations --------------------------------------------------------------------------------------------

    def translate(
        self, space: VtdSpace, addr: int, want: int, *, soft_write: bool = False, recoverable: bool = False
    ) -> IOMMUTLBEntry:
        """The translation of ``addr`` for ``want``. With 0 nothing is reported, marked or cached. ``soft_write`` as in
        :meth:`.walk.Walker.walk`. ``recoverable``: for a translation request, of which recoverable faults are not
        recorded.
        """
        if not self.enabled:
            return self._traced(space, IOMMUTLBEntry(self.system, addr & ~_LOW, addr & ~_LOW, _LOW, _RW, space.pasid))
        known = self._known(space, addr) if want else None
        if known is not None:
            if self._serves(known, want, soft_write):
                return self._hit(space, addr, known)
            if self._silent and want & ~known.perm:
                return self._nothing(space, known.level)
        reason, fpd, binding = self.binding(space) if want else self.unseen(space)
        if binding is None:
            return self._blocked(space, addr, want, reason, fpd, 0, recoverable)
        if binding.type is TableType.PASS_THROUGH:
            return self._passed(space, addr, want)
        if want and not self.by_source:
            known = self.iotlb.find(binding.did, self._who(space, binding), addr)
            if known is not None:
                if self._serves(known, want, soft_write):
                    return self._hit(space, addr, known)
                if self._silent and want & ~known.perm:
                    return self._nothing(space, known.level)
        done = self.walker.walk(binding, addr, want, soft_write=soft_write)
        if done.reason:
            return self._blocked(space, addr, want, done.reason, fpd, done.level, recoverable)
        low = page_mask(done.level)
        tagged = binding.type is not TableType.SECOND
        page = Page(
            addr & ~low, done.level, done.page, done.perm, done.pte, done.dirty, binding.did, binding.pasid, tagged
        )
        if want:
            self.iotlb.add(self._who(space, binding), page)
            if self._trace.enabled:
                self._trace_page("vtd_iotlb_page_update", space, addr, page)
        return self._answer(space, addr, page, bool(want))

    def _known(self, space: VtdSpace, addr: int) -> Page | None:
        """What is cached without a look at the context entry: by source that is all of the IOTLB."""
        known = space.front.owner(addr >> 12)
        if known is None and self.by_source:
            pasid = RID_PASID if space.pasid == RID and self.structures.scalable else space.pasid
            return self.iotlb.find(0, (space.sid, pasid), addr)
        return known

    def unseen(self, space: VtdSpace) -> tuple[Reason, bool, Binding | None]:
        """What translates the space's requests; nothing is cached, reported or traced."""
        context = space.context
        if context is not None:
            return self.structures.binding(context, space.pasid, cached=True)
        return Reason.NONE, True, self.peek(space)

    def _who(self, space: VtdSpace, binding: Binding) -> Hashable:
        """The tag beside the domain."""
        if self.by_source:
            return space.sid, binding.pasid
        return RID if binding.type is TableType.SECOND else binding.pasid

    def cached(self, space: VtdSpace, binding: Binding, addr: int) -> Page | None:
        """The page that holds ``addr``, if it is in the IOTLB; nothing is traced."""
        return self.iotlb.find(binding.did, self._who(space, binding), addr)

    def _serves(self, page: Page, want: int, soft_write: bool) -> bool:
        if want & ~page.perm:
            return False
        return page.dirty or not self._marks or not (want & WRITE or (soft_write and page.perm & WRITE))

    def _hit(self, space: VtdSpace, addr: int, page: Page) -> IOMMUTLBEntry:
        if self._trace.enabled:
            self._trace_page("vtd_iotlb_page_hit", space, addr, page)
        return self._answer(space, addr, page, True)

    def _answer(self, space: VtdSpace, addr: int, page: Page, keep: bool) -> IOMMUTLBEntry:
        low = page_mask(page.level)
        entry = IOMMUTLBEntry(self.system, page.iova, page.page, low, _PERMS[page.perm], space.pasid)
        if keep:
            space.front.add(addr >> 12, entry, page)
        return self._traced(space, entry) if self._trace.enabled else entry

    def _passed(self, space: VtdSpace, addr: int, want: int) -> IOMMUTLBEntry:
        """The context entry became pass-through without an invalidation: the space is switched."""
        if want:
            self._trace("vtd_translate_pt", sid=space.sid, addr=addr & ~_LOW)
            now = self.peek(space)
            if space.translated and now is not None and now.type is TableType.PASS_THROUGH and self.may_switch():
                self._trace("vtd_pt_enable_fast_path", sid=space.sid, success=1)
                space.show(False)
        return IOMMUTLBEntry(self.system, addr & ~_LOW, addr & ~_LOW, _LOW, _RW, space.pasid)

    # -- faults --------------------------------------------------------------------------------------------------

    def _blocked(
        self,
        space: VtdSpace,
        addr: int,
        want: int,
        reason: Reason,
        fpd: bool,
        level: int,
        recoverable: bool,
    ) -> IOMMUTLBEntry:
        if want and not (recoverable and reason in RECOVERABLE):
            self.report(space, addr, bool(want & WRITE), reason, fpd)
        return self._nothing(space, level)

    def _nothing(self, space: VtdSpace, level: int) -> IOMMUTLBEntry:
        return IOMMUTLBEntry(self.system, 0, 0, page_mask(level), _NONE, space.pasid)

    def report(self, space: VtdSpace, addr: int, is_write: bool, reason: Reason, fpd: bool) -> None:
        """Hand over a fault, unless fault processing is disabled for it."""
        if fpd and reason not in UNQUALIFIED:
            self._trace("vtd_fault_disabled")
            return
        self._faults.report(Fault(int(reason), space.sid, addr, is_write, space.pasid))

    # -- traces --------------------------------------------------------------------------------------------------

    def _trace_page(self, event: str, space: VtdSpace, addr: int, page: Page) -> None:
        self._trace(event, sid=space.sid, iova=addr, slpte=page.pte, domain=page.did)

    def _traced(self, space: VtdSpace, entry: IOMMUTLBEntry) -> IOMMUTLBEntry:
        if self._trace.enabled:
            self._trace(
                "vtd_dmar_translate",
                bus=space.bus.number,
                slot=space.devfn >> 3,
                function=space.devfn & 7,
                iova=entry.iova,
                gpa=entry.translated_addr,
                mask=entry.addr_mask,
            )
        return entry
