"""Our own trace records as QEMU prints them: recordings of machines that nobody has got on file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from vfio_model.machine.pseries import PseriesMachine

_TCE = "liobn={liobn:#x} ioba={ioba:#x}"
_PE = "buid={buid:#x} addr={cfgaddr:#x}"
_FORMATS = {
    "spapr_iommu_new_table": "liobn={liobn:#x} table=0x0 fd=-1",
    "spapr_iommu_xlate": "liobn={liobn:#x} {ioba:#x} -> {tce:#x} perm={perm} mask={pgsize:#x}",
    "spapr_iommu_ddw_query": _PE + ", {wa} windows available, max window size={win_size:#x}, mask={pgmask:#x}",
    "spapr_iommu_ddw_create": _PE
    + ", page size={pg_size:#x}, requested={req_size:#x}, start addr={start:#x}, liobn={liobn:#x}",
    "spapr_iommu_ddw_remove": "liobn={liobn:#x}",
    "spapr_iommu_ddw_reset": _PE,
}
for _family in ("spapr_iommu_pci_", "spapr_iommu_"):
    _FORMATS[_family + "put"] = _TCE + " tce={tce:#x} ret={ret}"
    _FORMATS[_family + "get"] = _TCE + " ret={ret} tce={tce:#x}"
    _FORMATS[_family + "stuff"] = _TCE + " tcevalue={tcevalue:#x} npages={npages} ret={ret}"
    _FORMATS[_family + "indirect"] = _TCE + " tcelist={tcelist:#x} iobaN={iobaN:#x} tceN={tceN:#x} ret={ret}"


def format_record(event: str, fields: Mapping[str, object]) -> str | None:
    """The line, or None for an event that QEMU has not got."""
    form = _FORMATS.get(event)
    return None if form is None else f"{event} {form.format_map(fields)}"


@dataclass
class LogTrace:
    """A trace that writes QEMU's lines."""

    enabled: bool = True
    cause: int = 0
    lines: list[str] = field(default_factory=list)

    def __call__(self, event: str, **fields: object) -> None:
        line = format_record(event, fields)
        if line is not None:
            self.lines.append(line)


def log_of(machine: PseriesMachine) -> list[str]:
    """What ``machine`` (made with a :class:`LogTrace`) has logged so far."""
    assert isinstance(machine.trace, LogTrace)
    return machine.trace.lines
