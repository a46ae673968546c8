"""How a driver tells a VT-d unit that tables changed: by registers, or by its queue.

Intel VT-d specification, "Register-based Invalidation Interface" (6.5.1), "Queued Invalidation Interface" (6.5.2). Both
return when the unit has answered. Page ranges become one aligned power of two of pages, as Linux does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_tables import PAGE, PAGE_SHIFT, PageAllocator
from vfio_model.iommu.vtd import regs
from vfio_model.ranges import U64_MAX

TRIES = 1000
GLOBAL, DOMAIN, SELECTIVE = 1, 2, 3
PASID_ALL, PASID_PAGES = 2, 3
"""Granularities of a PASID-based IOTLB invalidation."""
PASID_CACHE_SELECTIVE = 1


class Registers:
    """A unit's registers at ``base``."""

    def __init__(self, cpu: Cpu, base: int = regs.BASE) -> None:
        self._cpu, self.base = cpu, base

    def read(self, offset: int, size: int = 4) -> int:
        """4 or 8 bytes."""
        return self._cpu.mmio_read(self.base + offset, size)

    def write(self, offset: int, value: int, size: int = 4) -> None:
        """4 or 8 bytes."""
        self._cpu.mmio_write(self.base + offset, size, value)

    def wait(self, what: str, condition: Callable[[], bool]) -> None:
        """Until ``condition()`` holds.

        :raise DriverError: when it does not.
        """
        for _ in range(TRIES):
            if condition():
                return
        raise DriverError(f"the unit at {self.base:#x} does not answer: {what}")


def page_mask(iova: int, size: int) -> tuple[int, int]:
    """(address, log2 of pages) of the smallest aligned power of two of pages around ``size`` bytes from ``iova``."""
    first, last = iova >> PAGE_SHIFT, iova + size - 1 >> PAGE_SHIFT
    am = (first ^ last).bit_length()
    return first >> am << am << PAGE_SHIFT, am


class Invalidation(Protocol):
    """One of the two ways."""

    def contexts(self, did: int | None = None, sid: int | None = None) -> None:
        """Context cache: all, those of a domain, or that of function ``sid`` in domain ``did``."""

    def iotlb(self, did: int | None = None) -> None:
        """All of it, or what a domain has."""

    def pages(self, did: int, iova: int, size: int) -> None:
        """What domain ``did`` has of ``size`` bytes from ``iova``; all of it when that is too much to name."""

    def device_tlb(self, sid: int, iova: int, size: int) -> None:
        """What function ``sid`` caches of ``size`` bytes from ``iova``."""

    def interrupt_entries(self) -> None:
        """Every interrupt entry."""

    def pasid_cache(self, did: int, pasid: int) -> None:
        """The PASID table entry of ``pasid``."""

    def pasid_iotlb(self, did: int, pasid: int, iova: int = 0, size: int = 0) -> None:
        """What is cached for ``pasid``: of ``size`` bytes from ``iova``, or with 0 all of it."""

    def pasid_device_tlb(self, sid: int, pasid: int, iova: int, size: int) -> None:
        """As :meth:`device_tlb`, for ``pasid``."""


