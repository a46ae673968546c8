"""What the hub knows: peers, what each publishes or caches, observers, open flushes. Records and questions, no
decisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from protocols.notifier.delivery import Delivery


class Stage(Enum):
    """Where a subscriber is; the picture is in :mod:`protocols.notifier.hub`."""

    WAITING = "waiting"
    OFFERED = "offered"
    SUBSCRIBED = "subscribed"
    TICKET = "ticket"
    ATTACHING = "attaching"
    ATTACHED = "attached"


@dataclass(slots=True)
class PendingFlush:
    """A Flush: for each subscriber (by peer) that has to acknowledge, up to which number."""

    seq: int
    deadline_ns: int
    targets: dict[int, int]


@dataclass(slots=True)
class Publisher:
    """``told``: the newest Want that it has confirmed; ``wants``: what the newest one said."""

    name: str
    ring: int
    spaces: set[int]
    want_seq: int = 0
    wants: bool = False
    told: int = 0
    flushes: list[PendingFlush] = field(default_factory=list)


@dataclass(slots=True)
class Subscriber:
    """With ``lanes`` (a descriptor) or with ``delivery``. ``publisher`` is the peer that publishes its spaces; 0:
    none."""

    number: int
    name: str
    spaces: frozenset[int]
    stage: Stage
    lanes: int = -1
    delivery: Delivery | None = None
    ticket: int = 0
    identity: bytes = b""
    publisher: int = 0


@dataclass(slots=True)
class Peer:
    """A connection, or what is left of a ``dropped`` one until its process is dead."""

    number: int
    pid: int
    pidfd: int
    publisher: Publisher | None = None
    subscriber: Subscriber | None = None
    dropped: bool = False


@dataclass(slots=True)
class Observer:
    """``lost``: how many messages it has missed."""

    name: str
    lost: int = 0


class Registry:
    """All of it. Iterations are over copies: what they lead to may change the registry."""

    def __init__(self) -> None:
        self.peers: dict[int, Peer] = {}
        self.identities: dict[bytes, Peer] = {}
        self.observers: dict[bytes, Observer] = {}

    def publishers(self) -> Iterator[tuple[Peer, Publisher]]:
        """Every publisher and its connection."""
        for peer in list(self.peers.values()):
            if peer.publisher is not None:
                yield peer, peer.publisher

    def publisher(self, number: int) -> tuple[Peer, Publisher] | None:
        """The publisher on connection ``number``."""
        peer = self.peers.get(number)
        return None if peer is None or peer.publisher is None else (peer, peer.publisher)

    def subscribers(self, publisher: int | None = None) -> Iterator[tuple[Peer, Subscriber]]:
        """Every subscriber, or those of one publisher."""
        for peer in list(self.peers.values()):
            if peer.subscriber is not None and publisher in (None, peer.subscriber.publisher):
                yield peer, peer.subscriber

    def deliveries(self, publisher: int | None = None) -> Iterator[tuple[Peer, Subscriber, Delivery]]:
        """Those whose acknowledgements count: attached ones, also when dropped."""
        for peer, sub in self.subscribers(publisher):
            if sub.delivery is not None and sub.stage is Stage.ATTACHED:
                yield peer, sub, sub.delivery
