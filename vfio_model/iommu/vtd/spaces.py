"""The address space of one function and PASID below a VT-d unit, and the region in it whose addresses are translated.

::

    vtd-02.0 (container)
      interrupt range 0xfee00000..0xfeefffff: requests without a PASID are interrupts, with one they are blocked
      vtd-dmar        shown while translation is on: everything is translated
      vtd-nodmar      shown while it is off, or the function is passed through: system memory

With a PASID there is no interrupt range while translation is on ("Interrupt Address Range", 3.14). Spaces are known by
bus *object*: bus numbers are the guest's to change, and a source ID is computed when it is needed.
"""

from __future__ import annotations

from typing import Any, Protocol

from vfio_model.iommu.vtd.caches import Front
from vfio_model.iommu.vtd.pasid_cache import Words
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.iommu.vtd.structures import Context
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, TranslatedPieces
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion, transaction
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag, MemTxResult
from vfio_model.pci.iommu_ops import AtsGate, PageResponseFn, RequesterBus
from vfio_model.trace import Trace

_WHOLE = 1 << 64
_bits = int.__and__
"""``&`` of two ints without the cost of IntFlag's own operator."""


class InterruptSink(Protocol):
    """Where writes to the interrupt range go (:mod:`.remapping`)."""

    def request(self, sid: int, address: int, data: int) -> MemTxResult:
        """An interrupt request of ``sid``: a write of 4 bytes."""


class Resolver(Protocol):
    """What a space asks its unit."""

    @property
    def interrupts(self) -> InterruptSink:
        """Where interrupt requests go."""

    def translate(self, space: VtdSpace, addr: int, want: int) -> IOMMUTLBEntry:
        """See :meth:`IOMMUMemoryRegion.translate`; ``want``: 0, or bits of READ and WRITE."""

    def translate_many(self, space: VtdSpace, iovas: Any, want: int) -> TranslatedPieces | None:
        """See :meth:`IOMMUMemoryRegion.translate_many`."""

    def interrupt_range_hit(self, space: VtdSpace, addr: int, is_write: bool) -> None:
        """A request with a PASID that is not translated went there: a fault."""

    def flags_changed(self, space: VtdSpace, new: IOMMUNotifierFlag) -> None:
        """See :meth:`IOMMUMemoryRegion.notify_flag_changed`."""

    def replay(self, space: VtdSpace, notifier: IOMMUNotifier) -> None:
        """See :meth:`IOMMUMemoryRegion.replay`."""


class VtdRegion(IOMMUMemoryRegion):
    """Everything that a function can address, translated."""

    cache_events = IOMMUNotifierFlag.UNMAP
    whole_space = True
    marks_writes = True

    def __init__(self, space: VtdSpace, resolver: Resolver, trace: Trace) -> None:
        super().__init__(f"{space.name}-dmar", _WHOLE)
        self.space = space
        self._resolver, self._trace = resolver, trace
        none: dict[int, IOMMUTLBEntry] = {}
        self._fronts = (none, space.front.readable, space.front.writable, none)

    def translate(self, addr: int, flag: IOMMUAccessFlags, idx: int) -> IOMMUTLBEntry:
        """A cached translation costs one look; everything else is the unit's. With ``flag`` NONE nothing is reported
        and no bit is set in a table."""
        want = _bits(flag, 3)
        entry = self._fronts[want].get(addr >> 12)
        if entry is not None and not self._trace.enabled:
            return entry
        return self._resolver.translate(self.space, addr, want)

    def translate_many(self, iovas: Any, flag: IOMMUAccessFlags, idx: int) -> TranslatedPieces | None:
        """Walks of the tables as they are, level by level."""
        return self._resolver.translate_many(self.space, iovas, _bits(flag, 3))

    def notify_flag_changed(self, old: IOMMUNotifierFlag, new: IOMMUNotifierFlag) -> None:
        """:raise OSError: ENOTSUP: the unit has not got what that needs."""
        self._resolver.flags_changed(self.space, new)

    def replay(self, notifier: IOMMUNotifier) -> None:
        """All that is mapped, by a walk of the tables."""
        self._resolver.replay(self.space, notifier)


class _InterruptOps:
    """The interrupt range of a function's requests without PASID."""

    min_access_size = max_access_size = 4

    def __init__(self, space: VtdSpace, resolver: Resolver) -> None:
        self._space, self._resolver = space, resolver

    def read(self, addr: int, size: int) -> int | None:
        return 0

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        return self._resolver.interrupts.request(self._space.sid, INTERRUPT_FIRST + addr, value)


class _BlockedOps:
    """The interrupt range of untranslated requests with a PASID."""

    min_access_size, max_access_size = 1, 8

    def __init__(self, space: VtdSpace, resolver: Resolver) -> None:
        self._space, self._resolver = space, resolver

    def read(self, addr: int, size: int) -> int | None:
        self._resolver.interrupt_range_hit(self._space, INTERRUPT_FIRST + addr, False)
        return None

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        self._resolver.interrupt_range_hit(self._space, INTERRUPT_FIRST + addr, True)
        return MemTxResult.ERROR


class VtdSpace:
    """What a unit knows of ``devfn`` on ``bus`` with ``pasid`` (:data:`RID`: without one). ``goes_on``: the quirk."""

    def __init__(
        self,
        bus: RequesterBus,
        devfn: int,
        pasid: int,
        system: AddressSpace,
        resolver: Resolver,
        trace: Trace,
        *,
        goes_on: bool = False,
    ) -> None:
        self.bus, self.devfn, self.pasid = bus, devfn, pasid
        self.name = f"vtd-{devfn >> 3:02x}.{devfn & 7:x}" + ("" if pasid == RID else f"-pasid-{pasid:#x}")
        self.front = Front()
        self.context: Context | None = None
        """The cached context entry."""
        self.pasid_entry: Words | None = None
        """What is remembered of the PASID entry, as :mod:`.pasid_cache` says."""
        self.page_response: PageResponseFn | None = None
        """Who waits for responses to page requests."""
        self.gates: list[AtsGate] = []
        """Who wants to know whether translated requests are let through."""
        self._trace = trace
        self.region = VtdRegion(self, resolver, trace)
        root = MemoryRegion(self.name, _WHOLE)
        assert system.root is not None, "system memory is there as long as its unit"
        self._untranslated = AliasRegion(f"{self.name}-nodmar", system.root, 0, system.root.size)
        ops = _InterruptOps(self, resolver) if pasid == RID else _BlockedOps(self, resolver)
        self._interrupts = IORegion(f"{self.name}-ir", INTERRUPT_LAST - INTERRUPT_FIRST + 1, ops)
        with transaction():
            root.add_subregion(0, self._untranslated)
            root.add_subregion(0, self.region)
            root.add_subregion(INTERRUPT_FIRST, self._interrupts, priority=1)
            self.region.set_enabled(False)
        self.address_space = AddressSpace(self.name, root, goes_on=goes_on)

    @property
    def sid(self) -> int:
        """The source ID, as the guest numbers buses now."""
        return self.bus.number << 8 | self.devfn

    @property
    def translated(self) -> bool:
        """Whether the region is shown."""
        return self.region.enabled

    def show(self, translated: bool) -> None:
        """Translate from now on, or pass through."""
        if self._trace.enabled:
            self._trace(
                "vtd_switch_address_space",
                bus=self.bus.number,
                slot=self.devfn >> 3,
                function=self.devfn & 7,
                enabled=int(translated),
            )
        with transaction():
            self._untranslated.set_enabled(not translated)
            self.region.set_enabled(translated)
            if self.pasid != RID:
                self._interrupts.set_enabled(not translated)
