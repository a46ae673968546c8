"""The notifier's hub: who caches translations of which address space, and how they hear of invalidations.

One I/O-free state machine, ``handle(event, now_ns) → effects``; it runs in a process of its own or inside guestd. A
subscriber is, in turn::

    ring:     waiting ──publisher there: LaneAdd──▶ offered ──LaneReady──▶ subscribed (it has the ring)
    message:  ticket  ──Attach──▶ attaching ──publisher knows: Wanted──▶ attached (Invalidate / Ack)
    either:   ──publisher gone: PublisherLost──▶ waiting / attaching
              ──EOF or death──▶ gone              ──broke the protocol──▶ dropped ──death──▶ gone

Until it is subscribed or attached a subscriber caches nothing and nobody waits for it. One that left or is known dead
counts as having acknowledged; one that was *dropped* may still use what it cached, so its lanes and its missing
acknowledgements are waited for until its pidfd says that it is dead. A publisher's Flush is answered when all is
acknowledged, or late with names.
"""

from __future__ import annotations

from collections.abc import Callable

from protocols.notifier.delivery import MAX_BACKLOG, Delivery
from protocols.notifier.events import (
    Broken,
    Close,
    Connected,
    Died,
    Disconnect,
    Disconnected,
    Effect,
    HubEvent,
    Post,
    Received,
    Refuse,
    RouterReceived,
    Send,
    Tick,
    Unsent,
)
from protocols.notifier.messages import (
    Ack,
    AddSpace,
    Announce,
    Attach,
    Attached,
    Flush,
    FlushDone,
    FromHub,
    Invalidate,
    LaneAdd,
    LaneReady,
    LaneRemove,
    Observation,
    Observe,
    Ping,
    Pong,
    Publish,
    PublisherLost,
    Record,
    Refused,
    RemoveSpace,
    SpaceGone,
    Subscribe,
    SubscribeByMessage,
    Subscribed,
    Ticket,
    Want,
    Wanted,
)
from protocols.notifier.registry import Observer, Peer, PendingFlush, Publisher, Registry, Stage, Subscriber
from vfio_model.errors import RemoteProtocolError
from vfio_model.ranges import U64_MAX

MAX_SUBSCRIBERS = 1024
MAX_OBSERVERS = 64
MAX_FLUSHES = 64
"""Flushes that one publisher may have open."""
RETRY_NS = 1_000_000
"""A ROUTER queue that was full is tried again after this long, or at the next acknowledgement."""


