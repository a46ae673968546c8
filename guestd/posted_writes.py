"""Bursts: stores of the guest that follow one another with nothing in between, and may travel together.

A device's stores are held from the first one of a burst on, and leave in one REGION_WRITE_MULTI when the burst ends,
when there are many, or before anything else goes to that device. So the device gets everything in the order in which
the guest did it, and nobody waits for a store: nothing is held while the caller of a burst does something else.

Source: QEMU ``docs/interop/vfio-user.rst`` ("VFIO_USER_REGION_WRITE_MULTI").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Holder(Protocol):
    """A device whose stores may be held."""

    def send_held(self) -> None:
        """Send what is held. Harmless when nothing is."""


class Burst:
    """Who holds stores at present."""

    def __init__(self) -> None:
        self._holders: list[Holder] = []

    def join(self, holder: Holder) -> None:
        """``holder`` has begun to hold stores; it is told when they have to leave."""
        self._holders.append(holder)

    def send(self) -> None:
        """Everything that is held leaves."""
        holders, self._holders = self._holders, []
        for holder in holders:
            holder.send_held()


_burst: ContextVar[Burst | None] = ContextVar("burst", default=None)


def current_burst() -> Burst | None:
    """The burst that is under way."""
    return _burst.get()


@contextmanager
def burst() -> Iterator[Burst]:
    """What the guest stores inside may be held; before the caller does anything else it calls :meth:`Burst.send`."""
    made = Burst()
    token = _burst.set(made)
    try:
        yield made
    finally:
        _burst.reset(token)
        made.send()
