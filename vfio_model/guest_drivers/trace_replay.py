"""Replays QEMU's trace lines of a pseries guest on a CPU and compares what the log says with what happens there.

Hypercalls and RTAS calls are done again; return codes, windows and translations are compared. Facts of the format:
H_STUFF_TCE's address is the one *behind* its last entry; an H_PUT_TCE_INDIRECT line gives the list's address, the
last index and the last TCE, and the list is written into guest memory at that address as consecutive pages; a
translation's address is relative to its window; a new table belongs to the ``ddw_create`` or ``ddw_reset`` that
follows it, else it is the reset of its PHB; RTAS calls that failed are not in the log.

A translation is compared only with what *earlier* lines wrote (:mod:`vfio_model.guest_drivers.trace_windows`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vfio_model.guest_drivers.cpu import PseriesCpu
from vfio_model.guest_drivers.trace_compare import Comparison, ReplayReport
from vfio_model.guest_drivers.trace_events import (
    DdwCreate,
    DdwQuery,
    DdwRemove,
    DdwReset,
    GetTce,
    NewTable,
    PutTce,
    PutTceIndirect,
    StuffTce,
    TraceEvent,
    Xlate,
)
from vfio_model.guest_drivers.trace_windows import Doubt, ListLine, Window
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, RtasToken
from vfio_model.ranges import U32_MAX, U64_MAX

OnEvent = Callable[[int, TraceEvent], None]
"""``(line, event)``, after the event took effect."""

_OK = int(regs.H_SUCCESS)


class Replayer:
    """Feed it the events of a log in order, then :meth:`finish`.

    ``options`` tells how PHB ``index`` was configured. ``provide(liobn)`` is asked before the first event of a PHB or
    VIO device: it may make one on the platform; False: there is none, and its events are passed over.
    ``on_event`` hears of every event after it took effect. With ``windows_refused`` the platform must refuse the first
    dynamic window that the recording got; what follows it in the log is of a guest that had one (:attr:`refused`).
    """

    def __init__(
        self,
        cpu: PseriesCpu,
        *,
        options: Callable[[int], DmaOptions] = lambda index: DmaOptions(),
        provide: Callable[[int], bool] = lambda liobn: regs.is_pci_liobn(liobn) and regs.liobn_phb(liobn) == 0,
        on_event: OnEvent = lambda line, event: None,
        windows_refused: bool = False,
    ) -> None:
        self._cpu, self._options, self._provide, self._on_event = cpu, options, provide, on_event
        self._windows_refused = windows_refused
        self.refused = False
        """A window was refused, as expected: there is nothing more to replay."""
        self._compare = Comparison()
        self.windows: dict[int, Window] = {}
        """Open windows by LIOBN."""
        self._known: dict[int, bool] = {}
        """What ``provide`` said, by the LIOBN of window 0 (or of the VIO device)."""
        self._used: set[int] = set()
        """Those of them that saw more than new tables."""
        self._pending: dict[int, tuple[int, NewTable]] = {}
        self._in_kernel: set[int] = set()
        """LIOBNs whose last new table lies in the kernel."""
        self._handlers: Mapping[type[TraceEvent], Callable[[int, Any], None]] = {
            PutTce: self._put,
            GetTce: self._get,
            StuffTce: self._stuff,
            PutTceIndirect: self._indirect,
            Xlate: self._xlate,
            DdwQuery: self._query,
            DdwCreate: self._create,
            DdwRemove: self._remove,
            DdwReset: self._reset,
        }

    @property
    def report(self) -> ReplayReport:
        """The counts so far."""
        return self._compare.report

    # -- feeding -------------------------------------------------------------------------------------------------

    def feed(self, line: int, event: TraceEvent) -> None:
        """Replay ``event``, which is on line ``line`` (from 1)."""
        if isinstance(event, NewTable):
            self._pending[event.liobn] = line, event
            (self._in_kernel.add if event.fd >= 0 else self._in_kernel.discard)(event.liobn)
            return
        self._settle(event)
        base = _base_of(event)
        if not self._offered(base, fresh=False) or not self._has_window(event):
            self.report.passed_over += 1
            return
        self._used.add(base)
        self.report.events += 1
        self._handlers[type(event)](line, event)
        self._on_event(line, event)

    def finish(self) -> ReplayReport:
        """The log has ended."""
        self._settle(None)
        return self._compare.finish()

    def _has_window(self, event: TraceEvent) -> bool:
        return isinstance(event, DdwQuery | DdwCreate | DdwRemove | DdwReset) or event.liobn in self.windows

    # -- windows coming and going ----------------------------------------------------------------------------------

    def _offered(self, base: int, *, fresh: bool) -> bool:
        """Whether the platform has the PHB or device of ``base``; met for the first time, its window is noted."""
        if base not in self._known:
            self._known[base] = base > 0 and self._provide(base)
            if self._known[base]:
                self._open_first(base, fresh=fresh)
        return self._known[base]

    def _open_first(self, base: int, *, fresh: bool) -> None:
        """The window that ``base`` has after a reset."""
        if regs.is_pci_liobn(base):
            options = self._options(regs.liobn_phb(base))
            address, size = options.dma_win_addr, options.dma_win_size
        else:
            address, size = 0, regs.VIO_WINDOW_SIZE
        count = size >> regs.TCE_PAGE_SHIFT
        self.windows[base] = Window(base, address, regs.TCE_PAGE_SHIFT, count, fresh, base in self._in_kernel)

    def _settle(self, event: TraceEvent | None) -> None:
        """Decide what the new tables before ``event`` were, as far as it tells."""
        if not self._pending:
            return
        if isinstance(event, Xlate) and event.liobn not in self._pending:
            return  # another device's DMA may come between a table and the call that made it
        claimed: set[int] = set()
        if isinstance(event, DdwCreate):
            claimed = {event.liobn}
        elif isinstance(event, DdwReset):
            claimed = {_base_of(event), _base_of(event) | 1}
        pending, self._pending = self._pending, {}
        for liobn, (line, new_table) in sorted(pending.items(), key=lambda item: item[1][0]):
            if not self._offered(_window0(liobn), fresh=True):
                self.report.passed_over += 1
                continue
            self.report.events += 1
            if liobn not in claimed:
                self._renew(liobn, moved=_window0(liobn) | 1 in pending.keys() - claimed)
            self._on_event(line, new_table)

    def _renew(self, liobn: int, *, moved: bool) -> None:
        """A table that no window call made: a reset. ``moved``: a dynamic window's table is new as well, which only
        VFIO's coming or going does; tables then keep their contents."""
        base, window = _window0(liobn), self.windows.get(liobn)
        in_kernel = liobn in self._in_kernel
        if base not in self._used:
            return
        if not regs.is_pci_liobn(liobn) and window is not None:
            self._clear(window)
            window.renew(fresh=True, in_kernel=in_kernel)
        elif not moved:
            self._reset_phb(base)
        elif window is not None and window.in_kernel != in_kernel:
            window.renew(fresh=False, in_kernel=in_kernel)

    def _reset_phb(self, base: int) -> None:
        """As a reset of the PHB does: its default window alone, empty."""
        rets = self._cpu.rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, [0, *_buid_cells(base)], 1)
        if regs.rtas_status(rets) != 0:  # without dynamic windows the default one is all there is
            self._clear(self.windows[base])
        self.windows.pop(base | 1, None)
        self._open_first(base, fresh=True)

    def _clear(self, window: Window) -> None:
        self._cpu.hcall(HCall.H_STUFF_TCE, window.liobn, window.bus_offset, 0, window.nb_table)

    def _query(self, line: int, event: DdwQuery) -> None:
        cells = [event.cfgaddr, *_buid_cells(_base_of(event))]
        rets = self._cpu.rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, cells, 5)
        if regs.rtas_status(rets) != 0:
            self._compare.mismatch(line, "ddw_query", f"status {regs.rtas_status(rets)}", "status 0")
            return
        self._compare.value(line, "ddw_query", "windows available", rets[1], event.available, "d")
        self._compare.value(line, "ddw_query", "mask", rets[3], event.mask)

    def _create(self, line: int, event: DdwCreate) -> None:
        page_shift, window_shift = event.page_size.bit_length() - 1, event.size.bit_length() - 1
        if event.page_size != 1 << max(page_shift, 0) or event.size != 1 << max(window_shift, 0):
            self._compare.mismatch(line, "ddw_create", "powers of two", f"{event.page_size:#x}, {event.size:#x}")
            return
        cells = [event.cfgaddr, *_buid_cells(_base_of(event)), page_shift, window_shift]
        rets = self._cpu.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, cells, 4)
        if self._windows_refused:
            self.refused = regs.rtas_status(rets) == regs.RtasStatus.HW_ERROR
            self._compare.value(line, "ddw_create", "status", regs.rtas_status(rets), regs.RtasStatus.HW_ERROR, "d")
            return
        if regs.rtas_status(rets) != 0:
            self._compare.mismatch(line, "ddw_create", f"status {regs.rtas_status(rets)}", "status 0")
            return
        liobn, start = rets[1], rets[2] << 32 | rets[3]
        self._compare.value(line, "ddw_create", "liobn", liobn, event.liobn)
        self._compare.value(line, "ddw_create", "start addr", start, event.start)
        count = 1 << window_shift - page_shift
        self.windows[liobn] = Window(liobn, start, page_shift, count, True, liobn in self._in_kernel)

    def _remove(self, line: int, event: DdwRemove) -> None:
        status = regs.rtas_status(self._cpu.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [event.liobn], 1))
        self._compare.value(line, "ddw_remove", "status", status, 0, "d")
        if status == 0:
            self.windows.pop(event.liobn, None)
            base = _window0(event.liobn)
            if event.liobn != base and base not in self.windows:
                self._open_first(base, fresh=True)  # the platform restores the default window

    def _reset(self, line: int, event: DdwReset) -> None:
        base = _base_of(event)
        status = regs.rtas_status(
            self._cpu.rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, [event.cfgaddr, *_buid_cells(base)], 1)
        )
        self._compare.value(line, "ddw_reset", "status", status, 0, "d")
        if status == 0:
            self.windows.pop(base | 1, None)
            self._open_first(base, fresh=True)

    # -- hypercalls ------------------------------------------------------------------------------------------------

    def _put(self, line: int, event: PutTce) -> None:
        ret, _ = self._cpu.hcall(HCall.H_PUT_TCE, event.liobn, event.ioba, event.tce)
        self._compare.value(line, "put", "ret", ret, event.ret, "d")
        window = self.windows[event.liobn]
        window.wrote(window.index(event.ioba), 1)

    def _get(self, line: int, event: GetTce) -> None:
        ret, outs = self._cpu.hcall(HCall.H_GET_TCE, event.liobn, event.ioba)
        self._compare.value(line, "get", "ret", ret, event.ret, "d")
        if ret == _OK == event.ret:
            window = self.windows[event.liobn]
            self._compare.entry(line, "get", window, window.index(event.ioba), outs[0], event.tce)

    def _stuff(self, line: int, event: StuffTce) -> None:
        window = self.windows[event.liobn]
        end = window.range.last + 1
        failed_at_end = event.ret != _OK and event.ioba_after == end & U64_MAX
        outside = not window.range.start <= event.ioba_after < end
        if event.ret != _OK and (outside or not event.npages):
            start = event.ioba_after
        else:
            start = event.ioba_after - event.npages * window.page_size & U64_MAX
        ret, _ = self._cpu.hcall(HCall.H_STUFF_TCE, event.liobn, start, event.value, event.npages)
        self._compare.value(line, "stuff", "ret", ret, event.ret, "d")
        if failed_at_end:
            self._doubt_tail(window, event)
        elif ret == _OK:
            window.wrote(window.index(start), event.npages)

    def _doubt_tail(self, window: Window, event: StuffTce) -> None:
        """The call ran into the window's end after 0 to ``npages - 1`` entries; how many is not in the log."""
        for index in range(max(window.nb_table - event.npages + 1, 0), window.nb_table):
            self._maybe(window, index, event.value)

    def _maybe(self, window: Window, index: int, tce: int) -> None:
        """Entry ``index`` is what it was, or ``tce``."""
        before = window.doubt_of(index)
        if before is not None:
            old = before.tces
        else:
            translated, perm, _ = self._cpu.translate(window.liobn, window.bus_offset + index * window.page_size)
            old = frozenset({translated | perm})
        window.doubt(index, Doubt(old | {window.meaning(tce)} if old else old))

    def _indirect(self, line: int, event: PutTceIndirect) -> None:
        window = self.windows[event.liobn]
        first = window.index(event.ioba)
        room = max(window.nb_table - first, 0)
        if event.ret == _OK:
            npages = event.last_index + 1
        elif max(room - 1, 0) == event.last_index and (event.last_tce or room != 1):
            npages = min(room + 1, regs.INDIRECT_MAX_TCES)  # the entry behind the window's last one failed
        else:
            npages = 0  # an empty list
        tces = _linear(event.last_tce, npages, window.page_size)
        if npages <= regs.INDIRECT_MAX_TCES:
            self._cpu.write_memory(event.tce_list, b"".join(tce.to_bytes(8, "big") for tce in tces))
        ret, _ = self._cpu.hcall(HCall.H_PUT_TCE_INDIRECT, event.liobn, event.ioba, event.tce_list, npages)
        self._compare.value(line, "indirect", "ret", ret, event.ret, "d")
        if npages <= regs.INDIRECT_MAX_TCES:
            self._doubt_list(window, first, tces, ListLine(line))
        if not npages and room == 1:
            self._maybe(window, first, 0)  # the line reads the same for two invalid TCEs, one beyond the window

    @staticmethod
    def _doubt_list(window: Window, first: int, tces: list[int], source: ListLine) -> None:
        """All but the last of ``tces`` are inferred; where consecutive pages cannot be, nothing is known of them."""
        window.wrote(first, len(tces))
        for i, tce in enumerate(tces[:-1]):
            if tce <= tces[-1]:
                window.doubt(first + i, Doubt(frozenset({window.meaning(tce)}), source))
            else:
                window.doubt(first + i, Doubt(frozenset()))

    # -- translations ----------------------------------------------------------------------------------------------

    def _xlate(self, line: int, event: Xlate) -> None:
        window = self.windows[event.liobn]
        translated, perm, mask = self._cpu.translate(event.liobn, event.offset + window.bus_offset & U64_MAX)
        self._compare.translation(line, window, event.offset, (translated, perm), (event.translated, event.perm))
        self._compare.value(line, "xlate", "mask", mask & U32_MAX, event.mask & U32_MAX)


def _linear(last: int, count: int, page_size: int) -> list[int]:
    """The list of ``count`` TCEs that ends with ``last`` and maps consecutive pages; of invalid ones, all equal."""
    step = page_size if last & regs.TCE_PERM_MASK else 0
    return [last - (count - 1 - i) * step & U64_MAX for i in range(count)]


def _window0(liobn: int) -> int:
    """The LIOBN by which a PHB (its default window's) or a VIO device (its only one) is known here."""
    return liobn & ~0xFF if regs.is_pci_liobn(liobn) else liobn


def _base_of(event: TraceEvent) -> int:
    if isinstance(event, DdwQuery | DdwCreate | DdwReset):
        return regs.pci_liobn(event.buid - regs.BUID_BASE, 0) if event.buid >= regs.BUID_BASE else -1
    return _window0(event.liobn)


def _buid_cells(base: int) -> list[int]:
    buid = regs.phb_buid(regs.liobn_phb(base))
    return [buid >> 32, buid & U32_MAX]
