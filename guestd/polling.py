"""Waiting for something that nobody signals: a word in shared memory, looked at with growing pauses.

Spinning is for microseconds only: a waiter that spins holds the core that the other side may need. After that the loop
sleeps on a fine timer and serves what is served meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from protocols.transport.loop import Loop

SPIN_NS: Final = 20_000
FIRST_PAUSE_NS: Final = 50_000
LONGEST_PAUSE_NS: Final = 1_000_000


def poll_until(loop: Loop, poll: Callable[[], bool], seconds: float, peer: str, request: str) -> None:
    """Return when ``poll()`` is true.

    :raise DeadlineExceeded: naming ``peer`` and ``request``, after ``seconds`` (scaled).
    """
    until = time.monotonic_ns() + SPIN_NS
    while time.monotonic_ns() < until:
        if poll():
            return
    pause = FIRST_PAUSE_NS
    armed = False

    def wake() -> None:
        nonlocal armed
        armed = False

    def look() -> bool:
        nonlocal armed, pause
        if poll():
            return True
        if not armed:
            armed = True
            loop.call_later(pause, wake, served=True)
            pause = min(pause * 2, LONGEST_PAUSE_NS)
        return False

    loop.serve_until(look, seconds, peer, request)
