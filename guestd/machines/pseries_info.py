"""What of a pseries machine monitors show: bridges, windows, tables, and how a table translates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from guestd.machine_config import PseriesConfig
from guestd.machines.followers import follower
from guestd.machines.qom import QomObject, QomTree
from guestd.machines.walk import PERMS, Walk
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.phb import SpaprPhb
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.address_space import AddressSpace

MACHINE_TYPE: Final = "pseries-machine"
PHB_TYPE: Final = "spapr-pci-host-bridge"
TYPES: Final[Mapping[str, tuple[str, bool]]] = {
    "spapr-machine": ("machine", True),
    MACHINE_TYPE: ("spapr-machine", False),
    PHB_TYPE: ("pci-host-bridge", False),
    "spapr-tce-table": ("device", False),
}


def properties(phb: SpaprPhb) -> list[str]:
    """Those of ``phb``, as lines."""
    options = phb.dma.options
    numbers = {
        "index": phb.index,
        "dma_win_addr": options.dma_win_addr,
        "dma_win_size": options.dma_win_size,
        "dma64_win_addr": options.dma64_win_addr,
    }
    lines = [f"{name} = {value} ({value:#x})" for name, value in numbers.items()]
    return [*lines, f"ddw = {str(options.ddw).lower()}", f"pgsz = {options.pgsz} ({options.pgsz:#x})"]


def qom_tree(config: PseriesConfig, phbs: Mapping[str, SpaprPhb]) -> QomTree:
    """Bridges with an id are peripherals."""
    tree = QomTree(MACHINE_TYPE)
    for place, (each, (bus, phb)) in enumerate(zip(config.phbs, phbs.items(), strict=True)):
        bridge = _phb(phb)
        container, name = ("peripheral", each.id) if each.id else ("unattached", f"device[{place}]")
        tree.objects.setdefault(container, {})[name] = bridge
        tree.buses[bus] = bridge.children[bus] = QomObject("PCI")
    return tree


def _phb(phb: SpaprPhb) -> QomObject:
    options = phb.dma.options
    return QomObject(
        PHB_TYPE,
        properties={
            "realized": ("bool", lambda: True),
            "index": ("uint32", lambda: phb.index),
            "dma_win_addr": ("uint64", lambda: options.dma_win_addr),
            "dma_win_size": ("uint64", lambda: options.dma_win_size),
            "dma64_win_addr": ("uint64", lambda: options.dma64_win_addr),
            "ddw": ("bool", lambda: options.ddw),
            "pgsz": ("uint64", lambda: options.pgsz),
        },
    )


def windows(machine: PseriesMachine) -> list[dict[str, int]]:
    """Every table that is enabled; ``start`` is a bus address."""
    return [
        {
            "liobn": table.liobn,
            "start": table.bus_offset,
            "entries": table.nb_table,
            "page_shift": table.page_shift,
        }
        for table in machine.tables.values()
        if table.enabled
    ]


def window_lines(machine: PseriesMachine) -> list[str]:
    """Every open DMA window; addresses inclusive, sizes in bytes."""
    found = []
    for table in sorted(machine.tables.values(), key=lambda table: table.liobn):
        window = table.window
        if window is not None:
            where = f"LIOBN {table.liobn:08x}: {window.start:016x}-{window.last:016x}"
            found.append(f"{where}, page size {1 << table.page_shift:#x}, entries {table.nb_table:#x}")
    return found or ["no DMA window is open"]


def iommu_lines(machine: PseriesMachine) -> list[str]:
    """Every vIOMMU unit, its tables, and who follows them."""
    found = []
    for phb in machine.phbs.values():
        found.append(f"{phb.name}: sPAPR TCE, address space {phb.address_space.name}")
        for table in phb.dma.tables:
            found += _table(table)
    units = [device for device in machine.vio if device.dma is not None]
    for unit in units:
        assert unit.dma is not None, "filtered above"
        found.append(f"{unit.node}: sPAPR TCE, bypass {'on' if unit.dma.bypass else 'off'}")
        found += _table(unit.dma.table)
    return found


def _table(table: SpaprTceTable) -> list[str]:
    if table.iommu is None:
        return [f"  LIOBN {table.liobn:08x}: disabled"]
    need = f"need_vfio {'on' if table.need_vfio else 'off'}{', in the kernel' if table.kernel is not None else ''}"
    lines = [f"  LIOBN {table.liobn:08x}: {table.nb_table:#x} entries of {1 << table.page_shift:#x} bytes, {need}"]
    return [*lines, *(f"    followed by {follower(notifier)}" for notifier in table.iommu.notifiers)]


def explain(walk: Walk, system: AddressSpace, phb: SpaprPhb, iova: int) -> None:
    """The steps from the address space to RAM."""
    walk.step("address space", f"{phb.address_space.name} (shared by all functions of the bridge)")
    table = _window(phb, iova)
    if table is None:
        shown = ", ".join(str(each.window) for each in phb.dma.tables if each.enabled) or "none"
        walk.step("DMA window", f"none holds {iova:#x}; open: {shown}", ok=False)
    else:
        _entry(system, walk, table, iova)


def _window(phb: SpaprPhb, iova: int) -> SpaprTceTable | None:
    for table in phb.dma.tables:
        window = table.window
        if window is not None and window.start <= iova <= window.last:
            return table
    return None


def _entry(system: AddressSpace, walk: Walk, table: SpaprTceTable, iova: int) -> None:
    shift = table.page_shift
    walk.page_size = 1 << shift
    walk.step("DMA window", f"LIOBN {table.liobn:#x}, {table.window}, pages of {1 << shift >> 10} KiB")
    index = table.index(iova)
    tce = table.get(index) or 0
    perm, page = tce & 3, tce & -(1 << shift)
    if walk.step("TCE", f"entry {index:#x} is {tce:#x}: {PERMS[perm]}", ok=bool(perm)):
        walk.reach(system, page | iova & (1 << shift) - 1, perm)
