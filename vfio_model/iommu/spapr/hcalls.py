"""The TCE hypercalls: H_GET_TCE, H_PUT_TCE, H_STUFF_TCE, H_PUT_TCE_INDIRECT (LoPAPR "TCE hcall()s").

Errors and their order are those of QEMU's pseries machine without in-kernel acceleration: an unaligned I/O bus
address is rounded down, a TCE's low bits beyond the permissions are masked, a call that runs out of the window keeps
what it did before and returns H_PARAMETER. One hypercall tells each follower of the table once, and waits for it
before it returns; if a follower fails (the host could not map), the call undoes its whole change and returns
H_HARDWARE, or H_RESOURCE when memory ran out.

H_PUT_TCE_INDIRECT reads its list big-endian and wants it 4K-aligned.
"""

from __future__ import annotations

import errno
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence

from vfio_model.iommu.spapr.acceleration import ACCELERATED, accelerated
from vfio_model.iommu.spapr.regs import (
    INDIRECT_LIST_ALIGN,
    INDIRECT_MAX_TCES,
    MULTI_TCE,
    HCall,
    HReturn,
    is_pci_liobn,
)
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.memory.access import takes
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import RAMRegion
from vfio_model.ranges import U64_MAX
from vfio_model.trace import NULL_TRACE, Trace

HCallResult = tuple[int, list[int]]
"""Signed return code and output registers."""
HCallHandler = Callable[[Sequence[int]], HCallResult]

_SUCCESS = int(HReturn.H_SUCCESS)
_PARAMETER = int(HReturn.H_PARAMETER)
_OUT_OF_MEMORY = (errno.ENOMEM, errno.ENOSPC)


def hreturn_of(error: OSError | None) -> int:
    """The return code of a hypercall whose followers answered ``error``."""
    if error is None:
        return _SUCCESS
    return int(HReturn.H_RESOURCE if error.errno in _OUT_OF_MEMORY else HReturn.H_HARDWARE)


