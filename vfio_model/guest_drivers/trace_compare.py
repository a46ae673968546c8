"""What a log says against what earlier lines of it lead to: counts, mismatches, and the two kinds of uncertainty.

A translation of a *known* entry must be what the platform translates to. Of an entry in doubt it must be one of the
values that the doubt allows. An inferred list is presumed to hold consecutive pages; a translation that says
otherwise is a mismatch, unless at the end of the log most of that list's observed entries (and at least two) say
otherwise, consistently: then the list was not of consecutive pages, and its translations count as inferred. What no
earlier line says anything about is unchecked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vfio_model.guest_drivers.trace_windows import Doubt, ListLine, Window
from vfio_model.iommu.spapr.regs import TCE_PERM_MASK


@dataclass(frozen=True, slots=True)
class Mismatch:
    """What line ``line`` says (``seen``) is not what earlier lines lead to (``expected``)."""

    line: int
    event: str
    expected: str
    seen: str


@dataclass(slots=True)
class ReplayReport:
    """Counts, and every mismatch by line."""

    events: int = 0
    """Lines replayed."""
    passed_over: int = 0
    """Lines about a window that the log does not show being made, or that the platform has not got."""
    translations_checked: int = 0
    """Translations (and H_GET_TCE results) compared with what earlier lines wrote."""
    inferred: int = 0
    """Those of them that rest on entries which the log does not spell out."""
    unchecked: int = 0
    """Translations of entries about which no earlier line says anything."""
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Comparison:
    """Keeps the report."""

    def __init__(self) -> None:
        self.report = ReplayReport()
        self._suspects: list[tuple[ListLine, int, Mismatch]] = []

    def mismatch(self, line: int, event: str, expected: str, seen: str) -> None:
        """Line ``line`` is wrong."""
        self.report.mismatches.append(Mismatch(line, event, expected, seen))

    def value(self, line: int, event: str, name: str, ours: int, logged: int, form: str = "#x") -> None:
        """A field that must be equal; ``form`` is how it is shown."""
        if ours != logged:
            self.mismatch(line, event, f"{name}={ours:{form}}", f"{name}={logged:{form}}")

    def translation(self, line: int, window: Window, offset: int, ours: tuple[int, int], seen: tuple[int, int]) -> None:
        """A device's translation at ``offset`` in the window, as (page address, permission)."""
        (address, perm), low = seen, window.page_size - 1
        if window.in_kernel:
            self.report.unchecked += 1
        elif perm > TCE_PERM_MASK or address & low:
            self.report.translations_checked += 1
            self.mismatch(line, "xlate", f"{ours[0]:#x} perm={ours[1]}", f"{address:#x} perm={perm}")
        else:
            self.entry(line, "xlate", window, offset >> window.page_shift, ours[0] | ours[1], address | perm)

    def entry(self, line: int, event: str, window: Window, index: int, ours: int, seen: int) -> None:
        """Entry ``index`` as the log shows it (``seen``, a TCE) against the platform's (``ours``).

        Counts the line as checked, inferred or unchecked.
        """
        report, doubt, meant = self.report, window.doubt_of(index), window.meaning(seen)
        if doubt is not None and not doubt.tces:
            report.unchecked += 1
            window.doubts[index] = Doubt(frozenset({meant}))
            return
        report.translations_checked += 1
        if doubt is None:
            if seen != ours:
                self.mismatch(line, event, _show(ours), _show(seen))
            return
        report.inferred += 1
        if doubt.list_line is not None:
            self._list_entry(line, event, doubt, index, meant)
        elif meant in doubt.tces:
            window.doubts[index] = Doubt(frozenset({meant}))
        else:
            self.mismatch(line, event, " or ".join(_show(tce) for tce in sorted(doubt.tces)), _show(seen))

    def _list_entry(self, line: int, event: str, doubt: Doubt, index: int, seen: int) -> None:
        source = doubt.list_line
        assert source is not None, "the caller looked"
        if seen in doubt.tces:
            source.agreed.add(index)
            return
        expected = " or ".join(_show(tce) for tce in sorted(doubt.tces))
        wrong = Mismatch(line, event, f"{expected} (inferred from line {source.line})", _show(seen))
        if source.deviant.setdefault(index, seen) == seen and index not in source.agreed:
            self._suspects.append((source, index, wrong))
        else:
            self.report.mismatches.append(wrong)

    def finish(self) -> ReplayReport:
        """Settle what the lists were; mismatches are then in the order of their lines."""
        for source, index, wrong in self._suspects:
            many = len(source.deviant) >= 2 and len(source.deviant) > len(source.agreed)
            if not many or index in source.agreed:
                self.report.mismatches.append(wrong)
        odd = sorted({source.line for source, _, wrong in self._suspects if wrong not in self.report.mismatches})
        self.report.notes += [f"line {line}: the list was not of consecutive pages" for line in odd]
        self._suspects.clear()
        self.report.mismatches.sort(key=lambda wrong: wrong.line)
        return self.report


def _show(tce: int) -> str:
    return f"{tce & ~TCE_PERM_MASK:#x} perm={tce & TCE_PERM_MASK}"
