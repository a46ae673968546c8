"""A function's way to the IOMMU of its bus, in the guest machine."""

from __future__ import annotations

from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.pci.iommu_ops import (
    AtsCompletion,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponseFn,
    PCIIOMMUOps,
    RequesterBus,
)


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

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_register_notifier(self._bus, self._devfn, pasid, fn)

    def pri_unregister_notifier(self, pasid: int) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_unregister_notifier(self._bus, self._devfn, pasid)

    def pri_request_page(self, request: PageRequest) -> None:
        """See :class:`PCIIOMMUOps`."""
        self._ops.pri_request_page(self._bus, self._devfn, request)
