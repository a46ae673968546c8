"""The eventfd of ``VFIO_IRQ_SET_ACTION_UNMASK``, which speaks in both directions.

In Linux's VFIO who holds the eventfd unmasks INTx by ringing it (KVM's resamplefd at the guest's end of interrupt); in
the vfio-user specification the server rings it when INTx was unmasked. Both hold here: the eventfd is watched without
being drained, so that whoever waits for the event finds it, and a ring of our own is not taken for the other side's.

Source: ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_SET_IRQS"); QEMU ``docs/interop/vfio-user.rst``.
"""

from __future__ import annotations

import select
from collections.abc import Callable

from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop


class UnmaskBell:
    """``event`` (taken over); ``unmask()`` is called when the other side rings it."""

    def __init__(self, loop: Loop, event: EventFd, unmask: Callable[[], None]) -> None:
        self._loop, self._event, self._unmask = loop, event, unmask
        self._edges = select.epoll()
        self._edges.register(event.fd, select.EPOLLIN | select.EPOLLET)
        loop.register(self, self._rung, served=True)

    def fileno(self) -> int:
        """For a poller."""
        return self._edges.fileno()

    def ring(self) -> None:
        """INTx is being unmasked by a message. A ring of the other side that comes with ours asks for the same."""
        self._event.ring()
        self._edges.poll(0)

    def _rung(self) -> None:
        if self._edges.poll(0):
            self._unmask()

    def close(self) -> None:
        """Harmless twice."""
        if self._event.fd >= 0:
            self._loop.unregister(self)
            self._edges.close()
            self._event.close()
