"""The page request queue of a VT-d unit as its driver serves it: requests gathered into groups, each group answered.

Intel VT-d specification, "Page Request Queue" (7.4), "Page Group Response Descriptor" (7.7), "Page Request Drain"
(7.10). Who answers a group says whether its pages are there. What no process can have meant is refused here, as Linux
does: an address that is not canonical, a privileged access, an instruction fetch, a function or PASID that nobody has.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable
from typing import Final, NamedTuple

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_interrupts import MESSAGE_BASE
from vfio_model.guest_drivers.vtd_invalidation import QueuedInvalidation, Registers
from vfio_model.guest_drivers.vtd_tables import PAGE, PageAllocator
from vfio_model.iommu.vtd import regs
from vfio_model.pci.iommu_ops import PageRequest, PageResponse
from vfio_model.ranges import U64_MAX

SIZE_ORDER = 4
"""Linux's queue: 64 KiB, 2048 requests."""
ADDRESS_BITS = 48
DRAIN_TRIES = 64
_DESCRIPTOR: Final = struct.Struct("<4Q")

Answer = Callable[[list[PageRequest]], PageResponse]
"""Brings the pages of a group in, or says why not."""


class Known(NamedTuple):
    """Requests of a function with a PASID: a group is one's."""

    sid: int
    pasid: int


def canonical(address: int) -> bool:
    """Whether the bits above the highest one that is translated are like it."""
    top = address >> ADDRESS_BITS - 1
    return top in (0, U64_MAX >> ADDRESS_BITS - 1)


class PageRequestQueue:
    """The queue of the unit behind ``registers``, in ``pages``; answers go by ``invalidation``."""

    def __init__(
        self,
        cpu: Cpu,
        registers: Registers,
        invalidation: QueuedInvalidation,
        pages: PageAllocator,
        *,
        order: int = SIZE_ORDER,
    ) -> None:
        """:raise DriverError: the unit takes no page requests."""
        if not registers.read(regs.ECAP, 8) & regs.ECAP_PRS:
            raise DriverError("the unit takes no page requests")
        self._cpu, self._registers, self._invalidation = cpu, registers, invalidation
        self._size = PAGE << order
        self._base = pages.take(1 << order)
        self._answers: dict[Known, Answer] = {}
        self._open: dict[tuple[Known, int], list[PageRequest]] = {}
        """Requests of groups whose last one has not come, by the group's number."""
        self.requests = 0
        """Taken from the queue so far."""
        self.responses: Counter[PageResponse] = Counter()
        self.overflows = 0
        registers.write(regs.PQH, 0, 8)
        registers.write(regs.PQT, 0, 8)
        registers.write(regs.PQA, self._base | order, 8)
        registers.write(regs.PRS, regs.PRS_PPR | regs.PRS_PRO)

    def interrupt(self, vector: int, destination: int = 0) -> None:
        """Have requests interrupt as message ``vector`` to APIC ``destination``."""
        self._registers.write(regs.PEDATA, vector)
        self._registers.write(regs.PEADDR, MESSAGE_BASE | destination << 12)
        self._registers.write(regs.PECTL, 0)

    def answer(self, sid: int, pasid: int, fn: Answer) -> None:
        """Groups of ``sid`` and ``pasid`` are ``fn``'s to answer."""
        self._answers[Known(sid, pasid)] = fn

    def forget(self, sid: int, pasid: int) -> None:
        """Nobody answers them; those that were not complete are dropped."""
        known = Known(sid, pasid)
        self._answers.pop(known, None)
        for key in [key for key in self._open if key[0] == known]:
            del self._open[key]

    # -- the handler of the interrupt

    @property
    def pending(self) -> bool:
        """Whether the unit says that there is something to do."""
        return bool(self._registers.read(regs.PRS) & (regs.PRS_PPR | regs.PRS_PRO))

    def handle(self) -> int:
        """Take what is in the queue and answer each group that is complete; the requests taken."""
        if not self.pending:
            return 0
        self._registers.write(regs.PRS, regs.PRS_PPR)
        taken = self._take()
        if self._registers.read(regs.PRS) & regs.PRS_PRO and self._empty():
            self.overflows += 1
            self._open.clear()  # their last requests may be what was lost: devices ask again
            self._registers.write(regs.PRS, regs.PRS_PRO)
        return taken

    def _empty(self) -> bool:
        return self._registers.read(regs.PQH, 8) == self._registers.read(regs.PQT, 8)

    def _take(self) -> int:
        head, tail = self._registers.read(regs.PQH, 8), self._registers.read(regs.PQT, 8)
        taken = 0
        while head != tail:
            raw = self._cpu.read_memory(self._base + head, regs.PRQ_ENTRY)
            self._request(*_DESCRIPTOR.unpack(raw)[:2])
            head = (head + regs.PRQ_ENTRY) % self._size
            taken += 1
        self._registers.write(regs.PQH, tail, 8)
        self.requests += taken
        return taken

    def _request(self, low: int, high: int) -> None:
        known = Known(regs.PRQ_RID.of(low), regs.PRQ_PASID.of(low))
        request = PageRequest(
            high & ~regs.PAGE,
            known.pasid,
            regs.PRQ_PRGI.of(high),
            last=bool(high & regs.PRQ_LPIG),
            is_read=bool(high & regs.PRQ_READ),
            is_write=bool(high & regs.PRQ_WRITE),
            priv=bool(low & regs.PRQ_PRIV),
            exec=bool(low & regs.PRQ_EXEC),
        )
        if not low & regs.PRQ_PP or _refused(request):
            self._refuse(known, request)
        elif request.last and not request.is_read and not request.is_write:
            return  # a stop marker is not answered
        elif known not in self._answers:
            self._refuse(known, request)
        else:
            self._group(known, request)

    def _refuse(self, known: Known, request: PageRequest) -> None:
        if request.last:
            self._open.pop((known, request.prgi), None)
            self._respond(known, request.prgi, PageResponse.INVALID_REQUEST)

    def _group(self, known: Known, request: PageRequest) -> None:
        key = known, request.prgi
        if not request.last:
            self._open.setdefault(key, []).append(request)
            return
        group = [*self._open.pop(key, []), request]
        self._respond(known, request.prgi, self._answers[known](group))

    def _respond(self, known: Known, prgi: int, code: PageResponse) -> None:
        self.responses[code] += 1
        self._invalidation.page_group_response(known.sid, known.pasid, prgi, code)

    # -- the end of a PASID

    def drain(self, sid: int, did: int, pasid: int) -> None:
        """No request of ``sid`` and ``pasid`` is in the queue any more or on its way to it. Its requests are blocked.

        :raise DriverError: they do not end.
        """
        for _ in range(DRAIN_TRIES):
            self.handle()
            self._invalidation.drain_page_requests(sid, did, pasid)
            if self._empty() and not self._registers.read(regs.PRS) & regs.PRS_PRO:
                return
        raise DriverError(f"page requests of PASID {pasid:#x} do not end")


def _refused(request: PageRequest) -> bool:
    """Whether no process can have meant it."""
    wants = request.is_read or request.is_write
    return not canonical(request.addr) or (request.priv and wants) or (request.exec and request.is_read)
