"""Address spaces of processes for devices (Linux's ``iommu_sva_bind_device``): a PASID whose first stage is the page
table of a process.

A device's page requests are faults of the process. What the process unmaps is invalidated in the unit and in the
device before the memory is anybody else's. A PASID is free again when nothing of it is cached, queued or on its way.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.mm import Mm, OnInvalidate
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_invalidation import QueuedInvalidation
from vfio_model.guest_drivers.vtd_prq import PageRequestQueue
from vfio_model.guest_drivers.vtd_tables import PageAllocator
from vfio_model.iommu.vtd import regs
from vfio_model.pci.iommu_ops import PageRequest, PageResponse

FIRST_PASID = 1


class Bond(NamedTuple):
    """A process's address space as function ``sid`` has it."""

    sid: int
    pasid: int
    mm: Mm
    domain: Domain
    told: OnInvalidate


class Sva:
    """Over the unit of ``vtd``, which has started in scalable mode with device TLBs. ``order`` as for the queue."""

    def __init__(self, cpu: Cpu, vtd: VtdDriver, pages: PageAllocator, *, order: int = 4) -> None:
        """:raise DriverError: the unit takes no page requests."""
        invalidation = vtd.invalidation
        assert isinstance(invalidation, QueuedInvalidation), "page requests are answered through the queue"
        self._vtd = vtd
        self.queue = PageRequestQueue(cpu, vtd.registers, invalidation, pages, order=order)
        self._bonds: dict[int, Bond] = {}
        self._pasids = 1 << regs.ECAP_PSS.of(vtd.ecap) + 1
        self.invalidations = 0
        """Ranges that devices were told to forget."""

    def bind(self, sid: int, mm: Mm) -> Bond:
        """Requests of ``sid`` with the PASID of what is returned are ``mm``'s.

        :raise OSError: ENOSPC: no PASID is free.
        """
        pasid = next((n for n in range(FIRST_PASID, self._pasids) if n not in self._bonds), None)
        if pasid is None:
            raise OSError(errno.ENOSPC, f"{self._pasids} PASIDs are in use")
        domain = self._vtd.shared_domain(mm.table)

        def told(addr: int, size: int) -> None:
            self.invalidations += 1
            self._vtd.flush(domain, addr, size)

        bond = self._bonds[pasid] = Bond(sid, pasid, mm, domain, told)
        self._vtd.attach_pasid(domain, sid, pasid)
        mm.on_invalidate.append(told)
        self.queue.answer(sid, pasid, lambda group: _answer(mm, group))
        return bond

    def unbind(self, bond: Bond) -> None:
        """The opposite. The PASID may be another's then."""
        self._vtd.detach(bond.domain, bond.sid, bond.pasid)
        self.queue.drain(bond.sid, bond.domain.did, bond.pasid)
        self.queue.forget(bond.sid, bond.pasid)
        bond.mm.on_invalidate.remove(bond.told)
        del self._bonds[bond.pasid]


def _answer(mm: Mm, group: list[PageRequest]) -> PageResponse:
    """Every page of a group, as faults of the process."""
    for request in group:
        if not mm.fault(request.addr, write=request.is_write):
            return PageResponse.INVALID_REQUEST
    return PageResponse.SUCCESS
