"""One TCE table: a DMA window of a PHB or of a VIO device (LoPAPR "TCE Tables and TCE"; QEMU's ``SpaprTceTable``).

A table object exists from the start with nothing but its LIOBN; :meth:`SpaprTceTable.enable` gives it a window and
:meth:`~SpaprTceTable.disable` takes it away. It brings a root region as large as the address space, in which the
IOMMU region lies at the window's bus address while the table is enabled, so that it can map itself without its PHB.

Three things must not be broken. A notification's address is relative to the *region*, never to the bus. A change is
queued with every notifier and then flushed, once for a whole hypercall; if that fails, the table is as it was before.
A device reset zeroes the entries and tells nobody: the host's view follows the window's going and coming, so each
window gets a *new* region object.

The guest writes big-endian lists; the table itself is in native order.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable
from typing import Any

from vfio_model.batch.tces import (
    changed_stretches,
    fill_words,
    nonzero_perm_runs,
    split_tces,
    translate_tces,
    zeroed_words,
)
from vfio_model.iommu.spapr.acceleration import Accelerator, InKernelTable
from vfio_model.iommu.spapr.regs import TCE_PERM_MASK, is_pci_liobn
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import (
    IOMMUMemoryRegion,
    IOMMUNotifier,
    IOMMUTLBEntry,
    IOMMUTLBEvent,
    IOMMUTLBRun,
    TranslatedPieces,
)
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U32_MAX, U64_MAX, Range
from vfio_model.trace import NULL_TRACE, Trace

_MAP, _UNMAP = IOMMUNotifierFlag.MAP, IOMMUNotifierFlag.UNMAP
_NONE = IOMMUAccessFlags.NONE
_PERMS = tuple(IOMMUAccessFlags(bits) for bits in range(4))
_BYTEARRAY_LIMIT = 1 << 18
"""Tables up to this many entries (2 MiB) are plain bytearrays; larger ones are allocated lazily."""
_SLICE = 1 << 20
"""Entries that one step of a large fill stores; 8 MiB."""
_SMALL_RUN = 16
"""Runs up to this long are cheaper as Python lists."""


class SpaprTceRegion(IOMMUMemoryRegion):
    """The window itself, as an IOMMU region: ``nb_table`` pages."""

    def __init__(self, table: SpaprTceTable, size: int) -> None:
        super().__init__(f"tce-iommu-{table.liobn:x}", size)
        self.table = table

    def translate(self, addr: int, flag: IOMMUAccessFlags, idx: int) -> IOMMUTLBEntry:
        """The entry of ``addr`` (relative to the window)."""
        return self.table.translate(addr)

    def translate_many(self, iovas: Any, flag: IOMMUAccessFlags, idx: int) -> TranslatedPieces | None:
        """:meth:`translate` over a numpy uint64 array."""
        pages, perms = translate_tces(self.table.entries, self.table.page_shift, iovas)
        return self.table.system, pages, perms

    def get_min_page_size(self) -> int:
        """The window's page size in bytes."""
        return 1 << self.table.page_shift

    def notify_flag_changed(self, old: IOMMUNotifierFlag, new: IOMMUNotifierFlag) -> None:
        """Being followed at all means that VFIO needs the table; there is no device IOTLB on this platform.

        :raise OSError: EINVAL for DEVIOTLB_UNMAP.
        """
        if new & IOMMUNotifierFlag.DEVIOTLB_UNMAP:
            raise OSError(errno.EINVAL, "spapr: no device IOTLB notifications")
        self.table.need_vfio = bool(new)
        self.table.relocate()

    def get_attr(self, attr: str) -> object:
        """``spapr_tce_fd``: the file of the table, when it lives in the kernel.

        :raise OSError: EINVAL, it does not, or there is no such attribute.
        """
        if attr != "spapr_tce_fd" or self.table.kernel is None:
            return super().get_attr(attr)
        return self.table.kernel.fd

    def replay(self, notifier: IOMMUNotifier) -> None:
        """Every valid entry in the notifier's range, in runs; nothing while a window known to be empty is created."""
        table = self.table
        if table.skipping_replay:
            return
        first = notifier.start >> table.page_shift
        stop = min(notifier.last >> table.page_shift, table.nb_table - 1) + 1
        for start, end in nonzero_perm_runs(table.entries, first, stop) if first < stop else ():
            table.tell(notifier, start, end)


