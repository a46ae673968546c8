"""A memory region whose addresses are translated: the interface between a vIOMMU and those who follow it.

A translation depends on address and index only and is valid until the current operation ends; who keeps it longer
registers an :class:`IOMMUNotifier`. A vIOMMU calls :meth:`IOMMUMemoryRegion.notify` or
:meth:`~IOMMUMemoryRegion.notify_run` as entries change and :meth:`~IOMMUMemoryRegion.flush` before the hypercall or
queue step returns: callbacks only queue, the flush completes. After QEMU's ``IOMMUMemoryRegionClass``
(``include/exec/memory.h``).
"""

from __future__ import annotations

import errno
from abc import abstractmethod
from typing import Any

from vfio_model.memory.iotlb import IOMMUTLBEntry, IOMMUTLBEvent, IOMMUTLBRun
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.region import AliasRegion, MemoryRegion
from vfio_model.memory.space import Space
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag, MemTxAttrs

__all__ = [
    "IOMMUMemoryRegion",
    "IOMMUNotifier",
    "IOMMUTLBEntry",
    "IOMMUTLBEvent",
    "IOMMUTLBRun",
    "TranslatedPieces",
    "iommu_behind",
]

TranslatedPieces = tuple[Space, Any, Any]
"""What ``translate_many`` returns: target space, addresses (numpy uint64), and permissions (0: no translation): an
integer array, or one number for all."""


