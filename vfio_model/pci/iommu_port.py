"""A function's way to the IOMMU of its bus, in the guest machine."""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.memory.atc_cache import PrivateRing, TranslationCache
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.lane import Lane
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.ring import RecordFlags, pasid_flags
from vfio_model.memory.types import PCI_NO_PASID, IOMMUNotifierFlag, MemTxResult
from vfio_model.pci.atc import DeviceAtc, Translated, required
from vfio_model.pci.iommu_ops import (
    Atc,
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponseFn,
    PCIIOMMUOps,
    RequesterBus,
)
from vfio_model.ranges import U64_MAX


class BusIommuPort:
    """An :class:`~vfio_model.pci.iommu_ops.IommuPort`: ``ops`` asked for ``devfn`` of ``bus``, the requester as the
    IOMMU sees it. Errors are those of ``ops``."""

    def __init__(self, ops: PCIIOMMUOps, bus: RequesterBus, devfn: int) -> None:
        self._ops, self._bus, self._devfn = ops, bus, devfn

    def get_iotlb_info(self) -> IotlbInfo:
        """See :class:`PCIIOMMUOps`."""
        return self._ops.get_iotlb_info(self._bus, self._devfn)

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.register_iotlb_notifier(self._bus, self._devfn, pasid, notifier)

    def unregister_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.unregister_iotlb_notifier(self._bus, self._devfn, pasid, notifier)

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        """See :class:`PCIIOMMUOps`."""
        return self._ops.ats_request_translation(self._bus, self._devfn, request)

    def translated_space(self, pasid: int) -> DMAImpl:
        """See :class:`PCIIOMMUOps`."""
        return self._ops.translated_space(self._bus, self._devfn, pasid)

    def watch_translated_requests(self, fn: AtsGate) -> Callable[[], None]:
        """See :class:`PCIIOMMUOps`."""
        return self._ops.watch_translated_requests(self._bus, self._devfn, fn)

    def open_atc(self, pasid: int, *, priv: bool = False) -> Atc:
        """See :class:`~vfio_model.pci.iommu_ops.IommuPort`. Nothing waits here: what is invalidated goes at once."""
        ring = PrivateRing()
        flags = pasid_flags(pasid, RecordFlags.ATS)

        def invalidated(_notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
            ring.invalidate(0, entry.iova, min(entry.last, U64_MAX), flags)

        def close(_atc: DeviceAtc) -> None:
            self.unregister_iotlb_notifier(pasid, notifier)

        notifier = IOMMUNotifier(invalidated, IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, U64_MAX)
        translated = self.translated_space(PCI_NO_PASID)

        def ask(request: AtsRequest) -> tuple[AtsCompletion, int]:
            return self.ats_request_translation(request), 0

        def through(found: Translated, view: memoryview, is_write: bool) -> MemTxResult:
            return translated.write(found.address, view) if is_write else translated.read(found.address, view)

        self.register_iotlb_notifier(pasid, notifier)
        cache = TranslationCache(
            ring.reader, Lane.private(), as_id=0, pasid=pasid, kind=RecordFlags.ATS, required=required(priv)
        )
        return DeviceAtc(cache, None, ask, through, close, pasid=pasid, priv=priv)

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_register_notifier(self._bus, self._devfn, pasid, fn)

    def pri_unregister_notifier(self, pasid: int) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_unregister_notifier(self._bus, self._devfn, pasid)

    def pri_request_page(self, request: PageRequest) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_request_page(self._bus, self._devfn, request)
