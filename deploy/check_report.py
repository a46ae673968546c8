"""What :mod:`deploy.check` is told of a recording, and what it says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from vfio_model.guest_drivers.trace_compare import ReplayReport
from vfio_model.guest_drivers.trace_options import GivenOptions


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

    def take_over(self, replayed: ReplayReport) -> None:
        """What became of the lines that were replayed."""
        self.replayed = replayed.events
        self.passed_over += replayed.passed_over
        self.translations_checked = replayed.translations_checked
        self.inferred, self.unchecked = replayed.inferred, replayed.unchecked
        self.mismatches = len(replayed.mismatches)
        self.details = [asdict(wrong) for wrong in replayed.mismatches]
        self.notes += replayed.notes

    def to_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {**asdict(self), "exit_code": self.exit_code}
