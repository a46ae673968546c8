"""The translation half of a VT-d unit: what registers and queue command, carried out.

Source: Intel Virtualization Technology for Directed I/O specification, "Invalidation of Translation Caches" (6.5),
"Root Table Pointer" operations (11.4.4). Followers are told while a command is carried out and complete at
:meth:`Translation.flush`.
"""

from __future__ import annotations

import errno
from typing import Any

from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.ats import PageRequestSink, VtdOps
from vfio_model.iommu.vtd.batch import BatchWalker
from vfio_model.iommu.vtd.caches import Page
from vfio_model.iommu.vtd.leaves import Leaves
from vfio_model.iommu.vtd.lookup import Lookup
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.pasid_cache import invalidated
from vfio_model.iommu.vtd.ports import RID, FaultSink, Granularity
from vfio_model.iommu.vtd.shadow import Shadow
from vfio_model.iommu.vtd.spaces import InterruptSink, VtdSpace
from vfio_model.iommu.vtd.structures import RID_PASID, Binding, Reason, TableType
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBEvent, TranslatedPieces
from vfio_model.memory.region import transaction
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.pci.iommu_ops import PageResponse, RequesterBus
from vfio_model.ranges import U64_MAX
from vfio_model.trace import NULL_TRACE, Trace

_IOTLB_EVENTS = IOMMUNotifierFlag.IOTLB_EVENTS
_DEVIOTLB = IOMMUNotifierFlag.DEVIOTLB_UNMAP
_RESPONSES = {0: PageResponse.SUCCESS, 1: PageResponse.INVALID_REQUEST}


