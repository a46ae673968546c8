"""IOMMU groups and the devices in them, as VFIO sees them.

A group here is one partitionable endpoint. Its state is in one PE block for each of its devices, all stored alike,
because a device process maps a block of its own; only the bus-master word differs.

Source: the kernel's ``Documentation/driver-api/vfio.rst`` ("Groups, Devices, and IOMMUs").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from vfio_model.host.pe import PeBlock
from vfio_model.host.platform import PlatformName
from vfio_model.host.topology import DeviceSpec, GroupSpec

if TYPE_CHECKING:
    from vfio_model.host.container import VfioContainer


class HostDevice:
    """A device that a client may open."""

    def __init__(self, spec: DeviceSpec, group: Group, pe: PeBlock) -> None:
        self.spec, self.group, self.pe = spec, group, pe
        self.token: int | None = None
        """What opening it returned; None while nobody has it open."""

    @property
    def name(self) -> str:
        """Its PCI address, as ``VFIO_GROUP_GET_DEVICE_FD`` takes it."""
        return self.spec.name

    @property
    def open_count(self) -> int:
        """0 or 1: one process serves one open of a device."""
        return int(self.token is not None)


class Group:
    """A group: its devices, the container that it is in and the handle that has it open.

    ``make_pe(device name)`` gives the PE block of one device.
    """

    def __init__(self, spec: GroupSpec, platform: PlatformName, make_pe: Callable[[str], PeBlock]) -> None:
        self.spec = spec
        self.iommu = spec.iommu or platform
        self.devices = {device.name: HostDevice(device, self, make_pe(device.name)) for device in spec.devices}
        self.container: VfioContainer | None = None
        self.handle: int | None = None

    @property
    def id(self) -> int:
        """The group's number."""
        return self.spec.id

    @property
    def open_devices(self) -> list[HostDevice]:
        """Those that somebody has open."""
        return [device for device in self.devices.values() if device.token is not None]

    @property
    def lanes(self) -> list[str]:
        """Names of the devices whose lanes a revocation has to wait for."""
        return [device.name for device in self.open_devices]

    def set_window(self, slot: int, record: int) -> None:
        """Publish a window record to every device, 0 takes the window away."""
        for device in self.devices.values():
            device.pe.set_window(slot, record)

    def set_frozen(self, frozen: bool) -> None:
        """Freeze or thaw the PE."""
        for device in self.devices.values():
            device.pe.set_frozen(frozen)
