"""nvme: when a completion queue interrupts (NVM Express Base Specification 1.4, section 7.5, "Interrupts").

With MSI-X a queue's vector is sent when entries were posted, once for all of them. The pin is up while any queue that
interrupts has entries that the host has not taken, unless the interrupt mask hides its vector. Messages have masks of
their own, and do not ask this one.
"""

from __future__ import annotations

from typing import Protocol

from vfio_model.devices.nvme.queues import CompletionQueue, Queues

MASKED_VECTORS = 32


class Outlet(Protocol):
    """How the function interrupts: :class:`~vfio_model.pci.device.PCIDevice`."""

    @property
    def uses_msi(self) -> bool:
        """Whether interrupts are messages."""

    def raise_irq(self, vector: int = 0) -> None:
        """Send message ``vector``, or take the pin up."""

    def lower_irq(self) -> None:
        """Take the pin down."""

    @property
    def vectors(self) -> int:
        """How many vectors a completion queue may choose from now."""


class Interrupts:
    """The interrupts of ``queues``."""

    def __init__(self, outlet: Outlet, queues: Queues) -> None:
        self._outlet, self._queues = outlet, queues
        self.mask = 0
        """INTMS and INTMC: a bit per vector."""
        self._pin_up = False

    @property
    def vectors(self) -> int:
        """How many vectors a completion queue may choose from now."""
        return self._outlet.vectors

    def posted(self, cq: CompletionQueue) -> None:
        """Entries were posted to ``cq``."""
        if not cq.irq_enabled:
            return
        if not self._outlet.uses_msi:
            self.update_pin()
        else:
            self._outlet.raise_irq(cq.vector)

    def consumed(self) -> None:
        """The host has taken entries, or a queue is gone."""
        if self._pin_up:
            self.update_pin()

    def set_mask(self, mask: int) -> None:
        """The mask is ``mask`` now; the pin follows it."""
        self.mask = mask
        self.update_pin()

    def reset(self) -> None:
        """Nothing is masked, and nothing interrupts."""
        self.mask = 0
        self._pin_up = False
        self._outlet.lower_irq()

    def update_pin(self) -> None:
        """Bring the pin to where it belongs."""
        queues = self._queues.completion.values()
        self._pin_up = not self._outlet.uses_msi and any(
            cq.irq_enabled and cq.head != cq.tail and not self._masked(cq) for cq in queues
        )
        if self._pin_up:
            self._outlet.raise_irq()
        else:
            self._outlet.lower_irq()

    def _masked(self, cq: CompletionQueue) -> bool:
        return cq.vector < MASKED_VECTORS and bool(self.mask >> cq.vector & 1)
