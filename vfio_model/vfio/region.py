"""The seam to a device: regions, interrupts and reset, as a VFIO device file offers them.

Two adapters: a device object in this process, and a device process behind vfio-user framing. Errors are
``OSError`` with errno; a device that is gone raises :class:`~vfio_model.errors.PeerLost`, which the guest sees as
a surprise removal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from vfio_model.uapi.vfio import DeviceInfo, IrqInfo, RegionInfo

IrqHandler = Callable[[], None]
"""Called once for each signal of an interrupt vector; what the device wrote before the signal is visible."""


class DeviceConnection(Protocol):
    """One opened device. ``index`` is a VFIO region or interrupt index; offsets and sizes are bytes."""

    def get_info(self) -> DeviceInfo:
        """``VFIO_DEVICE_GET_INFO``."""
        ...

    def get_region_info(self, index: int) -> RegionInfo:
        """``VFIO_DEVICE_GET_REGION_INFO``; size 0 means the region is not there."""
        ...

    def get_irq_info(self, index: int) -> IrqInfo:
        """``VFIO_DEVICE_GET_IRQ_INFO``; ``count`` is the number of vectors."""
        ...

    def region_read(self, index: int, offset: int, size: int) -> bytes:
        """``size`` bytes, in the order in which they lie in the region."""
        ...

    def region_write(self, index: int, offset: int, data: bytes) -> None:
        """Write; may be posted."""
        ...

    def set_irqs(self, index: int, handlers: Sequence[IrqHandler]) -> None:
        """Let vector *n* of ``index`` call ``handlers[n]``; an empty sequence disables the index."""
        ...

    def unmask_irq(self, index: int) -> None:
        """Let a level interrupt that masked itself when it was signalled (INTx) be signalled again."""
        ...

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``."""
        ...

    def close(self) -> None:
        """Close the device file; the device stops."""
        ...
