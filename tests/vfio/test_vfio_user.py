"""A vfio-user server follows a guest's IOMMU: what it was told to map is what the guest's table says, whatever it takes
and refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from errno import EEXIST, EINVAL, ENOSPC

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.memory.fakes import DictIOMMU
from vfio_model.errors import PeerLost
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUTLBEntry, IOMMUTLBEvent, IOMMUTLBRun
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace
from vfio_model.vfio.vfio_user import DmaChange, DmaLimits, VfioUserIOMMU, VfioUserSpace

PAGE = 4096
PAGES = 64
HVA = Hva(0x7F00_0000_0000)
FD = 77
R, W, RW = 1, 2, 3
WINDOW = 1 << 30
"""Where the IOMMU's window begins."""


@dataclass
class Server:
    """By the letter of the document: no overlaps, exact unmaps, a limit. ``refuses`` says which maps it does not
    take."""

    limit: int = 65535
    name: str = "server"
    maps: dict[int, DmaChange] = field(default_factory=dict)
    sent: list[DmaChange] = field(default_factory=list)
    given_up: str = ""
    refuses: bool = False
    refuses_unmaps: bool = False
    gone: bool = False

    def dma_many(self, changes: Sequence[DmaChange]) -> list[int]:
        if self.gone:
            raise PeerLost(self.name, "DMA_MAP")
        self.sent += changes
        return [self._take(change) for change in changes]

    def _take(self, change: DmaChange) -> int:
        if not change.is_map:
            known = self.maps.get(change.iova)
            if known is None or known.size != change.size or self.refuses_unmaps:
                return EINVAL
            del self.maps[change.iova]
            return 0
        if any(
            known.iova < change.iova + change.size and change.iova < known.iova + known.size
            for known in self.maps.values()
        ):
            return EEXIST
        if len(self.maps) >= self.limit or (self.refuses and change.fd >= 0):
            return ENOSPC
        self.maps[change.iova] = change
        return 0

    def give_up(self, reason: str) -> None:
        self.given_up, self.gone = reason, True

    def pages(self) -> dict[int, tuple[int, int] | None]:
        """Page of the window → (page of RAM, permission), None by message."""
        found: dict[int, tuple[int, int] | None] = {}
        for known in self.maps.values():
            for at in range(known.iova, known.iova + known.size, PAGE):
                offset = known.offset + at - known.iova
                found[(at - WINDOW) // PAGE] = None if known.fd < 0 else (offset // PAGE, known.perm)
        return found


class Bench:
    """RAM of :data:`PAGES` pages, an IOMMU whose window has as many, a server."""

    def __init__(self, server: Server | None = None, *, by_message: bool = False, pgsizes: int = PAGE) -> None:
        self.server = server or Server()
        self.block = RAMBlock("ram", bytearray(PAGES * PAGE), page_size=PAGE, hva=HVA, fd=FD)
        root = MemoryRegion("system", 1 << 64)
        root.add_subregion(0, RAMRegion("ram", self.block))
        self.system = AddressSpace("memory", root)
        self.iommu = DictIOMMU(self.system, PAGES * PAGE)
        self.root = MemoryRegion("device", 1 << 64)
        self.root.add_subregion(WINDOW, self.iommu)
        self.device = AddressSpace("device", self.root)
        self.trace = ListTrace()
        self.limits = DmaLimits(self.server.limit, pgsizes)
        self.by_message = by_message
        self.attach()

    def attach(self) -> None:
        self.backend = VfioUserIOMMU(
            self.server, (self.block,), self.limits, by_message=self.by_message, trace=self.trace
        )
        self.space = VfioUserSpace(self.backend, self.system, self.device, trace=self.trace)

    def set(self, first: int, pages: Sequence[int], perm: int = RW) -> None:
        """One hypercall: entries from ``first`` lead to ``pages``."""
        for number, page in enumerate(pages):
            self.iommu.pages[first + number] = (page * PAGE, perm)
            entry = IOMMUTLBEntry(self.system, (first + number) * PAGE, page * PAGE, PAGE - 1, IOMMUAccessFlags(perm))
            self.iommu.notify(IOMMUTLBEvent(IOMMUNotifierFlag.MAP, entry))
        assert self.iommu.flush() is None

    def run(self, first: int, pages: Sequence[int], perm: int = RW) -> None:
        """The same, told as one run."""
        for number, page in enumerate(pages):
            self.iommu.pages[first + number] = (page * PAGE, perm)
        translated = np.array([page * PAGE for page in pages], dtype=np.uint64)
        flags = IOMMUAccessFlags(perm)
        kind = IOMMUNotifierFlag.MAP
        self.iommu.notify_run(IOMMUTLBRun(kind, self.system, first * PAGE, 12, len(pages), translated, flags))
        assert self.iommu.flush() is None

    def clear(self, first: int, count: int) -> None:
        """One hypercall: entries from ``first`` lead nowhere."""
        for number in range(first, first + count):
            self.iommu.pages.pop(number, None)
        kind = IOMMUNotifierFlag.UNMAP
        self.iommu.notify_run(IOMMUTLBRun(kind, None, first * PAGE, 12, count))
        assert self.iommu.flush() is None

    def expected(self) -> dict[int, tuple[int, int]]:
        """What the table says."""
        return {page: (address // PAGE, perm) for page, (address, perm) in self.iommu.pages.items()}


def test_a_page_is_mapped_with_its_permission_and_its_place_in_the_file() -> None:
    bench = Bench()
    bench.set(3, [7], R)
    bench.set(4, [9], W)
    assert bench.server.sent == [
        DmaChange(True, WINDOW + 3 * PAGE, PAGE, R, FD, 7 * PAGE),
        DmaChange(True, WINDOW + 4 * PAGE, PAGE, W, FD, 9 * PAGE),
    ]


@pytest.mark.parametrize("as_run", [False, True])
def test_pages_in_order_are_one_map_and_others_are_not(as_run: bool) -> None:
    bench = Bench()
    (bench.run if as_run else bench.set)(0, [10, 11, 12, 20, 22])
    sizes = [(change.iova - WINDOW, change.size // PAGE, change.offset // PAGE) for change in bench.server.sent]
    assert sizes == [(0, 3, 10), (3 * PAGE, 1, 20), (4 * PAGE, 1, 22)]


def test_unmapping_a_part_takes_the_map_and_brings_the_rest_back() -> None:
    bench = Bench()
    bench.run(0, range(10, 20))
    del bench.server.sent[:]
    bench.clear(3, 2)
    assert bench.server.sent == [
        DmaChange(False, WINDOW, 10 * PAGE),
        DmaChange(True, WINDOW, 3 * PAGE, RW, FD, 10 * PAGE),
        DmaChange(True, WINDOW + 5 * PAGE, 5 * PAGE, RW, FD, 15 * PAGE),
    ]
    assert bench.server.pages() == bench.expected()


def test_an_entry_that_stays_as_it_is_says_nothing() -> None:
    bench = Bench()
    bench.set(1, [5])
    del bench.server.sent[:]
    bench.set(1, [5])
    bench.clear(40, 3)
    assert bench.server.sent == []


def test_an_overwritten_entry_is_unmapped_first() -> None:
    bench = Bench()
    bench.set(1, [5])
    bench.set(1, [6])
    assert [change.is_map for change in bench.server.sent] == [True, False, True]
    assert bench.server.pages() == {1: (6, RW)}


def test_a_window_that_goes_unmaps_everything() -> None:
    bench = Bench()
    bench.set(0, [3, 9, 27])
    bench.root.del_subregion(bench.iommu)
    assert bench.server.maps == {}
    bench.root.add_subregion(WINDOW, bench.iommu)
    assert bench.server.pages() == bench.expected(), "and comes back with its entries"


def test_memory_without_an_iommu_is_mapped_whole() -> None:
    bench = Bench()
    bench.root.del_subregion(bench.iommu)
    bench.root.add_subregion(0x10000, RAMRegion("bypass", bench.block))
    assert list(bench.server.maps.values()) == [DmaChange(True, 0x10000, PAGES * PAGE, RW, FD, 0)]


def test_by_message_a_window_is_one_map_without_a_descriptor() -> None:
    bench = Bench(by_message=True)
    assert not bench.iommu.notifiers, "nobody follows its entries"
    bench.set(0, [1, 2])
    bench.clear(0, PAGES)
    assert bench.server.sent == [DmaChange(True, WINDOW, PAGES * PAGE, RW)]
    bench.space.close()
    assert bench.server.maps == {}


def test_pages_smaller_than_the_servers_go_by_message() -> None:
    bench = Bench(pgsizes=1 << 16)
    bench.set(0, [1, 2])
    assert bench.server.sent == [DmaChange(True, WINDOW, PAGES * PAGE, RW)]


def test_memory_without_a_descriptor_goes_by_message() -> None:
    bench = Bench()
    bench.block.fd = -1
    bench.set(0, [1])
    assert bench.server.pages() == {0: None}


def test_a_full_server_gets_the_window_by_message_until_it_is_empty() -> None:
    bench = Bench(Server(limit=3))
    bench.set(0, [1, 3, 5, 7])
    assert list(bench.server.maps.values()) == [DmaChange(True, WINDOW, PAGES * PAGE, RW)]
    assert bench.trace.named("vfio_user_dma_by_message")
    bench.clear(0, PAGES)
    assert bench.server.maps == {}
    bench.set(2, [9])
    assert bench.server.pages() == {2: (9, RW)}


def test_a_refused_map_takes_its_window_by_message() -> None:
    bench = Bench()
    bench.set(0, [1, 3])
    bench.server.refuses = True
    bench.set(5, [7, 9])
    assert list(bench.server.maps.values()) == [DmaChange(True, WINDOW, PAGES * PAGE, RW)]
    assert not bench.server.given_up


def test_refused_ram_is_mapped_by_message() -> None:
    bench = Bench(Server(refuses=True))
    bench.root.del_subregion(bench.iommu)
    bench.root.add_subregion(0, RAMRegion("bypass", bench.block))
    assert list(bench.server.maps.values()) == [DmaChange(True, 0, PAGES * PAGE, RW)]


def test_a_server_that_refuses_an_unmap_is_given_up_and_the_guest_goes_on() -> None:
    bench = Bench()
    lost: list[PeerLost] = []
    bench.backend.queue.on_lost = lost.append
    bench.set(0, [1])
    bench.server.refuses_unmaps = True
    bench.clear(0, 1)
    assert "DMA_UNMAP" in bench.server.given_up and len(lost) == 1
    bench.set(0, [2])
    bench.root.del_subregion(bench.iommu)
    assert bench.space.lost


def test_a_server_that_cannot_be_attached_leaves_nothing_behind() -> None:
    with pytest.raises(PeerLost):
        Bench(Server(gone=True), by_message=True)


@settings(max_examples=60)
@given(
    limit=st.integers(1, 6),
    steps=st.lists(
        st.tuples(
            st.integers(0, 15), st.lists(st.integers(0, 15), min_size=1, max_size=6), st.sampled_from([0, R, W, RW])
        ),
        max_size=25,
    ),
)
def test_a_server_with_little_room_never_has_too_many_maps(limit: int, steps: list[tuple[int, list[int], int]]) -> None:
    bench = Bench(Server(limit=limit))
    for first, pages, perm in steps:
        if perm:
            bench.set(first, pages, perm)
        else:
            bench.clear(first, len(pages))
        assert not bench.server.given_up
        assert {change.iova: change for change in bench.backend.maps.maps} == bench.server.maps
        seen = bench.server.pages()
        direct = {page: where for page, where in seen.items() if where is not None}
        assert all(bench.expected()[page] == where for page, where in direct.items())
        assert set(bench.expected()) <= set(seen), "what is not mapped goes by message"


class FollowedTable(RuleBasedStateMachine):
    """A table that changes, a server that is restarted, a window that goes and comes."""

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench()
        self.shown = True

    @rule(
        first=st.integers(0, 55),
        pages=st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=8),
        perm=st.sampled_from([R, W, RW]),
    )
    def scattered(self, first: int, pages: list[int], perm: int) -> None:
        self.bench.set(first, pages, perm)

    @rule(first=st.integers(0, 40), page=st.integers(0, 40), count=st.integers(1, 20), perm=st.sampled_from([R, RW]))
    def linear(self, first: int, page: int, count: int, perm: int) -> None:
        self.bench.run(first, range(page, page + count), perm)

    @rule(first=st.integers(0, 60), count=st.integers(1, PAGES))
    def cleared(self, first: int, count: int) -> None:
        self.bench.clear(first, min(count, PAGES - first))

    @rule()
    def restarted(self) -> None:
        self.bench.space.abandon()
        self.bench.server = Server()
        self.bench.attach()

    @precondition(lambda self: self.shown)
    @rule()
    def removed(self) -> None:
        self.bench.root.del_subregion(self.bench.iommu)
        self.shown = False

    @precondition(lambda self: not self.shown)
    @rule()
    def shown_again(self) -> None:
        self.bench.root.add_subregion(WINDOW, self.bench.iommu)
        self.shown = True

    @invariant()
    def the_server_has_what_the_table_says(self) -> None:
        assert self.bench.server.pages() == (self.bench.expected() if self.shown else {})
        assert not self.bench.server.given_up


TestFollowedTable = FollowedTable.TestCase
