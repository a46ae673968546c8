"""``VFIO_USER_DEVICE_GET_REGION_IO_FDS``: eventfds that a client's hypervisor rings in place of a write.

Source: QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_DEVICE_GET_REGION_IO_FDS"); KVM_IOEVENTFD of Linux's
``Documentation/virt/kvm/api.rst``. A client that does not ask, or asks in vain, writes as ever. What was rung before a
message was sent is seen before that is carried out.
"""

from __future__ import annotations

import errno
import select
from typing import Final

from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import IOEVENTFD_DATAMATCH, IoFd
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.doorbell import Doorbell
from vfio_model.uapi.vfio import VFIO_PCI_NUM_REGIONS

_ANY_SIZE: Final = 4
"""The size with which a doorbell of any size is rung."""


class DeviceDoorbells:
    """Those of ``device``, for one client."""

    def __init__(self, device: PCIDevice, loop: Loop) -> None:
        self._device, self._loop = device, loop
        self._events: dict[Doorbell, EventFd] = {}
        self._rings = select.poll()

    def describe(self, request: wire.RegionIoFds, max_fds: int) -> tuple[wire.RegionIoFds, tuple[int, ...]]:
        """The answer and its descriptors, of which there are at most ``max_fds``.

        :raise OSError: EINVAL when there is no such region.
        """
        index = request.index
        if index >= VFIO_PCI_NUM_REGIONS or request.flags or request.count:
            raise OSError(errno.EINVAL, f"region {index}, flags {request.flags:#x}")
        bells = [bell for bell in self._device.DOORBELLS if bell.bar == index][: max(max_fds, 1)]
        areas = b"".join(_area(bell, number).pack() for number, bell in enumerate(bells))
        full = wire.RegionIoFds.SIZE + len(areas)
        if request.argsz < full or not bells:
            return wire.RegionIoFds(full, 0, index, 0), ()
        fds = tuple(self._event(bell).fd for bell in bells)
        return wire.RegionIoFds(full, 0, index, len(bells), areas), fds

    def _event(self, bell: Doorbell) -> EventFd:
        event = self._events.get(bell)
        if event is None:
            event = self._events[bell] = EventFd()
            self._loop.register(event, lambda: self._rung(bell))
            self._rings.register(event, select.POLLIN)
        return event

    def _rung(self, bell: Doorbell) -> None:
        event = self._events.get(bell)
        if event is not None and event.drain():
            self._device.region_write(bell.bar, bell.offset, bell.size or _ANY_SIZE, bell.value or 0)

    def settle(self) -> None:
        """What was rung until now has reached the device when this returns."""
        if self._events and self._rings.poll(0):
            for bell in list(self._events):
                self._rung(bell)

    def close(self) -> None:
        """The client is gone. Harmless twice."""
        for event in self._events.values():
            self._rings.unregister(event)
            self._loop.unregister(event)
            event.close()
        self._events.clear()


def _area(bell: Doorbell, number: int) -> IoFd:
    flags = 0 if bell.value is None else IOEVENTFD_DATAMATCH
    return IoFd(bell.offset, bell.size, number, flags=flags, datamatch=bell.value or 0)
