"""Disturbing a live system at a random point of its traffic."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.acceleration import Switch
from tests.processes.rig import NIC, Live, Target, target, until
from tests.processes.traffic import Traffic

ROUNDS = range(1 if Switch.on else 4)
"""With ``--kvm`` the same disturbances at fewer points: the machine without it has the others."""
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


def kill(victim: Target) -> None:
    """SIGKILL."""
    victim.signal(signal.SIGKILL)


def kill_with_the_device(live: Live, role: str, traffic: Traffic, seed: int) -> None:
    """``role`` is killed at a random point of the traffic; the assigned device ends with it."""
    with target(live.pid(role)) as victim, target(live.pid(NIC)) as device:
        strike(traffic, seed, lambda: kill(victim))
        victim.gone()
        device.gone()


def everything_is_released(live: Live) -> None:
    """Of a guest that has died, by the host."""
    until("the host has released everything", lambda: not live.status("hostd")["mms"])
    status = live.status("hostd")
    assert (status["locked_vm"], status["files"], status["devices"]) == (live.before_guest, [], [])


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
