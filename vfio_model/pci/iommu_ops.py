"""The one way by which a bus reaches its IOMMU (QEMU's ``PCIIOMMUOps``), and what travels it.

An IOMMU subclasses :class:`PCIIOMMUOps` and is put on the bus of its host bridge. What it does not offer answers with
``OSError`` ENODEV. Functions are named by *bus object* and devfn, after requester-ID aliasing: bus numbers are the
guest's to change, so a requester ID is computed when it is needed.

ATS, PRI and PASID follow the PCI Express Base Specification, "Address Translation Services" (chapter 10).
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable
from enum import Enum, IntEnum
from typing import NamedTuple, Protocol

from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.types import PCI_NO_PASID


class RequesterBus(Protocol):
    """What an IOMMU sees of a bus."""

    @property
    def name(self) -> str:
        """For traces."""

    @property
    def number(self) -> int:
        """What the guest calls it now."""


class IotlbInfo(NamedTuple):
    """For a device that caches translations."""

    addr_width: int
    """Bits of an untranslated address."""
    min_page_size: int
    """Bytes of the smallest page."""


class AtsRequest(NamedTuple):
    """A translation request for ``length`` bytes from ``addr``; at most ``max_entries`` pieces are wanted."""

    addr: int
    length: int
    no_write: bool = False
    pasid: int = PCI_NO_PASID
    priv: bool = False
    exec: bool = False
    max_entries: int = 512


class AtsCompletion(NamedTuple):
    """Pieces in ascending order, with no gap; one without the permissions asked for counts as an error.

    ``complete`` is False when the range goes on behind the last piece (-ENOMEM in QEMU).
    """

    entries: list[IOMMUTLBEntry]
    errors: int = 0
    complete: bool = True


class PageRequest(NamedTuple):
    """A page request message; ``prgi`` (9 bits) names its group, ``last`` ends the group."""

    addr: int
    pasid: int
    prgi: int
    last: bool
    is_read: bool
    is_write: bool
    priv: bool = False
    exec: bool = False


class PageResponse(IntEnum):
    """The response code of a page request group (PCIe 10.4.2)."""

    SUCCESS = 0
    INVALID_REQUEST = 1
    RESPONSE_FAILURE = 15


PageResponseFn = Callable[[int, PageResponse], None]
"""``fn(prgi, code)``: the response to a group came."""


class AtcOutcome(Enum):
    """What became of an access through a device's cache of translations."""

    OK = "ok"
    MISS = "miss"
    """Nothing is cached that gives every permission needed: ask for it, or have the page requested."""
    UNTRANSLATED_ONLY = "untranslated only"
    """The IOMMU wants untranslated requests there (the U bit of a completion)."""
    FAILED = "failed"
    """The request with the translated address was refused on its way, or the function has no way any more."""


class Atc(Protocol):
    """A device's cache (ATC) of translations of one PASID, its invalidations followed by whoever made it.

    An entry is used only while it is true: after the guest was told that an invalidation is complete, no access finds
    what it took away.
    """

    @property
    def entries(self) -> int:
        """How many translations are cached."""

    def fill(self, request: AtsRequest) -> AtsCompletion:
        """Ask for translations; those with every permission asked for are cached. PASID and privilege of the request
        are this cache's. One that an invalidation overtook is asked for again.

        :raise OSError: as :meth:`PCIIOMMUOps.ats_request_translation`; EAGAIN when invalidations never end; ENODEV when
            the cache is closed, or the IOMMU gone.
        """

    @property
    def access(self) -> Callable[[int, memoryview, bool], tuple[int, AtcOutcome]]:
        """``access(addr, view, is_write)``: move bytes between ``view`` and ``addr`` by a translated request, in one
        DMA section: (bytes moved, outcome). To be looked up for each use: it changes with what the function may do.

        Fewer bytes than wanted may move; it is none unless the outcome is OK.
        """

    def close(self) -> None:
        """Forget everything, follow no invalidations any more. Harmless twice."""


AtsGate = Callable[[bool], None]
"""``fn(open)``: whether the IOMMU lets translated requests of a function through, as far as it depends on the
function and not on the address."""


def _absent(what: str) -> OSError:
    return OSError(errno.ENODEV, f"this IOMMU has no {what}")


