"""Revocation: the order of its steps, and what each interleaving of a device and a revoke must give.

A tiny machine stands in for processors: a device that does one step of a DMA section at a time, with a store buffer
that only a barrier (or the device's own leave) empties. The property at the end runs every schedule against the
promise.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest

from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.revoke import NoFence, Revoke


class Lanes:
    """A lane set whose words a test sets; logs every look."""

    def __init__(self, name: str, words: list[int], log: list[str] | None = None) -> None:
        self.name, self.words, self.living = name, words, True
        self.log = [] if log is None else log

    def snapshot(self) -> list[int]:
        self.log.append("snapshot")
        return list(self.words)

    def alive(self) -> bool:
        return self.living


class Fence:
    def __init__(self, log: list[str] | None = None) -> None:
        self.log = [] if log is None else log

    def barrier(self) -> None:
        self.log.append("barrier")


def test_even_lanes_are_not_waited_for_and_both_barriers_are_made() -> None:
    log: list[str] = []
    assert Revoke(Fence(log), [Lanes("a", [0, 2], log)]).start()
    assert log[:2] == ["barrier", "snapshot"] and log[-1] == "barrier" and log.count("barrier") == 2


def test_without_lane_sets_there_is_nothing_to_do() -> None:
    fence = Fence()
    assert Revoke(fence, []).start()
    assert fence.log == []


def test_an_odd_lane_is_waited_for_until_it_changes() -> None:
    fence, lanes = Fence(), Lanes("a", [0, 5])
    revoke = Revoke(fence, [lanes])
    assert not revoke.start()
    assert not revoke.poll()
    assert fence.log == ["barrier"]
    lanes.words[1] = 6
    assert revoke.poll()
    assert fence.log == ["barrier", "barrier"]


def test_a_lane_in_a_later_section_is_not_waited_for() -> None:
    lanes = Lanes("a", [5])
    revoke = Revoke(Fence(), [lanes])
    assert not revoke.start()
    lanes.words[0] = 7
    assert revoke.poll()


def test_a_lane_that_becomes_odd_after_the_snapshot_is_not_waited_for() -> None:
    lanes = Lanes("a", [5, 0])
    revoke = Revoke(Fence(), [lanes])
    assert not revoke.start()
    lanes.words = [6, 1]
    assert revoke.poll()


def test_a_dead_process_is_not_waited_for() -> None:
    lanes = Lanes("a", [5])
    revoke = Revoke(Fence(), [lanes])
    assert not revoke.start()
    lanes.living = False
    assert revoke.late == []
    assert revoke.poll()


def test_every_lane_set_is_waited_for_and_the_late_ones_are_named() -> None:
    a, b, c = Lanes("a", [1]), Lanes("b", [2]), Lanes("c", [3, 3])
    revoke = Revoke(Fence(), [a, b, c])
    assert not revoke.start()
    assert revoke.late == ["a", "c"]
    c.words = [4, 3]
    assert revoke.late == ["a", "c"]
    a.words = [2]
    assert revoke.late == ["c"]
    c.words[1] = 4
    assert revoke.poll() and revoke.late == []


def test_the_lane_is_read_again_before_it_is_called_late() -> None:
    fence, lanes = Fence(), Lanes("a", [1])
    revoke = Revoke(fence, [lanes])
    assert not revoke.start()
    lanes.words[0] = 2  # while the waiter was off the processor and its deadline passed
    assert revoke.late == []
    assert fence.log == ["barrier"], "asking who is late does not end the revoke"
    assert revoke.poll() and fence.log == ["barrier", "barrier"]


def test_poll_stays_true_and_makes_no_third_barrier() -> None:
    fence = Fence()
    revoke = Revoke(fence, [Lanes("a", [0])])
    assert revoke.start() and revoke.poll() and revoke.poll()
    assert fence.log == ["barrier", "barrier"]


def test_a_revoke_starts_once() -> None:
    revoke = Revoke(NoFence(), [Lanes("a", [1])])
    with pytest.raises(AssertionError):
        revoke.poll()
    revoke.start()
    with pytest.raises(AssertionError):
        revoke.start()


def test_skip_wait_leaves_exactly_the_wait_out() -> None:
    fence = Fence()
    assert Revoke(fence, [Lanes("a", [5])], skip_wait=True).start()
    assert fence.log == ["barrier", "barrier"]


class Device:
    """One DMA section over a table of one entry. The lane's odd value reaches memory late: only a barrier or the next
    store of the device drains it, as on x86."""

    def __init__(self) -> None:
        self.words = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(self.words)
        self.lanes = LaneArea("device", self.words)
        self._lane = Lane(self.words, 0)
        self._buffered = False

    def drain(self) -> None:
        if self._buffered:
            self._buffered = False
            self._lane.enter()

    def section(self, table: dict[str, bool], landed: list[str]) -> Iterator[None]:
        self._buffered = True  # lane odd, in the store buffer
        yield
        valid = table["valid"]  # may pass the store above
        yield
        self.drain()
        yield
        if valid:
            landed.append("copy")
        yield
        self._lane.leave()


def schedules(device_steps: int, waiter_steps: int) -> Iterator[list[bool]]:
    """Every order of the two sides' steps; True is the device's."""
    total = device_steps + waiter_steps
    for places in combinations(range(total), device_steps):
        yield [at in places for at in range(total)]


def unmap(
    device: Device, table: dict[str, bool], landed: list[str], *, barrier: bool, skip_wait: bool
) -> Iterator[None]:
    class DrainingFence:
        def barrier(self) -> None:
            if barrier:
                device.drain()

    table["valid"] = False
    yield
    revoke = Revoke(DrainingFence(), [device.lanes], skip_wait=skip_wait)
    over = revoke.start()
    while not over:
        yield
        over = revoke.poll()
    landed.append("reply")


def violations(*, barrier: bool = True, skip_wait: bool = False) -> int:
    """In how many schedules a copy landed after the reply."""
    found = 0
    for schedule in schedules(5, 4):
        device, table, landed = Device(), {"valid": True}, list[str]()
        sides = {
            True: device.section(table, landed),
            False: unmap(device, table, landed, barrier=barrier, skip_wait=skip_wait),
        }
        for side in [*schedule, *[True] * 6, *[False] * 6]:
            next(sides[side], None)
        assert landed.count("reply") == 1, "the revoke ends when the device has"
        found += "copy" in landed[landed.index("reply") :]
    return found


def test_no_schedule_lets_a_copy_land_after_the_reply() -> None:
    assert violations() == 0


def test_the_schedules_would_notice_a_missing_wait() -> None:
    assert violations(skip_wait=True) > 0


def test_the_schedules_would_notice_a_missing_barrier() -> None:
    assert violations(barrier=False) > 0
