"""Timing two things in turn, and the rows that come of it."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

Action = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. ``seconds`` and ``limit_seconds`` are per operation; ``aim`` bounds ``ratio`` (from below when
    ``at_least``).
    """

    name: str
    seconds: float
    limit: str = ""
    limit_seconds: float | None = None
    aim: float | None = None
    at_least: bool = False
    note: str = ""
    extra: dict[str, float] = field(default_factory=dict)
    given_ratio: float | None = None

    @property
    def ratio(self) -> float | None:
        """Time over the limit's time; for ``at_least`` rows the limit's time over this one (speed over speed)."""
        if self.given_ratio is not None:
            return self.given_ratio
        if not self.limit_seconds or not self.seconds:
            return None
        return self.limit_seconds / self.seconds if self.at_least else self.seconds / self.limit_seconds

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None when there is no aim."""
        if self.aim is None or self.ratio is None:
            return None
        return self.ratio >= self.aim if self.at_least else self.ratio <= self.aim


def _timed(action: Action, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        action()
    return (time.perf_counter() - start) / number


def in_turn(actions: Sequence[Action], *, number: int, rounds: int = 31) -> list[list[float]]:
    """Seconds per call of each action, one list per action with a figure per round; the actions take turns."""
    for action in actions:
        _timed(action, max(1, number // 4))
    results: list[list[float]] = [[] for _ in actions]
    gc_was_on = gc.isenabled()
    gc.disable()
    try:
        for _ in range(rounds):
            for action, seconds in zip(actions, results, strict=True):
                seconds.append(_timed(action, number))
    finally:
        if gc_was_on:
            gc.enable()
    return results


def against(
    name: str,
    action: Action,
    limit: str,
    limit_action: Action,
    *,
    number: int,
    rounds: int = 31,
    aim: float | None = None,
    at_least: bool = False,
    per: int = 1,
    note: str = "",
) -> Row:
    """A row from ``action`` and ``limit_action`` in turn; ``per`` operations happen in one call of either."""
    mine, theirs = in_turn([action, limit_action], number=number, rounds=rounds)
    return row_of(name, mine, limit, theirs, aim=aim, at_least=at_least, per=per, note=note)


def row_of(
    name: str,
    mine: Sequence[float],
    limit: str,
    theirs: Sequence[float],
    *,
    aim: float | None = None,
    at_least: bool = False,
    per: int = 1,
    note: str = "",
) -> Row:
    """A row from what the rounds of the two took, of ``per`` operations each."""
    ratios = [t / m if at_least else m / t for m, t in zip(mine, theirs, strict=True)]
    return Row(
        name,
        statistics.median(mine) / per,
        limit,
        statistics.median(theirs) / per,
        aim,
        at_least,
        note,
        given_ratio=statistics.median(ratios),
    )


def percentile(values: Iterable[float], percent: float) -> float:
    """The ``percent``-th percentile, nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]
