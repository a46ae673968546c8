"""Looking again for a short while before going to sleep.

Two processes that speak in turn spend most of a round trip on going to sleep and being woken: an interrupt to the other
processor each way, and caches that are cold afterwards. Who expects the next message within microseconds therefore
looks for it a few times first, as KVM polls before it halts (Linux ``Documentation/virt/kvm/halt-polling.rst``).

It costs at most about as much as the sleep would have, and it is given up where it does not help: after some attempts
in vain only now and then another one is made; where there is one processor, none at all.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

LONGEST_NS: Final = 50_000
"""How long is looked at a time: what a sleep and being woken cost."""
VAIN: Final = 8
"""Attempts in vain after which most waits go without."""
SELDOM: Final = 64
"""Every how many of those an attempt is made nevertheless."""

T = TypeVar("T")


class HaltPoll(Generic[T]):
    """Calls ``look``, which must not wait, until it gives something true, at most :data:`LONGEST_NS` long.

    ``processors`` is how many there are; None: as many as this machine has.
    """

    def __init__(self, look: Callable[[], T], processors: int | None = None) -> None:
        self._look = look
        self._alone = (processors or os.cpu_count() or 1) == 1
        self._left, self._skipped = VAIN, 0

    def __call__(self) -> T:
        """What ``look`` gave last."""
        look = self._look
        found = look()
        if found or not self._worthwhile():
            return found
        clock = time.monotonic_ns
        until = clock() + LONGEST_NS
        while not (found := look()):
            if clock() > until:
                self._left = max(self._left - 1, 0)
                return found
        self._left = VAIN
        return found

    def _worthwhile(self) -> bool:
        if self._alone:
            return False
        if self._left:
            return True
        self._skipped = (self._skipped + 1) % SELDOM
        return self._skipped == 0
