"""A small model of windows and entries beside the peers, so that programs can be mostly good and no DMA a gamble.

It says of an operation, before it runs: whether it is expected to succeed, which RAM a DMA may touch, and whether it
is a *hazard*: something that the two sides are known to answer differently, by a named quirk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.interop.operations import Call, DeviceTest, Edu, Indirect, Operation, QtestRtas, Reset, Rtas, Switched
from tests.interop.variants import RAM_SIZE, Variant
from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS
from vfio_model.iommu.spapr.regs import (
    INDIRECT_LIST_ALIGN,
    INDIRECT_MAX_TCES,
    MAX_WINDOWS,
    MSI_WINDOW,
    MSI_WINDOW_SIZE,
    RTAS_TOKENS,
    TCE_PAGE_SHIFT,
    VIO_WINDOW_SIZE,
    DmaOptions,
    HCall,
    RtasToken,
    pci_liobn,
    phb_buid,
)
from vfio_model.ranges import U32_MAX, U64_MAX, Range

READ, WRITE = 1, 2
MAX_ENTRIES = 1 << 24
"""Windows of more entries are not asked for: QEMU would need the memory."""


@dataclass
class Window:
    """An open window: where, how many pages of which size, and its entries that are not 0."""

    shift: int
    bus: int
    entries: int
    tces: dict[int, int] = field(default_factory=dict)

    @property
    def range(self) -> Range:
        """Its bus addresses."""
        return Range.sized(self.bus, self.entries << self.shift)

    def index(self, ioba: int) -> int:
        """As a hypercall computes it: rounded down, and huge below the window."""
        return ((ioba & -(1 << self.shift)) - self.bus & U64_MAX) >> self.shift

    def store(self, ioba: int, tces: list[int]) -> bool:
        """Whether all of ``tces`` fit; those that do are stored."""
        first = self.index(ioba)
        for at, tce in enumerate(tces):
            if first + at >= self.entries:
                return False
            self.tces[first + at] = tce
        return bool(tces)


@dataclass(frozen=True)
class Expected:
    """What is known of an operation beforehand."""

    good: bool = True
    spans: tuple[tuple[int, int], ...] = ()
    """RAM that a DMA may touch, as ``(gpa, size)``."""
    hazard: str = ""
    """The name of the quirk that the operation runs into."""


class Bridge:
    """The windows of one PHB by slot."""

    def __init__(self, index: int, options: DmaOptions) -> None:
        self.index, self.options = index, options
        self.windows: dict[int, Window] = {}
        self.default: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """The default window alone."""
        of = self.options
        self.windows = {0: Window(TCE_PAGE_SHIFT, of.dma_win_addr, of.dma_win_size >> TCE_PAGE_SHIFT)}
        self.default = {0}

    def plan(self, page_shift: int, window_shift: int) -> Window | None:
        """The window that a create would open; None when it fails."""
        bits = window_shift - page_shift
        if page_shift > 63 or not self.options.pgsz >> page_shift & 1 or not 0 <= bits < 32:
            return None
        if len(self.windows) == MAX_WINDOWS:
            return None
        address = self.options.dma64_win_addr if self.windows else self.options.dma_win_addr
        return Window(page_shift, address, 1 << bits)

    def create(self, window: Window) -> None:
        """Open ``window`` in the first free slot."""
        self.windows[0 if 0 not in self.windows else 1] = window

    def remove(self, slot: int) -> None:
        """Close a window; the default one comes back after the last, unless that was it."""
        del self.windows[slot]
        if not self.windows and slot not in self.default:
            self.reset()

    def overlaps(self, wanted: Window) -> bool:
        """Whether another window lies there."""
        return any(each.range.overlaps(wanted.range) for each in self.windows.values())

    def tce(self, iova: int) -> tuple[int, int] | None:
        """(permission, guest-physical address) of a bus address, or None outside of the windows."""
        for slot in sorted(self.windows, reverse=True):  # where two windows overlap the later table is seen
            window = self.windows[slot]
            if window.range.start <= iova <= window.range.last:
                tce = window.tces.get(window.index(iova), 0)
                low = (1 << window.shift) - 1
                return tce & 3, tce & ~low | iova & low
        return None


class Shadow:
    """The machine of ``variant``."""

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.bridges = [Bridge(index, variant.dma) for index in range(variant.phbs)]
        self.vio: dict[int, Window] = {}
        """The windows of VIO devices by unit, which is their LIOBN."""
        self._reset()

    def _reset(self) -> None:
        for bridge in self.bridges:
            bridge.reset()
        self.vio = {unit: Window(TCE_PAGE_SHIFT, 0, VIO_WINDOW_SIZE >> TCE_PAGE_SHIFT) for unit in self.variant.vio}

    def windows(self) -> dict[int, Window]:
        """Every open window by LIOBN."""
        found = {
            pci_liobn(bridge.index, slot): window for bridge in self.bridges for slot, window in bridge.windows.items()
        }
        return found | self.vio

    def window(self, liobn: int) -> Window | None:
        """The open window of ``liobn``."""
        return self.windows().get(liobn)

    def bridge(self, buid_hi: int, buid_lo: int) -> Bridge | None:
        """The bridge of a BUID."""
        wanted = buid_hi << 32 | buid_lo
        return next((each for each in self.bridges if phb_buid(each.index) == wanted), None)

    def apply(self, operation: Operation) -> Expected:
        """Do ``operation`` here. A hazard changes nothing: it must not be run."""
        match operation:
            case Call():
                return Expected(self._call(operation))
            case Indirect():
                return Expected(self._indirect(operation))
            case Rtas():
                return self._rtas(operation)
            case QtestRtas():
                token = RTAS_TOKENS.get(operation.name)
                return Expected(False) if token is None else self._rtas(Rtas(token, operation.args, operation.nret))
            case Switched(phb=phb, iova=iova):
                return Expected(True, hazard=self._dma(phb, iova, 128, READ).hazard)
            case Edu(phb=phb, iova=iova, length=length, to_ram=to_ram):
                return self._dma(phb, iova, length, WRITE if to_ram else READ)
            case DeviceTest(phb=phb, iova=iova, length=length):
                return self._dma(phb, iova, length, WRITE)
            case Reset():
                self._reset()
        return Expected()

    def _call(self, call: Call) -> bool:
        if call.nr not in set(HCall):
            return False
        window = self.window(call.args[0])
        if window is None:
            return False
        match call.nr, call.args:
            case HCall.H_GET_TCE, (_, ioba):
                return window.index(ioba) < window.entries
            case HCall.H_PUT_TCE, (_, ioba, tce):
                return window.store(ioba, [tce])
            case HCall.H_STUFF_TCE, (_, ioba, tce, count):
                return count <= window.entries and window.store(ioba, [tce] * count)
            case HCall.H_PUT_TCE_INDIRECT, (_, ioba, _, count):  # from a list that is not in RAM: zeros
                return window.store(ioba, [0] * count)
        return False

    def _indirect(self, call: Indirect) -> bool:
        window = self.window(call.liobn)
        if window is None or call.npages > INDIRECT_MAX_TCES or call.skew % INDIRECT_LIST_ALIGN:
            return False
        return window.store(call.ioba, list(call.tces[: call.npages]))

    # -- RTAS ----------------------------------------------------------------------------------------------------

    def _rtas(self, call: Rtas) -> Expected:
        args = call.args
        if not self.variant.dma.ddw:
            return Expected(False) if call.token in _DDW else Expected(True)
        if call.token == RtasToken.IBM_REMOVE_PE_DMA_WINDOW:
            return Expected(len(args) == 1 and call.nret == 1 and self._remove(args[0]))
        bridge = self.bridge(args[1], args[2]) if len(args) > 2 else None
        if call.token not in _DDW:
            return Expected()
        if bridge is None or (len(args), call.nret) not in _DDW[call.token]:
            return Expected(False)
        if call.token == RtasToken.IBM_RESET_PE_DMA_WINDOW:
            bridge.reset()
        elif call.token == RtasToken.IBM_CREATE_PE_DMA_WINDOW:
            return self._create(bridge, args[3], args[4])
        return Expected()

    @staticmethod
    def _create(bridge: Bridge, page_shift: int, window_shift: int) -> Expected:
        if window_shift - page_shift >= 32:
            return Expected(False, hazard="window-too-large")
        window = bridge.plan(page_shift, window_shift)
        if window is None:
            return Expected(False)
        if window.entries > MAX_ENTRIES or window.range.last > U64_MAX:
            return Expected(False, hazard="window-too-large")
        if bridge.overlaps(window) and OVERLAPPING_WINDOWS not in bridge.options.quirks:
            return Expected(False, hazard=OVERLAPPING_WINDOWS)
        bridge.create(window)
        return Expected()

    def _remove(self, liobn: int) -> bool:
        for bridge in self.bridges:
            for slot in bridge.windows:
                if pci_liobn(bridge.index, slot) == liobn & U32_MAX:
                    bridge.remove(slot)
                    return True
        return False

    # -- DMA -----------------------------------------------------------------------------------------------------

    def _dma(self, phb: int, iova: int, length: int, access: int) -> Expected:
        """A DMA, page by page of 4 KiB. One that fails at first and could go on later is a hazard."""
        if iova <= MSI_WINDOW + MSI_WINDOW_SIZE and iova + length >= MSI_WINDOW:
            return Expected(False, hazard="message-of-no-interrupt")
        spans: list[tuple[int, int]] = []
        failed = hazard = False
        at = iova
        while at < iova + length:
            size = min(-at % 4096 or 4096, iova + length - at)
            found = self.bridges[phb].tce(at & U64_MAX)
            if found is not None and found[0] & access == access and found[1] < RAM_SIZE:
                hazard = hazard or failed
                spans.append((found[1], size))
            else:
                failed = True
            at += size
        return Expected(not failed, tuple(spans), "dma-goes-on-after-a-fault" if hazard else "")


_DDW = {
    int(RtasToken.IBM_QUERY_PE_DMA_WINDOW): ((3, 5), (3, 6)),
    int(RtasToken.IBM_CREATE_PE_DMA_WINDOW): ((5, 4),),
    int(RtasToken.IBM_REMOVE_PE_DMA_WINDOW): ((1, 1),),
    int(RtasToken.IBM_RESET_PE_DMA_WINDOW): ((3, 1),),
}
