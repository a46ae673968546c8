"""``vfio-model check``: does the model do what a recorded QEMU did?

Reads a QEMU trace (plain or gzip), does again what the guest did there, and compares. A pseries guest's hypercalls and
RTAS calls are replayed on a machine (:mod:`deploy.check_spapr`): return codes, windows and translations must agree. Of
a PC with ``intel-iommu`` the registers, invalidations and translations are replayed on a VT-d unit
(:mod:`deploy.check_vtd`): every line must come out again. Files may be damaged: what can be read is checked and
reported, and the damage as well.

Exit codes: 0 nothing wrong, 1 mismatches, 2 the file (or part of it) could not be checked.
"""

from __future__ import annotations

import os
from pathlib import Path

from deploy import check_spapr, check_vtd
from deploy.check_report import CheckOptions, CheckReport
from deploy.trace_file import Unreadable, trace_lines
from vfio_model.guest_drivers import vtd_trace
from vfio_model.guest_drivers.trace_events import Malformed, TraceEvent, event_of, parse_event
from vfio_model.trace_text import VTD


def check_trace(path: str | os.PathLike[str], options: CheckOptions | None = None) -> CheckReport:
    """Check the recording at ``path``. Never raises for what is in the file, or for a file that is not there."""
    report = CheckReport(os.fspath(path))
    log = _Log()
    log.read(Path(path), report)
    if log.spapr:
        report.passed_over += len(log.vtd)
        check_spapr.replay(log.spapr, options or CheckOptions(), report)
    elif log.vtd:
        check_vtd.replay(log.vtd, report)
    elif not report.errors:
        what = "no trace of sPAPR DMA windows (events spapr_iommu_*) or of VT-d (vtd_*) in it"
        report.errors.append(f"{report.path}: {what}")
    return report


class _Log:
    """The lines of a file that say something, with their numbers."""

    def __init__(self) -> None:
        self.spapr: list[tuple[int, TraceEvent]] = []
        self.vtd: list[vtd_trace.LogLine] = []

    def read(self, path: Path, report: CheckReport) -> None:
        """All that can be read; what is wrong with the file goes into ``report``."""
        try:
            for number, text in enumerate(trace_lines(path), 1):
                report.read_lines = number
                self._line(number, text, report)
        except OSError as error:
            report.errors.append(f"{report.path}: {error.strerror or error}")
        except Unreadable as error:
            report.errors.append(f"{report.path}: {error} (after line {report.read_lines})")
        if report.malformed:
            first = report.malformed[0]
            report.errors.append(
                f"{report.path}: {len(report.malformed)} malformed lines, first line {first['line']}: {first['reason']}"
            )

    def _line(self, number: int, text: str, report: CheckReport) -> None:
        event = event_of(text)
        if event is None:
            return
        if isinstance(event, Malformed):
            parsed: object = event
        elif event[0] in VTD:
            parsed = vtd_trace.parse(number, *event)
        else:
            parsed = parse_event(*event)
        if isinstance(parsed, Malformed):
            report.malformed.append({"line": number, "reason": parsed.reason})
            return
        report.events += 1
        if isinstance(parsed, vtd_trace.LogLine):
            self.vtd.append(parsed)
        elif isinstance(parsed, TraceEvent):
            self.spapr.append((number, parsed))
        else:
            report.passed_over += 1
