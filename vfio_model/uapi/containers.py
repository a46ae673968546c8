"""The kinds of container there are, by the names that people give them, and the number of each for VFIO_SET_IOMMU.

A kind belongs to one *driver* of the host's kernel. A driver answers VFIO_CHECK_EXTENSION for the types it serves and
for a few properties besides, which are numbers of the same space but no types.

Source: ``include/uapi/linux/vfio.h``, "Extensions".
"""

from __future__ import annotations

from typing import Literal, get_args

from vfio_model.uapi.vfio import IommuType

ContainerKind = Literal["spapr-v2", "spapr-v1", "type1v2", "type1"]
CONTAINER_KINDS: tuple[ContainerKind, ...] = get_args(ContainerKind)

IOMMU_TYPES: dict[ContainerKind, IommuType] = {
    "spapr-v2": IommuType.VFIO_SPAPR_TCE_v2_IOMMU,
    "spapr-v1": IommuType.VFIO_SPAPR_TCE_IOMMU,
    "type1v2": IommuType.VFIO_TYPE1v2_IOMMU,
    "type1": IommuType.VFIO_TYPE1_IOMMU,
}
KIND_OF_TYPE: dict[int, ContainerKind] = {number: kind for kind, number in IOMMU_TYPES.items()}

DriverName = Literal["spapr", "type1"]
DRIVERS: dict[ContainerKind, DriverName] = {
    "spapr-v2": "spapr",
    "spapr-v1": "spapr",
    "type1v2": "type1",
    "type1": "type1",
}
DRIVER_PROPERTIES: dict[DriverName, frozenset[IommuType]] = {
    "spapr": frozenset({IommuType.VFIO_EEH}),
    "type1": frozenset({IommuType.VFIO_UNMAP_ALL, IommuType.VFIO_UPDATE_VADDR}),
}
"""What a driver says yes to beside the types it serves."""
