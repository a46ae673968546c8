"""Invalidations reach those who cache: the hub, a subscriber and the publisher, in one loop."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import guestd.notifier
from guestd.dma_services import DmaServices
from guestd.notifier import Publisher, SpaceFollower
from protocols.notifier import messages as wire
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.notifier import NotifierServer
from protocols.transport.shm import create_memory, map_memory
from protocols.transport.unix import SeqpacketConnection
from tests.memory.fakes import DictIOMMU, system_memory
from tests.vfio.direct_chain import Chain
from vfio_model.errors import PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.lane import LANES_SIZE, Lane, init_lanes
from vfio_model.memory.region import AliasRegion, MemoryRegion, transaction
from vfio_model.memory.revoke import NoFence
from vfio_model.memory.ring import RecordFlags, RingReader, pasid_flags
from vfio_model.memory.types import PCI_NO_PASID, IOMMUNotifierFlag

pytestmark = pytest.mark.machine

AS_ID = 7


class Subscriber:
    """A process that caches translations: a lane, and the ring it was given."""

    def __init__(self, directory: Path, loop: Loop) -> None:
        self._loop = loop
        self.memory = create_memory("lanes", LANES_SIZE)
        init_lanes(self.memory.words)
        self.lane = Lane(self.memory.words, 0)
        self.channel: FdChannel[wire.FromHub, wire.ToHub] = FdChannel(
            SeqpacketConnection.connect(directory / "notifier.sock"), wire.FROM_HUB, wire.TO_HUB, wire.fd_count
        )
        self.ring: RingReader | None = None
        self._ring_memory = None
        loop.register(self.channel, self._readable, served=True)
        self.channel.send(wire.Subscribe("cache", [AS_ID]), (self.memory.fd,))
        loop.serve_until(lambda: self.ring is not None, 5, "hub", "Subscribed")

    def _readable(self) -> None:
        try:
            received = self.channel.receive()
        except PeerLost:
            self._loop.unregister(self.channel)
            return
        if received is not None and isinstance(received[0], wire.Subscribed):
            self._ring_memory = map_memory(received[1][0])
            self.ring = RingReader(self._ring_memory.words)

    def drained(self) -> list[tuple[int, int, int]]:
        """The records since the last time."""
        found: list[tuple[int, int, int]] = []
        assert self.ring is not None
        assert self.ring.drain(lambda as_id, iova, last, _flags: found.append((as_id, iova, last)))
        return found

    def close(self) -> None:
        self._loop.unregister(self.channel)
        self.channel.close()
        self.memory.close()
        if self._ring_memory is not None:
            self._ring_memory.close()


@pytest.fixture
def hub(loop: Loop, runtime_dir: Path) -> Iterator[NotifierServer]:
    server = NotifierServer(loop, runtime_dir, served=True)
    yield server
    server.close()


@pytest.fixture
def publisher(loop: Loop, runtime_dir: Path, hub: NotifierServer) -> Iterator[Publisher]:
    publisher = Publisher(runtime_dir, "guest", loop, NoFence())
    publisher.add_space(AS_ID)
    yield publisher
    publisher.close()


@pytest.fixture
def subscriber(loop: Loop, runtime_dir: Path, publisher: Publisher) -> Iterator[Subscriber]:
    subscriber = Subscriber(runtime_dir, loop)
    yield subscriber
    subscriber.close()


def test_a_subscriber_is_known_before_it_gets_the_ring(publisher: Publisher, subscriber: Subscriber) -> None:
    assert publisher.status()["subscribers"] == ["cache"]


def test_nothing_to_say_is_no_invalidation(publisher: Publisher, subscriber: Subscriber) -> None:
    assert publisher.flush() is None
    assert publisher.invalidations == 0


def test_a_flush_publishes_everything_that_was_queued(publisher: Publisher, subscriber: Subscriber) -> None:
    publisher.append(AS_ID, 0x1000, 0x1FFF)
    publisher.append(AS_ID, 0x5000, 0x8FFF)
    assert subscriber.drained() == []
    assert publisher.flush() is None
    assert subscriber.drained() == [(AS_ID, 0x1000, 0x1FFF), (AS_ID, 0x5000, 0x8FFF)]


def test_a_flush_waits_for_the_section_that_is_under_way(
    publisher: Publisher, subscriber: Subscriber, loop: Loop
) -> None:
    subscriber.lane.enter()
    left: list[bool] = []

    def leave() -> None:
        left.append(True)
        subscriber.lane.leave()

    loop.call_later(2_000_000, leave, served=True)
    publisher.append(AS_ID, 0, 0xFFF)
    assert publisher.flush() is None
    assert left


def test_a_subscriber_that_stays_is_fenced_never_ignored(
    publisher: Publisher, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.notifier, "LANE_SECONDS", 0.01)
    monkeypatch.setattr(guestd.notifier, "FENCE_SECONDS", 0.01)
    killed: list[int] = []
    monkeypatch.setattr(guestd.notifier.Pidfd, "send_signal", lambda self, number: killed.append(self.pid))
    subscriber.lane.enter()
    publisher.append(AS_ID, 0, 0xFFF)
    error = publisher.flush()
    assert killed == [os.getpid()], "its process, which here is this one and survives"
    assert error is not None and "cache" in str(error)


def test_one_that_leaves_during_the_wait_is_not_waited_for(
    publisher: Publisher, subscriber: Subscriber, loop: Loop
) -> None:
    subscriber.lane.enter()
    loop.call_later(
        2_000_000, lambda: (loop.unregister(subscriber.channel), subscriber.channel.close())[0], served=True
    )
    publisher.append(AS_ID, 0, 0xFFF)
    assert publisher.flush() is None
    assert publisher.status()["subscribers"] == []


def test_without_the_hub_known_lanes_are_still_waited_for_and_it_is_found_again(
    publisher: Publisher, subscriber: Subscriber, hub: NotifierServer, loop: Loop, runtime_dir: Path
) -> None:
    hub.close()
    while publisher.status()["connected"]:
        loop.run_once(1.0)
    publisher.append(AS_ID, 0, 0xFFF)
    assert publisher.flush() is None
    assert subscriber.drained() == [(AS_ID, 0, 0xFFF)]
    again = NotifierServer(loop, runtime_dir, served=True)
    while not publisher.status()["connected"]:
        loop.run_once(1.0)
    again.close()


def test_windows_and_their_entries_are_followed_by_bus_address(publisher: Publisher, subscriber: Subscriber) -> None:
    chain = Chain(connect=False)
    space = chain.machine.phb().address_space
    follower = SpaceFollower(publisher, AS_ID)
    space.register_listener(follower)
    chain.put(0x3000, 0x5003)
    chain.put(0x3000, 0x6003)
    assert subscriber.drained() == [(AS_ID, 0x3000, 0x3FFF)] * 2, "an overwritten entry is invalidated too"
    chain.stuff(0x10000, 0, 16)
    assert subscriber.drained() == [(AS_ID, 0x10000, 0x1FFFF)]
    chain.create_window(16, 24)
    chain.put((1 << 59) + 0x10000, 0x10003, 0x8000_0001)
    chain.remove_window(0x8000_0001)
    start = 1 << 59
    assert subscriber.drained() == [(AS_ID, start + 0x10000, start + 0x1FFFF), (AS_ID, start, start + (1 << 24) - 1)]
    space.unregister_listener(follower)


def test_a_window_that_goes_is_invalidated_when_nobody_is_given_its_translations_any_more(
    publisher: Publisher, subscriber: Subscriber, loop: Loop
) -> None:
    chain = Chain(connect=False)
    phb = chain.machine.phb()
    follower = SpaceFollower(publisher, AS_ID)
    phb.address_space.register_listener(follower)
    services = DmaServices(phb.address_space, chain.machine.system, lambda: True)
    chain.put(0x3000, 0x5003)
    assert services.translate_page(0x3000).perm
    subscriber.drained()
    subscriber.lane.enter()
    answers: list[int] = []

    def ask_in_the_wait() -> None:
        assert subscriber.drained(), "the invalidation is published"
        answers.append(services.translate_page(0x3000).perm)
        subscriber.lane.leave()

    loop.call_later(2_000_000, ask_in_the_wait, served=True)
    phb.dma.tables[0].disable()
    assert answers == [0]
    phb.address_space.unregister_listener(follower)


class DeafIommu(DictIOMMU):
    """One that tells nobody of anything."""

    def notify_flag_changed(self, old: IOMMUNotifierFlag, new: IOMMUNotifierFlag) -> None:
        raise OSError(errno.ENOTSUP, "no followers")


def test_a_space_whose_iommu_tells_nobody_is_known_as_such(publisher: Publisher, subscriber: Subscriber) -> None:
    system, _ = system_memory(1 << 16)
    root = MemoryRegion("root", 1 << 32)
    root.add_subregion(0, DeafIommu(system))
    space = AddressSpace("device", root)
    follower = SpaceFollower(publisher, AS_ID)
    space.register_listener(follower)
    assert not follower.complete
    space.unregister_listener(follower)
    assert follower.complete


def test_memory_that_is_no_longer_shown_as_it_is_is_invalidated(publisher: Publisher, subscriber: Subscriber) -> None:
    system, _ = system_memory(1 << 16)
    assert system.root is not None
    root = MemoryRegion("root", 1 << 32)
    passed, translated = AliasRegion("passed", system.root, 0, 1 << 32), DictIOMMU(system)
    root.add_subregion(0, passed)
    space = AddressSpace("device", root)
    space.register_listener(SpaceFollower(publisher, AS_ID))
    with transaction():
        passed.set_enabled(False)
        root.add_subregion(0, translated)
    assert subscriber.drained() == [(AS_ID, 0, 0xFFFF)]


def test_who_was_late_for_an_invalidation_of_caches_is_told_of_once(
    publisher: Publisher, subscriber: Subscriber, monkeypatch: pytest.MonkeyPatch, loop: Loop
) -> None:
    monkeypatch.setattr(guestd.notifier, "LANE_SECONDS", 0.01)
    monkeypatch.setattr(Pidfd, "send_signal", lambda self, number: subscriber.lane.leave())
    for flags, late in ((pasid_flags(5, RecordFlags.ATS), True), (pasid_flags(PCI_NO_PASID), False)):
        subscriber.lane.enter()
        publisher.append(AS_ID, 0, 0xFFF, flags)
        error = publisher.flush_ats()
        assert (error is not None and error.errno == errno.ETIMEDOUT) is late
        assert publisher.flush_ats() is None and not subscriber.lane.inside


def test_a_new_hub_numbers_anew_and_whom_the_old_one_introduced_is_still_waited_for(
    publisher: Publisher, subscriber: Subscriber, hub: NotifierServer, loop: Loop, runtime_dir: Path
) -> None:
    hub.close()
    while publisher.status()["connected"]:
        loop.run_once(1.0)
    again = NotifierServer(loop, runtime_dir, served=True)
    while not publisher.status()["connected"]:
        loop.run_once(1.0)
    other = Subscriber(runtime_dir, loop)
    assert publisher.status()["subscribers"] == ["cache", "cache"]
    subscriber.lane.enter()
    loop.call_later(2_000_000, subscriber.lane.leave, served=True)
    publisher.append(AS_ID, 0, 0xFFF)
    assert publisher.flush() is None
    assert not subscriber.lane.inside
    other.close()
    again.close()


def test_two_subscribers_of_one_process_and_name_are_two(
    publisher: Publisher, subscriber: Subscriber, loop: Loop, runtime_dir: Path
) -> None:
    other = Subscriber(runtime_dir, loop)
    assert publisher.status()["subscribers"] == ["cache", "cache"]
    other.close()


def test_who_has_the_name_of_one_that_stays_is_not_fenced_with_it(
    publisher: Publisher, subscriber: Subscriber, loop: Loop, runtime_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.notifier, "LANE_SECONDS", 0.01)
    monkeypatch.setattr(guestd.notifier, "FENCE_SECONDS", 0.01)
    killed: list[Pidfd] = []
    monkeypatch.setattr(Pidfd, "send_signal", lambda self, number: killed.append(self))
    other = Subscriber(runtime_dir, loop)
    subscriber.lane.enter()
    publisher.append(AS_ID, 0, 0xFFF)
    assert publisher.flush() is not None
    assert len(killed) == 1
    other.close()


def test_a_hub_that_hangs_is_no_success(
    publisher: Publisher, subscriber: Subscriber, hub: NotifierServer, loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.notifier, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(publisher, "_wanted", True)
    monkeypatch.setattr(NotifierServer, "_receive", lambda self, number: self._channels[number].connection.receive())
    publisher.append(AS_ID, 0, 0xFFF)
    error = publisher.flush()
    assert error is not None and error.errno == errno.ETIMEDOUT
