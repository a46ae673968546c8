"""One log for all roles of a process: each record bears the role that would have written it.

Times are CLOCK_MONOTONIC, made to grow with every record, so that the merged order is the order of events.
"""

from __future__ import annotations

import os
import time

from deploy import events
from deploy.events import Log
from protocols.tracelog import TraceLog


class InlineLog:
    """The traces of all roles, by role."""

    def __init__(self) -> None:
        self._roles: dict[str, tuple[TraceLog, bytearray]] = {}
        self._last_ns = 0

    def _now_ns(self) -> int:
        self._last_ns = max(self._last_ns + 1, time.monotonic_ns())
        return self._last_ns

    def trace(self, role: str) -> TraceLog:
        """Where ``role`` writes; the same object each time."""
        if role not in self._roles:
            data = bytearray()
            self._roles[role] = (TraceLog(data.extend, os.getpid(), self._now_ns), data)
        return self._roles[role][0]

    def set_cause(self, cause: int) -> None:
        """What every role writes from now on is caused by operation ``cause``; 0: by none."""
        for trace, _ in self._roles.values():
            trace.cause = cause

    def merged(self) -> Log:
        """Every record so far, in order."""
        records: list[events.Record] = []
        torn = 0
        for role, (trace, data) in self._roles.items():
            trace.flush()
            some, bad = events.parse(bytes(data), role)
            records += some
            torn += bad
        return events.merge(records, torn)
