"""A PC with assigned devices behind VT-d moves between two processes while they write and the guest remaps."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from deploy.link import CommandFailed
from tests.processes.conftest import HostProcess
from tests.processes.migration_rig import EDU, NIC, OWN, RAM, Pair, pair, topology
from tests.processes.q35_rig import DATA, MIB, PAGE, Q35Guest, host_pages
from tests.processes.rig import until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.devices.edu import regs as edu
from vfio_model.guest_drivers.vtd import VtdDriver
from vfio_model.guest_drivers.vtd_tables import READ, WRITE

IOVA, EDU_IOVA = 0x1_0000_0000, 0x20_0000
"""An edu has 28 address bits."""
PAGES, LARGE = 64, 2 * MIB
PATTERN = 0x1122_3344_5566_7788
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
TRACKINGS = [("type1v2", True, "mapped"), ("type1v2", False, "shared"), ("type1", True, ""), ("type1", False, "")]
"""The devices note what they write, or the container does (type1v2), or nobody: then everything counts. And how a
remote device reaches memory, if there is one.
"""
RW = READ | WRITE


class Moving:
    """The source, prepared: a burst writes, its domain and that of both edu devices are mapped."""

    def __init__(self, both: Pair) -> None:
        self.both, source = both, both.source
        assert isinstance(source, Q35Guest)
        self.source = source
        source.bring_up(NIC, EDU, OWN, *source.remote)
        self.driver: VtdDriver = source.start_iommu(queued=False)
        self.first, self.second = self.driver.domain(), self.driver.domain()
        self.edus = EDU, OWN, *source.remote
        self.driver.attach(self.first, Q35Guest.SIDS[NIC])
        for name in self.edus:
            self.driver.attach(self.second, Q35Guest.SIDS[name])
        self.driver.map(self.first, IOVA, DATA, PAGES * PAGE)
        self.driver.map(self.first, 1 << 40, DATA + 2 * LARGE, LARGE, level=2)
        self.driver.map(self.second, EDU_IOVA, DATA + MIB, 4 * PAGE)
        source.burst().start(IOVA, 64, 1 << 40, stride=PAGE, span=PAGES, pattern=PATTERN, command=FOREVER)
        source.cpu.flush()
        source.ram.write(DATA + 8 * MIB, random.Random(1).randbytes(8 * MIB))

    def churn(self, seed: int) -> int:
        """Until the source has left: pages come, go and lead elsewhere under a device that writes all the time. The
        number of operations."""
        rng, done = random.Random(seed), 0
        with contextlib.suppress(CommandFailed):
            while True:
                self._change(rng)
                self.source.cpu.flush()
                done += 1
        return done

    def _change(self, rng: random.Random) -> None:
        driver, domain, cpu = self.driver, self.first, self.source.cpu
        iova, gpa = IOVA + rng.randrange(PAGES) * PAGE, DATA + rng.randrange(4 * PAGES) * PAGE
        choice = rng.randrange(8)
        if choice < 3:  # what was there leads elsewhere
            cpu.mmio_write(domain.table.slot(iova), 8, domain.table.leaf(gpa, RW))
            driver.flush(domain, iova, PAGE)
        elif choice == 3:
            driver.unmap(domain, iova, rng.randint(1, 4) * PAGE)
        elif choice == 4:
            count = min(rng.randint(1, 8), PAGES - (iova - IOVA) // PAGE)
            list(domain.table.unmap(iova, count * PAGE))
            domain.table.map(iova, gpa, count * PAGE, RW)
            driver.invalidation.iotlb(domain.did)
        elif choice == 5:
            list(domain.table.unmap(1 << 40, LARGE))
            driver.invalidation.iotlb(domain.did)
            domain.table.map(1 << 40, DATA + rng.randrange(2, 6) * LARGE, LARGE, RW, level=2)
            driver.invalidation.iotlb(domain.did)
        elif choice == 6:
            cpu.write_memory(DATA + 8 * MIB + rng.randrange(2 * MIB), rng.randbytes(100))
        else:
            self._remap_edus(gpa)
            self.source.edu(rng.choice(self.edus)).start_dma(edu.BUFFER_ADDRESS, EDU_IOVA + PAGE, 512, to_ram=True)
            self.source.step(100_000_000)

    def _remap_edus(self, gpa: int) -> None:
        table = self.second.table
        self.source.cpu.mmio_write(table.slot(EDU_IOVA + PAGE), 8, table.leaf(gpa + 4 * LARGE, RW))
        self.driver.flush(self.second, EDU_IOVA + PAGE, PAGE)

    def same(self, guest: Q35Guest, number: int) -> int:
        """What the host lets the burst of ``guest`` reach is what its page table says; the number of pages."""
        wanted = guest.pages(self.first)
        around = {*wanted, *range(IOVA - PAGE, IOVA + (PAGES + 2) * PAGE, PAGE), 1 << 40}
        found = host_pages(self.both.host, f"0000:01:{2 * number:02x}.0", sorted(around))
        assert {iova: perm for iova, (_, perm) in found.items()} == {iova: perm for iova, (_, perm) in wanted.items()}
        assert len({found[iova][0] - wanted[iova][0] for iova in wanted}) <= 1
        return len(wanted)


@pytest.mark.parametrize(("kind", "devices", "dma"), TRACKINGS)
def test_no_page_is_lost_while_the_guest_remaps(
    start_host: Callable[..., HostProcess], kind: str, devices: bool, dma: str
) -> None:
    host = start_host(topology=topology(kind))
    options = {"dirty_tracking": devices, "container": kind, "remote": bool(dma), "remote_dma": dma}
    with pair(host, kind=Q35Guest, **options) as both:
        moving = Moving(both)
        source, target = moving.source, both.make_paused()
        assert isinstance(target, Q35Guest)
        source.ask("migrate-set-parameters", max_bandwidth=20 << 20, downtime_limit=0)
        source.ask("migrate", uri=f"unix:{both.path}")
        done = moving.churn(len(kind) + devices)
        info = source.migrated("completed", "failed")
        assert info["status"] == "completed", info
        assert target.migrated("completed", "failed")["status"] == "completed"
        assert done > 30 and info["ram"]["dirty-sync-count"] > 2
        different = [
            hex(at) for at in range(0, RAM, PAGE) if target.ram.map[at : at + PAGE] != source.ram.map[at : at + PAGE]
        ]
        assert not different
        target.ask("cont")
        goes_on(moving, target)
        as_it_was(both)


def goes_on(moving: Moving, target: Q35Guest) -> None:
    """The target's guest goes on where the source stopped, perhaps in the middle of a change."""
    cpu = moving.source.cpu
    cpu.move(target.link)
    target.cpu, target.bars = cpu, moving.source.bars
    moving.driver.invalidation.iotlb()
    assert moving.same(target, 1) > 0
    before = target.burst().result().completed
    moving.driver.map(moving.first, IOVA + (PAGES + 1) * PAGE, DATA, PAGE)
    until("the burst goes on", lambda: target.burst().result().completed > before)
    target.burst().stop()
    target.burst().store(IOVA + (PAGES + 1) * PAGE, 8, pattern=7)
    assert not target.burst().result().failed and target.ram.read(DATA, 8) == (7).to_bytes(8, "little")
    moving.driver.unmap(moving.first, IOVA, PAGES * PAGE)
    target.burst().store(IOVA, 8)
    assert target.burst().result().failed == 1, "the host has unmapped it"
    moving.same(target, 1)


def as_it_was(both: Pair) -> None:
    """Nothing stays locked when both have ended."""
    for guest in (both.source, both.target):
        guest.ask("quit")
        assert guest.popen.wait(20) == 0
    assert both.host.until(lambda status: not status["mms"])["locked_vm"] == 0
