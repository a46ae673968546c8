"""nvme: asynchronous events (NVM Express Base Specification 1.4, section 5.2, "Asynchronous Event Request command").

A request waits until there is something to tell. An event of a type that was told is kept quiet until the host has read
the log page that belongs to it::

    raise_ ──► queued ──(a request waits)──► told, type masked ──(log page read)──► type unmasked
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import NamedTuple

REQUEST_LIMIT = 4
"""How many requests may wait; AERL is one less."""
QUEUE_LIMIT = 64
"""Events beyond these are lost, as when nobody asks."""


class EventType(IntEnum):
    """What an event is about."""

    ERROR = 0
    HEALTH = 1
    NOTICE = 2


class Event(NamedTuple):
    """An event: its type, what happened, and the log page that tells more."""

    type: EventType
    info: int
    log: int

    @property
    def result(self) -> int:
        """Dword 0 of the completion."""
        return self.type | self.info << 8 | self.log << 16


LOG_ERROR, LOG_HEALTH, LOG_FIRMWARE, LOG_CHANGED_NAMESPACES, LOG_EFFECTS = 1, 2, 3, 4, 5
"""Log page identifiers (section 5.14.1, "Log Specific Information")."""

INVALID_DOORBELL_REGISTER = Event(EventType.ERROR, 0, LOG_ERROR)
INVALID_DOORBELL_VALUE = Event(EventType.ERROR, 1, LOG_ERROR)
TEMPERATURE = Event(EventType.HEALTH, 1, LOG_HEALTH)


class AsyncEvents:
    """Requests that wait, and events that do."""

    def __init__(self) -> None:
        self.requests: deque[int] = deque()
        """Command identifiers, oldest first."""
        self.queue: deque[Event] = deque()
        self.aborted: deque[int] = deque()
        """Requests that the host has aborted and that were not answered yet."""
        self.masked: set[EventType] = set()
        """Types that were told and whose log page was not read since."""

    def clear(self) -> None:
        """A controller reset: requests end without a completion."""
        self.requests.clear()
        self.aborted.clear()
        self.queue.clear()
        self.masked.clear()

    def raise_(self, event: Event) -> None:
        """Something happened; told once, however often it happens before the host has looked."""
        if event.type not in self.masked and event not in self.queue and len(self.queue) < QUEUE_LIMIT:
            self.queue.append(event)

    def log_read(self, log: int) -> None:
        """The host has read page ``log``: what belongs to it is no news any more, and new ones are told."""
        self.masked = {type_ for type_ in self.masked if _LOG_OF[type_] != log}

    def next(self) -> tuple[int, Event | None] | None:
        """A request that can be answered now, by its command identifier, and with what: an event, or None when it was
        aborted. Both are taken.
        """
        if self.aborted:
            return self.aborted.popleft(), None
        if not self.requests:
            return None
        for event in self.queue:
            if event.type not in self.masked:
                self.queue.remove(event)
                self.masked.add(event.type)
                return self.requests.popleft(), event
        return None

    def abort(self, cid: int) -> bool:
        """End the request ``cid``; whether it waited."""
        if cid not in self.requests:
            return False
        self.requests.remove(cid)
        self.aborted.append(cid)
        return True


_LOG_OF = {EventType.ERROR: LOG_ERROR, EventType.HEALTH: LOG_HEALTH, EventType.NOTICE: LOG_CHANGED_NAMESPACES}
