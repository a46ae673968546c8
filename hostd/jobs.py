"""Operations that may have to wait, one queue for each thing they concern.

An operation is a generator that does its work and yields what it waits for (:class:`Wait`). What concerns the same
container runs in the order of its arrival: a pending operation keeps those behind it waiting, those of other
containers go on. Nothing here blocks or looks at a clock: :meth:`JobQueue.poll` asks the waits and resumes what can
go on. Long work is done in slices: an operation yields :class:`Turn` between two of them, and the owner calls
:meth:`JobQueue.turn` for one slice of one of them, whenever it has served everybody else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from hostd.clients import Client
from vfio_model.memory.revoke import LaneSet, Revoke


class Wait(Protocol):
    """What an operation waits for. ``what`` says so to a person."""

    @property
    def what(self) -> str: ...

    def over(self) -> bool: ...


Steps = Generator[Wait, None, None]
"""The body of an operation."""


class RevokeWait:
    """DMA sections that began before a right was taken away."""

    what = "DMA sections"
    meanwhile = "in one DMA section"

    def __init__(self, revoke: Revoke) -> None:
        self.revoke = revoke

    def over(self) -> bool:
        """Look at the lanes again."""
        return self.revoke.poll()

    @property
    def late(self) -> list[str]:
        """Devices that are still inside, read again now."""
        return self.revoke.late


class QuiesceWait:
    """The same where there is no fence: each device (by key) was sent Quiesce ``seq``, and answers from outside every
    DMA section. Its lanes say nothing without a fence, only whether it lives."""

    what = "an answer"
    meanwhile = "without an answer"

    def __init__(self, seq: int, asked: dict[int, LaneSet]) -> None:
        self.seq, self._asked = seq, asked

    def answered(self, key: int, seq: int) -> None:
        """Device ``key`` has sent Quiet. An answer to another question is none."""
        if seq == self.seq:
            self._asked.pop(key, None)

    def over(self) -> bool:
        """Whether each has answered or is dead."""
        self._asked = {key: lanes for key, lanes in self._asked.items() if lanes.alive()}
        return not self._asked

    @property
    def late(self) -> list[str]:
        """Devices that live and have not answered."""
        return [lanes.name for lanes in self._asked.values() if lanes.alive()]


DmaWait = RevokeWait | QuiesceWait
"""Both ways in which a revoke waits for devices."""


class Until:
    """Any condition over the service's own state."""

    def __init__(self, what: str, condition: Callable[[], bool]) -> None:
        self.what, self._condition = what, condition

    def over(self) -> bool:
        """Ask the condition."""
        return self._condition()


class Turn:
    """Others are served before the next slice of the work. ``client`` is for whom it is done."""

    what = "its turn"

    def __init__(self, client: Client) -> None:
        self.client = client
        self.come = False

    def over(self) -> bool:
        """Whether :meth:`JobQueue.turn` has come to it."""
        return self.come


@dataclass(slots=True, eq=False)
class Job:
    """One operation: ``label`` is its name for a person, ``client`` the pid that it serves."""

    label: str
    steps: Steps
    client: int = 0
    wait: Wait | None = None
    since: float | None = None
    """When a tick first saw it wait for :attr:`waited`; None before that."""
    waited: Wait | None = None
    late: set[str] = field(default_factory=set)
    """Lanes that were reported late."""
    over: bool = False
    """Whether it has been carried out to its end."""

    def advance(self) -> bool:
        """Go on as far as possible; True when the operation is over."""
        while self.wait is None or self.wait.over():
            try:
                self.wait = next(self.steps)
            except StopIteration:
                self.over = True
                return True
        return False


class JobQueue:
    """Jobs by key. The first of each queue is the running (or waiting) one."""

    def __init__(self) -> None:
        self._queues: dict[Hashable, deque[Job]] = {}
        self._turns: dict[Hashable, Turn] = {}
        """Who has work to go on with; the first is whose turn is next."""

    def submit(self, key: Hashable, job: Job) -> None:
        """Run ``job`` now, as far as it goes, or behind those that are pending for ``key``."""
        queue = self._queues.setdefault(key, deque())
        queue.append(job)
        if len(queue) == 1:
            self._drain(key)

    def idle(self, key: Hashable) -> bool:
        """Whether nothing is pending for ``key``."""
        return key not in self._queues

    def depth(self, key: Hashable) -> int:
        """How many jobs there are for ``key``."""
        return len(self._queues.get(key, ()))

    @property
    def empty(self) -> bool:
        """Whether nothing is pending at all."""
        return not self._queues

    @property
    def working(self) -> bool:
        """Whether slices of work are left, see :meth:`turn`."""
        return bool(self._turns)

    def works_for(self, client: Client) -> bool:
        """Whether some of them are this client's."""
        return any(turn.client is client for turn in self._turns.values())

    def turn(self) -> None:
        """One slice of the operation whose turn it is."""
        if self._turns:
            key = next(iter(self._turns))
            self._turns.pop(key).come = True
            self._drain(key)

    def poll(self) -> None:
        """Resume everything that can go on."""
        for key in list(self._queues):
            self._drain(key)

    def _drain(self, key: Hashable) -> None:
        queue = self._queues[key]
        while queue:
            if not queue[0].advance():
                wait = queue[0].wait
                if isinstance(wait, Turn):
                    self._turns[key] = wait
                return
            queue.popleft()
        del self._queues[key]

    def pending(self) -> Iterator[Job]:
        """The jobs that wait for something themselves, not for another job."""
        return iter([queue[0] for queue in self._queues.values() if queue])

    def behind(self) -> int:
        """How many jobs wait for another one."""
        return sum(len(queue) - 1 for queue in self._queues.values() if queue)

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())