class RegisterInvalidation:
    """By registers: contexts and IOTLB; the rest needs the queue, which is an error here."""

    def __init__(self, registers: Registers) -> None:
        self._registers = registers
        iro = regs.ECAP_IRO.of(registers.read(regs.ECAP, 8)) << 4
        self._iva, self._iotlb = iro, iro + 8

    def contexts(self, did: int | None = None, sid: int | None = None) -> None:
        """See :class:`Invalidation`."""
        granularity = GLOBAL if did is None else DOMAIN if sid is None else SELECTIVE
        command = regs.CCMD_ICC | regs.CCMD_CIRG.put(granularity) | (did or 0) | regs.CCMD_SID.put(sid or 0)
        self._registers.write(regs.CCMD, command, 8)
        self._registers.wait("contexts", lambda: not self._registers.read(regs.CCMD, 8) & regs.CCMD_ICC)

    def iotlb(self, did: int | None = None) -> None:
        """See :class:`Invalidation`."""
        self._command(GLOBAL if did is None else DOMAIN, did or 0)

    def pages(self, did: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        address, am = page_mask(iova, size)
        if am > regs.MAMV:
            self.iotlb(did)
            return
        self._registers.write(self._iva, address | am, 8)
        self._command(SELECTIVE, did)

    def _command(self, granularity: int, did: int) -> None:
        command = regs.IOTLB_IVT | regs.IOTLB_IIRG.put(granularity) | regs.IOTLB_DID.put(did)
        self._registers.write(self._iotlb, command, 8)
        self._registers.wait("IOTLB", lambda: not self._registers.read(self._iotlb, 8) & regs.IOTLB_IVT)

    def device_tlb(self, sid: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        raise self._needs_queue()

    def interrupt_entries(self) -> None:
        """See :class:`Invalidation`."""
        raise self._needs_queue()

    def pasid_cache(self, did: int, pasid: int) -> None:
        """See :class:`Invalidation`."""
        raise self._needs_queue()

    def pasid_iotlb(self, did: int, pasid: int, iova: int = 0, size: int = 0) -> None:
        """See :class:`Invalidation`."""
        raise self._needs_queue()

    def pasid_device_tlb(self, sid: int, pasid: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        raise self._needs_queue()

    def _needs_queue(self) -> DriverError:
        return DriverError("such an invalidation goes by the queue alone")


class QueuedInvalidation:
    """By a queue of one page of descriptors of 128 bits, or ``wide`` ones of 256. Making it switches the queue on."""

    def __init__(self, cpu: Cpu, registers: Registers, pages: PageAllocator, *, wide: bool = False) -> None:
        self._cpu, self._registers = cpu, registers
        self._size = 32 if wide else 16
        self._queue, self._status = pages.take(), pages.take()
        self._tail = 0
        self._expected = 0
        registers.write(regs.IQT, 0, 8)
        registers.write(regs.IQA, self._queue | (regs.IQA_DW if wide else 0), 8)

    def submit(self, *descriptors: tuple[int, int], drain: bool = False) -> None:
        """Put ``descriptors`` and a wait into the queue, and wait; with ``drain`` for page requests on their way, too.

        :raise DriverError: the queue stopped at an error, or does not answer.
        """
        self._expected = self._expected % 0xFFFF_FFFF + 1
        wait = regs.DescriptorType.WAIT | regs.WAIT_SW | regs.WAIT_DATA.put(self._expected)
        wait |= regs.WAIT_PD if drain else 0
        for low, high in (*descriptors, (wait, self._status)):
            words = (low, high, 0, 0)[: self._size // 8]
            self._cpu.write_memory(self._queue + self._tail, b"".join(word.to_bytes(8, "little") for word in words))
            self._tail = (self._tail + self._size) % PAGE
        self._registers.write(regs.IQT, self._tail, 8)
        self._registers.wait("invalidation queue", self._answered)

    def _answered(self) -> bool:
        status = self._registers.read(regs.FSTS)
        if status & (regs.FSTS_IQE | regs.FSTS_ITE):
            head = self._registers.read(regs.IQH, 8)
            raise DriverError(f"the invalidation queue stopped at {head:#x}: FSTS is {status:#x}")
        return int.from_bytes(self._cpu.read_memory(self._status, 4), "little") == self._expected

    def resume(self) -> None:
        """After an error: clear it; what stands in the queue goes on, the descriptor at its head first."""
        self._registers.write(regs.FSTS, regs.FSTS_IQE | regs.FSTS_ITE)

    def contexts(self, did: int | None = None, sid: int | None = None) -> None:
        """See :class:`Invalidation`."""
        granularity = GLOBAL if did is None else DOMAIN if sid is None else SELECTIVE
        low = regs.CC_G.put(granularity) | regs.CC_DID.put(did or 0) | regs.CC_SID.put(sid or 0)
        self.submit((regs.DescriptorType.CONTEXT_CACHE | low, 0))

    def iotlb(self, did: int | None = None) -> None:
        """See :class:`Invalidation`."""
        low = regs.TLB_G.put(GLOBAL if did is None else DOMAIN) | regs.TLB_DID.put(did or 0)
        self.submit((regs.DescriptorType.IOTLB | low, 0))

    def pages(self, did: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        address, am = page_mask(iova, size)
        if am > regs.MAMV:
            self.iotlb(did)
            return
        self.submit((regs.DescriptorType.IOTLB | regs.TLB_G.put(SELECTIVE) | regs.TLB_DID.put(did), address | am))

    def device_tlb(self, sid: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        self.submit((regs.DescriptorType.DEVICE_TLB | regs.DEV_SID.put(sid), _device_range(iova, size, regs.DEV_S)))

    def interrupt_entries(self) -> None:
        """See :class:`Invalidation`."""
        self.submit((regs.DescriptorType.INTERRUPT_ENTRY_CACHE, 0))

    def pasid_cache(self, did: int, pasid: int) -> None:
        """See :class:`Invalidation`."""
        low = regs.PASID_CACHE_G.put(PASID_CACHE_SELECTIVE) | regs.TLB_DID.put(did) | regs.PASID_TLB_PASID.put(pasid)
        self.submit((regs.DescriptorType.PASID_CACHE | low, 0))

    def pasid_iotlb(self, did: int, pasid: int, iova: int = 0, size: int = 0) -> None:
        """See :class:`Invalidation`."""
        address, am = page_mask(iova, size) if size else (0, 0)
        granularity = PASID_PAGES if size and am <= regs.MAMV else PASID_ALL
        low = regs.TLB_G.put(granularity) | regs.TLB_DID.put(did) | regs.PASID_TLB_PASID.put(pasid)
        self.submit((regs.DescriptorType.PASID_IOTLB | low, address | am if granularity == PASID_PAGES else 0))

    def pasid_device_tlb(self, sid: int, pasid: int, iova: int, size: int) -> None:
        """See :class:`Invalidation`."""
        low = regs.PASID_DEV_SID.put(sid) | regs.PASID_DEV_PASID.put(pasid)
        self.submit((regs.DescriptorType.PASID_DEVICE_TLB | low, _device_range(iova, size, regs.PASID_DEV_S)))

    def page_group_response(self, sid: int, pasid: int, prgi: int, code: int) -> None:
        """Answer page request group ``prgi`` of function ``sid`` and ``pasid``."""
        low = regs.RESPONSE_PP | regs.RESPONSE_CODE.put(code)
        low |= regs.RESPONSE_RID.put(sid) | regs.RESPONSE_PASID.put(pasid)
        self.submit((regs.DescriptorType.PAGE_GROUP_RESPONSE | low, regs.RESPONSE_PRGI.put(prgi)))

    def drain_page_requests(self, sid: int, did: int, pasid: int) -> None:
        """What is cached for ``pasid``, here and by function ``sid``, goes, and with it page requests on their way."""
        pasid_field = regs.PASID_TLB_PASID.put(pasid)
        device = regs.PASID_DEV_SID.put(sid) | regs.PASID_DEV_PASID.put(pasid)
        self.submit(
            (regs.DescriptorType.WAIT | regs.WAIT_FN, 0),
            (regs.DescriptorType.PASID_IOTLB | regs.TLB_G.put(PASID_ALL) | regs.TLB_DID.put(did) | pasid_field, 0),
            (regs.DescriptorType.PASID_DEVICE_TLB | device, _device_range(0, U64_MAX + 1, regs.PASID_DEV_S)),
            drain=True,
        )


def _device_range(iova: int, size: int, s_bit: int) -> int:
    """An address and its size as device-TLB invalidations have it: with S, the lowest zero bit from 12 on says how
    many pages; ``s_bit`` is S in its place."""
    address, am = page_mask(iova, size)
    if not am:
        return address
    return (address | (1 << am - 1) - 1 << PAGE_SHIFT) & U64_MAX | s_bit
