"""Revocation: "after UNMAP returns, no DMA lands on that page".

One mechanism serves everything that takes a right away: unmap, overwriting a valid TCE, narrowing a permission,
removing a window, detach, freezing a PE, bus master off, dirty tracking on, reset, and invalidating a device's
translation cache.

Devices read tables and move data without a lock, a fence or a message, because a fence is what Python has not got and
a message is what would cost most. So the whole burden lies on the side that revokes, in six steps whose order is the
point::

    1. store the new entries                    caller, before start()
    2. barrier                                  start()
    3. snapshot the lanes                       start()
    4. wait until each odd lane has changed,    start() looks once, poll() again
       or its process is dead
    5. barrier                                  when the last lane is through
    6. free table pages, unpin, un-account,     caller, after True
       reply

Why it holds. The barrier (``membarrier``, a full fence on every processor that runs a registered process) splits each
device thread's life into *before* and *after*. A section that begins after it loads the new entries. One that began
before it has made its lane odd before it, so step 3 sees the odd word; it may still copy through the old entry, and
step 4 waits for exactly that word to change. A lane that is odd again but with another count is in a later section:
it does not have to be waited for, so a saturating device cannot starve a revoke. Without 2, a device can load an old
entry while its odd lane still sits in a store buffer: step 3 sees it even. Without 4, the copy of an odd lane lands
after the reply. Without 5, on a weakly ordered machine, the bytes of a section that is over may become visible after
step 6 has given the page away.

A section ends in microseconds, but its thread may be descheduled, stopped or dead. Nothing here looks at a clock: the
owner polls, and decides with its own deadline. Before it calls a lane *late* the word is read again
(:attr:`Revoke.late`): the waiter may itself have been off the processor, and the deadline may have passed while the
lane had long changed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Fence(Protocol):
    """A full memory barrier on every processor where a registered process runs (``membarrier(GLOBAL_EXPEDITED)``)."""

    def barrier(self) -> None: ...


class NoFence:
    """The fence of a single thread: program order is order enough."""

    def barrier(self) -> None:
        return None


class LaneSet(Protocol):
    """The lanes of one process (:class:`vfio_model.memory.lane.LaneArea`)."""

    @property
    def name(self) -> str:
        """Whose lanes they are, for messages."""

    def snapshot(self) -> list[int]:
        """The counters as they are now."""

    def alive(self) -> bool:
        """Whether the process can still write."""


_odd = (1).__and__
"""Idle processes are most of them: what is done for each costs."""


class _Waiting:
    """The lanes of one set that were odd at the snapshot and have not changed yet."""

    __slots__ = ("lanes", "seen")

    def __init__(self, lanes: LaneSet, counts: list[int]) -> None:
        self.lanes = lanes
        self.seen = [(index, count) for index, count in enumerate(counts) if count & 1]

    def inside(self) -> bool:
        """Look again; whether at least one lane is still in the section that was seen."""
        if self.seen:
            now = self.lanes.snapshot()
            self.seen = [(index, count) for index, count in self.seen if now[index] == count]
            if self.seen and not self.lanes.alive():
                self.seen = []
        return bool(self.seen)


class Revoke:
    """One revocation, as steps that its owner drives: construct, :meth:`start`, then :meth:`poll` until True.

    ``skip_wait`` leaves step 4 out: the fault injection by which the tests prove that they would notice.
    """

    __slots__ = ("_fence", "_lane_sets", "_over", "_skip_wait", "_started", "_waiting")

    def __init__(self, fence: Fence, lane_sets: Iterable[LaneSet], *, skip_wait: bool = False) -> None:
        self._fence = fence
        self._lane_sets = tuple(lane_sets)
        self._skip_wait = skip_wait
        self._waiting: list[_Waiting] = []
        self._started = self._over = False

    def start(self) -> bool:
        """Steps 2 and 3, and a first look at step 4; call it after the new entries are stored.

        :return: True when it is already over (step 5 included): the caller goes on with step 6 at once.
        """
        assert not self._started, "a revoke starts once"
        self._started = True
        if not self._lane_sets:
            self._over = True
            return True
        self._fence.barrier()
        for lanes in self._lane_sets:
            counts = lanes.snapshot()
            if any(map(_odd, filter(None, counts))):
                self._waiting.append(_Waiting(lanes, counts))
        if self._skip_wait:
            self._waiting = []
        return self.poll()

    def poll(self) -> bool:
        """Look again at the lanes still waited for, then step 5. Does not block.

        :return: True when the revocation is over; stays True.
        """
        assert self._started, "poll() before start()"
        if self._over:
            return True
        self._look()
        if self._waiting:
            return False
        self._fence.barrier()
        self._over = True
        return True

    @property
    def late_sets(self) -> list[LaneSet]:
        """The lane sets that are, *read again now*, still inside the section that was seen.

        Empty means that nobody is late, whatever the clock says: :meth:`poll` will return True.
        """
        self._look()
        return [waiting.lanes for waiting in self._waiting]

    @property
    def late(self) -> list[str]:
        """Names of :attr:`late_sets`; two of them may have one name."""
        return [lanes.name for lanes in self.late_sets]

    def _look(self) -> None:
        self._waiting = [waiting for waiting in self._waiting if waiting.inside()]
