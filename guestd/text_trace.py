"""``-trace``: events as lines of text, as QEMU's log backend writes them.

The events of QEMU's sPAPR IOMMU have QEMU's own formats (``hw/ppc/trace-events``), so that what reads QEMU's log reads
this one; any other event is written as ``name field=value …``.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Final

from vfio_model.errors import ConfigError
from vfio_model.trace import Trace

_PUT = "liobn={liobn:#x} ioba={ioba:#x} tce={tce:#x} ret={ret}"
_GET = "liobn={liobn:#x} ioba={ioba:#x} ret={ret} tce={tce:#x}"
_STUFF = "liobn={liobn:#x} ioba={ioba:#x} tcevalue={tcevalue:#x} npages={npages} ret={ret}"
_INDIRECT = "liobn={liobn:#x} ioba={ioba:#x} tcelist={tcelist:#x} iobaN={iobaN:#x} tceN={tceN:#x} ret={ret}"
_PE = "buid={buid:#x} addr={cfgaddr:#x}"

FORMATS: Final[dict[str, str]] = {
    "spapr_iommu_pci_put": _PUT,
    "spapr_iommu_put": _PUT,
    "spapr_iommu_pci_get": _GET,
    "spapr_iommu_get": _GET,
    "spapr_iommu_pci_stuff": _STUFF,
    "spapr_iommu_stuff": _STUFF,
    "spapr_iommu_pci_indirect": _INDIRECT,
    "spapr_iommu_indirect": _INDIRECT,
    "spapr_iommu_xlate": "liobn={liobn:#x} {ioba:#x} -> {tce:#x} perm={perm} mask={pgsize:#x}",
    "spapr_iommu_new_table": "liobn={liobn:#x} table={table:#x} fd={fd}",
    "spapr_iommu_ddw_query": f"{_PE}, {{wa}} windows available, max window size={{win_size:#x}}, mask={{pgmask:#x}}",
    "spapr_iommu_ddw_create": (
        f"{_PE}, page size={{pg_size:#x}}, requested={{req_size:#x}}, start addr={{start:#x}}, liobn={{liobn:#x}}"
    ),
    "spapr_iommu_ddw_remove": "liobn={liobn:#x}",
    "spapr_iommu_ddw_reset": _PE,
}
_HEXADECIMAL_FROM: Final = 4096


def line(event: str, fields: dict[str, object]) -> str:
    """One event, without a line feed."""
    known = FORMATS.get(event)
    if known is not None:
        return f"{event} {known.format(**fields)}"
    return " ".join([event, *(f"{name}={_plain(value)}" for name, value in fields.items())])


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= _HEXADECIMAL_FROM:
        return f"{value:#x}"
    return re.sub(r"\s+", " ", str(value))


class TextTrace:
    """A trace that writes the events that match one of ``patterns`` (shell wildcards; ``-`` in front takes out again,
    the last match holds), and hands all of them on to ``inner``.
    """

    def __init__(self, inner: Trace, patterns: Sequence[str], write: Callable[[str], object]) -> None:
        self._inner, self._patterns, self._write = inner, tuple(patterns), write
        self._wanted: dict[str, bool] = {}
        self.enabled = True

    @property
    def cause(self) -> int:
        """Of the inner trace."""
        return self._inner.cause

    @cause.setter
    def cause(self, cause: int) -> None:
        self._inner.cause = cause

    def __call__(self, event: str, **fields: object) -> None:
        """One event."""
        if self._inner.enabled:
            self._inner(event, **fields)
        wanted = self._wanted.get(event)
        if wanted is None:
            wanted = self._wanted[event] = self._matches(event)
        if wanted:
            self._write(line(event, fields) + "\n")

    def _matches(self, event: str) -> bool:
        wanted = False
        for pattern in self._patterns:
            if fnmatchcase(event, pattern.removeprefix("-")):
                wanted = not pattern.startswith("-")
        return wanted


def read_patterns(path: str) -> list[str]:
    """The patterns in a file, one a line; ``#`` begins a comment.

    :raise ConfigError: when it cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return [text for each in lines if (text := each.partition("#")[0].strip())]


def open_log(path: str) -> IO[str]:
    """The file of ``-D``; stderr when ``path`` is empty. What was there is lost.

    :raise ConfigError: when it cannot be written.
    """
    if not path:
        return sys.stderr
    try:
        return open(path, "w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Error opening logfile {path}: {error.strerror}") from error
