"""A client's address space as the kernel sees it: VMAs, the memlock limit, and the preregistered regions.

Accounting and preregistration belong to the mm and not to a container: two containers that register the same memory
share one pin and one count. A region lives while a container holds it (``used``) or a TCE points into it (``mapped``);
between the end of the first and the end of the second it is being torn down, and mapping it is refused.

Sources: the kernel's ``Documentation/driver-api/vfio.rst`` (SPAPR TCE v2 container: memory preregistration) and
``include/uapi/linux/vfio.h``, ``VFIO_IOMMU_SPAPR_REGISTER_MEMORY``.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from dataclasses import dataclass, field
from errno import EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM

from vfio_model.host.hpa import HpaMap, Segment


@dataclass(frozen=True, slots=True)
class Vma:
    """``length`` bytes of ``segment`` from ``offset``, mapped by the client at ``hva``.

    ``page_size`` is the backing page size in bytes, a declared property; 0 stands for the segment's own.
    """

    hva: int
    length: int
    segment: Segment
    offset: int = 0
    page_size: int = 0

    @property
    def end(self) -> int:
        """Exclusive."""
        return self.hva + self.length


@dataclass(frozen=True, slots=True)
class Run:
    """Addresses ``ua``..``end`` (exclusive) of a region that lie in one segment; ``delta`` + address = segment
    offset.
    """

    ua: int
    end: int
    hpa: HpaMap
    delta: int


@dataclass(slots=True, eq=False)
class Region:
    """A range that TCEs point into: a preregistered one, pinned whole, or with ``pages`` 0 one whose pages are pinned
    one by one (:meth:`Mm.pinning`). ``page_shift`` bounds the IOMMU page that may map it.
    """

    id: int
    ua: int
    pages: int
    end: int
    page_shift: int
    runs: tuple[Run, ...]
    used: int = 1
    mapped: int = 0

    @property
    def dying(self) -> bool:
        """No container holds it any more; it stays pinned only until the last TCE into it is gone."""
        return self.used == 0

    def run_at(self, ua: int) -> Run:
        """The run that holds ``ua``, an address of the region."""
        if len(self.runs) == 1:
            return self.runs[0]
        return next(run for run in self.runs if run.ua <= ua < run.end)


@dataclass(eq=False)
class Mm:
    """One client process. ``memlock`` is its limit in bytes, None when it may lock without limit (CAP_IPC_LOCK)."""

    host_page: int = 0x1_0000
    memlock: int | None = None
    name: str = ""
    locked_vm: int = field(default=0, init=False)
    """Locked pages of the host's page size."""
    gone: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._vmas: list[Vma] = []
        self._vma_starts: list[int] = []
        self._regions: list[Region] = []
        self._region_starts: list[int] = []
        self._region_ids = 0
        self._pinned: dict[int, Region] = {}
        """By the first address of the mapping."""
        self.regions: dict[int, Region] = {}
        """Regions by id, those being torn down and those of :meth:`pinning` included."""

    # VMAs

    def declare(self, vma: Vma) -> None:
        """Add a mapping of the client's.

        :raise OSError: EINVAL when it leaves its segment, wraps, or its address and offset are not congruent modulo the
            backing page; EEXIST when it overlaps another.
        """
        page = vma.segment.page_size
        if vma.length < 1 or vma.offset < 0 or vma.offset + vma.length > vma.segment.length or vma.end > 1 << 64:
            raise OSError(EINVAL, f"mapping at {vma.hva:#x} leaves its segment {vma.segment.id}")
        if (vma.hva - vma.offset) % page:
            raise OSError(EINVAL, f"mapping at {vma.hva:#x}: address and offset disagree modulo the page {page:#x}")
        at = bisect_left(self._vma_starts, vma.hva)
        before, after = self._vmas[at - 1] if at else None, self._vmas[at] if at < len(self._vmas) else None
        if (before and before.end > vma.hva) or (after and after.hva < vma.end):
            raise OSError(EEXIST, f"mapping at {vma.hva:#x} overlaps another")
        self._vmas.insert(at, vma)
        self._vma_starts.insert(at, vma.hva)

    def undeclare(self, hva: int) -> Vma:
        """Forget the mapping that begins at ``hva``; what is registered stays pinned. :raise OSError: ENOENT."""
        at = bisect_left(self._vma_starts, hva)
        if at == len(self._vmas) or self._vma_starts[at] != hva:
            raise OSError(ENOENT, f"no mapping begins at {hva:#x}")
        del self._vma_starts[at]
        if pinned := self._pinned.pop(hva, None):
            self.put(pinned)
        return self._vmas.pop(at)

    def find(self, hva: int) -> Vma | None:
        """The mapping that holds ``hva``."""
        at = bisect_right(self._vma_starts, hva) - 1
        return self._vmas[at] if at >= 0 and hva < self._vmas[at].end else None

    def pinning(self, hva: int, size: int) -> Region | None:
        """The region in which TCEs pin pages one by one, for all ``size`` bytes from ``hva``: the mapping around them.

        Nothing of it is counted, and :meth:`lookup` does not find it. It lives while the mapping is declared, or a TCE
        points into it. None when no single mapping holds these bytes.
        """
        vma = self.find(hva)
        if vma is None or hva + size > vma.end:
            return None
        region = self._pinned.get(vma.hva)
        if region is None:
            run = Run(vma.hva, vma.end, vma.segment.hpa, vma.offset - vma.hva)
            backing = max(self.host_page, min(vma.page_size or vma.segment.page_size, vma.segment.page_size))
            self._region_ids += 1
            region = Region(self._region_ids, vma.hva, 0, vma.end, backing.bit_length() - 1, (run,))
            self._pinned[vma.hva] = self.regions[region.id] = region
        return region

    # Accounting

    def account(self, pages: int) -> None:
        """Count ``pages`` as locked. :raise OSError: ENOMEM beyond the memlock limit; then nothing has changed."""
        limit = None if self.memlock is None else self.memlock // self.host_page
        if limit is not None and self.locked_vm + pages > limit:
            raise OSError(ENOMEM, f"locked pages {self.locked_vm} + {pages} exceed the memlock limit of {limit}")
        self.locked_vm += pages

    def unaccount(self, pages: int) -> None:
        """Undo :meth:`account`."""
        assert pages <= self.locked_vm, "locked_vm cannot fall below zero"
        self.locked_vm -= pages

    # Preregistration

    def lookup(self, ua: int, size: int) -> Region | None:
        """The region that holds all ``size`` bytes from ``ua``."""
        at = bisect_right(self._region_starts, ua) - 1
        return self._regions[at] if at >= 0 and ua + size <= self._regions[at].end else None

    def exact(self, ua: int, pages: int) -> Region | None:
        """The live region of exactly ``pages`` pages from ``ua``."""
        region = self.lookup(ua, pages * self.host_page)
        return region if region and (region.ua, region.pages, region.dying) == (ua, pages, False) else None

    def register(self, ua: int, pages: int) -> Region:
        """Pin and account ``pages`` pages from ``ua`` as a new region.

        :raise OSError: in this order ENOMEM (limit), EFAULT (part of it is not mapped), EINVAL (overlaps a region);
            then nothing has changed.
        """
        end = ua + pages * self.host_page
        self.account(pages)
        try:
            runs, backing = self._pin(ua, end)
            at = bisect_left(self._region_starts, ua)
            if (at and self._regions[at - 1].end > ua) or (at < len(self._regions) and self._regions[at].ua < end):
                raise OSError(EINVAL, f"{ua:#x}..{end - 1:#x} overlaps a registered region")
        except OSError:
            self.unaccount(pages)
            raise
        natural = (ua | (end - ua)) & -(ua | (end - ua))
        self._region_ids += 1
        region = Region(self._region_ids, ua, pages, end, min(natural, backing).bit_length() - 1, runs)
        self.regions[region.id] = region
        self._regions.insert(at, region)
        insort(self._region_starts, ua)
        return region

    def _pin(self, ua: int, end: int) -> tuple[tuple[Run, ...], int]:
        runs, backing = [], 1 << 63
        while ua < end:
            vma = self.find(ua)
            if vma is None:
                raise OSError(EFAULT, f"{ua:#x} is not mapped by this process")
            stop = min(end, vma.end)
            runs.append(Run(ua, stop, vma.segment.hpa, vma.offset - vma.hva))
            backing = min(backing, max(self.host_page, min(vma.page_size or backing, vma.segment.page_size)))
            ua = stop
        return tuple(runs), backing

    def put(self, region: Region) -> None:
        """A container lets go of ``region``; the last one unpins it unless a TCE still points into it."""
        assert region.used > 0, "a region is let go of as often as it was taken"
        region.used -= 1
        self._drop_if_over(region)

    def unmapped(self, region: Region, count: int) -> None:
        """``count`` TCEs into ``region`` are gone, and no DMA through them is under way any more."""
        assert count <= region.mapped, "no more TCEs go than came"
        region.mapped -= count
        self._drop_if_over(region)

    def _drop_if_over(self, region: Region) -> None:
        if region.used == 0 and region.mapped == 0:
            del self.regions[region.id]
            if region.pages:
                at = bisect_left(self._region_starts, region.ua)
                del self._regions[at], self._region_starts[at]
                self.unaccount(region.pages)
