"""Lanes: parity, position, and what a waiter sees."""

from __future__ import annotations

import pytest

from vfio_model.errors import RemoteProtocolError
from vfio_model.memory.lane import (
    LANE_WORDS,
    LANES,
    LANES_SIZE,
    Lane,
    LaneArea,
    init_lanes,
    lanes_retired,
    lanes_snapshot,
    retire_lanes,
)


def lanes() -> memoryview:
    words = memoryview(bytearray(LANES_SIZE)).cast("Q")
    init_lanes(words)
    return words


def test_a_lane_is_odd_inside_a_section_only() -> None:
    lane = Lane(lanes(), 3)
    assert not lane.inside
    lane.enter()
    assert lane.inside and lanes_snapshot(lane.words)[3] == 1
    lane.leave()
    assert not lane.inside and lanes_snapshot(lane.words)[3] == 2


def test_lanes_lie_on_cache_lines_of_their_own_behind_the_header() -> None:
    words = lanes()
    for index in range(LANES):
        Lane(words, index).enter()
    assert LANE_WORDS * 8 == 64
    assert [at for at in range(8, len(words)) if words[at]] == [8 + 8 * index for index in range(LANES)]
    assert lanes_snapshot(words) == [1] * LANES


def test_sections_do_not_nest() -> None:
    lane = Lane.private()
    lane.enter()
    with pytest.raises(AssertionError, match="inside a DMA section"):
        lane.enter()
    lane.leave()
    with pytest.raises(AssertionError, match="not entered"):
        lane.leave()


def test_there_is_no_seventeenth_lane() -> None:
    with pytest.raises(AssertionError):
        Lane(lanes(), LANES)


def test_the_waiting_side_refuses_what_is_not_a_lane_area() -> None:
    with pytest.raises(RemoteProtocolError, match="lanes of edu0"):
        LaneArea("edu0", memoryview(bytearray(LANES_SIZE)).cast("Q"))


def test_the_waiting_side_sees_the_counters_and_whether_the_process_lives() -> None:
    words = lanes()
    area = LaneArea("edu0", words, alive=lambda: False)
    Lane(words, 1).enter()
    assert area.snapshot() == [0, 1] + [0] * (LANES - 2)
    assert area.name == "edu0" and not area.alive()


def test_retired_lanes_say_so_and_keep_their_counters() -> None:
    words = memoryview(bytearray(LANES_SIZE)).cast("Q")
    init_lanes(words)
    Lane(words, 0).enter()
    assert not lanes_retired(words)
    retire_lanes(words)
    assert lanes_retired(words) and lanes_snapshot(words)[0] == 1