class IOMMUMemoryRegion(MemoryRegion):
    """Base of every vIOMMU's region. ``size`` in bytes; addresses given to the methods are relative to the region."""

    terminates = True
    cache_events = IOMMUNotifierFlag.IOTLB_EVENTS
    """The events that somebody who caches translations has to hear of. An IOMMU that never gives a translated page
    another meaning without an UNMAP needs no MAP here."""
    whole_space = False
    """Whether it is all that a function can address, and not a window that the guest asked for: nobody needs to be able
    to map all of it, and the guest does not hear of what cannot be mapped."""
    marks_writes = False
    """Whether a translation for a write leaves a mark in a table (a dirty bit): one for a read is not to write by."""

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self.notifiers: list[IOMMUNotifier] = []
        self.notify_flags = IOMMUNotifierFlag.NONE
        """OR of the flags of all notifiers."""

    # -- what a vIOMMU implements

    @abstractmethod
    def translate(self, addr: int, flag: IOMMUAccessFlags, idx: int) -> IOMMUTLBEntry:
        """The translation of ``addr``. ``flag`` is the access wanted, NONE for a full walk; the answer does not
        depend on it.
        """
        raise NotImplementedError

    def translate_many(self, iovas: Any, flag: IOMMUAccessFlags, idx: int) -> TranslatedPieces | None:
        """Translate a numpy uint64 array of addresses at once; None when this vIOMMU does not offer it.

        Must equal ``translate`` address by address and must not have side effects (faults) for failing ones: the
        caller goes back to ``translate`` for the first of these.
        """
        return None

    def get_min_page_size(self) -> int:
        """Smallest page in bytes."""
        return 4096

    def notify_flag_changed(self, old: IOMMUNotifierFlag, new: IOMMUNotifierFlag) -> None:
        """The OR of all flags changes.

        :raise OSError: EINVAL or ENOTSUP to refuse; the notifier is then not registered.
        """

    def replay(self, notifier: IOMMUNotifier) -> None:
        """Tell ``notifier`` of every existing translation in its range: here, page by page."""
        page = self.get_min_page_size()
        addr = notifier.start & -page
        stop = min(notifier.last + 1, self.size)
        while addr < stop:
            entry = self.translate(addr, IOMMUAccessFlags.NONE, notifier.iommu_idx)
            if entry.perm:
                page_entry = entry.cropped(addr, addr + page - 1)
                assert page_entry is not None, "a translation covers the address that was asked for"
                notifier.deliver(IOMMUTLBEvent(IOMMUNotifierFlag.MAP, page_entry))
            addr += page

    def get_attr(self, attr: str) -> object:
        """A property by name (``spapr_tce_fd``).

        :raise OSError: EINVAL, the region has no such attribute.
        """
        raise OSError(errno.EINVAL, f"IOMMU region {self.name} has no attribute {attr}")

    def attrs_to_index(self, attrs: MemTxAttrs) -> int:
        """The index (below :meth:`num_indexes`) that transactions with ``attrs`` use."""
        return 0

    def num_indexes(self) -> int:
        """How many indexes there are, contiguous from 0."""
        return 1

    # -- what followers use

    def register_notifier(self, notifier: IOMMUNotifier) -> None:
        """Add ``notifier``; it is not replayed to.

        :raise OSError: the vIOMMU refuses these flags; nothing changed.
        """
        assert notifier.flags, "a notifier wants at least one kind of event"
        assert notifier.start <= notifier.last, "a notifier's range is not empty"
        assert 0 <= notifier.iommu_idx < self.num_indexes(), "a notifier's index exists"
        self.notifiers.append(notifier)
        try:
            self._update_flags()
        except OSError:
            self.notifiers.remove(notifier)
            raise

    def unregister_notifier(self, notifier: IOMMUNotifier) -> None:
        """Remove ``notifier``; a refusal of the smaller flags is ignored."""
        self.notifiers.remove(notifier)
        try:
            self._update_flags()
        except OSError:
            self.notify_flags = self._wanted_flags()

    def _wanted_flags(self) -> IOMMUNotifierFlag:
        flags = IOMMUNotifierFlag.NONE
        for notifier in self.notifiers:
            flags |= notifier.flags
        return flags

    def _update_flags(self) -> None:
        new = self._wanted_flags()
        if new != self.notify_flags:
            self.notify_flag_changed(self.notify_flags, new)
            self.notify_flags = new

    def notify(self, event: IOMMUTLBEvent, idx: int = 0) -> None:
        """Hand ``event`` to every notifier of index ``idx`` that wants it."""
        for notifier in tuple(self.notifiers):
            if notifier.iommu_idx == idx:
                notifier.deliver(event)

    def notify_run(self, run: IOMMUTLBRun, idx: int = 0) -> None:
        """Hand ``run`` to every notifier of index ``idx`` that wants it."""
        for notifier in tuple(self.notifiers):
            if notifier.iommu_idx == idx:
                notifier.deliver_run(run)

    def unmap_range(self, notifier: IOMMUNotifier) -> None:
        """One UNMAP over the whole range of ``notifier``, up to 2**64 bytes."""
        entry = IOMMUTLBEntry(None, notifier.start, 0, notifier.last - notifier.start, IOMMUAccessFlags.NONE)
        kind = notifier.flags & (IOMMUNotifierFlag.UNMAP | IOMMUNotifierFlag.DEVIOTLB_UNMAP)
        if IOMMUNotifierFlag.UNMAP in kind:
            kind = IOMMUNotifierFlag.UNMAP
        notifier.deliver(IOMMUTLBEvent(kind, entry))

    def flush(self) -> OSError | None:
        """Complete what the callbacks queued, every notifier once; the first error, or None. All are flushed in any
        case.
        """
        first: OSError | None = None
        for notifier in tuple(self.notifiers):
            error = notifier.flush()
            if first is None:
                first = error
        return first


def iommu_behind(region: MemoryRegion) -> IOMMUMemoryRegion:
    """The IOMMU that ``region`` is or shows through aliases: notifiers of an alias are its target's, and their ranges
    stay relative to the target. No other region has notifiers.
    """
    while isinstance(region, AliasRegion):
        region = region.target
    assert isinstance(region, IOMMUMemoryRegion), f"region {region.name} is not an IOMMU: it has no notifiers"
    return region
