"""A step of virtual time returns when every device has taken it, the dead and the late ones excepted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import guestd.clock
from guestd.clock import GuestClock
from guestd.remote import VfioUserDevice
from protocols.transport.kernel import EventFd
from protocols.transport.loop import Loop
from protocols.transport.shm import MappedMemory, map_memory
from protocols.vfio_user.messages import Command
from tests.guestd.fake_device import FakeDevice
from vfio_model.memory.clock_area import check_clock, check_ticks, read_time, write_time


class Follower:
    """The device's side: takes each step as it is rung, unless it is ``stuck``."""

    def __init__(self, fake: FakeDevice, loop: Loop) -> None:
        fds = fake.of(Command.X_CLOCK)[-1].fds
        self.clock, self.ticks = map_memory(fds[0]), map_memory(fds[1], writable=True)
        self.step, self.done = EventFd(fds[2]), EventFd(fds[3])
        fds.clear()
        check_clock(self.clock.words)
        check_ticks(self.ticks.words)
        self.stuck = False
        self.seen: list[int] = []
        self.bar_at_step: list[int] = []
        self._fake, self._loop = fake, loop
        loop.register(self.step, self._rung, served=True)

    def _rung(self) -> None:
        self.step.drain()
        if not self.stuck:
            self.seen.append(read_time(self.clock.words))
            self.bar_at_step.append(self._fake.bar[0])
            write_time(self.ticks.words, self.seen[-1])
            self.done.ring()

    def close(self) -> None:
        self._loop.unregister(self.step)
        memories: tuple[MappedMemory, ...] = (self.clock, self.ticks)
        for memory in memories:
            memory.close()
        self.step.close()
        self.done.close()


@pytest.fixture
def clock(loop: Loop) -> Iterator[GuestClock]:
    clock = GuestClock(loop)
    yield clock
    clock.close()


@pytest.fixture
def device(fake: FakeDevice, clock: GuestClock) -> VfioUserDevice:
    device = fake.connect()
    clock.attach(device)
    return device


@pytest.fixture
def follower(fake: FakeDevice, device: VfioUserDevice, loop: Loop) -> Iterator[Follower]:
    follower = Follower(fake, loop)
    yield follower
    follower.close()


def test_a_step_is_taken_before_it_returns(clock: GuestClock, follower: Follower) -> None:
    assert clock.step(1000) == 1000
    assert clock.step(500) == 1500
    assert follower.seen == [1000, 1500]


def test_posted_writes_arrive_before_the_step(clock: GuestClock, device: VfioUserDevice, follower: Follower) -> None:
    device.region_write(0, 0, b"\x07")
    clock.step(1)
    assert follower.bar_at_step == [7]


def test_timers_of_this_process_run_at_their_moment(clock: GuestClock) -> None:
    fired: list[int] = []
    clock.virtual.timer(lambda: fired.append(clock.now_ns)).mod(300)
    assert clock.step(299) == 299 and fired == []
    assert clock.step() == 300 and fired == [300], "0 goes to the next timer"
    assert clock.step() == 300, "and nowhere without one"


def test_a_device_that_died_is_not_waited_for(
    clock: GuestClock, fake: FakeDevice, device: VfioUserDevice, follower: Follower
) -> None:
    follower.stuck = True
    fake.close()
    assert clock.step(10) == 10
    assert device.lost is not None


def test_a_device_that_is_late_is_given_up(
    clock: GuestClock, device: VfioUserDevice, follower: Follower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestd.clock, "STEP_SECONDS", 0.01)
    follower.stuck = True
    assert clock.step(10) == 10
    assert device.lost is not None and "clock step" in str(device.lost)
    assert clock.step(10) == 20


def test_a_device_that_knows_no_clock_is_left_alone(loop: Loop, clock: GuestClock) -> None:
    other = FakeDevice(loop, extensions=guestd.remote.Extensions())
    clock.attach(other.connect())
    assert not other.of(Command.X_CLOCK)
    assert clock.step(1) == 1
    other.release()


def test_in_real_time_the_clock_moves_by_itself_and_can_be_frozen(loop: Loop) -> None:
    clock = GuestClock(loop, realtime=True)
    while not clock.now_ns:
        loop.run_once(1.0)
    clock.stop()
    loop.run_once(0.0)
    frozen = clock.now_ns
    loop.run_once(0.0)
    assert clock.now_ns == frozen
    clock.close()


def test_while_frozen_no_time_passes_and_steps_add_up(clock: GuestClock, follower: Follower) -> None:
    fired: list[int] = []
    clock.virtual.timer(lambda: fired.append(clock.virtual.now_ns)).mod(300)
    clock.freeze()
    assert clock.step(200) == 200 and clock.step(200) == 400 and clock.step() == 400
    assert clock.virtual.now_ns == 0 and fired == [] and follower.seen == []
    clock.thaw()
    assert clock.now_ns == clock.virtual.now_ns == 400
    assert fired == [300] and follower.seen == [400]


def test_a_stopped_machine_does_not_follow_real_time(loop: Loop) -> None:
    clock = GuestClock(loop, realtime=True)
    clock.freeze()
    for _ in range(3):
        loop.run_once(0.002)
    assert clock.now_ns == 0
    clock.thaw()
    while not clock.now_ns:
        loop.run_once(1.0)
    clock.close()
