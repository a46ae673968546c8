"""What the kernel of a PC does with its VT-d unit for the steps of a scenario: the driver, and who is in which domain.

Guest memory from :data:`TABLES` to :data:`TABLES_END` is for the unit's tables and its queue.
"""

from __future__ import annotations

from collections.abc import Mapping

from deploy.scenario_steps import DOMAINS
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator, shift_of

TABLES, TABLES_END = 0x10_0000, 0x80_0000
LEVELS = {1 << shift_of(level): level for level in (1, 2, 3)}
"""By page size."""
OWN, NONE, PASS_THROUGH = DOMAINS


class VtdKernel:
    """``requesters``: the requester ID of each device; devices of one requester are one to the unit.

    :raise DriverError: there is no unit, or it lacks what is asked for.
    """

    def __init__(self, cpu: Cpu, requesters: Mapping[str, int], *, queue: bool, scalable: bool) -> None:
        self._requesters = requesters
        self._driver = VtdDriver(cpu, PageAllocator(cpu, TABLES, TABLES_END), queued=queue, scalable=scalable)
        self._own: dict[int, Domain] = {}
        self._in: dict[int, Domain | None] = {}
        """By requester; None: passed through. Who is in none is missing."""

    def start(self) -> None:
        """Translation on; at the first time every device gets a domain of its own, with nothing in it."""
        self._driver.start()
        if not self._own:
            for requester in dict.fromkeys(self._requesters.values()):
                self._own[requester] = self._driver.domain()
                self._attach(requester, self._own[requester])

    def stop(self) -> None:
        """Translation off. Tables stay."""
        self._driver.stop()

    def _attach(self, requester: int, domain: Domain | None) -> None:
        self._in[requester] = domain
        if domain is None:
            self._driver.attach_pass_through(requester)
        else:
            self._driver.attach(domain, requester)

    def move(self, device: str, to: str) -> None:
        """Take ``device`` out of its domain, and put it into its own, none, past the unit, or into another device's.

        :raise ConfigError: the other device is in none.
        """
        requester = self._requesters[device]
        wanted = None if to in (NONE, PASS_THROUGH) else self._own[requester] if to == OWN else self.domain(to)
        if requester in self._in:
            now = self._in.pop(requester)
            if now is None:
                self._driver.detach_pass_through(requester)
            else:
                self._driver.detach(now, requester)
        if to != NONE:
            self._attach(requester, wanted)

    def passed_through(self, device: str) -> bool:
        """Whether the unit lets ``device`` past."""
        return self._in.get(self._requesters[device], self) is None

    def domain(self, device: str) -> Domain:
        """That of ``device``. :raise ConfigError: it is in none."""
        domain = self._in.get(self._requesters[device])
        if domain is None:
            raise ConfigError(f"{device} is in no domain")
        return domain

    def map(self, device: str, iova: int, gpa: int, count: int, page_size: int, perm: int) -> None:
        """``count`` pages in the domain of ``device``, where nothing is mapped; ``perm``: 1 read, 2 write.

        :raise ConfigError: it is in no domain. :raise DriverError: a larger page is in the way.
        """
        domain = self.domain(device)
        self._driver.map(domain, iova, gpa, count * page_size, perm, level=LEVELS[page_size])

    def unmap(self, device: str, iova: int, size: int) -> int:
        """Every page in ``size`` bytes; the bytes that were mapped. :raise ConfigError: it is in no domain."""
        return self._driver.unmap(self.domain(device), iova, size)
