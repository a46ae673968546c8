"""The VT-d unit of a machine: its registers, its translation half, and the port by which buses reach it.

::

    guest ── registers, queue (:mod:`.registers`) ── ports.Translator ──▶ :mod:`.translation` ◀── PCIIOMMUOps ── buses
                       ▲   ▲                                                  │   │
                       │   └────────────── FaultSink (:mod:`.faults`) ────────┘   │
                       └── InterruptSink (:mod:`.remapping`), page requests ──────┘
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import Message
from vfio_model.iommu.vtd.registers import VtdParts, VtdRegisters
from vfio_model.iommu.vtd.translation import Translation
from vfio_model.iommu.vtd.vmstate import export_unit, import_unit
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import IORegion
from vfio_model.pci.iommu_ops import PCIIOMMUOps
from vfio_model.trace import NULL_TRACE, Trace
from vfio_model.vmstate.fields import State


class IntelIommu:
    """``mmio`` is mapped by the machine, at :data:`.regs.BASE` in a PC. ``system`` holds the unit's tables; ``message``
    takes the interrupts that come out: the unit's own, and those of devices when they were remapped.
    """

    def __init__(
        self, options: VtdOptions, system: AddressSpace, message: Message, *, trace: Trace = NULL_TRACE
    ) -> None:
        self.options = options
        parts = VtdParts(options, system, message, trace)
        self.faults, self.interrupts, self.page_requests = parts.faults, parts.remapping, parts.page_requests
        self.translation = Translation(options, system, parts.faults, parts.remapping, trace)
        if options.svm:
            self.translation.attach_page_requests(self.page_requests)
        self.registers = VtdRegisters(parts, self.translation)
        self.queue = self.registers.queue
        self.mmio = IORegion("intel_iommu", regs.SIZE, self.registers)

    @property
    def ops(self) -> PCIIOMMUOps:
        """For the buses below the unit."""
        return self.translation.ops

    def reset(self) -> None:
        """As at power-on: nothing is translated."""
        self.registers.reset()

    def export_state(self) -> State:
        """See :data:`.vmstate.INTEL_IOMMU`."""
        return export_unit(self.registers)

    def import_state(self, state: Mapping[str, Any]) -> OSError | None:
        """Take a checked state; what a follower of a translation answered."""
        return import_unit(self.registers, state)
