"""What goes into the hub and what comes out: events and effects.

Descriptors are opaque numbers. Those in an event belong to the hub from then on, which gives each back in exactly one
:class:`Close`; sending one does not give it away. A peer (``int``) is a connection on ``notifier.sock``, numbered by
the driver and never reused; an identity (``bytes``) is a peer of the ROUTER.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocols.notifier.messages import FromHub, RouterFromHub, RouterToHub, ToHub


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection from process ``pid``; ``pidfd`` is now the hub's."""

    peer: int
    pid: int
    pidfd: int


@dataclass(frozen=True, slots=True)
class Received:
    """A message on a connection, with as many descriptors as it must have."""

    peer: int
    message: ToHub
    fds: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Broken:
    """The peer broke the protocol below the hub (its message did not decode)."""

    peer: int
    reason: str


@dataclass(frozen=True, slots=True)
class Disconnected:
    """EOF: the peer left by itself; it has stopped using what it cached."""

    peer: int


@dataclass(frozen=True, slots=True)
class Died:
    """The peer's pidfd says that it is dead."""

    peer: int


@dataclass(frozen=True, slots=True)
class RouterReceived:
    """A message on the ROUTER."""

    identity: bytes
    message: RouterToHub


@dataclass(frozen=True, slots=True)
class Unsent:
    """A :class:`Post` could not be sent: its queue is full (``again``) or there is no such peer.

    The driver sends nothing more to that identity from the same list of effects, so that no later one overtakes.
    """

    identity: bytes
    message: RouterFromHub
    again: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed: deadlines are looked at, full queues tried again."""


HubEvent = Connected | Received | Broken | Disconnected | Died | RouterReceived | Unsent | Tick


@dataclass(frozen=True, slots=True)
class Send:
    """Send on a connection; ``fds`` stay the hub's."""

    peer: int
    message: FromHub
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Close the connection once what was sent is out. Its pidfd goes on being watched until it is closed."""

    peer: int


@dataclass(frozen=True, slots=True)
class Post:
    """Send on the ROUTER; report :class:`Unsent` when it does not go."""

    identity: bytes
    message: RouterFromHub


@dataclass(frozen=True, slots=True)
class Refuse:
    """Tell an identity why, once, and ignore it from now on."""

    identity: bytes
    reason: str


@dataclass(frozen=True, slots=True)
class Close:
    """Close these descriptors."""

    fds: tuple[int, ...]


Effect = Send | Disconnect | Post | Refuse | Close
