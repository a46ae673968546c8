"""Trace records: one kind for every process.

A record is {monotonic ns, pid, seq, cause id, event, fields}. Events bear QEMU's trace-event names where QEMU has one
(``spapr_iommu_pci_put``, ``vfio_listener_region_add_iommu``), so that one log reads like the other. The domain
is pure: it emits to a :class:`Trace` that the process gives it, which knows the clock and the pid. The *cause id* is
set by the outermost operation (a hypercall, a control command) and rides in every message that it leads to.
"""

from __future__ import annotations

from typing import Protocol


class Trace(Protocol):
    """Where events go. Hot code asks :attr:`enabled` before it builds fields."""

    enabled: bool
    cause: int
    """The cause id of the operation in progress; 0 when none."""

    def __call__(self, event: str, **fields: object) -> None: ...


class NullTrace:
    """Drops everything; the default."""

    enabled = False
    cause = 0

    def __call__(self, event: str, **fields: object) -> None:
        return None


class ListTrace:
    """Keeps ``(event, fields)`` pairs in :attr:`records`, for tests and single-process runs."""

    def __init__(self) -> None:
        self.enabled = True
        self.cause = 0
        self.records: list[tuple[str, dict[str, object]]] = []

    def __call__(self, event: str, **fields: object) -> None:
        self.records.append((event, fields))

    def named(self, event: str) -> list[dict[str, object]]:
        """The fields of every record of ``event``, in order."""
        return [fields for name, fields in self.records if name == event]


NULL_TRACE = NullTrace()
