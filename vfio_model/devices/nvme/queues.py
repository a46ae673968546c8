"""nvme: submission and completion queues (NVM Express Base Specification 1.4, section 4.1).

A queue is a ring in host memory; it is empty when head and tail are equal, and full with one entry less than its size.
Of a submission queue the controller owns the head, of a completion queue the tail and the *phase*, which every round
inverts.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class CompletionQueue:
    """``size`` entries at bus address ``base``. ``vector`` interrupts when ``irq_enabled``."""

    id: int
    base: int
    size: int
    vector: int = 0
    irq_enabled: bool = True
    head: int = 0
    tail: int = 0
    phase: int = 1
    feeders: list[SubmissionQueue] = field(default_factory=list)
    """The submission queues that complete here."""

    @property
    def room(self) -> int:
        """How many more entries fit."""
        return (self.head - self.tail - 1) % self.size

    @property
    def unconsumed(self) -> int:
        """How many entries the host has not taken."""
        return (self.tail - self.head) % self.size

    def advance(self, count: int) -> None:
        """``count`` entries were posted; they did not go round the end."""
        self.tail += count
        if self.tail == self.size:
            self.tail, self.phase = 0, self.phase ^ 1


@dataclass(slots=True)
class SubmissionQueue:
    """``size`` entries at bus address ``base``, which complete to ``cq``."""

    id: int
    base: int
    size: int
    cq: CompletionQueue
    head: int = 0
    tail: int = 0

    @property
    def pending(self) -> int:
        """How many commands wait."""
        return (self.tail - self.head) % self.size

    @property
    def room(self) -> int:
        """How many more commands the host may add."""
        return (self.head - self.tail - 1) % self.size


class Queues:
    """The queues that exist, by identifier; 0 is the admin pair."""

    def __init__(self) -> None:
        self.submission: dict[int, SubmissionQueue] = {}
        self.completion: dict[int, CompletionQueue] = {}

    def add_completion(self, cq: CompletionQueue) -> None:
        """``cq`` exists from now on."""
        self.completion[cq.id] = cq

    def add_submission(self, sq: SubmissionQueue) -> None:
        """``sq`` exists from now on; so does its completion queue."""
        assert self.completion.get(sq.cq.id) is sq.cq, "a submission queue completes to a queue that exists"
        self.submission[sq.id] = sq
        sq.cq.feeders.append(sq)

    def remove_submission(self, sq: SubmissionQueue) -> None:
        """``sq`` is gone, with the commands in it."""
        del self.submission[sq.id]
        sq.cq.feeders.remove(sq)

    def remove_completion(self, cq: CompletionQueue) -> None:
        """``cq`` is gone; nothing completes to it any more."""
        assert not cq.feeders, "a completion queue outlives those that complete to it"
        del self.completion[cq.id]

    def clear(self) -> None:
        """All are gone."""
        self.submission.clear()
        self.completion.clear()

    @property
    def any_io(self) -> bool:
        """Whether there is a queue besides the admin pair."""
        return len(self.submission) > 1 or len(self.completion) > 1
