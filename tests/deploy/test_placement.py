"""Where the ends of a comparison run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from deploy.bench.placement import opposite


@pytest.fixture
def other() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate(b"\n")


def test_ends_lie_apart_and_are_free_again(other: int) -> None:
    before = os.sched_getaffinity(0)
    with opposite(asking=[os.getpid()], answering=[other]):
        asking, answering = os.sched_getaffinity(0), os.sched_getaffinity(other)
        if len(before) > 1:
            assert len(asking) == len(answering) == 1
            assert asking | answering <= before and not asking & answering
        else:
            assert asking == answering == before
    assert os.sched_getaffinity(0) == os.sched_getaffinity(other) == before


def test_an_end_that_is_gone_does_no_harm(other: int) -> None:
    before = os.sched_getaffinity(0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with pytest.raises(RuntimeError, match="of the caller"), opposite(asking=[gone.pid], answering=[other]):
        raise RuntimeError("of the caller")
    assert os.sched_getaffinity(other) == before
