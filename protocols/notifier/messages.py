"""The notifier's messages.

On ``notifier.sock`` (SEQPACKET, with descriptors) speak publishers (a guest machine: it owns vIOMMU address spaces and
the invalidation ring) and subscribers (a process that caches translations). EOF or a dead pidfd ends either. A
subscriber with shared memory gives its lanes and gets the ring, after which an invalidation takes no message at all.
One without gets a ``ticket``, with which it attaches on ``notifier.zmq`` (DEALER to ROUTER) and receives acknowledged
:class:`Invalidate` messages. Observers speak on ``notifier.zmq`` alone; what they miss is counted.

An address space is named by ``as_id``, never by a BDF: several functions may share one, and bus numbers change.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from protocols.codec import Codec
from protocols.fields import U64, Message, Name, Pid, Text

MAX_SPACES = 1024
MAX_RECORDS = 4096
"""Invalidation records in one :class:`Publish`."""
MAX_CREDIT = 4096

SpaceIds = Annotated[list[U64], Meta(min_length=1, max_length=MAX_SPACES)]
Credit = Annotated[int, Meta(ge=1, le=MAX_CREDIT)]


class Record(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """``iova``..``last`` (inclusive) of ``as_id`` is no longer translated as before; ``flags`` as in the ring,
    its PASID in the high half."""

    as_id: U64
    iova: U64
    last: U64
    flags: U64


class Announce(Message, tag="announce", frozen=True):
    """First message of a publisher, with its ring's memfd. Again after a reconnect, by the same ``name``."""

    name: Name
    spaces: Annotated[list[U64], Meta(max_length=MAX_SPACES)]


class AddSpace(Message, tag="add-space", frozen=True):
    """The publisher has a further address space."""

    as_id: U64


class RemoveSpace(Message, tag="remove-space", frozen=True):
    """An address space of the publisher is gone; its subscribers are told to flush it."""

    as_id: U64


class Publish(Message, tag="publish", frozen=True):
    """Invalidations for those who have no ring, and for observers; sent while :class:`Want` says so."""

    cause: U64
    records: Annotated[list[Record], Meta(min_length=1, max_length=MAX_RECORDS)]


class Wanted(Message, tag="wanted", frozen=True):
    """Answer to :class:`Want` ``seq``: from here on the publisher does as it says."""

    seq: U64


class Flush(Message, tag="flush", frozen=True):
    """Answer :class:`FlushDone` when everything published so far is acknowledged, or ``timeout_ns`` is over."""

    seq: U64
    timeout_ns: U64


class FlushDone(Message, tag="flush-done", frozen=True):
    """``late`` names the subscribers that have not acknowledged; empty: the invalidations are complete."""

    seq: U64
    late: Annotated[list[Name], Meta(max_length=MAX_SPACES)]


class Subscribe(Message, tag="subscribe", frozen=True):
    """First message of a subscriber with shared memory, with its lanes' memfd."""

    name: Name
    spaces: SpaceIds


class SubscribeByMessage(Message, tag="subscribe-by-message", frozen=True):
    """First message of a subscriber without; at most ``credit`` Invalidates are unacknowledged at a time."""

    name: Name
    spaces: SpaceIds
    credit: Credit


class Subscribed(Message, tag="subscribed", frozen=True):
    """The subscription stands: the publisher waits for these lanes. With the ring's memfd. May come again, with a new
    ring, when the publisher reconnects: the cache is flushed then."""

    subscriber: U64


class Ticket(Message, tag="ticket", frozen=True):
    """Answer to SubscribeByMessage: attach on the ROUTER with ``ticket`` (random, used once)."""

    subscriber: U64
    ticket: U64


class Want(Message, tag="want", frozen=True):
    """To the publisher, first in answer to Announce: whether anybody needs :class:`Publish` messages at all. While
    nobody does, an invalidation costs no message. Answer Wanted."""

    seq: U64
    records: bool


class PublisherLost(Message, tag="publisher-lost", frozen=True):
    """The publisher of your address spaces is gone: flush, and stop translated DMA until Subscribed comes again."""

    name: Name


class LaneAdd(Message, tag="lane-add", frozen=True):
    """To the publisher: a subscriber's lanes, with their memfd and the subscriber's pidfd. Answer LaneReady."""

    subscriber: U64
    name: Name
    pid: Pid
    spaces: SpaceIds


class LaneReady(Message, tag="lane-ready", frozen=True):
    """From the publisher: every invalidation from now on waits for these lanes."""

    subscriber: U64


class LaneRemove(Message, tag="lane-remove", frozen=True):
    """To the publisher: the subscriber left or died; do not wait for its lanes."""

    subscriber: U64


class SpaceGone(Message, tag="space-gone", frozen=True):
    """To a subscriber: the address space is gone; flush what is cached of it."""

    as_id: U64


class Attach(Message, tag="attach", frozen=True):
    """On the ROUTER: this connection belongs to the subscription ``ticket``."""

    ticket: U64


class Attached(Message, tag="attached", frozen=True):
    """Invalidates follow; the first bears sequence number ``seq`` or a later one."""

    seq: U64


class Invalidate(Message, tag="invalidate", frozen=True):
    """One invalidation. ``seq`` rises by one from message to message of a subscriber."""

    seq: U64
    cause: U64
    record: Record


class Ack(Message, tag="ack", frozen=True):
    """Everything up to ``seq`` (inclusive) is carried out: nothing translated before it will be used again."""

    seq: U64


class Observe(Message, tag="observe", frozen=True):
    """Send me a copy of everything; I may miss some."""

    name: Name


class Observation(Message, tag="observation", frozen=True):
    """A copy. ``lost`` is how many this observer has missed since it asked."""

    lost: U64
    cause: U64
    record: Record


class Ping(Message, tag="ping", frozen=True):
    """Is the main loop alive?"""

    seq: U64


class Pong(Message, tag="pong", frozen=True):
    """Answer to :class:`Ping`."""

    seq: U64


class Refused(Message, tag="refused", frozen=True):
    """The peer broke the protocol or asked for what cannot be; its connection is closed, or ignored."""

    reason: Text


ToHub = Announce | AddSpace | RemoveSpace | Publish | Wanted | Flush | Subscribe | SubscribeByMessage | LaneReady
FromHub = Subscribed | Ticket | Want | PublisherLost | LaneAdd | LaneRemove | SpaceGone | FlushDone | Refused
RouterToHub = Attach | Ack | Observe | Ping
RouterFromHub = Attached | Invalidate | Observation | Pong | Refused

TO_HUB: Codec[ToHub] = Codec(ToHub, "to the notifier", max_bytes=256 << 10)
FROM_HUB: Codec[FromHub] = Codec(FromHub, "from the notifier", max_bytes=256 << 10)
ROUTER_TO_HUB: Codec[RouterToHub] = Codec(RouterToHub, "notifier request", max_bytes=4096)
ROUTER_FROM_HUB: Codec[RouterFromHub] = Codec(RouterFromHub, "notifier message", max_bytes=16 << 10)

FDS: dict[type[Message], int] = {Announce: 1, Subscribe: 1, Subscribed: 1, LaneAdd: 2}
"""Descriptors that go with a message on ``notifier.sock``; 0 when not listed."""


def fd_count(message: ToHub | FromHub) -> int:
    """How many descriptors go with ``message``."""
    return FDS.get(type(message), 0)
