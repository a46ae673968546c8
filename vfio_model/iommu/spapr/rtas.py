"""RTAS: 32-bit cells in, 32-bit cells out, and the four calls of dynamic DMA windows (LoPAPR "RTAS Call Buffer", "DDW
RTAS calls").

A handler takes the argument cells and the number of return cells that the caller offers, and answers with the cells
to be written: status first. On an error that is the status alone; the caller's other cells keep what they hold.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping, Sequence

from vfio_model.iommu.spapr.ddw import PhbDma
from vfio_model.iommu.spapr.regs import (
    LARGEST_BLOCK_32,
    LARGEST_BLOCK_64,
    RtasStatus,
    RtasToken,
    page_mask,
)
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.ranges import U32_MAX
from vfio_model.trace import NULL_TRACE, Trace

RtasHandler = Callable[[Sequence[int], int], list[int]]
"""``(args, nret)`` -> the return cells to write, ``rets[0]`` (signed) first."""

_SUCCESS = int(RtasStatus.SUCCESS)
PARAM_ERROR = [int(RtasStatus.PARAM_ERROR)]
HW_ERROR = [int(RtasStatus.HW_ERROR)]


class DdwRtas:
    """The DDW calls over PHBs by BUID and tables by LIOBN."""

    def __init__(
        self, phbs: Mapping[int, PhbDma], tables: Mapping[int, SpaprTceTable], *, trace: Trace = NULL_TRACE
    ) -> None:
        self._phbs, self._tables, self._trace = phbs, tables, trace
        self.handlers: dict[int, RtasHandler] = {
            int(RtasToken.IBM_QUERY_PE_DMA_WINDOW): self.query,
            int(RtasToken.IBM_CREATE_PE_DMA_WINDOW): self.create,
            int(RtasToken.IBM_REMOVE_PE_DMA_WINDOW): self.remove,
            int(RtasToken.IBM_RESET_PE_DMA_WINDOW): self.reset,
        }

    def _phb(self, args: Sequence[int]) -> PhbDma | None:
        """The PHB named by cells 1 and 2, if it offers dynamic windows."""
        phb = self._phbs.get(args[1] << 32 | args[2])
        return phb if phb is not None and phb.options.ddw else None

    def query(self, args: Sequence[int], nret: int) -> list[int]:
        """ibm,query-pe-dma-window: config_addr, buid_hi, buid_lo -> windows available, largest block, page mask,
        migration mask.

        The largest block (in TCEs) takes one cell with 5 outputs and two with 6.
        """
        phb = self._phb(args) if len(args) == 3 and nret in (5, 6) else None
        if phb is None:
            return PARAM_ERROR
        mask = page_mask(phb.options.pgsz)
        block = [LARGEST_BLOCK_64 >> 32, LARGEST_BLOCK_64 & U32_MAX] if nret == 6 else [LARGEST_BLOCK_32]
        self._trace(
            "spapr_iommu_ddw_query",
            buid=phb.buid,
            cfgaddr=args[0],
            wa=phb.available,
            win_size=LARGEST_BLOCK_64 if nret == 6 else LARGEST_BLOCK_32,
            pgmask=mask,
        )
        return [_SUCCESS, phb.available, *block, mask, 0]

    def create(self, args: Sequence[int], nret: int) -> list[int]:
        """ibm,create-pe-dma-window: config_addr, buid_hi, buid_lo, page_shift, window_shift -> liobn, address hi,
        lo.
        """
        phb = self._phb(args) if len(args) == 5 and nret == 4 else None
        if phb is None:
            return PARAM_ERROR
        page_shift, window_shift = args[3], args[4]
        if page_shift > 63 or not phb.options.pgsz >> page_shift & 1 or window_shift < page_shift:
            return PARAM_ERROR
        try:
            table = phb.create(page_shift, window_shift)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, "")
            self._trace("spapr_iommu_ddw_create_failed", buid=phb.buid, cfgaddr=args[0], error=name, reason=str(error))
            return HW_ERROR
        self._trace(
            "spapr_iommu_ddw_create",
            buid=phb.buid,
            cfgaddr=args[0],
            pg_size=1 << page_shift,
            req_size=1 << window_shift,
            start=table.bus_offset,
            liobn=table.liobn,
        )
        return [_SUCCESS, table.liobn, table.bus_offset >> 32, table.bus_offset & U32_MAX]

    def remove(self, args: Sequence[int], nret: int) -> list[int]:
        """ibm,remove-pe-dma-window: liobn."""
        table = self._tables.get(args[0]) if len(args) == 1 and nret == 1 else None
        if table is None or not table.enabled:
            return PARAM_ERROR
        phb = next((phb for phb in self._phbs.values() if table in phb.tables), None)
        if phb is None or not phb.options.ddw:
            return PARAM_ERROR
        phb.remove(table)
        return [_SUCCESS]

    def reset(self, args: Sequence[int], nret: int) -> list[int]:
        """ibm,reset-pe-dma-window: config_addr, buid_hi, buid_lo. Back to the default window alone."""
        phb = self._phb(args) if len(args) == 3 and nret == 1 else None
        if phb is None:
            return PARAM_ERROR
        error = phb.dma_reset()
        self._trace("spapr_iommu_ddw_reset", buid=phb.buid, cfgaddr=args[0])
        return [_SUCCESS] if error is None else HW_ERROR
