"""The ``replay`` step: a recorded boot as hypercalls against a live guest, with DMA through the pages that it maps.

The recording is replayed by :mod:`vfio_model.guest_drivers.trace_replay`, which compares return codes, windows and
translations. After each event that maps pages, every probing device does DMA through them, and after each that unmaps
them it tries again and must be refused. What a page allows follows its TCE: a page that Linux mapped for reading takes
no store. A device's buffer is looked into through any page that is still mapped for both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from signal import Signals

from deploy import shipped
from deploy.probe import Prober
from deploy.quantity import show_size
from deploy.report import Totals
from deploy.scenario_machine import Pseries
from deploy.scenario_steps import At, Probe, Replay
from deploy.system import System
from deploy.trace_file import recorded_events
from vfio_model.guest_drivers import trace_events as traced
from vfio_model.guest_drivers.trace_compare import ReplayReport
from vfio_model.guest_drivers.trace_replay import Replayer
from vfio_model.iommu.spapr import regs

Progress = Callable[[str, int, int], None]
_PROGRESS_EVERY = 32
_PROBE_STRIDE = 0x140
"""Consecutive probes touch different offsets within their pages."""


@dataclass(frozen=True)
class PendingSignal:
    """A signal to send when the replay has made ``after`` calls."""

    after: int
    target: At
    number: Signals


@dataclass(frozen=True)
class Page:
    """One mapped page: bus and guest-physical address, size in bytes, TCE permission bits."""

    iova: int
    gpa: int
    size: int
    perm: int
    liobn: int


class MappedPages:
    """What the guest has mapped, as the events of the recording say it. Addresses are bus addresses."""

    def __init__(self, windows: Callable[[int], tuple[int, int]]) -> None:
        self._windows = windows
        self.pages: dict[int, Page] = {}
        self.mapped = self.unmapped = self.bytes_mapped = 0

    def put(self, liobn: int, ioba: int, tces: list[int]) -> tuple[list[Page], list[Page]]:
        """Consecutive TCEs from ``ioba``: the pages that came, and those that went."""
        _, size = self._windows(liobn)
        came: list[Page] = []
        went: list[Page] = []
        for number, tce in enumerate(tces):
            iova = (ioba & -size) + number * size
            old = self.pages.pop(iova, None)
            if old is not None:
                went.append(old)
            if perm := tce & regs.TCE_PERM_MASK:
                page = Page(iova, tce & -size, size, perm, liobn)
                self.pages[iova] = page
                came.append(page)
        self._count(came, went)
        return came, went

    def clear(self, liobn: int, start: int, count: int) -> list[Page]:
        """``count`` entries from ``start`` are zero now: the pages that went."""
        _, size = self._windows(liobn)
        last = start + count * size
        went = [page for page in self.pages.values() if page.liobn == liobn and start <= page.iova < last]
        for page in went:
            del self.pages[page.iova]
        self._count([], went)
        return went

    def drop(self, liobn: int) -> list[Page]:
        """The window is gone or new: the pages that went with it."""
        went = [page for page in self.pages.values() if page.liobn == liobn]
        for page in went:
            del self.pages[page.iova]
        self._count([], went)
        return went

    def stage(self, avoid: Page) -> Page | None:
        """The page mapped last that can be read and written, other than ``avoid``'s memory."""
        for page in reversed(self.pages.values()):
            apart = page.gpa + page.size <= avoid.gpa or avoid.gpa + avoid.size <= page.gpa
            if page.perm == regs.TcePerm.RW and apart:
                return page
        return None

    def _count(self, came: list[Page], went: list[Page]) -> None:
        self.mapped += len(came)
        self.unmapped += len(went)
        self.bytes_mapped += sum(page.size for page in came)


