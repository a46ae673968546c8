"""How Linux uses DMA windows on pseries (LoPAPR "DDW: Dynamic DMA Windows"; Linux
``arch/powerpc/platforms/pseries/iommu.c``).

Per device: query what the PE offers, open one window in the largest page size, as large as RAM if that fits what the
platform and the device's DMA mask allow, and map all RAM in it 1:1; when RAM does not fit, the window is used
dynamically, as the default one is. When something fails on the way, reset the PE's windows and stay with the default
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfio_model.guest_drivers.cpu import PseriesCpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import HCall, RtasToken
from vfio_model.ranges import U32_MAX, align_up

LIST_TCES = regs.INDIRECT_MAX_TCES


class TceWindow:
    """A DMA window as a driver sees it. ``list_gpa`` is a page of guest memory for TCE lists (4K-aligned).

    Every method that changes entries raises :class:`DriverError` when the hypercall fails.
    """

    def __init__(self, cpu: PseriesCpu, liobn: int, bus_offset: int, page_shift: int, *, list_gpa: int) -> None:
        self._cpu, self.liobn, self.bus_offset, self.page_shift = cpu, liobn, bus_offset, page_shift
        self._list_gpa = list_gpa
        self._multi_tce = True

    @classmethod
    def default(cls, cpu: PseriesCpu, phb_index: int = 0, *, list_gpa: int) -> TceWindow:
        """The default window of a PHB, where QEMU puts it."""
        liobn = regs.pci_liobn(phb_index, 0)
        return cls(cpu, liobn, regs.DEFAULT_WINDOW_ADDR, regs.TCE_PAGE_SHIFT, list_gpa=list_gpa)

    @property
    def page_size(self) -> int:
        """Bytes per TCE."""
        return 1 << self.page_shift

    def map(self, ioba: int, gpa: int, size: int, perm: int = regs.TcePerm.RW) -> None:
        """Map ``size`` bytes at bus address ``ioba`` to consecutive pages from ``gpa``; one page by PUT, more by
        INDIRECT.
        """
        count = align_up(size, self.page_size) >> self.page_shift
        self.map_pages(ioba, [gpa + i * self.page_size for i in range(count)], perm)

    def map_pages(self, ioba: int, pages: Sequence[int], perm: int = regs.TcePerm.RW) -> None:
        """Map these guest-physical pages, in order, from ``ioba`` on."""
        tces = [page | perm for page in pages]
        if len(tces) == 1 or not self._multi_tce:
            self._put_each(ioba, tces)
            return
        for first in range(0, len(tces), LIST_TCES):
            part, where = tces[first : first + LIST_TCES], ioba + (first << self.page_shift)
            self._cpu.write_memory(self._list_gpa, b"".join(tce.to_bytes(8, "big") for tce in part))
            ret, _ = self._cpu.hcall(HCall.H_PUT_TCE_INDIRECT, self.liobn, where, self._list_gpa, len(part))
            if ret == regs.H_FUNCTION:
                self._multi_tce = False
                self._put_each(where, tces[first:])
                return
            _check("H_PUT_TCE_INDIRECT", ret)

    def _put_each(self, ioba: int, tces: Sequence[int]) -> None:
        for i, tce in enumerate(tces):
            ret, _ = self._cpu.hcall(HCall.H_PUT_TCE, self.liobn, ioba + (i << self.page_shift), tce)
            _check("H_PUT_TCE", ret)

    def unmap(self, ioba: int, size: int) -> None:
        """Clear the entries of ``size`` bytes from ``ioba``."""
        count = align_up(size, self.page_size) >> self.page_shift
        for first in range(0, count, LIST_TCES):
            part, where = min(count - first, LIST_TCES), ioba + (first << self.page_shift)
            if self._multi_tce:
                ret, _ = self._cpu.hcall(HCall.H_STUFF_TCE, self.liobn, where, 0, part)
                if ret != regs.H_FUNCTION:
                    _check("H_STUFF_TCE", ret)
                    continue
                self._multi_tce = False
            self._put_each(where, [0] * part)

    def get(self, ioba: int) -> int:
        """The TCE of ``ioba``."""
        ret, outs = self._cpu.hcall(HCall.H_GET_TCE, self.liobn, ioba)
        _check("H_GET_TCE", ret)
        return outs[0]


@dataclass(frozen=True, slots=True)
class Query:
    """Answer of ibm,query-pe-dma-window; ``largest_block`` in TCEs, ``mask`` as the platform encodes it."""

    available: int
    largest_block: int
    mask: int

    @property
    def page_shift(self) -> int | None:
        """The largest page size offered, or None."""
        shifts = [shift for shift, bit in regs.PAGE_MASK_BITS.items() if self.mask & bit]
        return max(shifts, default=None)


@dataclass(frozen=True, slots=True)
class DirectWindow:
    """The window that a device got; ``direct``: all RAM is mapped, bus address = bus_offset + guest-physical
    address.
    """

    window: TceWindow
    window_shift: int
    direct: bool


class PseriesDdw:
    """Linux's sequence for the function ``devfn`` behind PHB ``phb_index``.

    ``outputs`` (5 or 6) and ``reset_extension`` come from the device tree's ``ibm,ddw-extensions``.
    """

    def __init__(
        self,
        cpu: PseriesCpu,
        devfn: int,
        *,
        ram_size: int,
        list_gpa: int,
        phb_index: int = 0,
        dma_mask_bits: int = 64,
        outputs: int = 6,
        reset_extension: bool = True,
    ) -> None:
        buid = regs.phb_buid(phb_index)
        self._cpu, self._phb_index = cpu, phb_index
        self._pe = [regs.config_addr(0, devfn), buid >> 32, buid & U32_MAX]
        self._ram_size, self._list_gpa, self._mask_bits = ram_size, list_gpa, dma_mask_bits
        self._outputs, self._reset_extension = outputs, reset_extension

    def query(self) -> Query | None:
        """What the PE offers; None when it has no dynamic windows."""
        rets = self._cpu.rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, self._pe, self._outputs)
        if regs.rtas_status(rets) != 0:
            return None
        if self._outputs == 6:
            return Query(rets[1], rets[2] << 32 | rets[3], rets[4])
        return Query(rets[1], rets[2], rets[3])

    def remove(self, liobn: int) -> int:
        """ibm,remove-pe-dma-window; the status."""
        return regs.rtas_status(self._cpu.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [liobn], 1))

    def reset(self) -> int:
        """ibm,reset-pe-dma-window; the status."""
        return regs.rtas_status(self._cpu.rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, self._pe, 1))

    def create(self, page_shift: int, window_shift: int) -> TceWindow | None:
        """ibm,create-pe-dma-window; None when refused."""
        rets = self._cpu.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*self._pe, page_shift, window_shift], 4)
        if regs.rtas_status(rets) != 0:
            return None
        return TceWindow(self._cpu, rets[1], rets[2] << 32 | rets[3], page_shift, list_gpa=self._list_gpa)

    def enable(self, *, disable_ddw: bool = False) -> DirectWindow | None:
        """The whole sequence; None when the device stays with the default window (``disable_ddw``: Linux's kernel
        parameter).
        """
        if disable_ddw:
            return None
        query = self.query()
        removed = False
        if query is not None and not query.available and self._reset_extension:
            removed = self.remove(regs.pci_liobn(self._phb_index, 0)) == 0
            query = self.query()
        if query is None or not query.available or query.page_shift is None:
            self._give_up(removed)
            return None
        ram_shift = (self._ram_size - 1).bit_length()
        limit = min(query.largest_block.bit_length() - 1 + query.page_shift, self._mask_bits)
        window_shift = max(min(ram_shift, limit), query.page_shift)
        window = self.create(query.page_shift, window_shift)
        if window is None:
            self._give_up(removed)
            return None
        if ram_shift > window_shift:
            return DirectWindow(window, window_shift, direct=False)
        try:
            window.map(window.bus_offset, 0, self._ram_size)
        except DriverError:
            self.remove(window.liobn)
            self._give_up(removed)
            return None
        return DirectWindow(window, window_shift, direct=True)

    def _give_up(self, removed: bool) -> None:
        """Bring a default window back that was ``removed``; other devices of the PE live in one that was not."""
        if removed and self._reset_extension:
            self.reset()


def _check(call: str, ret: int) -> None:
    if ret:
        raise DriverError(f"{call} returned {ret}")
