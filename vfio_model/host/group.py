"""IOMMU groups and the devices in them, as VFIO sees them.

A group here is one partitionable endpoint. Its state is in one PE block for each of its devices, all stored alike,
because a device process maps a block of its own; only the bus-master word differs.

Two things differ from Linux, because a process serves each open device. A device that is open cannot be opened again
(EBUSY; Linux counts the opens of ``VFIO_GROUP_GET_DEVICE_FD``): the process has one stream and one set of interrupts,
so that a second file would not be the same device. And closing the group's file closes its devices (Linux keeps the
group until the last of them is closed): the stream came over that file's connection, whose end is the release. While
the file is open, ``VFIO_GROUP_UNSET_CONTAINER`` is EBUSY as long as a device is.

Source: the kernel's ``Documentation/driver-api/vfio.rst`` ("Groups, Devices, and IOMMUs").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vfio_model.host.mm import Mm
from vfio_model.host.pe import PeBlock, Stop
from vfio_model.host.pending import Revocation
from vfio_model.host.platform import PlatformName
from vfio_model.host.topology import DeviceSpec, GroupSpec


class Domain(Protocol):
    """What stands behind the groups of a container with a type."""

    @property
    def domain_words(self) -> memoryview:
        """The memory that holds its tables."""

    @property
    def mm(self) -> Mm | None:
        """The process that it is bound to, once it has pinned or counted anything."""


class GroupContainer(Protocol):
    """The container of a group, as who holds the group sees it."""

    @property
    def handle(self) -> int:
        """The number of its file."""

    @property
    def driver(self) -> Domain | None:
        """None before it has a type."""

    def detach(self, group: Group, revocation: Revocation) -> None:
        """``VFIO_GROUP_UNSET_CONTAINER``."""


class HostDevice:
    """A device that a client may open."""

    def __init__(self, spec: DeviceSpec, group: Group, pe: PeBlock) -> None:
        self.spec, self.group, self.pe = spec, group, pe
        self.token: int | None = None
        """What opening it returned; None while nobody has it open."""
        self.dirty: memoryview | None = None
        """The dirty map of the process that serves it (:mod:`vfio_model.host.dirty`), when it has one."""
        self.closes = 0
        """How often it was closed, by its client or because its process died."""

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
        self.container: GroupContainer | None = None
        self.handle: int | None = None
        self.stops = Stop.NOTHING
        """What EEH has stopped."""

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

    def set_dirty(self, on: bool) -> None:
        """Let every device note what it writes, or not."""
        for device in self.devices.values():
            device.pe.set_dirty(on)

    def stop(self, stops: Stop) -> bool:
        """Stop exactly ``stops`` of the PE; returns whether DMA that was allowed is refused from now on."""
        before, after = bool(self.stops & ~Stop.IO), bool(stops & ~Stop.IO)
        self.stops = stops
        if after != before:
            for device in self.devices.values():
                device.pe.set_frozen(after)
        return after and not before