class ReplayStep:
    """One run of a recording. ``prober(device)`` gives the prober of a device."""

    def __init__(
        self,
        replay: Replay,
        machine: Pseries,
        beside: Path,
        system: System,
        prober: Callable[[str], Prober],
        pending: list[PendingSignal],
        progress: Progress,
    ) -> None:
        self._path = shipped.recording(replay.trace, beside)
        self._system, self._progress = system, progress
        self._probes = [(probe, prober(probe.device)) for probe in replay.probes]
        self._pending = sorted(pending, key=lambda each: each.after)
        options = regs.DmaOptions(
            ddw=machine.ddw,
            pgsz=sum(machine.pgsz),
            dma_win_addr=machine.dma_win_addr,
            dma_win_size=machine.dma_win_size,
            dma64_win_addr=machine.dma64_win_addr,
        )
        self._refused = replay.window == "refused"
        self._replayer = Replayer(
            system.cpu, options=lambda index: options, on_event=self._on_event, windows_refused=self._refused
        )
        self._memory = machine.ram
        self.pages = MappedPages(self._window)
        self.report = ReplayReport()
        self._calls = self._windows = 0
        self._probed: dict[tuple[str, int], tuple[int, int]] = {}
        """Where each device has probed a page that is mapped, by device and the page's bus address."""

    def _window(self, liobn: int) -> tuple[int, int]:
        window = self._replayer.windows[liobn]
        return window.bus_offset, window.page_size

    def run(self) -> str:
        """Replay everything; what was wrong, or an empty string.

        :raise ConfigError: when the recording cannot be read.
        """
        events = recorded_events(self._path)
        for done, (line, event) in enumerate(events, 1):
            self._replayer.feed(line, event)
            if done % _PROGRESS_EVERY == 0 or done == len(events):
                self._progress("replay", done, len(events))
            if self._replayer.refused:
                break
        self.report = self._replayer.finish()
        return self._wrong()

    def _wrong(self) -> str:
        wrong = [
            f"line {each.line}, {each.event}: expected {each.expected}, seen {each.seen}"
            for each in self.report.mismatches
        ]
        if self._refused and not self._replayer.refused:
            wrong.append("no dynamic window was refused")
        wrong += [text for _, prober in self._probes for text in prober.counts.wrong]
        if not wrong:
            return ""
        more = f"\n(and {len(wrong) - 10} more)" if len(wrong) > 10 else ""
        return "\n".join(wrong[:10]) + more

    def _on_event(self, line: int, event: traced.TraceEvent) -> None:
        if not isinstance(event, traced.Xlate):
            self._calls += 1
        while self._pending and self._pending[0].after <= self._calls:
            due = self._pending.pop(0)
            self._system.signal(due.target, due.number)
        came, went = self._moves(event)
        for page in went:
            self._system.trace("unmap_pages", iova=page.iova, size=page.size, line=line)
            self._probe_gone(page)
        for page in came:
            fields = {"iova": page.iova, "gpa": page.gpa, "size": page.size, "perm": page.perm, "line": line}
            self._system.trace("map_pages", **fields)
            self._probe_there(page)

    def _moves(self, event: traced.TraceEvent) -> tuple[list[Page], list[Page]]:
        """The pages that came and went by ``event``."""
        match event:
            case traced.PutTce(ret=0):
                return self.pages.put(event.liobn, event.ioba, [event.tce])
            case traced.PutTceIndirect(ret=0):
                _, size = self._window(event.liobn)
                behind = range(event.last_index, -1, -1)
                return self.pages.put(event.liobn, event.ioba, [event.last_tce - size * back for back in behind])
            case traced.StuffTce(ret=0):
                _, size = self._window(event.liobn)
                start = event.ioba_after - event.npages * size
                if event.value & regs.TCE_PERM_MASK:
                    return self.pages.put(event.liobn, start, [event.value] * event.npages)
                return [], self.pages.clear(event.liobn, start, event.npages)
            case traced.DdwCreate():
                self._windows += not self._replayer.refused
            case traced.DdwRemove():
                return [], self.pages.drop(event.liobn)
            case traced.NewTable():
                gone = {page.liobn for page in self.pages.pages.values()} - self._replayer.windows.keys()
                return [], [page for liobn in gone | {event.liobn} for page in self.pages.drop(liobn)]
        return [], []

    def _probe_there(self, page: Page) -> None:
        """DMA through a page that has just come, as its permissions allow."""
        for wanted, prober in self._probes:
            if not _concerns(wanted, page) or prober.counts.pages >= wanted.limit:
                continue
            if page.gpa + page.size > self._memory:
                continue
            prober.counts.pages += 1
            at = _within(page, prober.counts.pages)
            self._probed[prober.device, page.iova] = at
            self._probe_allowed(prober, page, *at)

    def _probe_allowed(self, prober: Prober, page: Page, iova: int, gpa: int) -> None:
        if page.perm == regs.TcePerm.RW:
            prober.allowed(iova, gpa)
            return
        stage = self.pages.stage(page)
        if stage is not None and page.perm == regs.TcePerm.READ:
            prober.allowed_load(iova, gpa, *_within(stage, 0))
            prober.refused_store(iova, gpa)
        elif stage is not None:
            prober.fill(*_within(stage, 0))
            prober.allowed_store(iova, gpa)

    def _probe_gone(self, page: Page) -> None:
        """DMA at the same place of a page that was probed when it was mapped, and is not any more."""
        stage = self.pages.stage(page)
        for _, prober in self._probes:
            at = self._probed.pop((prober.device, page.iova), None)
            if at is None or page.iova in self.pages.pages:
                continue
            prober.refused_store(*at)
            if stage is not None:
                prober.refused_load(*at, *_within(stage, 0))

    def text(self) -> str:
        """The outcome in one line."""
        total = self.report
        return (
            f"{total.events:,} events of {self._path.name}: {self.pages.mapped:,} pages mapped "
            f"({show_size(self.pages.bytes_mapped)}), {self.pages.unmapped:,} unmapped, "
            f"{total.translations_checked:,} translations checked, {len(total.mismatches)} mismatches; "
            f"{sum(prober.counts.pages for _, prober in self._probes):,} pages probed"
            + ("; the dynamic window was refused" if self._replayer.refused else "")
        )

    def facts(self) -> dict[str, int | str | bool | float]:
        """The counts."""
        return {
            "events": self.report.events,
            "passed_over": self.report.passed_over,
            "translations_checked": self.report.translations_checked,
            "inferred": self.report.inferred,
            "mismatches": len(self.report.mismatches),
            "pages_mapped": self.pages.mapped,
            "pages_unmapped": self.pages.unmapped,
            "still_mapped": len(self.pages.pages),
            "calls": self._calls,
        }

    def add_to(self, totals: Totals) -> None:
        """Add the counts to those of the run."""
        totals.pages_mapped += self.pages.mapped
        totals.pages_unmapped += self.pages.unmapped
        totals.bytes_mapped += self.pages.bytes_mapped
        totals.windows_created += self._windows
        totals.translations_checked += self.report.translations_checked
        totals.mismatches += len(self.report.mismatches)


def _concerns(probe: Probe, page: Page) -> bool:
    dynamic = regs.liobn_window(page.liobn) != 0
    return probe.window == "any" or (probe.window == "dynamic") == dynamic


def _within(page: Page, number: int) -> tuple[int, int]:
    """A 64-byte-aligned place in ``page``, a different one for each ``number``: its bus and its physical address."""
    offset = number * _PROBE_STRIDE % (page.size - 64) & ~63
    return page.iova + offset, page.gpa + offset
