"""Disturbing a live system at a random point of its traffic."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.processes.traffic import Traffic

ROUNDS = range(4)
POINTS = 5
"""Points of one round; a round has a system of its own, and every point another seed."""
STEPS = range(10, 40)
LATEST_SECONDS = 0.006
"""A few steps of traffic."""


@contextmanager
def told(seed: int) -> Iterator[None]:
    """A failure inside says which seed it had."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"seed of this point: {seed}")
        raise


def seeds(base: int, number: int, points: int = POINTS) -> list[int]:
    """The seeds of round ``number``."""
    return [base + number * points + point for point in range(points)]


def strike(traffic: Traffic, seed: int, fire: Callable[[], None]) -> None:
    """Run traffic, and ``fire()`` from the side at a point that ``seed`` chooses.

    That is in the middle of a step or between two. The traffic is left *disturbed*.
    """
    rng = random.Random(seed)
    traffic.run(rng.choice(STEPS))
    struck = threading.Event()
    errors: list[BaseException] = []

    def fire_now() -> None:
        try:
            fire()
        except OSError as error:
            errors.append(error)
        finally:
            struck.set()

    traffic.disturbed = True
    timer = threading.Timer(rng.random() * LATEST_SECONDS, fire_now)
    timer.start()
    try:
        while not struck.is_set():
            traffic.step()
    finally:
        timer.join()
    assert not errors, f"the signal could not be sent: {errors}"
