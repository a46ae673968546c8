"""Who may wait for whom: the table as data, and the property that keeps the processes from deadlock.

An edge is *plain*; or *pending*: the waiting side keeps the request as state and goes on serving others, but somebody's
answer depends on it all the same; or *served*: the side waited for answers it inside every wait of its own, and
answering never waits in turn.

No deadlock is possible when plain and pending edges form no circle, that is, when every circle contains a served edge.
What a role registers as ``served`` in its :class:`protocols.transport.loop.Loop` has to be what this table says.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple


class Party(Enum):
    """Kinds of process."""

    CONTAINER = "container"
    NOTIFIER = "notifier"
    DEVICE = "device process"
    GUESTD = "guestd"
    DESTINATION = "the guestd that a machine migrates to"


class Kind(Enum):
    """How a wait is held; see the module's head."""

    PLAIN = "plain"
    SERVED = "served"
    PENDING = "pending"


class Wait(NamedTuple):
    """``waiter`` may wait for ``waited`` because of ``what``."""

    waiter: Party
    waited: Party
    kind: Kind
    what: str


WAITS: tuple[Wait, ...] = (
    Wait(Party.CONTAINER, Party.DEVICE, Kind.PENDING, "lanes"),
    Wait(Party.CONTAINER, Party.DEVICE, Kind.PENDING, "mapping give-back"),
    Wait(Party.CONTAINER, Party.DEVICE, Kind.PENDING, "death"),
    Wait(Party.CONTAINER, Party.DEVICE, Kind.PENDING, "start-up"),
    Wait(Party.NOTIFIER, Party.DEVICE, Kind.PENDING, "acknowledgement"),
    Wait(Party.DEVICE, Party.CONTAINER, Kind.SERVED, "start-up"),  # the container never waits: it always answers
    Wait(Party.DEVICE, Party.GUESTD, Kind.SERVED, "ATS translation"),
    Wait(Party.DEVICE, Party.GUESTD, Kind.SERVED, "DMA message"),
    Wait(Party.DEVICE, Party.GUESTD, Kind.SERVED, "interrupt"),
    Wait(Party.DEVICE, Party.GUESTD, Kind.SERVED, "page request, outside a region access only"),
    Wait(Party.GUESTD, Party.CONTAINER, Kind.PLAIN, "ioctl"),
    Wait(Party.GUESTD, Party.CONTAINER, Kind.PLAIN, "kvm"),
    Wait(Party.GUESTD, Party.CONTAINER, Kind.PLAIN, "status"),
    Wait(Party.GUESTD, Party.NOTIFIER, Kind.PLAIN, "flush"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "region access"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "reset"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "ATC lanes"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "clock step"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "death"),
    Wait(Party.GUESTD, Party.DEVICE, Kind.PLAIN, "migration state, dirty pages"),
    Wait(Party.GUESTD, Party.DESTINATION, Kind.PLAIN, "loading the machine"),  # which never waits for its source
)


def circles(waits: Iterable[Wait]) -> list[tuple[Wait, ...]]:
    """Every simple circle of waits (each party at most once)."""
    edges = list(waits)
    order = {party: number for number, party in enumerate(Party)}
    found: list[tuple[Wait, ...]] = []

    def follow(start: Party, path: tuple[Wait, ...]) -> None:
        here = path[-1].waited if path else start
        for edge in edges:
            if edge.waiter is not here or order[edge.waited] < order[start]:
                continue
            if edge.waited is start:
                found.append((*path, edge))
            elif edge.waited not in {wait.waiter for wait in path} | {here}:
                follow(start, (*path, edge))

    for party in Party:
        follow(party, ())
    return found


def deadlocks(waits: Iterable[Wait]) -> list[tuple[Wait, ...]]:
    """The circles that contain no served edge: each is a possible deadlock. Empty for a sound table."""
    return [circle for circle in circles(waits) if not any(wait.kind is Kind.SERVED for wait in circle)]


def may_wait(waiter: Party, waited: Party, what: str) -> bool:
    """Whether the table knows this wait (a substring of its ``what`` is enough)."""
    return any(wait.waiter is waiter and wait.waited is waited and what in wait.what for wait in WAITS)


def served_by(party: Party) -> list[Wait]:
    """The waits of others that ``party`` must answer inside every wait of its own."""
    return [wait for wait in WAITS if wait.waited is party and wait.kind is Kind.SERVED]
