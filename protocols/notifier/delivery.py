"""Acknowledged delivery to one subscriber without shared memory: sequence numbers, a credit window, a bounded backlog.

Everything not yet acknowledged is kept, in order; of that, at most ``credit`` messages are on their way. When the
backlog grows past its bound, what was not sent yet is replaced by one invalidation of everything: that satisfies all
that it stands for, so no invalidation is ever lost and memory stays bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from protocols.notifier.messages import Invalidate, Record
from vfio_model.errors import RemoteProtocolError
from vfio_model.ranges import U64_MAX

MAX_BACKLOG = 65536


class Delivery:
    """The queue of one subscriber. ``spaces`` are those it caches."""

    def __init__(self, spaces: Iterable[int], credit: int, max_backlog: int = MAX_BACKLOG) -> None:
        self.spaces = frozenset(spaces)
        self.blocked = False
        self.collapsed = 0
        """How often a backlog was replaced by a flush of everything."""
        self._credit, self._max_backlog = credit, max_backlog
        self._queue: deque[Invalidate] = deque()
        self._sent = self._acked = 0

    @property
    def last(self) -> int:
        """Sequence number of the newest message."""
        return self._queue[-1].seq if self._queue else self._acked

    @property
    def next_seq(self) -> int:
        """Sequence number of the message that is sent next."""
        return self._sent + 1

    @property
    def acked(self) -> int:
        """Everything up to this number is acknowledged."""
        return self._acked

    def add(self, cause: int, records: Iterable[Record]) -> None:
        """Queue those of ``records`` that concern this subscriber."""
        for record in records:
            if record.as_id in self.spaces:
                self._queue.append(Invalidate(self.last + 1, cause, record))
        if len(self._queue) > self._max_backlog + len(self.spaces):
            self._collapse(cause)

    def _collapse(self, cause: int) -> None:
        while self._queue and self._queue[-1].seq > self._sent:
            self._queue.pop()
        for as_id in sorted(self.spaces):
            self._queue.append(Invalidate(self.last + 1, cause, Record(as_id, 0, U64_MAX, 0)))
        self.collapsed += 1

    def take(self) -> list[Invalidate]:
        """What may be sent now; it counts as sent."""
        if self.blocked:
            return []
        limit = self._acked + self._credit
        start = self._sent - self._acked
        ready: list[Invalidate] = []
        while start + len(ready) < len(self._queue) and self._sent < limit:
            ready.append(self._queue[start + len(ready)])
            self._sent += 1
        return ready

    def unsent(self, seq: int) -> None:
        """Message ``seq`` did not go, nor did any later one: they are sent again when the queue has room."""
        self._sent = min(self._sent, seq - 1)
        self.blocked = True

    def ack(self, seq: int) -> None:
        """Everything up to ``seq`` is carried out; an older acknowledgement changes nothing.

        :raise RemoteProtocolError: when it was never sent.
        """
        if seq > self._sent:
            raise RemoteProtocolError(f"acknowledges {seq}, {self._sent} is the last that was sent")
        self._acked = max(self._acked, seq)
        while self._queue and self._queue[0].seq <= self._acked:
            self._queue.popleft()
        self.blocked = False
