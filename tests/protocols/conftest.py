"""Fixtures: a private directory with a short path, and a check that no descriptor is left behind."""

from __future__ import annotations

import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from protocols.transport.runtime import make_runtime_directory


def open_fds() -> set[str]:
    """What /proc/self/fd holds, by target, with the descriptor's number."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}")
        except FileNotFoundError:
            continue
    return found


@pytest.fixture
def no_leak() -> Iterator[None]:
    """Every descriptor that the test opened is closed when it ends (libzmq's own thread may take a moment)."""
    zmq.Context.instance().socket(zmq.DEALER).close()
    before = open_fds()
    yield
    deadline = time.monotonic() + 10
    while (left := open_fds() - before) and time.monotonic() < deadline:
        gc.collect()
        os.sched_yield()
    assert left == set()


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A private directory under /tmp."""
    path = make_runtime_directory()
    yield path
    shutil.rmtree(path, ignore_errors=True)
