"""The notifier's hub: nobody is forgotten, nobody who is dead is waited for, every descriptor is given back once."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.notifier.delivery import Delivery
from protocols.notifier.events import (
    Broken,
    Close,
    Connected,
    Died,
    Disconnect,
    Disconnected,
    Effect,
    Post,
    Received,
    Refuse,
    RouterReceived,
    Send,
    Tick,
    Unsent,
)
from protocols.notifier.hub import MAX_FLUSHES, Hub
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
    RouterFromHub,
    RouterToHub,
    SpaceGone,
    Subscribe,
    SubscribeByMessage,
    Subscribed,
    Ticket,
    ToHub,
    Want,
    Wanted,
    fd_count,
)
from vfio_model.errors import RemoteProtocolError
from vfio_model.ranges import U64_MAX

PUBLISHER, RING, MESSAGE = 1, 2, 3
RECORD = Record(5, 0x1000, 0x1FFF, 1)


class World:
    """A hub, the descriptors it holds, and what was sent to whom."""

    def __init__(self, max_backlog: int = 100) -> None:
        self.hub = Hub(itertools.count(1000).__next__, max_backlog=max_backlog)
        self.fds = itertools.count(10)
        self.held: Counter[int] = Counter()
        self.now = 0

    def take(self, effects: Iterable[Effect]) -> list[Effect]:
        rest: list[Effect] = []
        for effect in effects:
            if isinstance(effect, Close):
                for fd in effect.fds:
                    assert self.held.pop(fd, 0) == 1, f"descriptor {fd} is not the hub's"
            else:
                if isinstance(effect, Send):
                    assert len(effect.fds) == fd_count(effect.message)
                    assert all(fd in self.held for fd in effect.fds)
                rest.append(effect)
        return rest

    def fd(self) -> int:
        fd = next(self.fds)
        self.held[fd] = 1
        return fd

    def connect(self, peer: int) -> None:
        assert self.take(self.hub.handle(Connected(peer, 100 + peer, self.fd()), self.now)) == []

    def say(self, peer: int, message: ToHub) -> list[Effect]:
        fds = [self.fd() for _ in range(fd_count(message))]
        return self.take(self.hub.handle(Received(peer, message, fds), self.now))

    def route(self, identity: bytes, message: RouterToHub) -> list[Effect]:
        return self.take(self.hub.handle(RouterReceived(identity, message), self.now))

    def event(self, event: Broken | Disconnected | Died | Unsent | Tick) -> list[Effect]:
        return self.take(self.hub.handle(event, self.now))

    def publisher(self, spaces: list[int] | None = None) -> list[Effect]:
        self.connect(PUBLISHER)
        return self.say(PUBLISHER, Announce("guest", [5, 6] if spaces is None else spaces))

    def ring_subscriber(self, peer: int = RING) -> list[Effect]:
        self.connect(peer)
        return self.say(peer, Subscribe(f"dev{peer}", [5]))

    def attached(self, peer: int = MESSAGE, credit: int = 2) -> bytes:
        """A message subscriber that is attached; the publisher has confirmed."""
        self.connect(peer)
        (ticket,) = messages(self.say(peer, SubscribeByMessage(f"dev{peer}", [5], credit)))
        assert isinstance(ticket, Ticket)
        identity = b"id%d" % peer
        effects = self.route(identity, Attach(ticket.ticket))
        for message in messages(effects):
            if isinstance(message, Want):
                effects = self.say(PUBLISHER, Wanted(message.seq))
        assert posts(effects) == [Attached(1)]
        return identity


def messages(effects: Iterable[Effect]) -> list[FromHub]:
    return [effect.message for effect in effects if isinstance(effect, Send)]


def posts(effects: Iterable[Effect]) -> list[RouterFromHub]:
    return [effect.message for effect in effects if isinstance(effect, Post)]


@pytest.fixture
def world() -> World:
    return World()


def test_a_ring_subscriber_gets_the_ring_only_when_the_publisher_waits_for_its_lanes(world: World) -> None:
    assert messages(world.publisher()) == [Want(1, False)]
    (offer,) = world.ring_subscriber()
    assert isinstance(offer, Send) and offer.peer == PUBLISHER
    assert offer.message == LaneAdd(1, "dev2", 102, [5])
    (subscribed,) = world.say(PUBLISHER, LaneReady(1))
    assert isinstance(subscribed, Send) and (subscribed.peer, subscribed.message) == (RING, Subscribed(1))


def test_a_subscriber_may_come_before_its_publisher(world: World) -> None:
    assert world.ring_subscriber() == []
    assert messages(world.publisher([6])) == [Want(1, False)]
    assert messages(world.say(PUBLISHER, AddSpace(5))) == [LaneAdd(1, "dev2", 102, [5])]


@pytest.mark.parametrize("end", [Died(RING), Disconnected(RING)])
def test_the_lanes_of_one_that_left_are_not_waited_for(world: World, end: Died | Disconnected) -> None:
    world.publisher()
    world.ring_subscriber()
    world.say(PUBLISHER, LaneReady(1))
    assert messages(world.event(end)) == [LaneRemove(1)]
    assert messages(world.event(Disconnected(PUBLISHER))) == []
    assert not world.held


def test_the_lanes_of_one_that_broke_the_protocol_are_waited_for_until_it_is_dead(world: World) -> None:
    world.publisher()
    world.ring_subscriber()
    world.say(PUBLISHER, LaneReady(1))
    refused, disconnect = world.event(Broken(RING, "junk"))
    assert isinstance(refused, Send) and refused.message == Refused("junk") and disconnect == Disconnect(RING)
    assert world.event(Disconnected(RING)) == []
    assert messages(world.event(Died(RING))) == [LaneRemove(1)]


def test_a_publisher_that_comes_back_gets_all_lanes_again(world: World) -> None:
    world.publisher()
    world.ring_subscriber()
    world.say(PUBLISHER, LaneReady(1))
    assert messages(world.event(Died(PUBLISHER))) == [PublisherLost("guest")]
    world.connect(9)
    again = world.say(9, Announce("guest", [5]))
    assert messages(again) == [Want(1, False), LaneAdd(1, "dev2", 102, [5])]
    assert messages(world.say(9, LaneReady(1))) == [Subscribed(1)]


def test_a_name_moves_to_a_new_connection_of_the_same_process_only(world: World) -> None:
    world.publisher()
    world.connect(9)
    assert isinstance(messages(world.say(9, Announce("guest", [7])))[0], Refused)
    world.take(world.hub.handle(Connected(10, 101, world.fd())))
    effects = world.say(10, Announce("guest", [5]))
    assert effects[0] == Disconnect(PUBLISHER) and messages(effects) == [Want(1, False)]


def test_an_address_space_has_one_publisher(world: World) -> None:
    world.publisher()
    world.connect(9)
    (refused,) = messages(world.say(9, Announce("other", [6, 7])))
    assert refused == Refused("address space 6 is published by guest")


def test_without_message_subscribers_or_observers_no_message_is_wanted(world: World) -> None:
    world.publisher()
    identity = world.attached()
    assert messages(world.event(Died(MESSAGE))) == [Want(3, False)]
    assert messages(world.route(b"watcher", Observe("dashboard"))) == [Want(4, True)]
    assert identity not in world.hub._identities


def test_attached_comes_only_after_the_publisher_has_confirmed(world: World) -> None:
    world.publisher()
    world.connect(MESSAGE)
    world.say(MESSAGE, SubscribeByMessage("dev3", [5], 2))
    assert messages(world.route(b"id3", Attach(1000))) == [Want(2, True)]
    assert world.say(PUBLISHER, Wanted(1)) == []
    assert posts(world.say(PUBLISHER, Wanted(2))) == [Attached(1)]


def test_a_ticket_works_once_and_only_if_it_was_given(world: World) -> None:
    world.publisher()
    world.attached()
    for ticket in (0, 1000, 1):
        (refuse,) = world.route(b"other", Attach(ticket))
        assert isinstance(refuse, Refuse)


def test_a_flush_is_done_when_all_is_acknowledged(world: World) -> None:
    world.publisher()
    identity = world.attached(credit=2)
    sent = posts(world.say(PUBLISHER, Publish(7, [RECORD] * 3)))
    assert sent == [Invalidate(1, 7, RECORD), Invalidate(2, 7, RECORD)]
    assert world.say(PUBLISHER, Flush(1, 1000)) == []
    assert posts(world.route(identity, Ack(2))) == [Invalidate(3, 7, RECORD)]
    assert messages(world.route(identity, Ack(3))) == [FlushDone(1, [])]
    assert messages(world.say(PUBLISHER, Flush(2, 1000))) == [FlushDone(2, [])]


def test_a_flush_waits_for_nothing_that_came_after_it(world: World) -> None:
    world.publisher()
    identity = world.attached(credit=4)
    world.say(PUBLISHER, Publish(7, [RECORD]))
    world.say(PUBLISHER, Flush(1, 1000))
    world.say(PUBLISHER, Publish(7, [RECORD]))
    assert messages(world.route(identity, Ack(1))) == [FlushDone(1, [])]


@pytest.mark.parametrize("end", [Died(MESSAGE), Disconnected(MESSAGE)])
def test_one_that_is_gone_counts_as_having_acknowledged(world: World, end: Died | Disconnected) -> None:
    world.publisher()
    world.attached()
    world.say(PUBLISHER, Publish(7, [RECORD]))
    assert world.say(PUBLISHER, Flush(1, 1000)) == []
    assert FlushDone(1, []) in messages(world.event(end))


def test_one_that_broke_the_protocol_counts_only_when_it_is_dead(world: World) -> None:
    world.publisher()
    identity = world.attached()
    world.say(PUBLISHER, Publish(7, [RECORD]))
    world.say(PUBLISHER, Flush(1, 1000))
    effects = world.route(identity, Ack(99))
    assert any(isinstance(effect, Refuse) for effect in effects) and FlushDone(1, []) not in messages(effects)
    assert FlushDone(1, []) not in messages(world.event(Disconnected(MESSAGE)))
    assert FlushDone(1, []) in messages(world.event(Died(MESSAGE)))


def test_a_deadline_names_those_who_are_late(world: World) -> None:
    world.publisher()
    world.attached()
    world.say(PUBLISHER, Publish(7, [RECORD]))
    world.say(PUBLISHER, Flush(1, 1000))
    assert world.hub.next_deadline_ns() == 1000
    world.now = 999
    assert world.event(Tick()) == []
    world.now = 1000
    assert messages(world.event(Tick())) == [FlushDone(1, ["dev3"])]
    assert world.hub.next_deadline_ns() is None


def test_a_full_queue_delays_and_loses_nothing(world: World) -> None:
    world.publisher()
    identity = world.attached(credit=3)
    sent = posts(world.say(PUBLISHER, Publish(7, [RECORD] * 3)))
    for message in sent[1:]:
        world.event(Unsent(identity, message, True))
    assert world.hub.next_deadline_ns() == 1_000_000
    assert posts(world.event(Tick())) == sent[1:]
    assert world.event(Tick()) == []


def test_a_backlog_that_is_too_long_becomes_a_flush_of_everything() -> None:
    world = World(max_backlog=3)
    world.publisher()
    identity = world.attached(credit=1)
    assert len(posts(world.say(PUBLISHER, Publish(7, [RECORD])))) == 1
    world.say(PUBLISHER, Publish(7, [RECORD] * 9))
    world.say(PUBLISHER, Flush(1, 1000))
    assert posts(world.route(identity, Ack(1))) == [Invalidate(2, 7, Record(5, 0, U64_MAX, 0))]
    assert messages(world.route(identity, Ack(2))) == [FlushDone(1, [])]


def test_observers_lose_and_are_told_how_much(world: World) -> None:
    world.publisher()
    world.route(b"watcher", Observe("dashboard"))
    (first,) = posts(world.say(PUBLISHER, Publish(7, [RECORD])))
    assert first == Observation(0, 7, RECORD)
    world.event(Unsent(b"watcher", first, True))
    assert posts(world.say(PUBLISHER, Publish(7, [RECORD]))) == [Observation(1, 7, RECORD)]
    assert messages(world.event(Unsent(b"watcher", first, False))) == [Want(3, False)]
    assert posts(world.say(PUBLISHER, Publish(7, [RECORD]))) == []


def test_a_space_that_goes_is_flushed_everywhere(world: World) -> None:
    world.publisher()
    world.ring_subscriber()
    world.say(PUBLISHER, LaneReady(1))
    world.attached()
    effects = world.say(PUBLISHER, RemoveSpace(5))
    assert posts(effects) == [Invalidate(1, 0, Record(5, 0, U64_MAX, 0))]
    assert messages(effects) == [SpaceGone(5), SpaceGone(5)]


def test_after_a_publisher_came_back_the_numbers_go_on(world: World) -> None:
    world.publisher()
    identity = world.attached()
    world.say(PUBLISHER, Publish(7, [RECORD]))
    world.route(identity, Ack(1))
    assert PublisherLost("guest") in messages(world.event(Died(PUBLISHER)))
    world.connect(9)
    effects = world.say(9, Announce("guest", [5]))
    assert messages(effects) == [Want(1, True)]
    assert posts(world.say(9, Wanted(1))) == [Attached(2)]
    assert posts(world.say(9, Publish(8, [RECORD]))) == [Invalidate(2, 8, RECORD)]


@pytest.mark.parametrize(
    "message", [Publish(0, [RECORD]), Flush(1, 0), LaneReady(1), AddSpace(1), RemoveSpace(1), Wanted(1)]
)
def test_only_a_publisher_publishes(world: World, message: ToHub) -> None:
    world.connect(9)
    assert isinstance(messages(world.say(9, message))[0], Refused)
    assert not world.held


def test_a_publisher_publishes_its_own_spaces_and_not_too_many_flushes(world: World) -> None:
    world.publisher()
    assert isinstance(messages(world.say(PUBLISHER, Publish(0, [Record(9, 0, 1, 0)])))[0], Refused)
    world = World()
    world.publisher()
    world.attached()
    world.say(PUBLISHER, Publish(7, [RECORD]))
    for number in range(MAX_FLUSHES):
        assert world.say(PUBLISHER, Flush(number, 1000)) == []
    assert Refused(f"{MAX_FLUSHES} flushes are open") in messages(world.say(PUBLISHER, Flush(99, 1000)))


def test_the_hub_answers_ping(world: World) -> None:
    assert posts(world.route(b"x", Ping(4))) == [Pong(4)]


@given(st.data())
def test_whatever_happens_every_descriptor_is_given_back_once(data: st.DataObject) -> None:
    world = World(max_backlog=5)
    choices: list[ToHub] = [
        Announce("guest", [5]),
        Announce("guest2", [6]),
        Announce("guest3", [5, 6]),
        Subscribe("a", [5]),
        Subscribe("b", [5, 6]),
        SubscribeByMessage("c", [5], 2),
        Publish(1, [RECORD] * 4),
        Flush(1, 10),
        Wanted(1),
        Wanted(2),
        LaneReady(1),
        LaneReady(2),
        AddSpace(6),
        RemoveSpace(5),
    ]
    routed: list[RouterToHub] = [Attach(1000), Attach(1001), Ack(1), Ack(3), Observe("o"), Ping(1)]
    connected = 0
    for _ in range(data.draw(st.integers(1, 25))):
        kind = data.draw(st.integers(0, 9))
        peer = data.draw(st.integers(1, max(connected, 1)))
        if kind <= 1 or connected == 0:
            connected += 1
            world.connect(connected)
        elif kind <= 5:
            world.say(peer, data.draw(st.sampled_from(choices)))
        elif kind == 6:
            world.route(data.draw(st.sampled_from([b"x", b"y"])), data.draw(st.sampled_from(routed)))
        elif kind == 7:
            ends: list[Disconnected | Died | Broken] = [Disconnected(peer), Died(peer), Broken(peer, "x")]
            world.event(data.draw(st.sampled_from(ends)))
        else:
            world.now += 7
            world.event(Tick())
    for peer in world.hub.peers():
        world.event(Died(peer))
    assert not world.held and world.hub.peers() == []


@given(st.lists(st.tuples(st.sampled_from(["add", "take", "ack", "unsent"]), st.integers(0, 5)), max_size=60))
def test_delivery_is_in_order_complete_and_within_the_credit(steps: list[tuple[str, int]]) -> None:
    """Against an oracle: the lists of what was added, received in order, and acknowledged."""
    delivery = Delivery([5], credit=3)
    added, received, acked, unread = 0, 0, 0, list[int]()
    for step, number in steps:
        if step == "add":
            delivery.add(0, [Record(5, added + n, added + n, 0) for n in range(number)] + [Record(6, 0, 0, 0)])
            added += number
        elif step == "take":
            unread += [message.seq for message in delivery.take()]
            assert len(unread) + received - acked <= 3
        elif step == "unsent" and unread:
            first = unread[min(number, len(unread) - 1)]
            delivery.unsent(first)
            unread = [seq for seq in unread if seq < first]
        elif step == "ack":
            for seq in unread:
                assert seq == received + 1
                received = seq
            unread = []
            acked = received
            delivery.ack(acked)
    assert delivery.last == added
    while acked < added:
        delivery.blocked = False
        unread += [message.seq for message in delivery.take()]
        assert unread == list(range(acked + 1, acked + 1 + len(unread)))
        acked, unread = unread[-1], []
        delivery.ack(acked)
    with pytest.raises(RemoteProtocolError):
        delivery.ack(added + 1)


def test_one_that_was_offered_only_goes_when_it_breaks_the_protocol() -> None:
    """It was never told that it is subscribed: it has cached nothing, and its process may live on."""
    world = World()
    world.publisher()
    assert any(isinstance(message, LaneAdd) for message in messages(world.ring_subscriber()))
    held = world.held.total()
    effects = world.event(Broken(RING, "nonsense"))
    assert any(isinstance(effect, Disconnect) and effect.peer == RING for effect in effects)
    (number,) = [message.subscriber for message in messages(effects) if isinstance(message, LaneRemove)]
    assert world.held.total() == held - 2, "its lanes and its process"
    assert messages(world.say(PUBLISHER, LaneReady(number))) == [], "an answer that comes late is nobody's"
