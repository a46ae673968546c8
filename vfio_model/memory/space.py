"""What the files below :mod:`vfio_model.memory.address_space` see of an address space.

An IOMMU names the space that its translations lead to, a section the space that shows it, a mapping the spaces that it
passes through. They all come before ``AddressSpace``, which is built out of them; so they speak of this.

::

    region ─► flatview ─► space ─► iotlb, listener ─► notifier ─► iommu_region ─► access, translation ─► zero_copy
                                                                                     └──────────┴──► address_space
"""

from __future__ import annotations

from typing import Protocol

from vfio_model.memory.flatview import FlatView
from vfio_model.memory.mapping import BounceBudget, MappingTable
from vfio_model.memory.types import MemTxResult, ReadBuffer, WriteBuffer


class Space(Protocol):
    """An address space in use. Its methods and its view are those of now: a commit replaces them, nobody keeps them."""

    @property
    def name(self) -> str:
        """For traces and explanations."""

    @property
    def view(self) -> FlatView:
        """What it shows."""

    @property
    def bounce(self) -> BounceBudget:
        """Bytes for mappings that cannot be shown in place."""

    @property
    def mappings(self) -> MappingTable:
        """Mappings that show or pass through this space, by the addresses they have here."""

    def read(self, addr: int, out: WriteBuffer, /) -> MemTxResult:
        """Fill ``out``; stops at the first failing piece and zero-fills from there."""

    def write(self, addr: int, data: ReadBuffer, /) -> MemTxResult:
        """Stops at the first failing piece; the bytes before it have moved."""