class Translation:
    """See :class:`vfio_model.iommu.vtd.ports.Translator`. ``ops`` is for the buses below the unit."""

    def __init__(
        self,
        options: VtdOptions,
        system: AddressSpace,
        faults: FaultSink,
        interrupts: InterruptSink,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self.options, self.system, self.interrupts = options, system, interrupts
        self._trace = trace
        self.lookup = Lookup(options, system, faults, trace)
        self.ops = VtdOps(options, self.lookup, self)
        self._batch = BatchWalker(options, self.lookup)
        self._spaces = self.lookup.spaces
        self._leaves = Leaves(options, self.lookup.memory)
        self._shadows: dict[VtdSpace, Shadow] = {}
        """Of the spaces that have followers."""
        self._lingers = options.has(quirks.PASS_THROUGH_LINGERS)
        self._goes_on = options.has(quirks.GOES_ON_AFTER_FAULT)
        self._told: dict[VtdSpace, None] = {}
        """Whose followers have something to complete."""

    def attach_page_requests(self, sink: PageRequestSink) -> None:
        """Page requests of devices go to ``sink`` from now on."""
        self.ops.page_requests = sink

    # -- spaces --------------------------------------------------------------------------------------------------

    def space(self, bus: RequesterBus, devfn: int, pasid: int) -> VtdSpace:
        """The one space of a function and PASID, made on demand."""
        key = id(bus), devfn, pasid
        found = self._spaces.get(key)
        if found is None:
            found = self._spaces[key] = VtdSpace(
                bus, devfn, pasid, self.system, self, self._trace, goes_on=self._goes_on
            )
            self._switch(found)
        return found

    def _switch(self, space: VtdSpace) -> None:
        """Show what the space is now: translated, unless translation is off or its function is passed through."""
        translated = self.lookup.enabled
        if translated:
            binding = self.lookup.peek(space)
            translated = binding is None or binding.type is not TableType.PASS_THROUGH
        space.show(translated)
        self._tell_gates(space)

    def _tell_gates(self, space: VtdSpace) -> None:
        """What a function's cache may do goes for all its spaces."""
        if space.gates:
            open_ = self.ops.lets_translated(space)
            for gate in tuple(space.gates):
                gate(open_)
            for other in self._spaces.values():
                if other.bus is space.bus and other.devfn == space.devfn:
                    self._told[other] = None

    def _switch_all(self) -> None:
        with transaction():
            for space in tuple(self._spaces.values()):
                self._switch(space)

    # -- commands ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """See :class:`Translator`."""
        self.lookup.enabled = False
        self.lookup.structures.root, self.lookup.structures.scalable = 0, False
        self._forget_all()
        self._switch_all()
        self._sync_all()

    def set_root(self, root: int, scalable: bool) -> None:
        """See :class:`Translator`."""
        self.lookup.structures.root, self.lookup.structures.scalable = root, scalable
        self._forget_all()
        self._switch_all()
        self._sync_all()

    def set_enabled(self, on: bool) -> None:
        """See :class:`Translator`."""
        self.lookup.enabled = on
        self._forget_all()
        self._switch_all()
        self._sync_all()

    def _forget_all(self) -> None:
        self._trace("vtd_context_cache_reset")
        self._forget_contexts(1)
        self._trace("vtd_pasid_cache_reset")
        if self._lingers:
            for space in self._spaces.values():
                space.pasid_entry = self.lookup.pasid_words(space)
        self._reset_iotlb()

    def _forget_contexts(self, generation: int) -> None:
        self.lookup.generation = generation
        for space in self._spaces.values():
            self._forget_context(space)

    def _switch_context(self, space: VtdSpace, *, selected: bool = False) -> None:
        """After an invalidation of its context entry. ``selected``: of few; by quirk these are of no concern for PASID
        entries unless there is first-stage translation."""
        if self._lingers and (not selected or self.options.first_stage):
            self._pasid_entry_invalidated(space, Granularity.GLOBAL)
        self._switch(space)

    def _forget_context(self, space: VtdSpace) -> None:
        space.context = None
        if not self.lookup.by_source:
            space.front.clear()

    def _reset_iotlb(self) -> None:
        self.lookup.iotlb.clear()
        for space in self._spaces.values():
            space.front.clear()

    def invalidate_contexts(self, granularity: Granularity, did: int = 0, sid: int = 0, mask: int = 0) -> None:
        """See :class:`Translator`. A whole domain is invalidated as everything."""
        if granularity is not Granularity.SELECTIVE:
            self._forget_contexts(self.lookup.generation + 1)
            with transaction():
                for space in tuple(self._spaces.values()):
                    self._switch_context(space)
            self._sync_all()
            return
        ignored = (0, 0b100, 0b110, 0b111)[mask & 3]
        for space in tuple(self._spaces.values()):
            if space.sid | ignored == sid | ignored:
                self._forget_context(space)
                self._switch_context(space, selected=True)
                self._sync(space)

    def invalidate_iotlb(self, granularity: Granularity, did: int = 0, addr: int = 0, am: int = 0) -> None:
        """See :class:`Translator`. What first-level tables say in the domain goes in any case (6.5.1.2)."""
        if granularity is Granularity.GLOBAL:
            self._reset_iotlb()
            self._sync_all()
        elif granularity is Granularity.DOMAIN:
            self.lookup.drop_pages(did, lambda page: True)
            for space in self._followed():
                self._sync(space, did)
        else:
            first = addr & ~0xFFF & -(0x1000 << am)
            last = first + (0x1000 << am) - 1
            within = first, last
            self.lookup.drop_pages(did, lambda page: page.tagged or page.meets(*within), within, tagged_too=True)
            for space in self._followed():
                self._sync(space, did, first, last)

    def invalidate_pasid_iotlb(self, did: int, pasid: int, addr: int | None = None, am: int = 0) -> None:
        """See :class:`Translator`. Second-level entries have no PASID: all of the domain's go with a whole PASID."""
        first, last = 0, U64_MAX
        if addr is not None:
            first = addr & ~0xFFF & -(0x1000 << am)
            last = first + (0x1000 << am) - 1

        def doomed(page: Page) -> bool:
            if not page.tagged:
                return addr is None
            return page.pasid == pasid and page.meets(first, last)

        self.lookup.drop_pages(did, doomed, None if addr is None else (first, last))
        for space in self._followed():
            if (RID_PASID if space.pasid == RID else space.pasid) != pasid:
                continue
            binding = self._binding(space)
            if binding is not None and binding.did == did and binding.pasid == pasid:
                self._shadow(space).invalidated(binding, first, last)
                self._told[space] = None

    def invalidate_pasid_cache(self, granularity: Granularity, did: int = 0, pasid: int = 0) -> None:
        """See :class:`Translator`. PASID entries are not cached; what a requester found with them may be another."""
        for space in tuple(self._spaces.values()):
            if self._lingers:
                if not self._pasid_entry_invalidated(space, granularity, did, pasid):
                    continue
            elif granularity is Granularity.SELECTIVE and space.pasid not in (pasid, RID):
                continue
            space.front.clear()
            self._switch(space)
            self._sync(space)

    def _pasid_entry_invalidated(
        self, space: VtdSpace, granularity: Granularity, did: int = 0, pasid: int = RID_PASID
    ) -> bool:
        """By quirk: whether the space is switched to what the tables say."""
        own = RID_PASID if space.pasid == RID else space.pasid
        now = self.lookup.pasid_words(space)
        space.pasid_entry, switched = invalidated(space.pasid_entry, now, granularity, did, own == pasid)
        return switched

    def invalidate_device_tlb(self, sid: int, pasid: int | None, first: int, last: int) -> None:
        """See :class:`Translator`."""
        for space in tuple(self._spaces.values()):
            if space.sid == sid and (pasid is None or space.pasid == pasid) and space.region.notifiers:
                entry = IOMMUTLBEntry(self.system, first, 0, last - first, IOMMUAccessFlags.NONE, space.pasid)
                space.region.notify(IOMMUTLBEvent(_DEVIOTLB, entry))
                self._told[space] = None

    def page_response(self, sid: int, pasid: int, prgi: int, code: int) -> None:
        """See :class:`Translator`."""
        for space in tuple(self._spaces.values()):
            if space.sid == sid and space.pasid == pasid and space.page_response is not None:
                space.page_response(prgi, _RESPONSES.get(code, PageResponse.RESPONSE_FAILURE))

    def flush(self) -> OSError | None:
        """See :class:`Translator`."""
        told, self._told = self._told, {}
        first: OSError | None = None
        for space in told:
            error = space.region.flush()
            first = first or error
        return first

    # -- followers -----------------------------------------------------------------------------------------------

    def _followed(self) -> list[VtdSpace]:
        return [space for space in self._spaces.values() if space.region.notify_flags & _IOTLB_EVENTS]

    def _shadow(self, space: VtdSpace) -> Shadow:
        found = self._shadows.get(space)
        if found is None:
            found = self._shadows[space] = Shadow(space, self._leaves, self.system)
        return found

    def _binding(self, space: VtdSpace) -> Binding | None:
        """What translates now, for followers."""
        return self.lookup.peek(space) if self.lookup.enabled else None

    def _sync_all(self) -> None:
        for space in self._followed():
            self._sync(space)

    def _sync(self, space: VtdSpace, did: int | None = None, first: int = 0, last: int = U64_MAX) -> None:
        """Tell the followers of ``space`` what a range means now, if it belongs to domain ``did`` (None: any)."""
        if not space.region.notify_flags & _IOTLB_EVENTS:
            return
        binding = self._binding(space)
        if did is None or (binding is not None and binding.did == did):
            self._shadow(space).invalidated(binding, first, last)
            self._told[space] = None

    def flags_changed(self, space: VtdSpace, new: IOMMUNotifierFlag) -> None:
        """:raise OSError: ENOTSUP for what the options leave out."""
        who = f"device {space.bus.number:02x}.{space.devfn >> 3:02x}.{space.devfn & 7:x}"
        if new and self.options.snoop_control:
            raise OSError(errno.ENOTSUP, "Snoop Control with vhost or VFIO is not supported")
        if new & IOMMUNotifierFlag.MAP and not self.options.caching_mode:
            raise OSError(errno.ENOTSUP, f"{who} requires caching mode")
        if new & _DEVIOTLB and not self.options.device_iotlb:
            raise OSError(errno.ENOTSUP, f"{who} requires device IOTLB mode")
        if not new & IOMMUNotifierFlag.MAP:
            self._shadows.pop(space, None)

    def replay(self, space: VtdSpace, notifier: IOMMUNotifier) -> None:
        """See :meth:`vfio_model.memory.iommu_region.IOMMUMemoryRegion.replay`."""
        self._shadow(space).replay(self._binding(space), notifier)

    # -- what spaces ask -----------------------------------------------------------------------------------------

    def translate(self, space: VtdSpace, addr: int, want: int) -> IOMMUTLBEntry:
        """See :class:`.spaces.Resolver`."""
        return self.lookup.translate(space, addr, want)

    def translate_many(self, space: VtdSpace, iovas: Any, want: int) -> TranslatedPieces | None:
        """See :class:`.spaces.Resolver`."""
        return self._batch.translate_many(space, iovas, want)

    def interrupt_range_hit(self, space: VtdSpace, addr: int, is_write: bool) -> None:
        """See :class:`.spaces.Resolver`."""
        self.lookup.report(space, addr, is_write, Reason.SCALABLE_INTERRUPT_ADDRESS, self._fpd(space))

    def _fpd(self, space: VtdSpace) -> bool:
        return self.lookup.enabled and self.lookup.binding(space)[1]
