"""What devices behind VT-d wrote while the machine migrates: found where it went, whatever became of the mapping."""

from __future__ import annotations

import random

import pytest

from tests.vfio.direct_chain import MIB
from tests.vfio.vtd_chain import DATA, MODES, NIC, PAGE, RAM, VtdChain
from vfio_model.guest_drivers.vtd_tables import READ, WRITE
from vfio_model.host.dma import AssignedImpl
from vfio_model.iommu.vtd.ports import Granularity
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.vfio.dirty import DirtySync
from vfio_model.vfio.dirty_source import ContainerDirty, DirtySource, EverythingDirty
from vfio_model.vfio.type1 import Type1

IOVA = 0x1_0000_0000
LARGE = 2 * MIB
RW = READ | WRITE
FIRST = DATA // PAGE
"""The page that tests map first."""


class Tracked:
    """A chain with a device that writes, and the RAM that was reported as written."""

    def __init__(self, mode: str = "queue", *, everything: bool = False) -> None:
        self.chain = VtdChain(mode)
        self.domain = self.chain.started()
        (container,) = self.chain.spaces[NIC].containers
        backend = container.backend
        assert isinstance(backend, Type1)
        dma = self.chain.dma()
        noted = memoryview(bytearray(64 * MIB))
        self.chain.host.set_dirty_map(self.chain.tokens[NIC], noted)
        words = self.chain.container().domain_words
        self.dma = AssignedImpl(dma.pe, words, self.chain.direct.segments, Lane.private(), dirty=noted)
        self.pages: set[int] = set()
        source: DirtySource = EverythingDirty(backend) if everything else ContainerDirty(backend)
        space = self.chain.machine.root_bus.iommu_address_space(NIC)
        self.sync = DirtySync(source, backend, space, self.chain.machine.system, self._mark)

    def _mark(self, block: RAMBlock, offset: int, size: int) -> None:
        assert block is self.chain.ram
        self.pages.update(range(offset >> 12, offset + size >> 12))

    def map(self, iova: int, page: int, count: int = 1, perm: int = RW) -> None:
        self.chain.driver.map(self.domain, iova, page * PAGE, count * PAGE, perm)

    def unmap(self, iova: int, count: int = 1) -> None:
        self.chain.driver.unmap(self.domain, iova, count * PAGE)

    def write(self, iova: int) -> None:
        assert self.dma.write(iova, b"x") == 0

    def written(self) -> set[int]:
        """Since the last time."""
        self.sync.sync()
        return self.reported()

    def reported(self) -> set[int]:
        """Without asking."""
        found, self.pages = self.pages, set()
        return found


@pytest.fixture(params=list(MODES))
def tracked(request: pytest.FixtureRequest) -> Tracked:
    return Tracked(request.param)


def test_writes_are_found_in_the_guests_ram(tracked: Tracked) -> None:
    tracked.map(IOVA, FIRST, 16)
    tracked.write(IOVA)
    tracked.sync.start()
    assert tracked.written() == set(), "before anybody counted"
    tracked.write(IOVA + 3 * PAGE)
    tracked.map(1 << 40, FIRST + 100, 2)
    tracked.write((1 << 40) + PAGE)
    assert tracked.written() == {FIRST + 3, FIRST + 101}
    assert tracked.written() == set()
    tracked.sync.stop()
    tracked.write(IOVA)
    assert tracked.chain.table() == tracked.chain.guest_table(tracked.domain)


def test_what_was_written_until_an_unmap_went_to_the_old_page(tracked: Tracked) -> None:
    tracked.map(IOVA, FIRST, 4)
    tracked.sync.start()
    tracked.write(IOVA)
    tracked.unmap(IOVA)
    assert tracked.reported() == {FIRST}, "without being asked: it is not mapped any more"
    tracked.write(IOVA + PAGE)
    table = tracked.domain.table
    tracked.chain.machine.mmio_write(table.slot(IOVA + PAGE), 8, table.leaf((FIRST + 50) * PAGE, RW))
    tracked.write(IOVA + PAGE)
    tracked.chain.driver.flush(tracked.domain, IOVA, 4 * PAGE)
    assert tracked.reported() == {FIRST + 1}
    tracked.write(IOVA + PAGE)
    assert tracked.written() == {FIRST + 50}


def test_several_changes_before_any_is_carried_out(tracked: Tracked) -> None:
    """A page that has gone elsewhere twice when the host hears of it."""
    tracked.map(IOVA, FIRST)
    tracked.sync.start()
    tracked.write(IOVA)
    table, unit = tracked.domain.table, tracked.chain.machine.iommu
    assert unit is not None
    for page in (FIRST + 10, FIRST + 20):
        tracked.chain.machine.mmio_write(table.slot(IOVA), 8, table.leaf(page * PAGE, RW))
        unit.translation.invalidate_iotlb(Granularity.SELECTIVE, tracked.domain.did, IOVA, 0)
    tracked.chain.driver.invalidation.iotlb()
    assert tracked.reported() == {FIRST}
    tracked.write(IOVA)
    assert tracked.written() == {FIRST + 20}


