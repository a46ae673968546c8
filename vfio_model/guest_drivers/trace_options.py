"""How the PHBs of a recorded machine were configured, as far as its log shows.

A log does not hold the machine's options. Where nobody gives them, the defaults hold unless several lines agree on
something else: hypercalls that succeeded beyond the default window, queries that all name the same page sizes, a
window whose own hypercalls lie where its creation says. One odd line is no evidence: it is a mismatch to be reported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vfio_model.guest_drivers.trace_events import (
    DdwCreate,
    DdwQuery,
    DdwRemove,
    PutTce,
    PutTceIndirect,
    StuffTce,
    TraceEvent,
)
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions
from vfio_model.ranges import align_down

ENOUGH_LINES = 2
"""Lines that must agree before a default gives way."""
_WINDOW_ALIGN = 1 << 28
_LARGEST_WINDOW = 1 << 40
"""No default window is that large: addresses beyond it are errors, not evidence."""


@dataclass(frozen=True, slots=True)
class GivenOptions:
    """What the person who knows the machine says; None: see what the log shows."""

    ddw: bool | None = None
    pgsz: int | None = None
    dma_win_addr: int | None = None
    dma_win_size: int | None = None
    dma64_win_addr: int | None = None

    def over(self, options: DmaOptions) -> DmaOptions:
        """``options`` with what was given put in."""
        return DmaOptions(
            ddw=options.ddw if self.ddw is None else self.ddw,
            pgsz=options.pgsz if self.pgsz is None else self.pgsz,
            dma_win_addr=options.dma_win_addr if self.dma_win_addr is None else self.dma_win_addr,
            dma_win_size=options.dma_win_size if self.dma_win_size is None else self.dma_win_size,
            dma64_win_addr=options.dma64_win_addr if self.dma64_win_addr is None else self.dma64_win_addr,
        )


@dataclass(slots=True)
class _Evidence:
    """What the lines about one PHB show."""

    spans: list[tuple[int, int]] = field(default_factory=list)
    """Bus addresses ``(start, end)`` of successful hypercalls on the default window, end exclusive."""
    default_gone: bool = False
    masks: list[int] = field(default_factory=list)
    creates: list[DdwCreate] = field(default_factory=list)
    dynamic: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    """The same spans on other windows, by LIOBN, in pages of unknown size: only the start counts."""


def infer_options(events: Iterable[TraceEvent], given: GivenOptions) -> tuple[dict[int, DmaOptions], list[str]]:
    """Options by PHB index, for every PHB in the log, and a note on each that is neither given nor the default."""
    found: dict[int, _Evidence] = defaultdict(_Evidence)
    for event in events:
        _look(event, found)
    options: dict[int, DmaOptions] = {}
    notes: list[str] = []
    for index, evidence in sorted(found.items()):
        shown = given.over(_shown(evidence))
        options[index] = shown
        plain = given.over(DmaOptions())
        for name in ("pgsz", "dma_win_addr", "dma_win_size", "dma64_win_addr"):
            if getattr(shown, name) != getattr(plain, name):
                notes.append(f"PHB {index}: {name}={getattr(shown, name):#x}, from the log")
    return options, notes


def _look(event: TraceEvent, found: dict[int, _Evidence]) -> None:
    if isinstance(event, DdwQuery | DdwCreate):
        evidence = found[event.buid - regs.BUID_BASE]
        if isinstance(event, DdwQuery):
            evidence.masks.append(event.mask)
        else:
            evidence.creates.append(event)
        return
    if not regs.is_pci_liobn(event.liobn):
        return
    evidence = found[regs.liobn_phb(event.liobn)]
    first = regs.liobn_window(event.liobn) == 0
    if isinstance(event, DdwRemove) and first:
        evidence.default_gone = True
    span = _span(event)
    if span is not None and not (first and evidence.default_gone):
        (evidence.spans if first else evidence.dynamic[event.liobn]).append(span)


def _span(event: TraceEvent) -> tuple[int, int] | None:
    """The bus addresses of a successful hypercall, in 4K pages."""
    page = 1 << regs.TCE_PAGE_SHIFT
    if isinstance(event, PutTce) and not event.ret:
        return event.ioba, event.ioba + page
    if isinstance(event, PutTceIndirect) and not event.ret:
        return event.ioba, event.ioba + (event.last_index + 1) * page
    if isinstance(event, StuffTce) and not event.ret:
        return event.ioba_after - event.npages * page, event.ioba_after
    return None


def _shown(evidence: _Evidence) -> DmaOptions:
    options = DmaOptions()
    options = _default_window(evidence, options)
    masks = set(evidence.masks)
    if len(masks) == 1 and (mask := masks.pop()) != regs.page_mask(options.pgsz):
        confirmed = any(regs.page_mask(create.page_size) & mask for create in evidence.creates)
        if len(evidence.masks) >= ENOUGH_LINES or confirmed:
            options = replace(options, pgsz=regs.pgsz_of_mask(mask))
    starts = {create.start for create in evidence.creates if create.start >= 1 << 32}
    if len(starts) == 1 and (start := starts.pop()) != options.dma64_win_addr:
        inside = [
            span
            for create in evidence.creates
            for span in evidence.dynamic.get(create.liobn, ())
            if start <= span[0] < start + create.size
        ]
        if inside:
            options = replace(options, dma64_win_addr=start)
    return options


def _default_window(evidence: _Evidence, options: DmaOptions) -> DmaOptions:
    """Where hypercalls succeed there is a window; a power of two in size, as far as they tell."""
    first_end = options.dma_win_addr + options.dma_win_size
    if sum(end > first_end for _, end in evidence.spans) < ENOUGH_LINES:
        return options
    lowest, highest = min(start for start, _ in evidence.spans), max(end for _, end in evidence.spans)
    address = align_down(lowest, _WINDOW_ALIGN) if lowest >= first_end else options.dma_win_addr
    size = max(1 << (highest - address - 1).bit_length(), options.dma_win_size)
    return replace(options, dma_win_addr=address, dma_win_size=size) if size <= _LARGEST_WINDOW else options
