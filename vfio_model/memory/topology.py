"""Transactions over the memory topology.

Regions change in any number of steps; what the address spaces show changes once, when the outermost transaction ends
(QEMU's ``memory_region_transaction_begin/commit``). A commit goes through all affected address spaces in phases, so
that a listener which looks through one space into another never sees half of a change::

    render new views ──► begin, region_del (old views in force) ──► switch views ──► region_add, commit

A change made by a listener during a commit is committed in another round.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol


class TopologyView(Protocol):
    """An address space, as the commit sees it."""

    serial: int
    """Creation order: commits go by it."""

    def shows(self, region: object) -> bool:
        """Whether a byte of ``region`` answers somewhere."""

    def discarded(self, region: object, first: int, last: int) -> None:
        """The RAM at offsets ``first``..``last`` (inclusive) of ``region`` is gone."""

    def rebind_writers(self) -> None:
        """Bind everybody who writes through it anew."""

    def render_pending(self) -> bool:
        """Render the new view; False when it shows nothing new."""

    def announce_removals(self) -> None:
        """``begin`` and ``region_del`` to the listeners."""

    def switch_view(self) -> None:
        """Put the new view in force."""

    def announce_additions(self) -> None:
        """``region_nop``, ``region_add`` and ``commit`` to the listeners."""


class _Topology:
    """Depth of the running transaction and the address spaces that it touched. One per process: one loop changes
    topology.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.dirty: set[TopologyView] = set()

    def commit(self) -> None:
        while self.dirty:
            views = sorted(self.dirty, key=lambda view: view.serial)
            self.dirty = set()
            changed = [view for view in views if view.render_pending()]
            # A listener that raises must not leave a view half switched: every step runs, then the error goes on.
            with ExitStack() as steps:
                for view in reversed(changed):
                    steps.callback(view.announce_additions)
                for view in reversed(changed):
                    steps.callback(view.switch_view)
                for view in reversed(changed):
                    steps.callback(view.announce_removals)


_TOPOLOGY = _Topology()


@contextmanager
def transaction() -> Iterator[None]:
    """Changes inside take effect together when the outermost transaction ends; also when the body raises."""
    _TOPOLOGY.depth += 1
    try:
        yield
    finally:
        try:
            if _TOPOLOGY.depth == 1:
                _TOPOLOGY.commit()
        finally:
            _TOPOLOGY.depth -= 1


def mark_dirty(views: Iterable[TopologyView]) -> None:
    """These address spaces must be rendered anew when the transaction in progress ends."""
    assert _TOPOLOGY.depth, "the topology changes inside a transaction only"
    _TOPOLOGY.dirty.update(views)
