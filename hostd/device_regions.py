"""A device model as a vfio-user server shows it: information, regions, interrupts, reset.

Region indices and interrupt indices are vfio-pci's; a BAR is little-endian; configuration space is region 7.
Accesses of other sizes than a register has are split into aligned ones. Source: QEMU ``docs/interop/vfio-user.rst`` and
``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_GET_REGION_INFO", "VFIO_DEVICE_SET_IRQS").
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence

from hostd.device_surroundings import Bell, ProcessSurroundings
from protocols.transport.kernel import EventFd, is_eventfd
from protocols.transport.unix import close_fds
from protocols.vfio_user import messages as wire
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.config_space import CONFIG_SIZE
from vfio_model.pci.device import PCIDevice
from vfio_model.uapi.vfio import (
    VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS,
    DeviceFlags,
    IrqInfoFlags,
    IrqSetFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
)

_CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_INTX = int(PciIrq.VFIO_PCI_INTX_IRQ_INDEX)
_MSI = int(PciIrq.VFIO_PCI_MSI_IRQ_INDEX)
_RW = int(RegionFlags.VFIO_REGION_INFO_FLAG_READ | RegionFlags.VFIO_REGION_INFO_FLAG_WRITE)


class DeviceRegions:
    """``device`` behind region and interrupt numbers. Errors are ``OSError`` with the errno of the reply."""

    def __init__(self, device: PCIDevice, around: ProcessSurroundings) -> None:
        self.device, self._around = device, around
        self._bars = {bar.index: bar for bar in device.BARS}
        self.accesses = 0
        """Region accesses served."""

    # -- information -------------------------------------------------------------------------------------------------

    def info(self) -> wire.DeviceInfo:
        """DEVICE_GET_INFO."""
        flags = int(DeviceFlags.VFIO_DEVICE_FLAGS_RESET | DeviceFlags.VFIO_DEVICE_FLAGS_PCI)
        return wire.DeviceInfo(16, flags, VFIO_PCI_NUM_REGIONS, VFIO_PCI_NUM_IRQS)

    def region_info(self, index: int) -> wire.RegionInfo:
        """DEVICE_GET_REGION_INFO. :raise OSError: EINVAL when there is no such index."""
        if index >= VFIO_PCI_NUM_REGIONS:
            raise OSError(errno.EINVAL, f"region {index}")
        bar = self._bars.get(index)
        size = CONFIG_SIZE if index == _CONFIG else bar.size if bar is not None else 0
        return wire.RegionInfo(32, _RW if size else 0, index, 0, size, 0)

    def irq_info(self, index: int) -> wire.IrqInfo:
        """DEVICE_GET_IRQ_INFO. :raise OSError: EINVAL when there is no such index."""
        if index >= VFIO_PCI_NUM_IRQS:
            raise OSError(errno.EINVAL, f"interrupt {index}")
        flags, count = int(IrqInfoFlags.VFIO_IRQ_INFO_EVENTFD), self._irq_count(index)
        if index == _INTX and count:
            flags |= int(IrqInfoFlags.VFIO_IRQ_INFO_MASKABLE | IrqInfoFlags.VFIO_IRQ_INFO_AUTOMASKED)
        elif index == _MSI and count:
            flags |= int(IrqInfoFlags.VFIO_IRQ_INFO_NORESIZE)
        return wire.IrqInfo(16, flags if count else 0, index, count)

    def _irq_count(self, index: int) -> int:
        if index == _INTX:
            return int(self.device.INTERRUPT_PIN > 0)
        return self.device.MSI_VECTORS if index == _MSI else 0

    # -- regions -----------------------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, count: int) -> bytes:
        """REGION_READ. :raise OSError: EINVAL outside a region or for a size that no register has; EIO from the
        device."""
        self.accesses += 1
        if index == _CONFIG:
            pieces = _pieces(offset, count, 1, 4, CONFIG_SIZE)
            return b"".join(self.device.config_read(at, size).to_bytes(size, "little") for at, size in pieces)
        bar = self._bar(index)
        data = bytearray()
        for at, size in _pieces(offset, count, *bar.access, bar.size):
            value = self.device.bar_read(index, at, size)
            if value is None:
                raise OSError(errno.EIO, f"BAR {index}+{at:#x}")
            data += value.to_bytes(size, "little")
        return bytes(data)

    def write(self, index: int, offset: int, data: bytes) -> None:
        """REGION_WRITE. :raise OSError: as :meth:`read`."""
        self.accesses += 1
        if index == _CONFIG:
            for at, size in _pieces(offset, len(data), 1, 4, CONFIG_SIZE):
                self.device.config_write(at, size, int.from_bytes(data[at - offset : at - offset + size], "little"))
            return
        bar = self._bar(index)
        for at, size in _pieces(offset, len(data), *bar.access, bar.size):
            value = int.from_bytes(data[at - offset : at - offset + size], "little")
            if self.device.bar_write(index, at, size, value) is not MemTxResult.OK:
                raise OSError(errno.EIO, f"BAR {index}+{at:#x}")

    def _bar(self, index: int) -> BarSpec:
        bar = self._bars.get(index)
        if bar is None:
            raise OSError(errno.EINVAL, f"no region {index}")
        return bar

    def reset(self) -> None:
        """DEVICE_RESET: the device as after power-on; where its interrupts go is the client's and stays."""
        self.device.reset()
        self.device.config.forget()

    # -- interrupts --------------------------------------------------------------------------------------------------

    def set_irqs(self, request: wire.SetIrqs, fds: list[int]) -> None:
        """DEVICE_SET_IRQS; ``fds`` are taken over.

        :raise OSError: EINVAL when flags, range, data and descriptors do not belong together; ``fds`` are closed then.
        """
        try:
            self._set_irqs(request, fds)
        except OSError:
            close_fds(fds)
            raise

    def _set_irqs(self, request: wire.SetIrqs, fds: list[int]) -> None:
        flags, count = IrqSetFlags(request.flags & 0x3F), self._irq_count(request.index)
        if request.flags & ~0x3F or request.index >= VFIO_PCI_NUM_IRQS or request.start + request.count > count:
            raise OSError(errno.EINVAL, f"interrupt {request.index}: {request.start} + {request.count} of {count}")
        data = flags & (IrqSetFlags.VFIO_IRQ_SET_DATA_NONE | IrqSetFlags.VFIO_IRQ_SET_DATA_BOOL)
        wanted = request.count if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD else 0
        if bool(data) == bool(flags & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD) or len(fds) not in (0, wanted):
            raise OSError(errno.EINVAL, f"interrupt {request.index}: {len(fds)} descriptors for flags {flags:#x}")
        if not all(map(is_eventfd, fds)):
            raise OSError(errno.EINVAL, f"interrupt {request.index}: a descriptor is no eventfd")
        if flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_TRIGGER:
            self._trigger(request, flags, fds)
        elif request.index == _INTX and flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_MASK and not fds:
            self._around.intx.mask()
        elif request.index == _INTX and flags & IrqSetFlags.VFIO_IRQ_SET_ACTION_UNMASK and not fds:
            self._around.intx.unmask()
        else:
            raise OSError(errno.EINVAL, f"interrupt {request.index}: flags {flags:#x}")

    def _trigger(self, request: wire.SetIrqs, flags: IrqSetFlags, fds: list[int]) -> None:
        around = self._around
        if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_EVENTFD:
            for fd in fds:
                os.set_blocking(fd, False)  # a full counter must not hold the device up
            self.set_events(request.index, request.start, [EventFd(fd) for fd in fds], request.count)
        elif request.count == 0:
            around.intx.set_event(None) if request.index == _INTX else around.vectors.clear_all()
        else:
            asked = (
                request.data[: request.count] if flags & IrqSetFlags.VFIO_IRQ_SET_DATA_BOOL else b"\1" * request.count
            )
            for number, wanted in enumerate(asked, request.start):
                if wanted:
                    around.intx.trigger() if request.index == _INTX else around.vectors.trigger(number)
        self.device.irq_by_msi = len(around.vectors) > 0

    def set_events(self, index: int, start: int, events: Sequence[Bell], count: int = 0) -> None:
        """Let the vectors from ``start`` ring ``events``, taken over; without any the ``count`` vectors are switched
        off.
        """
        if index == _INTX:
            self._around.intx.set_event(events[0] if events else None)
        elif events:
            self._around.vectors.set_events(start, events)
        else:
            for number in range(start, start + count):
                self._around.vectors.clear(number)
        self.device.irq_by_msi = len(self._around.vectors) > 0


def _pieces(offset: int, count: int, smallest: int, largest: int, end: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of the register accesses that make up ``count`` bytes at ``offset``: aligned powers of two.

    :raise OSError: EINVAL, before the first one, when they do not fit.
    """
    if count == 0 or offset + count > end or offset % smallest or count % smallest:
        raise OSError(errno.EINVAL, f"an access of {count} bytes at {offset:#x}")
    pieces, at, stop = [], offset, offset + count
    while at < stop:
        size = largest
        while at % size or at + size > stop:
            size //= 2
        pieces.append((at, size))
        at += size
    return iter(pieces)
