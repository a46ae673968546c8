"""What an ioctl leaves to be done: the rest of long work, and what has to wait until the DMA under way has ended.

An operation that takes a right away stores the new entries at once and puts the rest (unpin, un-account, free) on a
:class:`Revocation`. Work that may be long, entries by the million, is a generator that :meth:`Revocation.run` takes: it
yields when a slice is used up. Where something is left, the caller receives :class:`Pending`: it does the slices, makes
the barrier, waits for the lanes of the devices named, makes the barrier again, and only then calls
:meth:`Pending.finish`. Between slices it may serve others, but nothing else of the same container.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

Work = Generator[None, None, None]
"""Long work; it yields where :meth:`Revocation.spend` says so."""

SLICE = 1 << 16
"""What is done in one go, in entries of tables: a millisecond or two."""
CALL = 1 << 8
"""What one struct of a batch costs beside its entries."""
TABLE = 1 << 9
"""What one table that is made, filled or emptied costs beside its entries."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Result of ``count`` structs executed in order: ``done`` succeeded; then ``errno`` stopped it, 0 when none did."""

    done: int
    errno: int = 0
    reason: str = ""


class Pending(Generic[T_co]):
    """An operation that is not over: slices of work may be left (:attr:`long`), then its end waits for the lanes of
    :attr:`lane_devices`.
    """

    __slots__ = ("_outcome", "_revocation")

    def __init__(self, revocation: Revocation, outcome: Callable[[], T_co]) -> None:
        self._revocation, self._outcome = revocation, outcome

    @property
    def long(self) -> bool:
        """Whether slices are left."""
        return bool(self._revocation.work)

    def step(self) -> None:
        """Do one of the slices that are left."""
        self._revocation.step()

    def stop(self) -> None:
        """Nobody wants it any more: what is begun is brought to its end, further structs of a batch are not begun."""
        self._revocation.stopped = True

    @property
    def lane_devices(self) -> tuple[str, ...]:
        """Whose lanes to wait for. Does the slices that are left, for those who have nobody else to serve."""
        while self.long:
            self.step()
        return tuple(sorted(self._revocation.devices))

    def finish(self) -> T_co:
        """To be called exactly once, after the wait: the operation's result. :raise OSError: its error."""
        assert not self.long, "an operation ends after its work"
        actions, self._revocation.actions = self._revocation.actions, []
        for action in actions:
            action()
        if self._revocation.error is not None:
            raise self._revocation.error
        return self._outcome()


@dataclass(slots=True)
class Revocation:
    """Collects what has to wait, in the order in which it will be done, and the work to be done before."""

    devices: set[str] = field(default_factory=set)
    actions: list[Callable[[], None]] = field(default_factory=list)
    answer: bytes | None = None
    """What the ioctl answers, when that is known only at the end."""
    work: list[Work] = field(default_factory=list)
    """Begun or to be begun, in order."""
    error: OSError | None = None
    """What ended the work early, after the ioctl's own return."""
    stopped: bool = False
    """No further struct of a batch shall be begun."""
    _spent: int = 0
    """Of the present slice."""

    def run(self, work: Work) -> None:
        """Do ``work`` behind what is there already: as much as one slice has room for now, the rest in further ones.

        :raise OSError: what the work raises now; later it is the ioctl's error.
        """
        if self.work or next(work, self) is None:
            self.work.append(work)

    def spend(self, cost: int) -> bool:
        """Count ``cost``; True when the slice is used up: the work has to yield."""
        self._spent += cost
        if self._spent < SLICE:
            return False
        self._spent = 0
        return True

    def step(self) -> None:
        """One slice of the work that is left. After an error nothing is."""
        work = self.work.pop(0)
        try:
            over = next(work, self) is self
        except OSError as error:
            self.error = error
            self.work.clear()
            return
        if not over:
            self.work.insert(0, work)

    def rest(self) -> Work:
        """What the last :meth:`run` left, as a part of the work that is going on."""
        while self.work:
            work = self.work.pop(0)
            yield
            yield from work

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
        """``outcome()`` at once if nothing is left, else a :class:`Pending` that ends with it."""
        if not self.actions and not self.work:
            return outcome()
        return Pending(self, outcome)
