"""A random program of one seed on a PC, on the running daemons: after every step the host's tables are the guest's,
as its page tables in memory tell them; devices come and go, the machine is reset, the host dies and comes back.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable

import msgspec
import pytest

from protocols.control import messages as control
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, RAM, topology
from tests.processes.q35_rig import DATA, MIB, PAGE, Q35Guest, host_pages
from tests.processes.rig import until
from vfio_model.guest_drivers.vtd import Domain
from vfio_model.guest_drivers.vtd_tables import READ, WRITE, PageTable

SEEDS = [(20261, True), (20262, False)]
"""With the queue, or registers."""
STEPS = 150
IOVA, FAR = 0x1_0000_0000, 1 << 40
PAGES, LARGE = 12, 2 * MIB
"""Of 4 KiB from IOVA on, of 2 MiB from FAR on, that are looked at."""
HOST_NAMES = {NIC: "0000:01:00.0", EDU: "0000:01:01.0"}
WEIGHTS = {"map": 9, "change": 6, "unmap": 5, "large": 4, "narrow": 2, "switch": 3, "pass_through": 1, "flush": 2}
UPHEAVALS = ("kill", "unplug", "kill", "plug", "translation", "reset", "kill")
"""One after another, evenly spread over the steps."""


class Program:
    """What the guest does, and both views of its tables. There are two domains for two devices."""

    def __init__(self, start: Callable[[], HostProcess], rng: random.Random, *, queued: bool) -> None:
        self._start, self.rng, self.queued = start, rng, queued
        self.host = start()
        self.guest = Q35Guest(self.host, "guest", 0)
        self.before = self.locked
        self.plugged = True
        self.done: dict[str, int] = {}
        self.boot()

    def boot(self) -> None:
        """Firmware and driver: each device in a domain of its own."""
        self.guest.bring_up(*([NIC, EDU] if self.plugged else [EDU]))
        self.driver = self.guest.start_iommu(queued=self.queued)
        self.domains = [self.driver.domain(), self.driver.domain()]
        self.where: dict[str, Domain | None] = {}
        """None: passed through."""
        for name, domain in zip((NIC, EDU), self.domains, strict=True):
            self.driver.attach(domain, self.guest.SIDS[name])
            self.where[name] = domain
        self.guest.cpu.flush()

    @property
    def locked(self) -> int:
        """Pages, of all clients."""
        value = self.host.status()["locked_vm"]
        assert isinstance(value, int)
        return value

    # -- steps -------------------------------------------------------------------------------------------------------

    def _domain(self) -> Domain:
        return self.rng.choice(self.domains)

    def _gpa(self) -> int:
        """Some lead beyond RAM: the host has nothing there."""
        return self.rng.randrange(DATA, RAM + 2 * MIB, PAGE)

    def _perm(self) -> int:
        return self.rng.choice((READ, WRITE, READ | WRITE, READ | WRITE))

    def map(self) -> None:
        """What is there is unmapped before."""
        domain, first = self._domain(), self.rng.randrange(PAGES)
        count = self.rng.randint(1, PAGES - first)
        self.driver.unmap(domain, IOVA + first * PAGE, count * PAGE)
        self.driver.map(domain, IOVA + first * PAGE, self._gpa(), count * PAGE, self._perm())

    def change(self) -> None:
        domain, iova = self._domain(), IOVA + self.rng.randrange(PAGES) * PAGE
        table: PageTable = domain.table
        self.guest.cpu.mmio_write(table.slot(iova), 8, table.leaf(self._gpa(), self._perm()))
        self.driver.flush(domain, iova, PAGE * self.rng.randint(1, 4))

    def unmap(self) -> None:
        self.driver.unmap(self._domain(), IOVA + self.rng.randrange(PAGES) * PAGE, PAGE * self.rng.randint(1, 6))

    def large(self) -> None:
        domain, iova = self._domain(), FAR + self.rng.randrange(2) * LARGE
        self._clear(domain, iova)
        gpa = self.rng.randrange(DATA, RAM + LARGE, LARGE)
        domain.table.map(iova, gpa, LARGE, self._perm(), level=2)
        self.driver.flush(domain, iova, LARGE)

    def narrow(self) -> None:
        """A few small pages where a large one was."""
        domain, iova = self._domain(), FAR + self.rng.randrange(2) * LARGE
        self._clear(domain, iova)
        domain.table.map(iova + 3 * PAGE, self._gpa(), 4 * PAGE, self._perm())
        self.driver.flush(domain, iova, LARGE)

    def _clear(self, domain: Domain, iova: int) -> None:
        """All of 2 MiB goes, the table too; nobody is told yet."""
        if self.rng.random() < 0.5:
            list(domain.table.unmap(iova, LARGE))
        self.guest.cpu.mmio_write(domain.table.slot(iova, 2), 8, 0)

    def switch(self) -> None:
        name = self.rng.choice([NIC, EDU])
        self._leave(name)
        self.where[name] = domain = self._domain()
        self.driver.attach(domain, self.guest.SIDS[name])

    def pass_through(self) -> None:
        name = self.rng.choice([NIC, EDU])
        self._leave(name)
        self.where[name] = None
        self.driver.attach_pass_through(self.guest.SIDS[name])

    def _leave(self, name: str) -> None:
        domain, sid = self.where[name], self.guest.SIDS[name]
        if domain is None:
            self.driver.detach_pass_through(sid)
        else:
            self.driver.detach(domain, sid)

    def flush(self) -> None:
        domain = self._domain()
        self.driver.invalidation.iotlb(self.rng.choice([None, domain.did]))

    def step(self) -> None:
        (name,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        getattr(self, name)()
        self.guest.cpu.flush()
        self.done[name] = self.done.get(name, 0) + 1

    def upheaval(self, what: str) -> None:
        guest = self.guest
        if what == "unplug":
            guest.link.ask(control.DeviceDel(NIC))
            self.plugged = False
        elif what == "plug":
            guest.link.ask(control.DeviceAdd(msgspec.json.encode(guest.assigned(0, 1)[0])))
            self.plugged = True
            guest.bring_up(NIC, EDU)
        elif what == "translation":
            self.driver.stop()
            self.compare_all(whole=True)
            for domain in self.domains:
                domain.attached.clear()
            self.boot()
        elif what == "reset":
            guest.link.ask(control.Reset())
            assert self.locked == self.before
            self.boot()
        else:
            self.host.end(signal.SIGKILL)
            until("the guest knows", lambda: guest.link.status()["host"]["lost"])
            self.step()
            self.host = self._start()
            until("it is back", lambda: guest.link.status()["host"]["connected"])
            guest.bring_up(*([NIC, EDU] if self.plugged else [EDU]))

    # -- both views --------------------------------------------------------------------------------------------------

    def compare_all(self, *, whole: bool = False) -> int:
        """The number of pages that both have; ``whole``: translation is off."""
        names = [NIC, EDU] if self.plugged else [EDU]
        return sum(self.compare(name, None if whole else self.where[name]) for name in names)

    def compare(self, name: str, domain: Domain | None) -> int:
        """Of one device."""
        looked = [IOVA + n * PAGE for n in range(PAGES)] + [FAR + n * PAGE for n in (0, 3, 6, 7, 511, 512, 515, 1023)]
        looked += [DATA, DATA + PAGE, RAM - PAGE, RAM]
        found = host_pages(self.host, HOST_NAMES[name], looked)
        if domain is not None:
            pages = self.guest.pages(domain)
            wanted = {iova: pages[iova] for iova in looked if iova in pages}
        else:
            wanted = {iova: (iova, "rw") for iova in looked if iova < RAM}
        assert {iova: perm for iova, (_, perm) in found.items()} == {iova: perm for iova, (_, perm) in wanted.items()}
        places = {found[iova][0] - wanted[iova][0] for iova in wanted}
        assert len(places) <= 1, "the guest's RAM is in one place"
        if wanted and name == NIC and not self.rng.randrange(3):
            self.reach(*self.rng.choice([(iova, *page) for iova, page in wanted.items()]))
        return len(wanted)

    def reach(self, iova: int, gpa: int, perm: str) -> None:
        """The device writes where it may, and there alone."""
        pattern, driver, ram = self.rng.randrange(1 << 64), self.guest.burst(), self.guest.ram
        before = ram.read(gpa, 24)
        driver.store(iova + 8, 8, pattern=pattern)
        assert driver.result().completed == (perm == "rw")
        written = pattern.to_bytes(8, "little") if perm == "rw" else before[8:16]
        assert ram.read(gpa, 24) == before[:8] + written + before[16:]


@pytest.mark.parametrize(("seed", "queued"), SEEDS)
def test_the_hosts_tables_are_the_guests(start_host: Callable[..., HostProcess], seed: int, queued: bool) -> None:
    program = Program(lambda: start_host(topology=topology("type1v2")), random.Random(seed), queued=queued)
    compared = 0
    try:
        for number in range(STEPS):
            if number % (STEPS // len(UPHEAVALS)) == 5 and number // (STEPS // len(UPHEAVALS)) < len(UPHEAVALS):
                program.upheaval(UPHEAVALS[number // (STEPS // len(UPHEAVALS))])
            program.step()
            compared += program.compare_all()
        assert compared > 500 and program.done.keys() == WEIGHTS.keys()
        program.guest.link.ask(control.Reset())
        assert program.locked == program.before, "RAM as it is"
        program.guest.link.ask(control.DeviceDel(NIC))
    finally:
        program.guest.close()
    assert program.host.until(lambda status: not status["mms"])["locked_vm"] == 0
