"""The DMA windows of one PHB: the default window, dynamic windows, and their reset (LoPAPR "DDW: Dynamic DMA Windows").

At most two windows. A new window goes to the default address when none is active, else to the 64-bit address, and
takes the first table object that is disabled, so that LIOBN ...00 is reused after the default window was removed. Two
windows never overlap: after the default window went, a second 64-bit window would lie on the first, and is refused
(:data:`~vfio_model.iommu.spapr.quirks.OVERLAPPING_WINDOWS` allows it).

A window exists only when everybody who must follow it does. Opening one runs the memory listeners; if one of them
fails, or a follower answers its first flush with an error, the window is closed again and the caller told.
"""

from __future__ import annotations

import errno

from vfio_model.iommu.spapr.quirks import OVERLAPPING_WINDOWS
from vfio_model.iommu.spapr.regs import (
    MAX_WINDOWS,
    TCE_PAGE_SHIFT,
    DmaOptions,
    pci_liobn,
    phb_buid,
)
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import MemoryRegion
from vfio_model.ranges import U32_MAX, Range
from vfio_model.trace import NULL_TRACE, Trace


class PhbDma:
    """The DMA side of PHB ``index``: its tables, and the root region of its devices' address space."""

    def __init__(self, index: int, options: DmaOptions, system: AddressSpace, *, trace: Trace = NULL_TRACE) -> None:
        self.index = index
        self.buid = phb_buid(index)
        self.options = options
        self._trace = trace
        self.root = MemoryRegion(f"pci@{self.buid:x}.iommu-root", 1 << 64)
        self.tables = tuple(
            SpaprTceTable(pci_liobn(index, window), system, trace=trace) for window in range(MAX_WINDOWS)
        )
        for table in self.tables:
            self.root.add_subregion(0, table.root)

    @property
    def active(self) -> int:
        """How many windows are open."""
        return sum(table.enabled for table in self.tables)

    @property
    def available(self) -> int:
        """How many more windows could be opened."""
        return MAX_WINDOWS - self.active

    def dma_reset(self) -> OSError | None:
        """Close every window and open the default one; the first error of its followers (it stays open all the
        same).
        """
        for table in self.tables:
            table.disable()
        default, options = self.tables[0], self.options
        error = None
        try:
            default.enable(TCE_PAGE_SHIFT, options.dma_win_addr, options.dma_win_size >> TCE_PAGE_SHIFT)
        except OSError as refused:
            error = refused
        default.def_win = True
        return error or (default.iommu.flush() if default.iommu is not None else None)

    def create(self, page_shift: int, window_shift: int) -> SpaprTceTable:
        """Open a window of ``1 << window_shift`` bytes in pages of ``1 << page_shift`` (not larger).

        :raise OSError: ENOSPC without a free table, EINVAL for a size that the table's 32-bit count cannot hold,
            ENOMEM, EEXIST for an overlap with the other window, or what a follower answered. No window was opened.
        """
        table = next((table for table in self.tables if not table.enabled), None)
        if table is None:
            raise OSError(errno.ENOSPC, "both DMA windows are open")
        address = self.options.dma64_win_addr if self.active else self.options.dma_win_addr
        nb_table = 1 << (window_shift - page_shift) & U32_MAX if window_shift - page_shift < 32 else 0
        if not nb_table or address + (nb_table << page_shift) > 1 << 64:
            raise OSError(errno.EINVAL, f"a window of 2**{window_shift} bytes in pages of 2**{page_shift}")
        wanted = Range.sized(address, nb_table << page_shift)
        if OVERLAPPING_WINDOWS not in self.options.quirks and any(
            other.window is not None and other.window.overlaps(wanted) for other in self.tables
        ):
            raise OSError(errno.EEXIST, f"the other window overlaps {wanted}")
        self._open(table, page_shift, address, nb_table)
        return table

    @staticmethod
    def _open(table: SpaprTceTable, page_shift: int, address: int, nb_table: int) -> None:
        table.skipping_replay = True  # known to be empty, and may have billions of entries
        try:
            table.enable(page_shift, address, nb_table)
            refused = table.iommu.flush() if table.iommu is not None else None
            if refused is not None:
                raise refused
        except MemoryError:
            raise OSError(errno.ENOMEM, f"no memory for a table of {nb_table:#x} TCEs") from None
        except OSError:
            table.disable()
            raise
        finally:
            table.skipping_replay = False

    def remove(self, table: SpaprTceTable) -> bool:
        """Close ``table``'s window. When it was the last one and not the default one, the default comes back: True."""
        was_default = table.def_win
        table.disable()
        self._trace("spapr_iommu_ddw_remove", liobn=table.liobn)
        if self.active or was_default:
            return False
        self.dma_reset()
        self._trace("spapr_iommu_ddw_reset", buid=self.buid, cfgaddr=0)
        return True