class PCIIOMMUOps(ABC):
    """What an IOMMU does for the buses below it. ``devfn`` is 0..255."""

    @abstractmethod
    def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
        """The DMA address space of the function; the same object each time."""

    def refuses_assignment(self, bus: RequesterBus, devfn: int, host_bits: int) -> str:
        """Why the function cannot be a device of a host whose IOMMU takes addresses of ``host_bits`` bits: as this one
        is configured, it does not tell the host all that it has to know. Empty: it can (QEMU's ``set_iommu_device``).
        """
        return ""

    def get_iotlb_info(self, bus: RequesterBus, devfn: int) -> IotlbInfo:
        """:raise OSError: ENODEV."""
        raise _absent("translation caches in devices")

    def register_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        """Tell ``notifier`` (DEVIOTLB_UNMAP) of invalidations in the space of ``pasid``; its ``flush()`` completes them
        (ETIMEDOUT: a device was too late, and was fenced).

        :raise OSError: ENODEV; ENOTSUP when device-TLB invalidation is off.
        """
        raise _absent("translation caches in devices")

    def unregister_iotlb_notifier(self, bus: RequesterBus, devfn: int, pasid: int, notifier: IOMMUNotifier) -> None:
        """:raise OSError: ENODEV."""
        raise _absent("translation caches in devices")

    def ats_request_translation(self, bus: RequesterBus, devfn: int, request: AtsRequest) -> AtsCompletion:
        """:raise OSError: ENODEV."""
        raise _absent("address translation services")

    def translated_space(self, bus: RequesterBus, devfn: int, pasid: int) -> DMAImpl:
        """Where requests with translated addresses go; what the IOMMU blocks is a fault and an error there.

        :raise OSError: ENODEV.
        """
        raise _absent("address translation services")

    def watch_translated_requests(self, bus: RequesterBus, devfn: int, fn: AtsGate) -> Callable[[], None]:
        """Tell ``fn`` now, and whenever it changes, whether requests with translated addresses are let through; what is
        returned ends that.

        An IOMMU that takes the right away (VT-d: the context entry's TT or DTE, when that takes effect) says so before
        the flush of the notifiers, which completes it. One that never does needs no more than this.
        """
        fn(True)
        return lambda: None

    def pri_register_notifier(self, bus: RequesterBus, devfn: int, pasid: int, fn: PageResponseFn) -> None:
        """Tell ``fn`` of the responses to page requests of ``pasid``.

        :raise OSError: ENODEV.
        """
        raise _absent("page request interface")

    def pri_unregister_notifier(self, bus: RequesterBus, devfn: int, pasid: int) -> None:
        """:raise OSError: ENODEV."""
        raise _absent("page request interface")

    def pri_request_page(self, bus: RequesterBus, devfn: int, request: PageRequest) -> None:
        """:raise OSError: ENODEV; EPERM, EINVAL, ENOSPC, EIO: the request is not in the queue."""
        raise _absent("page request interface")


class IommuPort(Protocol):
    """The same, as a device's surroundings offer it: who asks is known there. In the guest machine the bus is behind
    it, in a device process a connection. Its users are the checked methods of a PCIe device."""

    def get_iotlb_info(self) -> IotlbInfo:
        """See :class:`PCIIOMMUOps`."""

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See :class:`PCIIOMMUOps`."""

    def unregister_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See :class:`PCIIOMMUOps`."""

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        """See :class:`PCIIOMMUOps`."""

    def translated_space(self, pasid: int) -> DMAImpl:
        """See :class:`PCIIOMMUOps`. ENODEV in a device process: translated requests go through an :class:`Atc`."""

    def watch_translated_requests(self, fn: AtsGate) -> Callable[[], None]:
        """See :class:`PCIIOMMUOps`."""

    def open_atc(self, pasid: int, *, priv: bool = False) -> Atc:
        """A cache of translations of ``pasid``, asked for with or without privilege; empty.

        :raise OSError: as :meth:`PCIIOMMUOps.register_iotlb_notifier`.
        """

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        """See :class:`PCIIOMMUOps`."""

    def pri_unregister_notifier(self, pasid: int) -> None:
        """See :class:`PCIIOMMUOps`."""

    def pri_request_page(self, request: PageRequest) -> None:
        """See :class:`PCIIOMMUOps`."""
