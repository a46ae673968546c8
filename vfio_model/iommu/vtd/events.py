"""The interrupts of a VT-d unit itself: fault event, invalidation completion event, page request event.

All three work alike ("Fault Event Control Register" and its two likes in 11.4): a condition makes the event *pending*
(IP); while it is masked (IM) it stays pending, else the message goes out and IP is cleared. A guest that takes the
condition away before it unmasks takes the event away, too. These messages are never remapped.
"""

from __future__ import annotations

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.ports import Message
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.trace import Trace


class Event:
    """The event whose registers begin at ``control``: control, data, address and upper address, 4 bytes each."""

    def __init__(self, registers: RegisterFile, control: int, message: Message, trace: Trace) -> None:
        self._registers, self._control, self._message, self._trace = registers, control, message, trace

    @property
    def masked(self) -> bool:
        """IM."""
        return bool(self._registers.get(self._control) & regs.EVENT_IM)

    @property
    def pending(self) -> bool:
        """IP."""
        return bool(self._registers.get(self._control) & regs.EVENT_IP)

    def generate(self) -> None:
        """Its condition arose."""
        self._registers.change(self._control, set_=regs.EVENT_IP)
        self.unmasked()

    def unmasked(self) -> None:
        """The control register was written: what is pending goes out, unless it is masked."""
        if not self.pending or self.masked:
            return
        address = self._registers.get_quad(self._control + 8)
        data = self._registers.get(self._control + 4)
        if self._trace.enabled:
            self._trace("vtd_irq_generate", addr=address, data=data)
        self._registers.change(self._control, clear=regs.EVENT_IP)
        self._message(address, data)

    def serviced(self) -> bool:
        """Its condition is gone; whether it was still pending."""
        was = self.pending
        self._registers.change(self._control, clear=regs.EVENT_IP)
        return was
