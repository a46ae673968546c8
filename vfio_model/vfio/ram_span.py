"""From a guest-physical page to the RAM block behind it (the last step of QEMU's ``vfio_get_xlat_addr``)."""

from __future__ import annotations

from typing import NamedTuple

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import RAMRegion
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
    """The RAM at ``gpa``, or None when something else (or nothing) answers there."""
    found = system.view.lookup(gpa)
    if found is None or not isinstance(found.region, RAMRegion):
        return None
    into = gpa - found.start
    return RAMSpan(found.region.block, found.offset + into, found.last - gpa + 1, found.readonly)
