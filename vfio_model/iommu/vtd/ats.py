"""What the functions below a unit ask of it: address spaces, translations for their caches, page requests.

Source: PCI Express Base Specification, "Address Translation Services" (10), "Translation Completion" (10.2.3); Intel
Virtualization Technology for Directed I/O specification, "Requests from Integrated Devices … and Translated Requests"
(3.11 and 4.2, "Device-TLBs"), "Page Request Service" (7.4), "Interrupt Address Range" (3.14).

A translation request that finds no permission to write is answered with what there is. What it is told of a hole has
the hole's size: the page size of the level at which the walk ended.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Protocol

from vfio_model.iommu.vtd.lookup import Lookup
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import Reason
from vfio_model.iommu.vtd.walk import READ, WRITE
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUAccessFlags
from vfio_model.pci.iommu_ops import (
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponseFn,
    PCIIOMMUOps,
    RequesterBus,
)
from vfio_model.ranges import U64_MAX

_LOW = 0xFFF
_NONE, _RW = IOMMUAccessFlags.NONE, IOMMUAccessFlags.RW
_WO, _EXEC, _PRIV, _GLOBAL = (
    IOMMUAccessFlags.WO,
    IOMMUAccessFlags.EXEC,
    IOMMUAccessFlags.PRIV,
    IOMMUAccessFlags.GLOBAL,
)


class PageRequestSink(Protocol):
    """Where page requests go (:mod:`.page_requests`)."""

    def submit(self, sid: int, request: PageRequest) -> None:
        """Queue ``request``.

        :raise OSError: ENOSPC, EIO: it is not in the queue.
        """


class SpaceMaker(Protocol):
    """Makes spaces on demand."""

    def space(self, bus: RequesterBus, devfn: int, pasid: int) -> VtdSpace:
        """The one space of a function and PASID."""


def in_interrupt_range(addr: int) -> bool:
    """Whether ``addr`` is where interrupt requests go."""
    return INTERRUPT_FIRST <= addr <= INTERRUPT_LAST


class TranslatedRegion(IOMMUMemoryRegion):
    """Addresses that a function has from its own cache: they are system memory's, where the context entry says so."""

    def __init__(self, space: VtdSpace, lookup: Lookup) -> None:
        super().__init__(f"{space.name}-translated", 1 << 64)
        self._space, self._lookup = space, lookup

    def translate(self, addr: int, flag: IOMMUAccessFlags, idx: int) -> IOMMUTLBEntry:
        """Identity, or a fault: the context entry allows no translated requests (its TT or DTE), the interrupt range,
        or a PASID."""
        lookup, space = self._lookup, self._space
        page = addr & ~_LOW
        blocked = IOMMUTLBEntry(lookup.system, page, 0, _LOW, _NONE, space.pasid)
        if not lookup.enabled:
            return IOMMUTLBEntry(lookup.system, page, page, _LOW, _RW, space.pasid)
        if space.pasid != RID:
            return blocked
        reason, fpd, context = lookup.context(space)
        if context is not None and not context.device_tlb:
            reason = Reason.REQUEST_TYPE
        elif context is not None and in_interrupt_range(addr):
            reason = Reason.SCALABLE_INTERRUPT_ADDRESS
        if reason:
            if flag:
                lookup.report(space, addr, bool(flag & _WO), reason, fpd)
            return blocked
        return IOMMUTLBEntry(lookup.system, page, page, _LOW, _RW, space.pasid)


