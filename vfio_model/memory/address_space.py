"""An address space: what a device, a CPU or a bus sees of a region tree (QEMU's ``AddressSpace``).

``read`` and ``write`` are closures over the current flat view, built anew by each commit that changes it and handed
to every :class:`~vfio_model.memory.dma.DMASpace` bound to the space; nobody else may keep them across a commit. An
address space is a DMA implementation itself: without an IOMMU ``dma.read is system_as.read``.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from weakref import WeakSet

from vfio_model.memory import access, going_on, pieces, zero_copy
from vfio_model.memory.dma import DMASpace, Iovas, OnInvalidate
from vfio_model.memory.flatview import EMPTY_VIEW, FlatRange, FlatView, render
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.mapping import DEFAULT_BOUNCE_BUDGET, BounceBudget, DMAMapping, MappingTable
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.translation import Translation, translate
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer, WriteBuffer
from vfio_model.ranges import wrap64

_serials = itertools.count(1)


class AddressSpace:
    """The space that shows ``root``. ``bounce_budget`` in bytes bounds the bounce buffers of :meth:`map`.

    ``goes_on``: an access goes on after a piece that failed (:mod:`.going_on`), else it stops there.
    """

    read: Callable[[int, WriteBuffer], MemTxResult]
    """``read(addr, out)`` fills ``out``; stops at the first failing piece and zero-fills from there, or goes on."""
    write: Callable[[int, ReadBuffer], MemTxResult]
    """``write(addr, data)`` stops at the first failing piece, or goes on; the bytes before it have moved."""

    def __init__(
        self, name: str, root: MemoryRegion, *, bounce_budget: int = DEFAULT_BOUNCE_BUDGET, goes_on: bool = False
    ) -> None:
        self.name = name
        self._access = going_on if goes_on else access
        self.root: MemoryRegion | None = root
        self.serial = next(_serials)
        self.view: FlatView = EMPTY_VIEW
        self.bounce = BounceBudget(bounce_budget)
        self.mappings = MappingTable()
        """Mappings that show or pass through this space, by the addresses they have here."""
        self.log_global = False
        """Whether everything written is being tracked."""
        self._listeners: list[MemoryListener] = []
        self._bound: WeakSet[DMASpace] = WeakSet()
        self._next_view: FlatView = EMPTY_VIEW
        self._previous: FlatView = EMPTY_VIEW
        self.render_pending()
        self.switch_view()

    def __repr__(self) -> str:
        return f"AddressSpace({self.name!r})"

    # -- one commit, phase by phase (see topology)

    def render_pending(self) -> bool:
        """Render the new view and watch its regions; False when it shows what the old one does."""
        old = self.view
        self._next_view = render(self.root)
        for region in old.regions - self._next_view.regions:
            region.watchers.discard(self)
        for region in self._next_view.regions:
            region.watchers.add(self)
        if self._next_view.ranges == old.ranges:
            self.view = self._next_view
            return False
        return True

    def announce_removals(self) -> None:
        """Tell the listeners what goes; the old view is still in force."""
        for listener in self._listeners:
            listener.begin()
        kept = set(self._next_view.ranges)
        for gone in [r for r in self.view.ranges if r not in kept]:
            for listener in reversed(self._listeners):
                listener.region_del(self._section(gone))

    def switch_view(self) -> None:
        """Put the new view in force: closures, bound devices, and mappings over what is gone."""
        old, self.view = self.view, self._next_view
        self.read, self.write = self._access.build_reader(self.view), self._access.build_writer(self.view)
        for dma in self._bound:
            dma.refresh()
        self._previous = old
        kept = set(self.view.ranges)
        for gone in [r for r in old.ranges if r not in kept]:
            self.mappings.invalidate(gone.start, gone.last)

    def rebind_writers(self) -> None:
        """What a range does with a write has changed (its RAM is logged, or not any more): nothing else has."""
        self.write = self._access.build_writer(self.view)
        for dma in self._bound:
            dma.refresh()

    def announce_additions(self) -> None:
        """Tell the listeners what stayed and what is new."""
        had = set(self._previous.ranges)
        for r in self.view.ranges:
            section = self._section(r)
            for listener in self._listeners:
                (listener.region_nop if r in had else listener.region_add)(section)
        for listener in self._listeners:
            listener.commit()

    def shows(self, region: object) -> bool:
        """Whether a byte of ``region`` answers somewhere."""
        return any(r.region is region for r in self.view.ranges)

    def discarded(self, region: object, first: int, last: int) -> None:
        """Ring every mapping over offsets ``first``..``last`` (inclusive) of ``region``: that RAM is gone."""
        for r in self.view.ranges:
            low, high = max(first, r.offset), min(last, r.offset + r.size - 1)
            if r.region is region and low <= high:
                self.mappings.invalidate(r.start + low - r.offset, r.start + high - r.offset)

    def destroy(self) -> None:
        """Show nothing any more: listeners are told, bound devices decode nothing."""
        self.root = None
        if self.render_pending():
            self.announce_removals()
            self.switch_view()
            self.announce_additions()

    # -- listeners

    def register_listener(self, listener: MemoryListener) -> None:
        """Add ``listener`` and replay the existing sections to it. If it raises it is not registered.

        :raise OSError: EIO when everything is being tracked and ``listener`` cannot join.
        """
        assert listener not in self._listeners, "a listener registers once per address space"
        self._listeners.append(listener)
        self._listeners.sort(key=lambda one: one.priority)
        replayed = False
        try:
            listener.begin()
            if self.log_global and not listener.log_global_start():
                raise OSError(errno.EIO, f"{self.name}: a listener cannot track what is written")
            for section in self.sections():
                listener.region_add(section)
            listener.commit()
            replayed = True
        finally:
            if not replayed:
                self._listeners.remove(listener)

    def unregister_listener(self, listener: MemoryListener) -> None:
        """Take every section away from ``listener``, then forget it."""
        listener.begin()
        for section in self.sections():
            listener.region_del(section)
        listener.commit()
        self._listeners.remove(listener)

    def log_global_start(self) -> bool:
        """Have every listener track all that is written, lowest priority first.

        :returns: False when one cannot; those that had started are stopped again.
        """
        assert not self.log_global, "global logging starts once"
        for count, listener in enumerate(self._listeners):
            if not listener.log_global_start():
                for started in reversed(self._listeners[:count]):
                    started.log_global_stop()
                return False
        self.log_global = True
        return True

    def log_global_stop(self) -> None:
        """The tracking ends, highest priority first."""
        assert self.log_global, "global logging was started"
        self.log_global = False
        for listener in reversed(self._listeners):
            listener.log_global_stop()

    def sections(self) -> list[MemoryRegionSection]:
        """What the space shows now, by ascending address."""
        return [self._section(r) for r in self.view.ranges]

    def _section(self, r: FlatRange) -> MemoryRegionSection:
        return MemoryRegionSection(self, r.region, r.offset, r.start, r.size, r.readonly)

    # -- translation

    def translate(self, addr: int, is_write: bool, length: int = 1) -> Translation | None:
        """Follow ``addr`` through every IOMMU; the answer may be shorter than ``length`` bytes. None: nothing
        decodes.
        """
        return translate(self, wrap64(addr), is_write, length)

    def valid(self, iova: int, length: int, direction: DMADirection) -> bool:
        """Whether all of ``length`` bytes translate; moves nothing."""
        done = 0
        while done < length:
            found = self.translate(iova + done, direction is DMADirection.FROM_DEVICE, length - done)
            if found is None:
                return False
            done += found.length
        return True

    # -- a DMA implementation (see dma.DMAImpl)

    def attach(self, dma: DMASpace) -> None:
        """Renew the methods of ``dma`` whenever a commit replaces them."""
        self._bound.add(dma)

    def detach(self, dma: DMASpace) -> None:
        """``dma`` is bound elsewhere."""
        self._bound.discard(dma)

    def read_many(self, iovas: Iovas, size: int, out: WriteBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes into ``out``, in order; on failure the remainder is zero."""
        return pieces.read_many(self, iovas, size, out)

    def write_many(self, iovas: Iovas, size: int, data: ReadBuffer) -> MemTxResult:
        """Pieces of ``size`` bytes from ``data``, in order; stops at the first failure."""
        return pieces.write_many(self, iovas, size, data)

    def map(
        self, iova: int, length: int, direction: DMADirection, on_invalidate: OnInvalidate | None = None
    ) -> DMAMapping | None:
        """Map up to ``length`` bytes: RAM in place, anything else through a bounce buffer.

        Without ``on_invalidate`` nobody follows the translation: map and unmap must then happen within one operation.
        None when nothing decodes at ``iova`` or the bounce budget is empty (see :meth:`register_map_client`).
        """
        return zero_copy.map_range(self, wrap64(iova), length, direction, on_invalidate)

    def unmap(self, mapping: DMAMapping, access_len: int) -> None:
        """Give ``mapping`` back; its first ``access_len`` bytes were accessed."""
        mapping.unmap(access_len)

    def register_map_client(self, client: Callable[[], None]) -> None:
        """Call ``client`` once when bounce bytes are free: at once if they are now."""
        self.bounce.register_client(client)

    def unregister_map_client(self, client: Callable[[], None]) -> None:
        """Forget ``client``."""
        self.bounce.unregister_client(client)

    def invalidate(self, start: int, last: int) -> list[DMAMapping]:
        """Ring every mapping that meets ``start``..``last`` (inclusive); returns those not given back."""
        return self.mappings.invalidate(start, last)