class Hub:
    """See the module's head. ``random64()`` gives tickets, never 0."""

    def __init__(self, random64: Callable[[], int], *, max_backlog: int = MAX_BACKLOG) -> None:
        self._random64, self._max_backlog = random64, max_backlog
        self._all = Registry()
        self._peers, self._identities, self._observers = self._all.peers, self._all.identities, self._all.observers
        self._subscribers = 0
        self._out: list[Effect] = []
        self._now_ns = 0

    def handle(self, event: HubEvent, now_ns: int = 0) -> list[Effect]:
        """What follows from ``event`` at ``now_ns``, to be done in this order."""
        self._now_ns = max(now_ns, self._now_ns)
        match event:
            case Connected():
                self._peers[event.peer] = Peer(event.peer, event.pid, event.pidfd)
            case Received():
                self._received(event)
            case Broken():
                self._drop(event.peer, event.reason)
            case Disconnected():
                self._left(event.peer)
            case Died():
                self._gone(event.peer)
            case RouterReceived():
                self._router_received(event)
            case Unsent():
                self._unsent(event)
            case Tick():
                self._tick()
        out, self._out = self._out, []
        return out

    def next_deadline_ns(self) -> int | None:
        """When a :class:`Tick` is due next; None: when something happens."""
        moments = [flush.deadline_ns for _, publisher in self._all.publishers() for flush in publisher.flushes]
        if any(delivery.blocked for _, _, delivery in self._all.deliveries()):
            moments.append(self._now_ns + RETRY_NS)
        return min(moments, default=None)

    def peers(self) -> list[int]:
        """Every peer that still has something here; all are gone after a :class:`Died` for each."""
        return list(self._peers)

    def status(self) -> dict[str, object]:
        """For a status: publishers, subscribers with their stage, observers with what they missed."""
        return {
            "publishers": {publisher.name: sorted(publisher.spaces) for _, publisher in self._all.publishers()},
            "subscribers": {f"{sub.number}:{sub.name}": sub.stage.value for _, sub in self._all.subscribers()},
            "observers": {observer.name: {"lost": observer.lost} for observer in self._observers.values()},
        }

    # ------------------------------------------------------------------------------------------------- connections

    def _received(self, event: Received) -> None:
        peer = self._peers.get(event.peer)
        if peer is None or peer.dropped:
            self._close(*event.fds)
            return
        try:
            self._message(peer, event)
        except RemoteProtocolError as error:
            self._close(*event.fds)
            self._drop(peer.number, str(error))

    def _message(self, peer: Peer, event: Received) -> None:
        message = event.message
        if isinstance(message, Announce | Subscribe | SubscribeByMessage):
            if peer.publisher or peer.subscriber:
                raise RemoteProtocolError(f"a second first message: {type(message).__name__}")
            match message:
                case Announce():
                    self._announce(peer, message, event.fds[0])
                case Subscribe():
                    self._subscribe(peer, message.name, message.spaces, lanes=event.fds[0])
                case SubscribeByMessage():
                    delivery = Delivery(message.spaces, message.credit, self._max_backlog)
                    self._subscribe(peer, message.name, message.spaces, delivery=delivery)
            return
        if peer.publisher is None:
            raise RemoteProtocolError(f"{type(message).__name__} from one that announced nothing")
        self._from_publisher(peer, peer.publisher, message)

    def _from_publisher(self, peer: Peer, publisher: Publisher, message: object) -> None:
        match message:
            case Publish():
                self._publish(peer, publisher, message.cause, message.records)
            case Flush():
                self._flush(peer, publisher, message)
            case Wanted():
                publisher.told = min(max(publisher.told, message.seq), publisher.want_seq)
                self._finish_attaching(peer, publisher)
            case LaneReady():
                self._lane_ready(peer, publisher, message.subscriber)
            case AddSpace():
                self._claim({message.as_id})
                publisher.spaces.add(message.as_id)
                self._offer(peer, publisher)
            case RemoveSpace():
                self._remove_space(peer, publisher, message.as_id)

    # -------------------------------------------------------------------------------------------------- publishers

    def _announce(self, peer: Peer, message: Announce, ring: int) -> None:
        spaces = set(message.spaces)
        before = next((other for other, publisher in self._all.publishers() if publisher.name == message.name), None)
        if before is not None and before.pid != peer.pid:
            raise RemoteProtocolError(f"{message.name} is announced by process {before.pid} already")
        self._claim(spaces, before)
        if before is not None:
            self._out.append(Disconnect(before.number))
            self._gone(before.number)
        peer.publisher = Publisher(message.name, ring, spaces)
        self._offer(peer, peer.publisher)

    def _claim(self, spaces: set[int], but: Peer | None = None) -> None:
        for peer, publisher in self._all.publishers():
            if peer is not but and (taken := publisher.spaces & spaces):
                raise RemoteProtocolError(f"address space {min(taken)} is published by {publisher.name}")

    def _want(self, peer: Peer, publisher: Publisher) -> None:
        """Tell the publisher whether anybody needs messages, when that is news."""
        wants = bool(self._observers) or any(
            sub.delivery is not None and sub.stage is not Stage.TICKET for _, sub in self._all.subscribers(peer.number)
        )
        if publisher.want_seq == 0 or wants != publisher.wants:
            publisher.want_seq += 1
            publisher.wants = wants
            self._send(peer, Want(publisher.want_seq, wants))

    def _want_all(self) -> None:
        for peer, publisher in self._all.publishers():
            self._want(peer, publisher)

    def _publish(self, peer: Peer, publisher: Publisher, cause: int, records: list[Record]) -> None:
        for record in records:
            if record.as_id not in publisher.spaces or record.iova > record.last:
                raise RemoteProtocolError(f"an invalidation of {record.iova:#x}..{record.last:#x} in {record.as_id}")
        for _, sub, delivery in self._all.deliveries(peer.number):
            delivery.add(cause, records)
            self._pump(sub)
        for identity, observer in self._observers.items():
            self._out += [Post(identity, Observation(observer.lost, cause, record)) for record in records]

    def _flush(self, peer: Peer, publisher: Publisher, message: Flush) -> None:
        if len(publisher.flushes) >= MAX_FLUSHES:
            raise RemoteProtocolError(f"{MAX_FLUSHES} flushes are open")
        deadline = self._now_ns + message.timeout_ns
        targets = {other.number: delivery.last for other, _, delivery in self._all.deliveries(peer.number)}
        publisher.flushes.append(PendingFlush(message.seq, deadline, targets))
        self._check_flushes(peer, publisher)

    def _check_flushes(self, peer: Peer, publisher: Publisher) -> None:
        for flush in list(publisher.flushes):
            late = [sub.name for number, target in flush.targets.items() if (sub := self._owes(number, target))]
            if not late or flush.deadline_ns <= self._now_ns:
                publisher.flushes.remove(flush)
                self._send(peer, FlushDone(flush.seq, late))

    def _owes(self, number: int, target: int) -> Subscriber | None:
        peer = self._peers.get(number)
        if peer is None or peer.subscriber is None or peer.subscriber.delivery is None:
            return None
        delivery = peer.subscriber.delivery
        return peer.subscriber if delivery.acked < min(target, delivery.last) else None

    def _check_all_flushes(self) -> None:
        for peer, publisher in self._all.publishers():
            self._check_flushes(peer, publisher)

    def _remove_space(self, peer: Peer, publisher: Publisher, as_id: int) -> None:
        if as_id not in publisher.spaces:
            raise RemoteProtocolError(f"address space {as_id} is not published")
        self._publish(peer, publisher, 0, [Record(as_id, 0, U64_MAX, 0)])
        publisher.spaces.discard(as_id)
        for other, sub in self._all.subscribers(peer.number):
            if as_id in sub.spaces and not other.dropped:
                self._send(other, SpaceGone(as_id))

    # ------------------------------------------------------------------------------------------------- subscribers

    def _subscribe(
        self, peer: Peer, name: str, spaces: list[int], *, lanes: int = -1, delivery: Delivery | None = None
    ) -> None:
        if sum(1 for _ in self._all.subscribers()) >= MAX_SUBSCRIBERS:
            raise RemoteProtocolError(f"{MAX_SUBSCRIBERS} subscribers are here already")
        self._subscribers += 1
        stage = Stage.WAITING if delivery is None else Stage.TICKET
        sub = Subscriber(self._subscribers, name, frozenset(spaces), stage, lanes, delivery)
        peer.subscriber = sub
        if delivery is not None:
            sub.ticket = self._random64()
            self._send(peer, Ticket(sub.number, sub.ticket))
        for publishing, publisher in self._all.publishers():
            self._offer(publishing, publisher)

    def _offer(self, publishing: Peer, publisher: Publisher) -> None:
        """Bring a publisher and those who wait for it together. A dropped one's lanes are offered too."""
        new = [(peer, sub) for peer, sub in self._all.subscribers(publisher=0) if sub.spaces <= publisher.spaces]
        for _, sub in new:
            sub.publisher = publishing.number
        self._want(publishing, publisher)
        for peer, sub in new:
            if sub.delivery is None:
                sub.stage = Stage.OFFERED
                add = LaneAdd(sub.number, sub.name, peer.pid, sorted(sub.spaces))
                self._send(publishing, add, (sub.lanes, peer.pidfd))
        self._finish_attaching(publishing, publisher)

    def _lane_ready(self, publishing: Peer, publisher: Publisher, number: int) -> None:
        for peer, sub in self._all.subscribers(publishing.number):
            if sub.number == number and sub.stage is Stage.OFFERED:
                sub.stage = Stage.SUBSCRIBED
                if not peer.dropped:
                    self._send(peer, Subscribed(number), (publisher.ring,))

    def _finish_attaching(self, publishing: Peer, publisher: Publisher) -> None:
        if not publisher.wants or publisher.told < publisher.want_seq:
            return
        for _, sub in self._all.subscribers(publishing.number):
            if sub.delivery is not None and sub.stage is Stage.ATTACHING:
                sub.stage = Stage.ATTACHED
                self._out.append(Post(sub.identity, Attached(sub.delivery.next_seq)))
                self._pump(sub)

    def _pump(self, sub: Subscriber) -> None:
        if sub.delivery is not None and sub.identity in self._identities:
            self._out += [Post(sub.identity, message) for message in sub.delivery.take()]

    # ----------------------------------------------------------------------------------------------------- leaving

    def _drop(self, number: int, reason: str) -> None:
        """The peer broke the protocol: its connection ends now, what it may have cached when it is dead. One that was
        never told that it is subscribed has cached nothing."""
        peer = self._peers.get(number)
        if peer is None or peer.dropped:
            return
        self._send(peer, Refused(reason[:1000]))
        self._out.append(Disconnect(number))
        sub = peer.subscriber
        if sub is None or sub.stage in (Stage.WAITING, Stage.OFFERED, Stage.TICKET, Stage.ATTACHING):
            self._gone(number)
            return
        peer.dropped = True
        if self._identities.pop(sub.identity, None):
            self._out.append(Refuse(sub.identity, reason[:1000]))

    def _left(self, number: int) -> None:
        """EOF. One that was dropped has not promised anything by it: its death is still waited for."""
        if number in self._peers and not self._peers[number].dropped:
            self._gone(number)

    def _gone(self, number: int) -> None:
        peer = self._peers.get(number)
        if peer is None:
            return
        del self._peers[number]
        if peer.publisher is not None:
            self._publisher_gone(number, peer.publisher)
        if peer.subscriber is not None:
            self._subscriber_gone(peer.subscriber)
        self._close(peer.pidfd)

    def _publisher_gone(self, number: int, publisher: Publisher) -> None:
        for peer, sub in self._all.subscribers(number):
            sub.publisher = 0
            if sub.stage in (Stage.OFFERED, Stage.SUBSCRIBED):
                sub.stage = Stage.WAITING
            elif sub.stage is Stage.ATTACHED and not peer.dropped:
                sub.stage = Stage.ATTACHING
            if not peer.dropped:
                self._send(peer, PublisherLost(publisher.name))
        self._close(publisher.ring)

    def _subscriber_gone(self, sub: Subscriber) -> None:
        self._identities.pop(sub.identity, None)
        found = self._all.publisher(sub.publisher)
        if sub.lanes >= 0:
            if found is not None:
                self._send(found[0], LaneRemove(sub.number))
            self._close(sub.lanes)
        elif found is not None:
            self._want(*found)
        self._check_all_flushes()

    # ------------------------------------------------------------------------------------------------------ router

    def _router_received(self, event: RouterReceived) -> None:
        message, identity = event.message, event.identity
        try:
            match message:
                case Ping():
                    self._out.append(Post(identity, Pong(message.seq)))
                case Attach():
                    self._attach(identity, message.ticket)
                case Ack():
                    self._ack(identity, message.seq)
                case Observe():
                    self._observe(identity, message.name)
        except RemoteProtocolError as error:
            peer = self._identities.get(identity)
            if peer is None:
                self._out.append(Refuse(identity, str(error)))
            else:
                self._drop(peer.number, str(error))

    def _attach(self, identity: bytes, ticket: int) -> None:
        if identity in self._identities:
            raise RemoteProtocolError("attached already")
        for peer, sub in self._all.subscribers():
            if sub.stage is Stage.TICKET and sub.ticket == ticket and ticket:
                sub.identity, sub.ticket, sub.stage = identity, 0, Stage.ATTACHING
                self._identities[identity] = peer
                if (found := self._all.publisher(sub.publisher)) is not None:
                    self._want(*found)
                    self._finish_attaching(*found)
                return
        raise RemoteProtocolError("no such ticket")

    def _ack(self, identity: bytes, seq: int) -> None:
        peer = self._identities.get(identity)
        if peer is None or peer.subscriber is None or peer.subscriber.delivery is None:
            raise RemoteProtocolError("an acknowledgement from one that is not attached")
        peer.subscriber.delivery.ack(seq)
        self._pump(peer.subscriber)
        self._check_all_flushes()

    def _observe(self, identity: bytes, name: str) -> None:
        if identity not in self._observers and len(self._observers) >= MAX_OBSERVERS:
            raise RemoteProtocolError(f"{MAX_OBSERVERS} observers are here already")
        self._observers.setdefault(identity, Observer(name))
        self._want_all()

    def _unsent(self, event: Unsent) -> None:
        peer, observer = self._identities.get(event.identity), self._observers.get(event.identity)
        if isinstance(event.message, Observation) and observer is not None:
            observer.lost += 1
            if not event.again:
                del self._observers[event.identity]
                self._want_all()
        elif isinstance(event.message, Invalidate) and peer and peer.subscriber and peer.subscriber.delivery:
            peer.subscriber.delivery.unsent(event.message.seq)
        elif isinstance(event.message, Attached) and peer:
            self._drop(peer.number, "it cannot be reached on the ROUTER")

    def _tick(self) -> None:
        for _, sub, delivery in self._all.deliveries():
            delivery.blocked = False
            self._pump(sub)
        self._check_all_flushes()

    # ----------------------------------------------------------------------------------------------------- effects

    def _send(self, peer: Peer, message: FromHub, fds: tuple[int, ...] = ()) -> None:
        self._out.append(Send(peer.number, message, fds))

    def _close(self, *fds: int) -> None:
        if fds:
            self._out.append(Close(fds))
