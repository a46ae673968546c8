"""What the halves of a VT-d unit see of each other.

Registers, queue and faults (:mod:`.unit`, :mod:`.queue`, :mod:`.faults`, :mod:`.page_requests`) decide *what* is to be
invalidated and report; the translation half (:mod:`.structures`, :mod:`.walk`, :mod:`.caches`, :mod:`.spaces`) carries
it out and finds faults. Terms are those of the Intel Virtualization Technology for Directed I/O specification.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple, Protocol

from vfio_model.memory.types import PCI_NO_PASID

RID = PCI_NO_PASID
"""In place of a PASID: requests without one. PASID 0 is a PASID like any other."""


class Granularity(IntEnum):
    """How much an invalidation takes, numbered as in registers and descriptors of contexts and second-level IOTLB."""

    GLOBAL = 1
    DOMAIN = 2
    SELECTIVE = 3
    """One device, or pages."""


class Fault(NamedTuple):
    """A fault to be recorded. ``address`` is where DMA wanted to go (or the index of an interrupt request << 48 for
    remapping faults). Whether fault processing was disabled for it has been looked at before."""

    reason: int
    sid: int
    address: int
    is_write: bool
    pasid: int = RID


class FaultSink(Protocol):
    """Where faults go."""

    def report(self, fault: Fault) -> None:
        """Record ``fault``, or find that it collapses into one that is recorded, or that there is no room."""


Message = Callable[[int, int], None]
"""``message(address, data)``: an interrupt message of the unit itself; it is not remapped."""


class Translator(Protocol):
    """The translation half, as registers and queue command it. Addresses are inclusive ranges.

    Invalidations tell notifiers; what these queue is complete when :meth:`flush` returned.
    """

    def reset(self) -> None:
        """Everything is dropped, nothing is translated."""

    def set_root(self, root: int, scalable: bool) -> None:
        """The root table pointer took effect (SRTP); ``root`` is the table's address. Everything cached goes."""

    def set_enabled(self, on: bool) -> None:
        """Translation enable (TE). Everything cached goes; spaces switch between identity and translation."""

    def invalidate_contexts(self, granularity: Granularity, did: int = 0, sid: int = 0, mask: int = 0) -> None:
        """Context cache. SELECTIVE: function ``sid``, of its function number the bits that FM ``mask`` (0..3) names
        do not matter."""

    def invalidate_iotlb(self, granularity: Granularity, did: int = 0, addr: int = 0, am: int = 0) -> None:
        """IOTLB. SELECTIVE: the 4 KiB << ``am`` bytes that contain ``addr``, of domain ``did``."""

    def invalidate_pasid_iotlb(self, did: int, pasid: int, addr: int | None = None, am: int = 0) -> None:
        """First-level and PASID-tagged IOTLB entries; ``addr`` None: all of the PASID."""

    def invalidate_pasid_cache(self, granularity: Granularity, did: int = 0, pasid: int = 0) -> None:
        """PASID cache. DOMAIN: all of ``did``; SELECTIVE: ``pasid`` of ``did``; GLOBAL."""

    def invalidate_device_tlb(self, sid: int, pasid: int | None, first: int, last: int) -> None:
        """Tell devices that cache: of function ``sid``, bytes ``first``..``last``. ``pasid``: :data:`RID`, a PASID, or
        None for every space of the function. An unknown function is no error."""

    def page_response(self, sid: int, pasid: int, prgi: int, code: int) -> None:
        """The response to a page request group. An unknown function or PASID is no error."""

    def flush(self) -> OSError | None:
        """Return when nobody uses what was invalidated any more; ETIMEDOUT when a device did not follow in time (it
        is fenced then)."""
