"""Who a function is to an IOMMU: the requester that arrives at the bus which the IOMMU sits on.

On a conventional bus nobody says who he is. The bridge above takes ownership of what it forwards: a PCI Express to PCI
bridge names function 0 of its secondary bus (PCI Express to PCI/PCI-X Bridge Specification, 2.3, "Assignment of
Requester ID and Tag"), any other names itself. All functions behind it are one requester then, and share one address
space. A PCI Express bus hands requests on as they are.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from vfio_model.pci.iommu_ops import PCIIOMMUOps, RequesterBus


class Segment(RequesterBus, Protocol):
    """What the walk sees of a bus."""

    @property
    def express(self) -> bool:
        """Whether it is PCI Express."""

    @property
    def iommu_ops(self) -> PCIIOMMUOps | None:
        """The IOMMU that sits on it."""

    @property
    def bypass_iommu(self) -> bool:
        """Whether requests from its root bus go past the IOMMU."""

    @property
    def is_root(self) -> bool:
        """Whether it is a host bridge's or an expander's."""

    @property
    def iommu_per_bus(self) -> bool:
        """Whether the IOMMU on it serves this root bus alone, and no expander's."""

    def above(self) -> Above | None:
        """The bridge above and its place; None at the top."""


class Above(NamedTuple):
    """The function by which a bus hangs on another."""

    bus: Segment
    devfn: int
    takes_ownership: bool
    """Whether it names its secondary bus as the requester of what it forwards (a PCI Express to PCI bridge)."""


class Requester(NamedTuple):
    """``ops`` know the function as ``devfn`` of ``bus``. Bus numbers are the guest's to change: the requester ID is
    computed from them when it is needed."""

    ops: PCIIOMMUOps
    bus: RequesterBus
    devfn: int


def requester_of(bus: Segment, devfn: int) -> Requester | None:
    """The requester as which ``devfn`` of ``bus`` appears; None when nothing translates it."""
    at: Segment = bus
    alias: Segment = bus
    while at.iommu_ops is None:
        above = at.above()
        if above is None or (at.is_root and above.bus.iommu_per_bus):
            return None
        if not at.express:
            alias, devfn = (at, 0) if above.takes_ownership else (above.bus, above.devfn)
        at = above.bus
    return None if alias.bypass_iommu else Requester(at.iommu_ops, alias, devfn)


def requester_id(bus: RequesterBus, devfn: int) -> int:
    """bus << 8 | devfn, with the bus's number of now."""
    return bus.number << 8 | devfn
