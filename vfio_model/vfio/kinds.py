"""Which kind of container a user asks for, and in what order it tries what the host has."""

from __future__ import annotations

from typing import Literal

from vfio_model.uapi.containers import CONTAINER_KINDS, IOMMU_TYPES, ContainerKind

__all__ = ["CONTAINER_KINDS", "IOMMU_TYPES", "PREFERENCE", "ContainerChoice", "ContainerKind"]

ContainerChoice = Literal["auto", "spapr-v2", "spapr-v1", "type1v2", "type1"]
"""``auto``: the first of :data:`PREFERENCE` that the host has."""

PREFERENCE: tuple[ContainerKind, ...] = ("type1v2", "type1", "spapr-v2", "spapr-v1")
"""The order in which QEMU tries VFIO_CHECK_EXTENSION."""
