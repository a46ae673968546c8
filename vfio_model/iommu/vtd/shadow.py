"""What followers of a space have been told of its second-level tables (caching mode).

Source: Intel Virtualization Technology for Directed I/O specification, "Caching Mode" (6.1): with it the guest
invalidates whatever it changes, so that a follower with MAP hears exactly what changed since: nothing for a page that
is as it was, UNMAP with the *old* translation for one that is gone, UNMAP and MAP for one that is another. A follower
without MAP keeps no copy; it is told of the whole range that was invalidated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vfio_model.iommu.vtd.leaves import Leaves, Mapped
from vfio_model.iommu.vtd.spaces import VtdSpace
from vfio_model.iommu.vtd.structures import Binding, TableType
from vfio_model.iommu.vtd.walk import page_mask
from vfio_model.memory.iommu_region import IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBEvent
from vfio_model.memory.iotlb import IOMMUTLBRun
from vfio_model.memory.space import Space
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX

_MAP, _UNMAP = IOMMUNotifierFlag.MAP, IOMMUNotifierFlag.UNMAP
_NONE = IOMMUAccessFlags.NONE
_PERMS = tuple(IOMMUAccessFlags(bits) for bits in range(4))
_PROBES = 512
"""Up to so many frames are looked up one by one, more by going through all that is known."""


class Shadow:
    """The copy that the followers of one space have."""

    def __init__(self, space: VtdSpace, leaves: Leaves, system: Space) -> None:
        self._space, self._leaves, self._system = space, leaves, system
        self.pages: dict[int, Mapped] = {}
        """By iova."""

    # -- changes -------------------------------------------------------------------------------------------------

    def invalidated(self, binding: Binding | None, first: int, last: int) -> None:
        """Tell everybody what ``first``..``last`` (inclusive) means now that ``binding`` translates; None: nothing
        does."""
        region = self._space.region
        for notifier in tuple(region.notifiers):
            if notifier.flags & _UNMAP and not notifier.flags & _MAP:
                self._tell_range(notifier, first, last)
        if region.notify_flags & _MAP:
            self._sync(binding, first, last)

    def _tell_range(self, notifier: IOMMUNotifier, first: int, last: int) -> None:
        entry = IOMMUTLBEntry(self._system, first, 0, last - first, _NONE, self._space.pasid)
        notifier.deliver(IOMMUTLBEvent(_UNMAP, entry))

    def _sync(self, binding: Binding | None, first: int, last: int) -> None:
        gone, now = self._compared(binding, first, last)
        for iova, was in gone.items():
            self._unmap(iova, was)
        for iova in gone:
            del self.pages[iova]
        self.pages.update(now)
        followers = [each for each in self._space.region.notifiers if each.flags & _MAP]
        self._map(now.items(), followers)

    def _compared(self, binding: Binding | None, first: int, last: int) -> tuple[dict[int, Mapped], dict[int, Mapped]]:
        """What of the copy is gone or another, and what is new; pages that the range only touches are whole."""
        while True:
            had, now = self._known(first, last), self._walked(binding, first, last)
            if had == now:
                return {}, {}
            wider, longer = _bounds(first, last, had, now)
            if (wider, longer) == (first, last):
                break
            first, last = wider, longer
        gone = {iova: was for iova, was in had.items() if now.get(iova) != was}
        return gone, {iova: page for iova, page in now.items() if had.get(iova) != page}

    def _known(self, first: int, last: int) -> dict[int, Mapped]:
        if last - first == U64_MAX:
            return self.pages
        if last - first >> 12 >= min(_PROBES, len(self.pages)):
            return {iova: was for iova, was in self.pages.items() if iova <= last and first <= iova | page_mask(was[0])}
        candidates = {first & ~page_mask(level) for level in (2, 3)} | set(range(first & ~0xFFF, last + 1, 0x1000))
        known = ((iova, self.pages.get(iova)) for iova in sorted(candidates))
        return {iova: was for iova, was in known if was is not None and first <= iova | page_mask(was[0])}

    def _walked(self, binding: Binding | None, first: int, last: int) -> dict[int, Mapped]:
        if binding is None or binding.type is not TableType.SECOND:
            return {}
        return self._leaves.mapped(binding, first, last)

    # -- telling -------------------------------------------------------------------------------------------------

    def _unmap(self, iova: int, was: Mapped) -> None:
        entry = IOMMUTLBEntry(self._system, iova, was[1], page_mask(was[0]), _NONE, self._space.pasid)
        event = IOMMUTLBEvent(_UNMAP, entry)
        for notifier in tuple(self._space.region.notifiers):
            if notifier.flags & _MAP:
                notifier.deliver(event)

    def _map(self, pages: Iterable[tuple[int, Mapped]], followers: list[IOMMUNotifier]) -> None:
        """``pages`` by ascending iova; neighbours of one size and permission in one run."""
        run: list[int] = []
        start, end, shape = 0, -1, (0, 0)
        for iova, (level, page, perm) in pages:
            if iova != end or (level, perm) != shape:
                self._map_run(start, run, shape, followers)
                start, run, shape = iova, [], (level, perm)
            run.append(page)
            end = iova + page_mask(level) + 1
        self._map_run(start, run, shape, followers)

    def _map_run(self, iova: int, run: list[int], shape: tuple[int, int], followers: list[IOMMUNotifier]) -> None:
        if not run:
            return
        level, perm = shape
        pasid = self._space.pasid
        deliver: Callable[[IOMMUNotifier], None]
        if len(run) == 1:
            event = IOMMUTLBEvent(
                _MAP, IOMMUTLBEntry(self._system, iova, run[0], page_mask(level), _PERMS[perm], pasid)
            )
            deliver = lambda notifier: notifier.deliver(event)  # noqa: E731
        else:
            whole = IOMMUTLBRun(_MAP, self._system, iova, 3 + 9 * level, len(run), run, _PERMS[perm], pasid)
            deliver = lambda notifier: notifier.deliver_run(whole)  # noqa: E731
        for notifier in followers:
            deliver(notifier)

    def replay(self, binding: Binding | None, notifier: IOMMUNotifier) -> None:
        """``notifier`` is told of all that is mapped, having been told to forget what it had. Where others follow, that
        is what they know; what the guest changed since comes to all with its invalidation."""
        region = self._space.region
        region.unmap_range(notifier)
        if not notifier.flags & _MAP:
            return
        if not any(each.flags & _MAP for each in region.notifiers if each is not notifier):
            self.pages = self._walked(binding, 0, U64_MAX)
        self._map(sorted(self.pages.items()), [notifier])


def _bounds(first: int, last: int, *parts: dict[int, Mapped]) -> tuple[int, int]:
    """``first``..``last``, and all of the pages in ``parts``."""
    if last - first == U64_MAX:
        return first, last
    for pages in parts:
        for iova, (level, _, _) in pages.items():
            first, last = min(first, iova), max(last, iova | page_mask(level))
    return first, last