class TceHcalls:
    """The calls over ``tables`` (LIOBN to table); lists are read through ``system``."""

    def __init__(
        self,
        tables: Mapping[int, SpaprTceTable],
        system: AddressSpace,
        *,
        multi_tce: bool = True,
        trace: Trace = NULL_TRACE,
    ) -> None:
        self._tables, self._system, self._trace = tables, system, trace
        self._list = bytearray(INDIRECT_MAX_TCES * 8)
        handlers: dict[int, HCallHandler] = {
            HCall.H_GET_TCE: self.get_tce,
            HCall.H_PUT_TCE: self.put_tce,
            HCall.H_STUFF_TCE: self.stuff_tce,
            HCall.H_PUT_TCE_INDIRECT: self.put_tce_indirect,
        }
        self.handlers = {int(nr): handler for nr, handler in handlers.items() if multi_tce or nr not in MULTI_TCE}
        """By opcode; the multi-TCE calls are missing where they are not advertised."""

    def accelerated(self) -> dict[int, HCallHandler]:
        """:attr:`handlers`, but for a table that lives in the kernel the host is asked first."""
        fast = {
            int(nr): accelerated(int(nr), self._tables, self.handlers[nr], hreturn_of, self._trace)
            for nr in ACCELERATED
            if nr in self.handlers
        }
        return {**self.handlers, **fast}

    def get_tce(self, args: Sequence[int]) -> HCallResult:
        """``liobn, ioba`` -> the TCE."""
        liobn, ioba = args[0], args[1]
        table = self._tables.get(liobn)
        tce = table.get(table.index(ioba)) if table is not None else None
        ret = _PARAMETER if tce is None else _SUCCESS
        if self._trace.enabled:
            self._trace(_event(table, liobn, "get"), liobn=liobn, ioba=_rounded(table, ioba), ret=ret, tce=tce or 0)
        return (ret, []) if tce is None else (ret, [tce])

    def put_tce(self, args: Sequence[int]) -> HCallResult:
        """``liobn, ioba, tce``."""
        liobn, ioba, tce = args[0], args[1], args[2]
        table = self._tables.get(liobn)
        ret = _PARAMETER
        if table is not None:
            index = table.index(ioba)
            if index < table.nb_table:
                ret = hreturn_of(table.put(index, tce))
        if self._trace.enabled:
            self._trace(_event(table, liobn, "put"), liobn=liobn, ioba=_rounded(table, ioba), tce=tce, ret=ret)
        return ret, []

    def stuff_tce(self, args: Sequence[int]) -> HCallResult:
        """``liobn, ioba, value, npages``: at most as many pages as the table has."""
        liobn, ioba, value, npages = args[0], args[1], args[2], args[3]
        table = self._tables.get(liobn)
        if table is None or npages > table.nb_table:
            return _PARAMETER, []
        index = table.index(ioba)
        count = max(min(npages, table.nb_table - index), 0)
        ret = _ret_of(table.fill(index, value, count) if count else None, count, npages)
        if self._trace.enabled:
            after = _rounded(table, ioba) + (count << table.page_shift) & U64_MAX
            self._trace(_event(table, liobn, "stuff"), liobn=liobn, ioba=after, tcevalue=value, npages=npages, ret=ret)
        return ret, []

    def put_tce_indirect(self, args: Sequence[int]) -> HCallResult:
        """``liobn, ioba, list, npages``: up to 512 TCEs from a list in guest memory."""
        liobn, ioba, tce_list, npages = args[0], args[1], args[2], args[3]
        table = self._tables.get(liobn)
        if table is None or npages > INDIRECT_MAX_TCES or tce_list % INDIRECT_LIST_ALIGN:
            return _PARAMETER, []
        tces = self._read_list(tce_list, npages)
        index = table.index(ioba)
        count = max(min(npages, table.nb_table - index), 0)
        ret = _ret_of(table.put_run(index, memoryview(tces)[:count]) if count else None, count, npages)
        if self._trace.enabled:
            reached = count + 1 if count < npages else npages
            self._trace(
                _event(table, liobn, "indirect"),
                liobn=liobn,
                ioba=ioba,
                tcelist=tce_list,
                iobaN=max(min(count, npages) - 1, 0),
                tceN=tces[reached - 1] if reached else 0,
                ret=ret,
            )
        return ret, []

    def _read_list(self, tce_list: int, npages: int) -> array[int]:
        """The list in native order. Its entries are loaded one by one; what cannot be loaded is zero."""
        buffer = memoryview(self._list)[: npages * 8]
        found = self._system.view.lookup(tce_list)
        if found is not None and isinstance(found.region, RAMRegion) and tce_list + len(buffer) - 1 <= found.last:
            self._system.read(tce_list, buffer)
        else:
            self._read_each(tce_list, buffer)
        tces = array("Q", bytes(buffer))
        if sys.byteorder == "little":
            tces.byteswap()
        return tces

    def _read_each(self, tce_list: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), 8):
            entry, gpa = buffer[at : at + 8], tce_list + at
            if takes(self._system.view, gpa, 8):
                self._system.read(gpa, entry)
            else:
                entry[:] = bytes(8)


def _ret_of(error: OSError | None, done: int, npages: int) -> int:
    """H_PARAMETER when the table ended after ``done`` entries, or there were none to do."""
    if error is None and (not npages or done < npages):
        return _PARAMETER
    return hreturn_of(error)


def _rounded(table: SpaprTceTable | None, ioba: int) -> int:
    return ioba if table is None else ioba & -(1 << table.page_shift)


def _event(table: SpaprTceTable | None, liobn: int, name: str) -> str:
    if table is not None:
        return table.event_prefix + name
    return ("spapr_iommu_pci_" if is_pci_liobn(liobn) else "spapr_iommu_") + name
