"""What an ioctl leaves to be done after the DMA that was under way has ended.

An operation that takes a right away stores the new entries at once and puts the rest (unpin, un-account, free) on a
:class:`Revocation`. Where something is on it, the caller receives :class:`Pending`: it makes the barrier, waits for the
lanes of the devices named, makes the barrier again, and only then calls :attr:`Pending.finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Batch:
    """Result of ``count`` structs executed in order: ``done`` succeeded; then ``errno`` stopped it, 0 when none did."""

    done: int
    errno: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Pending(Generic[T]):
    """An operation whose new entries are stored and whose end waits for the lanes of ``lane_devices``.

    ``finish()`` must be called exactly once, after the wait; it returns the operation's result or raises its
    ``OSError``.
    """

    lane_devices: tuple[str, ...]
    finish: Callable[[], T]


@dataclass(slots=True)
class Revocation:
    """Collects what has to wait, in the order in which it will be done."""

    devices: set[str] = field(default_factory=set)
    actions: list[Callable[[], None]] = field(default_factory=list)
    answer: bytes | None = None
    """What the ioctl answers, when that is known only at the end."""

    def later(self, devices: Iterable[str], action: Callable[[], None]) -> None:
        """Do ``action`` once no DMA section of ``devices`` that began before now is still open."""
        self.devices.update(devices)
        self.actions.append(action)

    def answer_later(self, devices: Iterable[str], answer: Callable[[], bytes]) -> None:
        """As :meth:`later`; what ``answer()`` returns is the ioctl's answer."""

        def action() -> None:
            self.answer = answer()

        self.later(devices, action)

    def settle(self, outcome: Callable[[], T]) -> T | Pending[T]:
        """``outcome()`` at once if nothing waits, else a :class:`Pending` that ends with it."""
        if not self.actions:
            return outcome()

        def finish() -> T:
            actions, self.actions = self.actions, []
            for action in actions:
                action()
            return outcome()

        return Pending(tuple(sorted(self.devices)), finish)
