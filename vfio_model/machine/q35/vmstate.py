"""What of a q35 machine migrates: ports, chipset, bridges, the VT-d unit, functions, the I/O APIC.

Bridges come before the unit, which looks functions up by the numbers of their buses, and the unit before functions,
whose DMA may begin. Sections have QEMU's names where QEMU has such a section (``iommu-intel``, ``ioapic``,
``PCIHost``); the instance of a function is its bus's place in the tree << 16 | devfn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.iommu.vtd import vmstate as vtd
from vfio_model.iommu.vtd.unit import IntelIommu
from vfio_model.machine.entries import Entry, clock_entry, function_entry, irqs_entry
from vfio_model.machine.q35 import ioapic
from vfio_model.machine.q35.interrupts import CHIPSET_VMSTATE
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.machine.q35.regs import LPC_DEVFN
from vfio_model.pci.bus import PCIBus
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

PORTS = VMStateDescription("PCIHost", 1, (Field("config_reg"), Field("rst_cnt", Type.U8)))
"""What the host bridge's ports hold: CONFIG_ADDRESS, and the reset control register."""


def entries(machine: Q35Machine) -> Iterator[Entry]:
    """Everything besides RAM, in the order in which it is loaded.

    :raise VMStateError: a device cannot be migrated.
    """
    yield clock_entry(machine)
    yield _ports(machine)
    yield _sized(CHIPSET_VMSTATE, machine.chipset.export_state, machine.chipset.import_state, "size")
    functions = list(_functions(machine))
    early = {id(bridge) for bus in machine.root_bus.walk() for bridge in _bridges(bus)}
    yield from (entry for key, entry in functions if key in early)
    if machine.iommu is not None:
        yield _iommu(machine.iommu)
    yield from (entry for key, entry in functions if key not in early)
    pins = machine.ioapic
    yield _sized(ioapic.VMSTATE, pins.export_state, pins.import_state, "ioredtbl_count")
    yield irqs_entry(machine)


def _functions(machine: Q35Machine) -> Iterator[tuple[int, Entry]]:
    for index, bus in enumerate(machine.root_bus.walk()):
        for devfn, function in sorted(bus.devices.items()):
            yield id(function), function_entry(function, index << 16 | devfn)


def _bridges(bus: PCIBus) -> list[object]:
    """The functions of ``bus`` that others stand on: those with a bus behind them, and the chipset's."""
    above = {child.upstream.devfn for child in bus.children if child.upstream is not None}
    if bus.upstream is None:
        above |= {0, LPC_DEVFN}
    return [bus.devices[devfn] for devfn in above]


def _ports(machine: Q35Machine) -> Entry:
    address, control = machine.config_address, machine.reset_control

    def load(state: State) -> None:
        address.value, control.value = state["config_reg"], state["rst_cnt"]

    return Entry(PORTS, 0, lambda: {"config_reg": address.value, "rst_cnt": control.value}, load)


def _sized(
    description: VMStateDescription,
    export: Callable[[], State],
    load: Callable[[Mapping[str, Any]], None],
    count: str,
) -> Entry:
    def check(state: State, where: str) -> State:
        mine = export()[count]
        if state[count] != mine:
            raise VMStateError(f"{count} is {state[count]}, not {mine}", where=where)
        return state

    return Entry(description, 0, export, load, check)


def _iommu(unit: IntelIommu) -> Entry:
    def check(state: State, where: str) -> State:
        vtd.check(unit.registers, state, where=where)
        return state

    return Entry(vtd.INTEL_IOMMU, 0, unit.export_state, unit.import_state, check)