class SpaprTceTable:
    """The table of ``liobn``; it translates into ``system``. ``nb_table`` 0 means disabled."""

    def __init__(self, liobn: int, system: AddressSpace, *, trace: Trace = NULL_TRACE) -> None:
        self.liobn = liobn
        self.system = system
        self.trace = trace
        self.root = MemoryRegion(f"tce-root-{liobn:x}", 1 << 64)
        self.iommu: SpaprTceRegion | None = None
        """The window's region while enabled."""
        self.entries = memoryview(array("Q"))
        self.nb_table = 0
        self.page_shift = 0
        self.bus_offset = 0
        self.def_win = False
        """Whether this table once was the default window; a later window in it still counts as that."""
        self.skipping_replay = False
        self.need_vfio = False
        self.accelerator: Accelerator | None = None
        """Who makes tables in the kernel; assign, then :meth:`relocate`."""
        self.kernel: InKernelTable | None = None
        """Where :attr:`entries` live, if in the kernel."""
        self.event_prefix = "spapr_iommu_pci_" if is_pci_liobn(liobn) else "spapr_iommu_"
        """QEMU has two families of trace events, for PCI and for VIO."""

    @property
    def enabled(self) -> bool:
        """Whether there is a window."""
        return self.nb_table != 0

    @property
    def window(self) -> Range | None:
        """The window's bus addresses, or None while disabled."""
        return Range.sized(self.bus_offset, self.nb_table << self.page_shift) if self.nb_table else None

    def enable(self, page_shift: int, bus_offset: int, nb_table: int, content: memoryview | None = None) -> None:
        """Open a window of ``nb_table`` empty pages at ``bus_offset``, or of what ``content`` (u64s) holds. No change
        when already open or ``nb_table`` is 0.

        ``nb_table`` is a 32-bit number: a larger one loses its high bits and may become 0.

        :raise MemoryError: the table does not fit this machine's memory; it stays disabled.
        """
        if self.nb_table:
            self.trace("warning", reason=f"DMA window {self.liobn:#x} is already enabled")
            return
        nb_table &= U32_MAX
        if not nb_table:
            return
        self.kernel = self._create_in_kernel(page_shift, bus_offset, nb_table)
        self.entries = self._allocate(nb_table) if self.kernel is None else self.kernel.entries
        if content is not None:
            self.entries[:] = content
        self.nb_table, self.page_shift, self.bus_offset = nb_table, page_shift, bus_offset
        fd = -1 if self.kernel is None else self.kernel.fd
        self.trace("spapr_iommu_new_table", liobn=self.liobn, table=0, fd=fd)
        self.iommu = SpaprTceRegion(self, nb_table << page_shift)
        self.root.add_subregion(bus_offset, self.iommu)

    @staticmethod
    def _allocate(nb_table: int) -> memoryview:
        if nb_table <= _BYTEARRAY_LIMIT:
            return memoryview(bytearray(nb_table * 8)).cast("Q")
        return zeroed_words(nb_table)

    def _create_in_kernel(self, page_shift: int, bus_offset: int, nb_table: int) -> InKernelTable | None:
        maker = self.accelerator
        if maker is None or not maker.takes(nb_table << page_shift, need_vfio=self.need_vfio):
            return None
        return maker.create(self.liobn, page_shift, bus_offset, nb_table)

    def relocate(self) -> None:
        """Move the entries to where they should live now, in the kernel or here; every one of them is kept.

        To be called when what the accelerator takes has changed; need_vfio does it by itself.
        """
        if self.iommu is None:
            return
        maker, old = self.accelerator, self.kernel
        wanted = maker is not None and maker.takes(self.nb_table << self.page_shift, need_vfio=self.need_vfio)
        if wanted == (old is not None):
            return
        new = self._create_in_kernel(self.page_shift, self.bus_offset, self.nb_table) if wanted else None
        if wanted and new is None:
            return
        entries = self._allocate(self.nb_table) if new is None else new.entries
        entries[:] = self.entries
        self.entries, self.kernel = entries, new
        self.trace("spapr_iommu_new_table", liobn=self.liobn, table=0, fd=-1 if new is None else new.fd)
        if old is not None:
            old.close()

    def served_followers(self) -> int | None:
        """How many followers the table has; None when the host cannot serve all of them by itself."""
        notifiers = self.iommu.notifiers if self.iommu is not None else ()
        for notifier in notifiers:
            if not notifier.in_kernel:
                return None
        return len(notifiers)

    def disable(self) -> None:
        """Close the window; its followers see the region go. Harmless when closed."""
        if self.iommu is None:
            return
        region, self.iommu = self.iommu, None
        self.root.del_subregion(region)
        self.entries = memoryview(array("Q"))
        if self.kernel is not None:
            self.kernel.close()
            self.kernel = None
        self.nb_table = self.page_shift = self.bus_offset = 0

    def reset(self) -> None:
        """Zero the entries, as the reset of the table's device does. No notification."""
        if self.kernel is not None:
            self.entries[:] = memoryview(bytes(self.entries.nbytes)).cast("Q")
        elif self.nb_table:
            self.entries = self._allocate(self.nb_table)

    def index(self, ioba: int) -> int:
        """The entry of bus address ``ioba``, rounded down to a page. Below the window it wraps to a huge index."""
        rounded = ioba & -(1 << self.page_shift)
        return (rounded - self.bus_offset & U64_MAX) >> self.page_shift

    def translate(self, addr: int) -> IOMMUTLBEntry:
        """The translation of ``addr``, relative to the window; beyond the table: perm NONE with an all-ones mask."""
        index = addr >> self.page_shift
        if index < self.nb_table:
            tce = self.entries[index]
            low = (1 << self.page_shift) - 1
            entry = IOMMUTLBEntry(self.system, addr & ~low, tce & ~low, low, _PERMS[tce & TCE_PERM_MASK])
        else:
            entry = IOMMUTLBEntry(self.system, 0, 0, U64_MAX, _NONE)
        if self.trace.enabled:
            self.trace(
                "spapr_iommu_xlate",
                liobn=self.liobn,
                ioba=addr,
                tce=entry.translated_addr,
                perm=int(entry.perm),
                pgsize=entry.addr_mask & U32_MAX,
            )
        return entry

    def get(self, index: int) -> int | None:
        """The TCE, or None beyond the table."""
        return self.entries[index] if index < self.nb_table else None

    def put(self, index: int, tce: int) -> OSError | None:
        """Store one TCE and tell the followers; an error of theirs undoes it. ``index`` lies in the table."""
        old = self.entries[index]
        self.entries[index] = tce
        region = self.iommu
        if region is None or not region.notifiers:
            return None
        self._notify_one(region, index, tce)
        error = region.flush()
        if error is not None:
            self.entries[index] = old
            if old != tce:
                self._notify_one(region, index, old)
                self._flush_undo(region)
        return error

    def _notify_one(self, region: SpaprTceRegion, index: int, tce: int) -> None:
        shift, perm = self.page_shift, _PERMS[tce & TCE_PERM_MASK]
        low = (1 << shift) - 1
        entry = IOMMUTLBEntry(self.system, index << shift, tce & ~low, low, perm)
        region.notify(IOMMUTLBEvent(_MAP if perm else _UNMAP, entry))

    def put_run(self, index: int, tces: memoryview) -> OSError | None:
        """Store ``tces`` (u64s) from ``index`` on and tell the followers with one run; an error of theirs undoes all
        of it.
        """
        return self._store(index, tces, self._run_of_entries)

    def fill(self, index: int, tce: int, count: int) -> OSError | None:
        """Store ``tce`` in ``count`` entries from ``index`` on; as :meth:`put_run`, without looking at each.

        More than :data:`_SLICE` go in slices. Without a permission they are one run nevertheless; with one, a run and a
        flush for each slice, whose followers need as many mappings as there are pages.
        """
        if count <= _SLICE:
            return self._store(index, memoryview(array("Q", (tce,)) * count), self._run_of_one)
        region, perm = self.iommu, tce & TCE_PERM_MASK
        followed = region if region is not None and region.notifiers else None
        before: list[tuple[int, memoryview]] = []
        error: OSError | None = None
        for at in range(index, index + count, _SLICE):
            length = min(_SLICE, index + count - at)
            old = fill_words(self.entries[at : at + length], tce)
            if followed is None:
                continue
            if old is not None:
                before.append((at, old))
            if perm and (error := self._tell_all(followed, at, length)) is not None:
                break
        if followed is not None and not perm:
            error = self._tell_all(followed, index, count)
        if followed is not None and error is not None:
            for at, old in before:
                self._undo_run(followed, at, old)
        return error

    def _tell_all(self, region: SpaprTceRegion, index: int, count: int) -> OSError | None:
        """Tell the followers that ``count`` entries equal the one at ``index`` now, and wait for them."""
        region.notify_run(self._run_of_one(index, count))
        return region.flush()

    def _store(self, index: int, tces: memoryview, run_of: Callable[[int, int], IOMMUTLBRun]) -> OSError | None:
        count = len(tces)
        region = self.iommu
        if region is None or not region.notifiers:
            self.entries[index : index + count] = tces
            return None
        old = self.entries[index : index + count].tobytes()
        self.entries[index : index + count] = tces
        region.notify_run(run_of(index, count))
        error = region.flush()
        if error is not None:
            self._undo_run(region, index, memoryview(old).cast("Q"))
        return error

    def _run_of_one(self, index: int, count: int) -> IOMMUTLBRun:
        """The run of ``count`` entries that all equal the one at ``index``."""
        shift, tce = self.page_shift, self.entries[index]
        perm = _PERMS[tce & TCE_PERM_MASK]
        if not perm:
            return IOMMUTLBRun(_UNMAP, self.system, index << shift, shift, count)
        pages = memoryview(array("Q", (tce & -(1 << shift),)) * count)
        return IOMMUTLBRun(_MAP, self.system, index << shift, shift, count, pages, perm)

    def _undo_run(self, region: SpaprTceRegion, index: int, old: memoryview) -> None:
        """Restore ``old``, and tell the followers of each stretch of entries that really changed."""
        entries = self.entries[index : index + len(old)]
        changed = changed_stretches(old, entries)
        entries[:] = old
        for start, end in changed:
            region.notify_run(self._run_of_entries(index + start, end - start))
        if changed:
            self._flush_undo(region)

    def _flush_undo(self, region: SpaprTceRegion) -> None:
        again = region.flush()
        if again is not None:  # the caller reports the first error; the host keeps what it could not take back
            self.trace("warning", reason=f"undo on {self.liobn:#x} was refused as well: {again}")

    def tell(self, notifier: IOMMUNotifier, start: int, end: int) -> None:
        """Hand ``notifier`` the entries ``start``..``end`` (exclusive) as they are."""
        notifier.deliver_run(self._run_of_entries(start, end - start))

    def _run_of_entries(self, index: int, count: int) -> IOMMUTLBRun:
        """What ``count`` (at least 1) entries from ``index`` say at present, as one run."""
        shift = self.page_shift
        tces = self.entries[index : index + count]
        perms: Any
        if count <= _SMALL_RUN:
            pages: Any = [tce & -(1 << shift) for tce in tces]
            each = [tce & TCE_PERM_MASK for tce in tces]
            perms = each[0] if each.count(each[0]) == count else each
        else:
            pages, perms = split_tces(tces, shift)
        if isinstance(perms, int):
            perms = _PERMS[perms]
            if not perms:
                return IOMMUTLBRun(_UNMAP, self.system, index << shift, shift, count)
        return IOMMUTLBRun(_MAP, self.system, index << shift, shift, count, pages, perms)
