"""``VFIO_DEVICE_GET_IRQ_INFO`` and ``VFIO_DEVICE_SET_IRQS`` of a device process.

Interrupt indices are vfio-pci's. INTx has one interrupt, which masks itself; MSI and MSI-X have as many as the device
has vectors; ERR and REQ have one each, which no device here raises by itself but a client may trigger. An index is set
up in whole or in part; messages go out by the one that is set up, MSI-X first.

Source: ``include/uapi/linux/vfio.h``; QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_DEVICE_SET_IRQS").
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence

from hostd.device_surroundings import Bell, ProcessSurroundings
from protocols.transport.kernel import EventFd, is_eventfd
from protocols.transport.unix import close_fds
from protocols.vfio_user import messages as wire
from vfio_model.pci.device import PCIDevice
from vfio_model.uapi.vfio import VFIO_PCI_NUM_IRQS, IrqInfoFlags, IrqSetFlags, PciIrq

_INTX = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
_MSI = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
_MSIX = int(PciIrq.VFIO_PCI_MSIX_IRQ_INDEX)
_DATA = IrqSetFlags.VFIO_IRQ_SET_DATA_NONE | IrqSetFlags.VFIO_IRQ_SET_DATA_BOOL | IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD
_ACTION = (
    IrqSetFlags.VFIO_IRQ_SET_ACTION_MASK
    | IrqSetFlags.VFIO_IRQ_SET_ACTION_UNMASK
    | IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER
)


class DeviceIrqs:
    """The interrupts of ``device``. Errors are ``OSError`` with the errno of the reply."""

    def __init__(self, device: PCIDevice, around: ProcessSurroundings) -> None:
        self._device, self._around = device, around
        self._counts = {
            _INTX: int(device.INTERRUPT_PIN > 0),
            _MSI: device.MSI_VECTORS,
            _MSIX: 0 if device.MSIX is None else device.MSIX.vectors,
            int(PciIrq.VFIO_PCI_ERR_IRQ_INDEX): 1,
            int(PciIrq.VFIO_PCI_REQ_IRQ_INDEX): 1,
        }

    def info(self, index: int) -> wire.IrqInfo:
        """DEVICE_GET_IRQ_INFO. :raise OSError: EINVAL when there is no such index."""
        if index >= VFIO_PCI_NUM_IRQS:
            raise OSError(errno.EINVAL, f"interrupt {index}")
        flags, count = int(IrqInfoFlags.VFIO_IRQ_INFO_EVENTFD), self._counts[index]
        if index == _INTX:
            flags |= int(IrqInfoFlags.VFIO_IRQ_INFO_MASKABLE | IrqInfoFlags.VFIO_IRQ_INFO_AUTOMASKED)
        elif index != _MSIX:
            flags |= int(IrqInfoFlags.VFIO_IRQ_INFO_NORESIZE)
        return wire.IrqInfo(16, flags if count else 0, index, count)

    def set(self, request: wire.SetIrqs, fds: list[int]) -> None:
        """DEVICE_SET_IRQS; ``fds`` are taken over.

        :raise OSError: EINVAL when flags, range, data and descriptors do not belong together; ``fds`` are closed then.
        """
        try:
            flags = self._check(request, fds)
            if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD:
                for fd in fds:
                    os.set_blocking(fd, False)  # a full counter must not hold the device up
        except OSError:
            close_fds(fds)
            raise
        if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD:
            self._assign(request, flags, fds)
        elif request.count == 0:
            self.set_events(request.index, 0, (), self._counts[request.index])
        else:
            self._act(request, flags)

    def _check(self, request: wire.SetIrqs, fds: list[int]) -> IrqSetFlags:
        flags, index = IrqSetFlags(request.flags & int(_DATA | _ACTION)), request.index
        count = self._counts.get(index, 0)
        data, action = flags & _DATA, flags & _ACTION
        if request.flags != flags or data.bit_count() != 1 or action.bit_count() != 1:
            raise OSError(errno.EINVAL, f"interrupt {index}: flags {request.flags:#x}")
        if index not in self._counts or request.start + request.count > count:
            raise OSError(errno.EINVAL, f"interrupt {index}: {request.start} + {request.count} of {count}")
        masks = not action & IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER
        if masks and index != _INTX:
            raise OSError(errno.EINVAL, f"interrupt {index} cannot be masked")
        if request.count == 0 and (masks or request.start or not data & IrqSetFlags.VFIO_IRQ_SET_DATA_NONE):
            raise OSError(errno.EINVAL, f"interrupt {index}: a count of 0 switches all of it off, and nothing else")
        wanted = request.count if data & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD else 0
        if len(fds) not in (0, wanted) or not all(map(is_eventfd, fds)):
            raise OSError(errno.EINVAL, f"interrupt {index}: {len(fds)} descriptors, {wanted} eventfds belong here")
        if data & IrqSetFlags.VFIO_IRQ_SET_DATA_BOOL and len(request.data) < request.count:
            raise OSError(errno.EINVAL, f"interrupt {index}: {len(request.data)} booleans for {request.count}")
        return flags

    def _assign(self, request: wire.SetIrqs, flags: IrqSetFlags, fds: list[int]) -> None:
        """Eventfds for interrupts, or for what happens to their mask; none of them takes those away."""
        events = [EventFd(fd) for fd in fds]
        if flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER:
            self.set_events(request.index, request.start, events, request.count)
        elif flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_MASK:
            self._around.intx.on_mask(events[0] if events else None)
        else:
            self._around.intx.on_unmask(self._around.unmask_bell(events[0]) if events else None)

    def _act(self, request: wire.SetIrqs, flags: IrqSetFlags) -> None:
        asked = request.data[: request.count] if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_BOOL else b"\1" * request.count
        around, index = self._around, request.index
        for number, wanted in enumerate(asked, request.start):
            if not wanted:
                continue
            if flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_MASK:
                around.intx.mask()
            elif flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_UNMASK:
                around.intx.unmask()
            elif index == _INTX:
                around.intx.trigger()
            else:
                around.vectors_of(index).trigger(number)

    def set_events(self, index: int, start: int, events: Sequence[Bell], count: int = 0) -> None:
        """Let the interrupts from ``start`` ring ``events``, taken over; without any the ``count`` ones from there are
        switched off.
        """
        if index == _INTX:
            self._around.intx.set_event(events[0] if events else None)
        elif events:
            self._around.vectors_of(index).set_events(start, events)
        else:
            for number in range(start, start + count):
                self._around.vectors_of(index).clear(number)
        self._device.irq_by_msi = self._around.by_message

    def drop(self) -> None:
        """The client is gone: nothing is signalled any more."""
        self._around.drop_irqs()
        self._device.irq_by_msi = None
