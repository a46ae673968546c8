"""``vfio-model check``: does the model do what a recorded QEMU did?

Reads a QEMU trace of a pseries guest (plain or gzip), replays its hypercalls and RTAS calls on a machine in this
process, and compares return codes, windows and translations. Files may be damaged: what can be read is checked and
reported, and the damage as well.

Exit codes: 0 nothing wrong, 1 mismatches, 2 the file (or part of it) could not be checked.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from deploy.trace_file import Unreadable, trace_lines
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.trace_compare import ReplayReport
from vfio_model.guest_drivers.trace_events import Malformed, PassedOver, PutTceIndirect, TraceEvent, parse_line
from vfio_model.guest_drivers.trace_options import GivenOptions, infer_options
from vfio_model.guest_drivers.trace_replay import Replayer
from vfio_model.iommu.spapr import regs
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva, align_up

DEFAULT_RAM = 1 << 30
RAM_STEP = 1 << 28
RAM_LIMIT = 1 << 42
MAX_VIO_DEVICES = 256
_HVA = Hva(0x7F00_0000_0000)


@dataclass(frozen=True, slots=True)
class CheckOptions:
    """What the recorded machine was; a log does not hold it. None: the default, or what the log shows.

    ``ram_size`` in bytes, ``phbs`` how many host bridges there are at least, ``dma`` the window options of each.
    """

    ram_size: int | None = None
    phbs: int = 1
    dma: GivenOptions = field(default_factory=GivenOptions)


@dataclass(slots=True)
class CheckReport:
    """What became of one file. Lines count from 1."""

    path: str
    read_lines: int = 0
    """Lines that could be read."""
    events: int = 0
    """Well-formed event lines, of whatever event."""
    replayed: int = 0
    """Those of them that were replayed and compared."""
    passed_over: int = 0
    """Lines of other events, or of windows that are not in the log."""
    translations_checked: int = 0
    """Translations compared with what earlier lines wrote."""
    inferred: int = 0
    """Those of them that rest on entries which the log does not spell out (the inside of a TCE list, a call that
    failed half-way).
    """
    unchecked: int = 0
    """Translations about which no earlier line says anything."""
    mismatches: int = 0
    details: list[dict[str, Any]] = field(default_factory=list)
    """Each mismatch: line, event, expected, seen."""
    malformed: list[dict[str, Any]] = field(default_factory=list)
    """Lines that cannot be understood: line, reason."""
    notes: list[str] = field(default_factory=list)
    """What was found out about the machine."""
    errors: list[str] = field(default_factory=list)
    """Why the file, or part of it, could not be checked."""

    @property
    def exit_code(self) -> int:
        """2 when something could not be checked, else 1 with mismatches, else 0."""
        if self.errors:
            return 2
        return 1 if self.mismatches else 0

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "exit_code": self.exit_code}


def check_trace(path: str | os.PathLike[str], options: CheckOptions | None = None) -> CheckReport:
    """Check the recording at ``path``. Never raises for what is in the file, or for a file that is not there."""
    chosen = options or CheckOptions()
    report = CheckReport(os.fspath(path))
    events = _read_events(Path(path), report)
    if not events:
        if not report.errors:
            report.errors.append(f"{report.path}: no trace of sPAPR DMA windows in it (events spapr_iommu_*)")
        return report
    _replay(events, chosen, report)
    return report


def _read_events(path: Path, report: CheckReport) -> list[tuple[int, TraceEvent]]:
    events: list[tuple[int, TraceEvent]] = []
    try:
        for number, text in enumerate(trace_lines(path), 1):
            report.read_lines = number
            parsed = parse_line(text)
            if isinstance(parsed, Malformed):
                report.malformed.append({"line": number, "reason": parsed.reason})
            elif parsed is not None:
                report.events += 1
            if isinstance(parsed, PassedOver):
                report.passed_over += 1
            elif isinstance(parsed, TraceEvent):
                events.append((number, parsed))
    except OSError as error:
        report.errors.append(f"{report.path}: {error.strerror or error}")
    except Unreadable as error:
        report.errors.append(f"{report.path}: {error} (after line {report.read_lines})")
    if report.malformed:
        first = report.malformed[0]
        report.errors.append(
            f"{report.path}: {len(report.malformed)} malformed lines, first line {first['line']}: {first['reason']}"
        )
    return events


def _replay(events: list[tuple[int, TraceEvent]], options: CheckOptions, report: CheckReport) -> None:
    inferred, notes = infer_options((event for _, event in events), options.dma)
    report.notes += notes
    ram_size = _ram_size(events, options, report)
    default = options.dma.over(regs.DmaOptions())
    machine = PseriesMachine(
        [RAMBlock("ram", _sparse_ram(ram_size), page_size=1 << 16, hva=_HVA)],
        PseriesOptions(phbs=max(options.phbs, 1), dma=default, per_phb=inferred),
    )
    replayer = Replayer(
        DirectCpu(machine),
        options=lambda index: inferred.get(index, default),
        provide=lambda liobn: _provide(machine, liobn),
    )
    for line, event in events:
        replayer.feed(line, event)
    _take_over(replayer.finish(), report)


def _sparse_ram(size: int) -> memoryview:
    """Zeroed memory that costs what is touched; it goes when the machine that holds it goes."""
    fd = os.memfd_create("check-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        return memoryview(mmap.mmap(fd, size))
    finally:
        os.close(fd)


def _ram_size(events: list[tuple[int, TraceEvent]], options: CheckOptions, report: CheckReport) -> int:
    """RAM that holds every TCE list of the log."""
    size = options.ram_size or DEFAULT_RAM
    lists = [event.tce_list for _, event in events if isinstance(event, PutTceIndirect)]
    needed = max((last + regs.INDIRECT_LIST_ALIGN for last in lists if last < RAM_LIMIT), default=0)
    if needed > size:
        size = align_up(needed, RAM_STEP)
        report.notes.append(f"ram_size={size:#x}, from the log: a TCE list lies at {needed - 4096:#x}")
    return size


def _provide(machine: PseriesMachine, liobn: int) -> bool:
    """Give ``machine`` the PHB or VIO table that the log speaks of."""
    if liobn in machine.tables:
        return True
    try:
        if regs.is_pci_liobn(liobn):
            machine.add_phb(regs.liobn_phb(liobn))
        elif sum(not regs.is_pci_liobn(known) for known in machine.tables) < MAX_VIO_DEVICES:
            machine.add_vio_table(liobn)
    except ConfigError:
        return False
    return liobn in machine.tables


def _take_over(replayed: ReplayReport, report: CheckReport) -> None:
    report.replayed = replayed.events
    report.passed_over += replayed.passed_over
    report.translations_checked = replayed.translations_checked
    report.inferred, report.unchecked = replayed.inferred, replayed.unchecked
    report.mismatches = len(replayed.mismatches)
    report.details = [asdict(wrong) for wrong in replayed.mismatches]
    report.notes += replayed.notes
