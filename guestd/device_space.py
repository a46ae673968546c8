"""The DMA address space of a device, as processes that cache its translations know it."""

from __future__ import annotations

from typing import NamedTuple

from vfio_model.memory.address_space import AddressSpace


class DeviceSpace(NamedTuple):
    """Devices with the same space share what is cached of it."""

    as_id: int
    """What invalidations of it are published by: unsigned, 64 bits, the same for as long as the machine lives."""
    address_space: AddressSpace
