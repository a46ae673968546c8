"""Which kind of container a user asks for, and in what order it tries what the host has."""

from __future__ import annotations

from errno import EINVAL
from typing import Literal

from vfio_model.uapi.containers import CONTAINER_KINDS, IOMMU_TYPES, ContainerKind
from vfio_model.vfio.ioctl import ContainerFile

__all__ = ["CONTAINER_KINDS", "IOMMU_TYPES", "PREFERENCE", "ContainerChoice", "ContainerKind", "choose_kind"]

ContainerChoice = Literal["auto", "spapr-v2", "spapr-v1", "type1v2", "type1"]
"""``auto``: the first of :data:`PREFERENCE` that the host has."""

PREFERENCE: tuple[ContainerKind, ...] = ("type1v2", "type1", "spapr-v2", "spapr-v1")
"""The order in which QEMU tries VFIO_CHECK_EXTENSION."""


def choose_kind(container: ContainerFile, wanted: ContainerChoice) -> ContainerKind:
    """The kind to ask for with VFIO_SET_IOMMU. :raise OSError: EINVAL when the host has none that would do."""
    for kind in PREFERENCE if wanted == "auto" else (wanted,):
        if container.check_extension(IOMMU_TYPES[kind]):
            return kind
    raise OSError(EINVAL, f"no available IOMMU models: the host has no container of kind {wanted}")
