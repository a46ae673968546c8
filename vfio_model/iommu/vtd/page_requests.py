"""The page request queue of a VT-d unit: what devices ask for, in guest RAM until software takes it.

Source: Intel VT-d specification, "Page Request Queue" (7.4), "Page Request Status Register" and its neighbours (11.4).
One slot stays free: a queue whose tail would meet its head is full. A request that finds it full sets PRO, and as long
as that is set none is accepted. The event says that there is a request, or that one was lost, once until software has
taken both away.
"""

from __future__ import annotations

import errno
import struct

from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.events import Event
from vfio_model.iommu.vtd.register_file import RegisterFile
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.iommu_ops import PageRequest
from vfio_model.ranges import U64_MAX

_DESCRIPTOR = struct.Struct("<4Q")
_TYPE_PAGE_REQUEST = 1
_LEAST_PAGE_SHIFT = 12


def encode(sid: int, request: PageRequest) -> bytes:
    """The page request descriptor of a request with a PASID, 32 bytes; there is no private data."""
    low = regs.PRQ_TYPE.put(_TYPE_PAGE_REQUEST) | regs.PRQ_PP
    low |= regs.PRQ_RID.put(sid) | regs.PRQ_PASID.put(request.pasid)
    low |= (regs.PRQ_EXEC if request.exec else 0) | (regs.PRQ_PRIV if request.priv else 0)
    high = request.addr & U64_MAX & ~regs.PAGE | regs.PRQ_PRGI.put(request.prgi)
    high |= (regs.PRQ_READ if request.is_read else 0) | (regs.PRQ_WRITE if request.is_write else 0)
    high |= regs.PRQ_LPIG if request.last else 0
    return _DESCRIPTOR.pack(low, high, 0, 0)


class PageRequests:
    """The queue's head, tail, address and status are registers."""

    def __init__(self, registers: RegisterFile, event: Event, system: AddressSpace, address_mask: int) -> None:
        self._registers, self._event, self._system = registers, event, system
        self._address_mask = address_mask

    @property
    def _status(self) -> int:
        return self._registers.get(regs.PRS)

    def _size(self) -> int:
        """Bytes."""
        pqa = self._registers.get_quad(regs.PQA)
        return 1 << regs.PQA_PQS.of(pqa) + _LEAST_PAGE_SHIFT

    def submit(self, sid: int, request: PageRequest) -> None:
        """Put ``request``, which has a PASID, of function ``sid`` into the queue and tell the guest.

        :raise OSError: it is not in the queue: ENOSPC, no room, or overflow was not cleared; EIO, the queue is not in
            memory.
        """
        if self._status & regs.PRS_PRO:
            raise OSError(errno.ENOSPC, "page request overflow")
        tail = self._registers.get_quad(regs.PQT)
        following = (tail + regs.PRQ_ENTRY) % self._size()
        if following == self._registers.get_quad(regs.PQH):
            self._raise(regs.PRS_PRO)
            raise OSError(errno.ENOSPC, "the page request queue is full")
        base = self._registers.get_quad(regs.PQA) & self._address_mask
        if self._system.write(base + tail, encode(sid, request)) != MemTxResult.OK:
            raise OSError(errno.EIO, "the page request queue is not in memory")
        self._registers.put_quad(regs.PQT, following)
        if not self._status & regs.PRS_PPR:
            self._raise(regs.PRS_PPR)

    def _raise(self, condition: int) -> None:
        before = self._status
        self._registers.change(regs.PRS, set_=condition)
        if not before & (regs.PRS_PPR | regs.PRS_PRO):
            self._event.generate()

    def status_written(self) -> None:
        """PRS was: without a condition nothing is pending."""
        if not self._status & (regs.PRS_PPR | regs.PRS_PRO):
            self._event.serviced()
