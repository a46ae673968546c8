"""The migrated state of a TCE table: section ``spapr_iommu``, and how it is taken from a table and put into one.

The section says how many entries there are and what they hold; where the window lies and how large its pages are is in
the subsection ``spapr_iommu_ex``, which is sent unless the window has 4K pages at bus address 0. A stream without it is
one of a default window. A closed table has no page size, so its subsection is sent.

Version 3 brought ``def_win``. Version 2 had only the default window in the first table of a bridge, so a table that
comes open in such a stream counts as the default window exactly if it is that first one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.iommu.spapr.regs import TCE_PAGE_SHIFT, is_pci_liobn, liobn_window
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

SPAPR_IOMMU_EX = VMStateDescription(
    "spapr_iommu_ex",
    1,
    (Field("bus_offset", Type.U64), Field("page_shift")),
    needed=lambda state: bool(state["bus_offset"]) or state["page_shift"] != TCE_PAGE_SHIFT,
)
SPAPR_IOMMU = VMStateDescription(
    "spapr_iommu",
    3,
    (
        Field("liobn", equal=True),
        Field("mig_nb_table"),
        Field("bypass", Type.BOOL),
        Field("mig_table", Type.U64, array="mig_nb_table"),
        Field("def_win", Type.BOOL, since=3),
    ),
    minimum_version=2,
    subsections=(SPAPR_IOMMU_EX,),
)


def export_table(table: SpaprTceTable, *, bypass: bool = False) -> State:
    """The state of ``table``; entries are not copied."""
    return {
        "liobn": table.liobn,
        "mig_nb_table": table.nb_table,
        "bypass": bypass,
        "mig_table": table.entries,
        "def_win": table.def_win,
        "bus_offset": table.bus_offset,
        "page_shift": table.page_shift,
    }


def completed(state: Mapping[str, Any], *, where: str) -> State:
    """``state`` as read, with what an old stream leaves out.

    :raise VMStateError: for a window that cannot be.
    """
    defaults = {"bus_offset": 0, "page_shift": TCE_PAGE_SHIFT}
    pci = is_pci_liobn(state["liobn"])
    full = {**defaults, "def_win": pci and not liobn_window(state["liobn"]), **state}
    size = full["mig_nb_table"] << full["page_shift"] if full["page_shift"] < 64 else 1 << 64
    if full["mig_nb_table"] and (full["page_shift"] < TCE_PAGE_SHIFT or full["bus_offset"] + size > 1 << 64):
        window = f"{full['mig_nb_table']:#x} pages of 2**{full['page_shift']} bytes at {full['bus_offset']:#x}"
        raise VMStateError(f"a window of {window}", where=where)
    if full["bypass"] and pci:
        raise VMStateError("bypass of a PCI window", where=where)
    return full


def import_table(table: SpaprTceTable, state: Mapping[str, Any]) -> OSError | None:
    """Give ``table`` the window of a :func:`completed` ``state``, or none. A window that is open closes and comes
    anew, so that whoever follows it makes a host window for it and maps what it holds.

    Returns, or raises, what a follower answered: the window is open all the same or is not, and the machine must not
    run.

    :raise OSError: a follower refused the window. :raise MemoryError: the table does not fit.
    """
    table.disable()
    table.def_win = state["def_win"]
    table.enable(state["page_shift"], state["bus_offset"], state["mig_nb_table"], state["mig_table"])
    return table.iommu.flush() if table.iommu is not None else None
