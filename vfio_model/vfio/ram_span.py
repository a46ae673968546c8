"""From a guest-physical page to the RAM block behind it (the last step of QEMU's ``vfio_get_xlat_addr``)."""

from __future__ import annotations

from typing import NamedTuple

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.translation import DISCARDED
from vfio_model.ranges import Gpa, Hva


class RAMSpan(NamedTuple):
    """``size`` bytes of ``block`` from ``offset``: as far as the same RAM goes on at consecutive guest addresses."""

    block: RAMBlock
    offset: int
    size: int
    readonly: bool

    @property
    def hva(self) -> Hva:
        """Where the client has the first byte mapped."""
        return self.block.hva_of(self.offset)


def ram_span(system: AddressSpace, gpa: Gpa) -> RAMSpan | None:
    """The RAM at ``gpa``, or None when something else (or nothing) answers there, or that part was discarded.

    A span ends where a discarded part begins.
    """
    found = system.view.lookup(gpa)
    if found is None or not isinstance(found.region, RAMRegion):
        return None
    into = gpa - found.start
    size = found.last - gpa + 1
    manager = found.region.discard_manager
    if manager is not None:
        size = min(size, manager.populated_length(found.offset + into))
        if not size:
            return None
    return RAMSpan(found.region.block, found.offset + into, size, found.readonly)


def refusal(system: AddressSpace, gpa: Gpa, size: int) -> str:
    """Why ``size`` bytes from ``gpa`` are no span, in QEMU's words."""
    found = system.view.lookup(gpa)
    if found is not None and isinstance(found.region, RAMRegion) and (manager := found.region.discard_manager):
        shown = min(size, found.last - gpa + 1)
        if manager.populated_length(gpa - found.start + found.offset) < shown:
            return DISCARDED
    return "iommu map to non memory area"
