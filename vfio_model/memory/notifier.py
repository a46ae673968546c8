"""One subscriber to the changes of an IOMMU memory region (QEMU's ``IOMMUNotifier``).

Two classes of users exist. *Shadowing* users (VFIO) want MAP and UNMAP, exact; *caching* users (vhost, ATS devices)
want UNMAP or DEVIOTLB_UNMAP only and must tolerate invalidations larger than what they asked for.

During one hypercall or queue step ``fn`` and ``fn_run`` only append to a queue of their own; ``flush`` completes what
was queued and answers with the first error. Nothing in ``fn`` may wait.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.memory.iotlb import IOMMUTLBEntry, IOMMUTLBEvent, IOMMUTLBRun
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import is_aligned

_MAP = IOMMUNotifierFlag.MAP


class IOMMUNotifier:
    """``fn(notifier, entry)`` for every event whose kind is in ``flags``, cropped to ``start``..``last`` (inclusive,
    relative to the region). ``fn_run(notifier, run)`` takes a run at once when given. ``flush()`` completes, and
    returns the first error.
    """

    __slots__ = ("_flush", "_wanted", "flags", "fn", "fn_run", "in_kernel", "iommu_idx", "last", "start")

    def __init__(
        self,
        fn: Callable[[IOMMUNotifier, IOMMUTLBEntry], None],
        flags: IOMMUNotifierFlag,
        start: int,
        last: int,
        iommu_idx: int = 0,
        *,
        fn_run: Callable[[IOMMUNotifier, IOMMUTLBRun], None] | None = None,
        flush: Callable[[], OSError | None] | None = None,
    ) -> None:
        self.fn, self.fn_run, self._flush = fn, fn_run, flush
        self.flags = flags
        self._wanted = int(flags)  # an IntFlag's own arithmetic costs more than the rest of a delivery
        self.start, self.last = start, last
        self.iommu_idx = iommu_idx
        self.in_kernel = False
        """Whether the host itself tells this one's user of changes that it makes to the translation table."""

    def deliver(self, event: IOMMUTLBEvent) -> None:
        """Hand over ``event`` if this notifier wants its kind and the ranges meet."""
        entry = event.entry
        assert event.type is _MAP or not entry.perm, "an UNMAP has perm NONE"
        if int(event.type) & self._wanted:
            cropped = entry.cropped(self.start, self.last)
            if cropped is not None:
                self.fn(self, cropped)

    def deliver_run(self, run: IOMMUTLBRun) -> None:
        """Hand over the part of ``run`` in range: at once when possible, else page by page."""
        assert run.type is _MAP or (run.uniform and not run.perms), "an UNMAP has perm NONE"
        first, last = run.iova, run.last
        if last < self.start or first > self.last:
            return
        kinds = run.type if isinstance(run.perms, int) else run.types
        if self.fn_run is not None and not int(kinds) & ~self._wanted:
            part = run if self.start <= first and last <= self.last else self._part(run)
            if part is not None:
                self.fn_run(self, part)
                return
        for event in run.events():
            self.deliver(event)

    def _part(self, run: IOMMUTLBRun) -> IOMMUTLBRun | None:
        """The pages of ``run`` in range, or None when the range cuts one."""
        page = 1 << run.page_shift
        start_cuts = self.start > run.iova and not is_aligned(self.start - run.iova, page)
        last_cuts = self.last < run.last and not is_aligned(self.last + 1 - run.iova, page)
        return None if start_cuts or last_cuts else run.cropped(self.start, self.last)

    def flush(self) -> OSError | None:
        """Complete what the callbacks queued; the first error, or None."""
        return self._flush() if self._flush is not None else None

    def __repr__(self) -> str:
        return f"IOMMUNotifier({self.flags!r}, {self.start:#x}..{self.last:#x}, idx={self.iommu_idx})"