def test_a_large_page_that_becomes_small_ones_and_large_again(tracked: Tracked) -> None:
    tracked.chain.driver.map(tracked.domain, IOVA, DATA, LARGE, level=2)
    tracked.sync.start()
    tracked.write(IOVA + 5 * PAGE)
    list(tracked.domain.table.unmap(IOVA, LARGE))
    tracked.domain.table.map(IOVA, DATA + LARGE, 10 * PAGE, RW)
    tracked.chain.driver.flush(tracked.domain, IOVA, LARGE)
    assert tracked.reported() == {FIRST + 5}
    tracked.write(IOVA + 5 * PAGE)
    list(tracked.domain.table.unmap(IOVA, LARGE))
    at = tracked.domain.table.slot(IOVA, 2)
    tracked.chain.machine.mmio_write(at, 8, tracked.domain.table.leaf(DATA, RW, 2))
    tracked.chain.driver.flush(tracked.domain, IOVA, LARGE)
    assert tracked.reported() == {FIRST + 512 + 5}
    tracked.write(IOVA + 7 * PAGE)
    assert tracked.written() == {FIRST + 7}


def test_translation_ends_and_begins_meanwhile(tracked: Tracked) -> None:
    tracked.map(IOVA, FIRST, 2)
    tracked.sync.start()
    tracked.write(IOVA)
    tracked.chain.driver.detach(tracked.domain, NIC)
    assert tracked.reported() == {FIRST}
    tracked.chain.driver.attach_pass_through(NIC)
    tracked.write(DATA + 9 * PAGE)
    assert tracked.written() == {FIRST + 9}
    tracked.write(DATA + 11 * PAGE)
    tracked.chain.driver.detach_pass_through(NIC)
    assert tracked.reported() == {FIRST + 11}
    tracked.chain.driver.attach(tracked.domain, NIC)
    tracked.write(IOVA + PAGE)
    assert tracked.written() == {FIRST + 1}
    tracked.chain.machine.reset()
    tracked.write(DATA)
    assert tracked.written() == {FIRST}
    tracked.sync.stop()
    assert tracked.chain.one_to_one()


def test_where_nobody_tracks_what_is_mapped_counts() -> None:
    tracked = Tracked(everything=True)
    tracked.map(IOVA, FIRST, 4)
    tracked.sync.start()
    assert tracked.written() == {FIRST, FIRST + 1, FIRST + 2, FIRST + 3}
    tracked.unmap(IOVA, 2)
    assert tracked.reported() == {FIRST, FIRST + 1}
    assert tracked.written() == {FIRST + 2, FIRST + 3}


@pytest.mark.parametrize("seed", range(6))
def test_no_write_is_lost_and_none_is_put_elsewhere(seed: int) -> None:
    rng = random.Random(seed)
    tracked = Tracked(rng.choice(list(MODES)))
    other = tracked.chain.domain()
    model: dict[int, dict[int, int]] = {tracked.domain.did: {}, other.did: {}}
    tracked.sync.start()
    wrote: set[int] = set()
    reported: set[int] = set()
    for _ in range(250):
        domain = tracked.domain
        pages = model[domain.did]
        what = rng.choice(["map", "map", "change", "unmap", "write", "write", "write", "switch", "sync"])
        if what == "map":
            _map(tracked, pages, rng)
        elif what == "change" and pages:
            iova, page = rng.choice(sorted(pages)), rng.randrange(FIRST, RAM // PAGE)
            at = domain.table.slot(iova)
            tracked.chain.machine.mmio_write(at, 8, domain.table.leaf(page * PAGE, RW))
            tracked.chain.driver.flush(domain, iova, PAGE)
            pages[iova] = page
        elif what == "unmap" and pages:
            iova = rng.choice(sorted(pages))
            tracked.unmap(iova, 3)
            for at in range(iova, iova + 3 * PAGE, PAGE):
                pages.pop(at, None)
        elif what == "write" and pages:
            iova = rng.choice(sorted(pages))
            tracked.write(iova + rng.randrange(PAGE))
            wrote.add(pages[iova])
        elif what == "switch" and rng.random() < 0.3:
            tracked.chain.driver.detach(domain, NIC)
            tracked.domain, other = other, domain
            tracked.chain.driver.attach(tracked.domain, NIC)
        elif what == "sync":
            reported |= tracked.written()
            assert wrote <= reported
    assert reported | tracked.written() == wrote and len(wrote) > 20
    assert tracked.chain.table() == tracked.chain.guest_table(tracked.domain)


def _map(tracked: Tracked, pages: dict[int, int], rng: random.Random) -> None:
    iova = IOVA + rng.randrange(40) * PAGE
    page, count = rng.randrange(FIRST, RAM // PAGE - 4), rng.randint(1, 4)
    tracked.unmap(iova, count)
    tracked.map(iova, page, count)
    for number in range(count):
        pages[iova + number * PAGE] = page + number