class VtdOps(PCIIOMMUOps):
    """What a VT-d unit does for the buses below it."""

    def __init__(self, options: VtdOptions, lookup: Lookup, spaces: SpaceMaker) -> None:
        self._options, self._lookup, self._spaces = options, lookup, spaces
        self.page_requests: PageRequestSink | None = None
        """Set by the unit when it has a page request queue."""
        self._translated: dict[VtdSpace, AddressSpace] = {}

    def refuses_assignment(self, bus: RequesterBus, devfn: int, host_bits: int) -> str:
        """See :class:`PCIIOMMUOps`. Without caching mode nobody hears of new mappings; first-stage tables are not
        followed. In QEMU's words."""
        options = self._options
        if not options.caching_mode:
            return "Device assignment is not allowed without enabling caching-mode=on for Intel IOMMU."
        if options.snoop_control:
            return "Snoop Control with vhost or VFIO is not supported"
        if options.aw_bits > host_bits:
            return f"aw-bits {options.aw_bits} > host aw-bits {host_bits}"
        return "Need IOMMUFD backend when fsts=on" if options.fsts else ""

    def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
        """See :class:`PCIIOMMUOps`."""
        return self._spaces.space(bus, devfn, RID).address_space

    def get_iotlb_info(self, bus: RequesterBus, devfn: int) -> IotlbInfo:
        """See :class:`PCIIOMMUOps`."""
        return IotlbInfo(self._options.aw_bits, _LOW + 1)

    def register_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        """:raise OSError: ENOTSUP when device-TLB invalidation is off."""
        self._spaces.space(bus, devfn, pasid).region.register_notifier(notifier)

    def unregister_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._spaces.space(bus, devfn, pasid).region.unregister_notifier(notifier)

    # -- translation requests ------------------------------------------------------------------------------------

    def ats_request_translation(self, bus: RequesterBus, devfn: int, request: AtsRequest) -> AtsCompletion:
        """Piece by piece until the range is covered or there are ``max_entries``."""
        space = self._spaces.space(bus, devfn, request.pasid)
        wanted = READ | (0 if request.no_write else WRITE) | (_EXEC if request.exec else 0)
        wanted = int(wanted) | (int(_PRIV) if request.priv else 0)
        entries: list[IOMMUTLBEntry] = []
        addr, stop, errors = request.addr, request.addr + request.length, 0
        while addr < stop and len(entries) < request.max_entries:
            entry = self._piece(space, addr, request.no_write)
            errors += int(entry.perm) & wanted != wanted
            entries.append(entry)
            addr = (addr & ~entry.addr_mask) + entry.addr_mask + 1
        return AtsCompletion(entries, errors, addr >= stop)

    def _piece(self, space: VtdSpace, addr: int, no_write: bool) -> IOMMUTLBEntry:
        """The translation around ``addr``; its ``iova`` is where the piece begins, also of a hole."""
        lookup = self._lookup
        addr &= U64_MAX
        if lookup.enabled and (in_interrupt_range(addr) or not self._allowed(space)):
            reason, fpd, context = lookup.context(space)
            if in_interrupt_range(addr):
                reason, fpd = Reason.SCALABLE_INTERRUPT_ADDRESS, False if context is None else context.fpd
            elif context is not None:
                reason = Reason.REQUEST_TYPE
            lookup.report(space, addr, not no_write, reason, fpd)
            return IOMMUTLBEntry(lookup.system, 0, 0, _LOW, _NONE)
        entry = lookup.translate(space, addr, READ, soft_write=not no_write, recoverable=True)
        perm = int(entry.perm) & ~int(_GLOBAL) & (~WRITE if no_write else -1)
        return entry._replace(perm=IOMMUAccessFlags(perm))

    def _allowed(self, space: VtdSpace) -> bool:
        """Whether the context entry lets the function ask; a broken one does, and then the translation says why."""
        context = self._lookup.context(space)[2]
        return context is None or context.device_tlb

    def translated_space(self, bus: RequesterBus, devfn: int, pasid: int) -> AddressSpace:
        """See :class:`PCIIOMMUOps`; the same object each time."""
        space = self._spaces.space(bus, devfn, pasid)
        found = self._translated.get(space)
        if found is None:
            found = AddressSpace(f"{space.name}-translated", TranslatedRegion(space, self._lookup))
            self._translated[space] = found
        return found

    def lets_translated(self, space: VtdSpace) -> bool:
        """Whether the context entry, as the tables have it, lets translated requests through; all do when nothing is
        translated.
        """
        lookup = self._lookup
        if not lookup.enabled:
            return True
        context = lookup.structures.context(space.bus.number, space.devfn)[2]
        return context is not None and context.device_tlb

    def watch_translated_requests(self, bus: RequesterBus, devfn: int, fn: AtsGate) -> Callable[[], None]:
        """See :class:`PCIIOMMUOps`. Told when an invalidation lets the unit look at the context entry anew."""
        space = self._spaces.space(bus, devfn, RID)
        fn(self.lets_translated(space))
        space.gates.append(fn)
        return lambda: space.gates.remove(fn)

    # -- page requests -------------------------------------------------------------------------------------------

    def pri_register_notifier(self, bus: RequesterBus, devfn: int, pasid: int, fn: PageResponseFn) -> None:
        """See :class:`PCIIOMMUOps`."""
        if not self._options.svm:
            raise OSError(errno.ENODEV, "this IOMMU has no page request interface")
        self._spaces.space(bus, devfn, pasid).page_response = fn

    def pri_unregister_notifier(self, bus: RequesterBus, devfn: int, pasid: int) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._spaces.space(bus, devfn, pasid).page_response = None

    def pri_request_page(self, bus: RequesterBus, devfn: int, request: PageRequest) -> None:
        """What is cached of the page is dropped and the request queued.

        :raise OSError: EPERM: no page requests here, no PASID, or the context entry forbids them (a fault); EINVAL: to
            execute without reading; ENOSPC, EIO: the queue does not take it.
        """
        if self.page_requests is None or not self._options.svm:
            raise OSError(errno.EPERM, "this IOMMU takes no page requests")
        if request.pasid == RID:
            raise OSError(errno.EPERM, "a page request has a PASID")
        if request.exec and not request.is_read:
            raise OSError(errno.EINVAL, "who executes a page reads it")
        lookup = self._lookup
        space = self._spaces.space(bus, devfn, request.pasid)
        reason, fpd, context = lookup.context(space)
        if context is not None and not context.page_requests:
            reason = Reason.PAGE_REQUESTS_OFF
        if reason:
            lookup.report(space, request.addr, request.is_write, reason, fpd)
            raise OSError(errno.EPERM, f"page request of {space.name}: fault {int(reason):#x}")
        self._forget(space, request)
        self.page_requests.submit(space.sid, request)

    def _forget(self, space: VtdSpace, request: PageRequest) -> None:
        """The implicit invalidation: a page that is asked for must not be found as it was."""
        lookup, addr = self._lookup, request.addr & ~_LOW
        _, _, binding = lookup.binding(space)
        if binding is not None:
            within = addr, addr | _LOW
            lookup.drop_pages(binding.did, lambda page: page.pasid == request.pasid and page.meets(*within), within)
