"""What of a pseries machine migrates: VIO devices, bridges, TCE tables, functions.

Of a bridge's two tables the second comes first: a host puts a window where its slot says, so the window at the 64-bit
address has to be made while the default one is still there, as the guest made it. A table's window closes and opens
anew, whereby a VFIO container makes its host windows and maps what the table holds.

Sections are named and numbered as QEMU's where QEMU has them (``spapr_iommu``, ``spapr_pci``). The instance of a table
is its LIOBN, of a bridge its index, of a function index << 16 | bus << 8 | devfn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vfio_model.errors import VMStateError
from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.iommu.spapr.vmstate import SPAPR_IOMMU, completed, export_table, import_table
from vfio_model.machine.entries import Entry, clock_entry, function_entry, irqs_entry
from vfio_model.machine.phb import SpaprPhb
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.machine.vio import VioDma
from vfio_model.ranges import Range
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription, unused

_MSI = VMStateDescription("spapr_pci/msi", 1, (Field("config_addr"), Field("first_irq"), Field("num")))
SPAPR_PCI = VMStateDescription(
    "spapr_pci",
    2,
    (
        Field("buid", Type.U64, equal=True),
        unused(4),
        Field("msi_devs_num"),
        Field("msi_devs", array="msi_devs_num", struct=_MSI),
    ),
    minimum_version=2,
)
"""A bridge: which functions have which message interrupts. Its pins follow from its functions', its LIOBNs from its
index: their old field is unused.
"""


def entries(machine: PseriesMachine) -> Iterator[Entry]:
    """Everything of ``machine`` that migrates besides RAM, in the order in which it is loaded.

    :raise VMStateError: a device cannot be migrated.
    """
    yield clock_entry(machine)
    for device in machine.vio:
        if device.dma is not None:
            yield _vio(device.dma)
    for phb in machine.phbs.values():
        yield _phb(phb)
        for number in reversed(range(len(phb.dma.tables))):
            yield _table(phb.dma.tables[number], optional=number > 0)
    for phb in machine.phbs.values():
        for devfn, function in sorted(phb.bus.devices.items()):
            yield function_entry(function, phb.index << 16 | phb.bus.number << 8 | devfn)
    yield irqs_entry(machine)


def _table(table: SpaprTceTable, *, optional: bool) -> Entry:
    return Entry(
        SPAPR_IOMMU,
        table.liobn,
        lambda: export_table(table),
        lambda state: import_table(table, state),
        lambda state, where: completed(state, where=where),
        optional,
    )


def _vio(dma: VioDma) -> Entry:
    def load(state: State) -> OSError | None:
        error = import_table(dma.table, state)
        dma.set_bypass(state["bypass"])
        return error

    return Entry(
        SPAPR_IOMMU,
        dma.table.liobn,
        lambda: export_table(dma.table, bypass=dma.bypass),
        load,
        lambda state, where: completed(state, where=where),
    )


def _phb(phb: SpaprPhb) -> Entry:
    def export() -> State:
        given = [
            {"config_addr": address, "first_irq": block.first, "num": block.num}
            for address, block in sorted(phb.msi.given.items())
        ]
        return {"buid": phb.buid, "msi_devs_num": len(given), "msi_devs": given}

    def load(state: State) -> None:
        phb.msi.restore((each["config_addr"], each["first_irq"], each["num"]) for each in state["msi_devs"])

    return Entry(SPAPR_PCI, phb.index, export, load)


def check_windows(machine: PseriesMachine, states: Mapping[tuple[str, int], State], *, where: str) -> None:
    """Whether the bridges' DMA windows can be beside each other.

    :raise VMStateError: two of a bridge overlap.
    """
    for phb in machine.phbs.values():
        if OVERLAPPING_WINDOWS not in phb.dma.options.quirks:
            _check_bridge(phb, states, where)


def _check_bridge(phb: SpaprPhb, states: Mapping[tuple[str, int], State], where: str) -> None:
    seen: list[Range] = []
    for table in phb.dma.tables:
        state = states.get((SPAPR_IOMMU.name, table.liobn))
        if state is not None and state["mig_nb_table"]:
            window = Range.sized(state["bus_offset"], state["mig_nb_table"] << state["page_shift"])
            if any(window.overlaps(other) for other in seen):
                raise VMStateError(f"the DMA windows of {phb.name} overlap at {window}", where=where)
            seen.append(window)
