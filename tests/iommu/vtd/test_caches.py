"""What is cached under which key, and what each invalidation takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.iommu.vtd.rig import NONE, RO, RW, TABLES, WO, Rig
from vfio_model.iommu.vtd.caches import MAX_FRAMES, MAX_PAGES, Front, Iotlb, Page
from vfio_model.iommu.vtd.ports import RID, Granularity
from vfio_model.memory.iotlb import IOMMUTLBEntry

GLOBAL, DOMAIN, SELECTIVE = Granularity.GLOBAL, Granularity.DOMAIN, Granularity.SELECTIVE
CONTEXT = TABLES + 0x1180


def rig_with_pages(count: int = 4, **options: object) -> tuple[Rig, list[int]]:
    """Pages from 0 on, each mapped to itself + 16 MiB and cached; where their entries are."""
    rig = Rig(**options)
    table = rig.legacy()
    slots = [rig.tables_for(table, 4, page << 12, 0x100_0003 | page << 12) for page in range(count)]
    rig.enable()
    for page in range(count):
        rig.translate(page << 12, RW)
    return rig, slots


def stale(rig: Rig, slots: list[int]) -> list[int]:
    """The pages that are still found after all entries are gone."""
    for slot in slots:
        rig.store(slot, 0)
    return [page for page in range(len(slots)) if rig.translate(page << 12)[3]]


def test_a_cached_translation_outlives_its_entry() -> None:
    rig, slots = rig_with_pages()
    assert stale(rig, slots) == [0, 1, 2, 3]
    assert rig.translate(0x1234) == (0x1000, 0x100_1000, 0xFFF, 3)


def test_holes_are_not_cached() -> None:
    rig, slots = rig_with_pages()
    rig.store(slots[2], 0)
    rig.translation.invalidate_iotlb(GLOBAL)
    assert rig.blocked(0x2000) == [6]
    rig.store(slots[2], 0x2345_6003)
    assert rig.translate(0x2000)[1] == 0x2345_6000


@pytest.mark.parametrize(
    ("granularity", "did", "addr", "am", "left"),
    [
        (GLOBAL, 0, 0, 0, []),
        (DOMAIN, 5, 0, 0, []),
        (DOMAIN, 6, 0, 0, [0, 1, 2, 3]),
        (SELECTIVE, 5, 0x1000, 0, [0, 2, 3]),
        (SELECTIVE, 5, 0x3000, 1, [0, 1]),
        (SELECTIVE, 5, 0x3000, 2, []),
        (SELECTIVE, 5, 0x10_0000, 18, []),
        (SELECTIVE, 5, 0x10_0000, 0, [0, 1, 2, 3]),
        (SELECTIVE, 6, 0x1000, 0, [0, 1, 2, 3]),
    ],
)
def test_iotlb_invalidations(granularity: Granularity, did: int, addr: int, am: int, left: list[int]) -> None:
    rig, slots = rig_with_pages()
    rig.translation.invalidate_iotlb(granularity, did, addr, am)
    assert stale(rig, slots) == left
    assert len(rig.translation.lookup.iotlb) == len(left)


def test_a_large_page_goes_with_any_of_its_pages() -> None:
    rig = Rig()
    slot = rig.tables_for(rig.legacy(), 4, 0x40_0000, 0x60_0083, level=2)
    rig.enable()
    for addr in (0x40_0000, 0x41_0000, 0x5F_F000):
        assert rig.translate(addr) == (0x40_0000, 0x60_0000, 0x1F_FFFF, 3)
    assert len(rig.translation.lookup.iotlb) == 1
    rig.store(slot, 0)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x60_0000, 0)
    assert rig.translate(0x41_0000)[3]
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x50_1000, 0)
    assert [rig.translate(addr)[3] for addr in (0x40_0000, 0x41_0000, 0x5F_F000)] == [0, 0, 0]


def test_functions_of_one_domain_share_what_is_cached() -> None:
    rig, slots = rig_with_pages()
    rig.legacy(did=5, devfn=0x20)
    rig.store(TABLES + 0x1000 + 0x20 * 16, rig.load(CONTEXT))
    rig.store(slots[0], 0)
    assert rig.space(devfn=0x20).region.translate(0, RO, 0).translated_addr == 0x100_0000
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0)
    assert not rig.space(devfn=0x20).region.translate(0, RO, 0).perm
    assert not rig.translate(0)[3]


def moved_to_another_domain(**options: object) -> Rig:
    rig, _ = rig_with_pages(**options)
    other = rig.page()
    rig.tables_for(other, 4, 0, 0x2345_6003)
    rig.store(CONTEXT, other | 1)
    rig.store(CONTEXT + 8, 6 << 8 | 2)
    return rig


def test_a_context_entry_that_changes_counts_when_it_is_invalidated() -> None:
    rig = moved_to_another_domain()
    assert rig.translate(0)[1] == 0x100_0000
    rig.translation.invalidate_contexts(SELECTIVE, 5, 0x20, 0)
    assert rig.translate(0)[1] == 0x100_0000, "another function's"
    rig.translation.invalidate_contexts(SELECTIVE, 5, 0x18, 0)
    assert rig.translate(0)[1] == 0x2345_6000


@pytest.mark.parametrize(
    ("sid", "mask", "hit"),
    [(0x1C, 0, False), (0x1C, 1, True), (0x1A, 1, False), (0x1E, 2, True), (0x1F, 3, True), (0x11F, 3, False)],
)
def test_the_function_mask_of_a_context_invalidation(sid: int, mask: int, hit: bool) -> None:
    rig = moved_to_another_domain()
    rig.translation.invalidate_contexts(SELECTIVE, 5, sid, mask)
    assert (rig.translate(0)[1] == 0x2345_6000) == hit


def test_a_peer_s_iotlb_goes_on_with_what_the_function_had() -> None:
    rig = moved_to_another_domain(quirks=frozenset({"iotlb-by-source"}))
    rig.translation.invalidate_contexts(GLOBAL)
    assert rig.translate(0)[1] == 0x100_0000
    rig.translation.invalidate_iotlb(DOMAIN, 6)
    assert rig.translate(0)[1] == 0x100_0000
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert rig.translate(0)[1] == 0x2345_6000


def test_a_hit_without_permission_is_walked_again() -> None:
    rig, slots = rig_with_pages()
    rig.store(slots[0], 0x100_0001)
    rig.translation.invalidate_iotlb(GLOBAL)
    rig.translate(0)
    assert rig.blocked(0, WO) == [5]
    rig.store(slots[0], 0x100_0003)
    assert rig.translate(0, WO)[3] == 3


def test_a_peer_s_hit_without_permission_blocks_in_silence() -> None:
    rig, slots = rig_with_pages(quirks=frozenset({"no-fault-on-hit"}))
    rig.store(slots[0], 0x100_0001)
    rig.translation.invalidate_iotlb(GLOBAL)
    assert rig.blocked(0, WO) == [5], "nothing is cached yet"
    rig.translate(0)
    assert rig.blocked(0, WO) == []


def test_an_overflow_empties_all() -> None:
    rig, slots = rig_with_pages(MAX_PAGES)
    assert len(rig.translation.lookup.iotlb) == MAX_PAGES
    rig.translate(3 << 12)
    assert len(rig.translation.lookup.iotlb) == MAX_PAGES
    rig.legacy(did=6, devfn=0x20)
    rig.store(TABLES + 0x1000 + 0x20 * 16, rig.load(CONTEXT))
    rig.space(devfn=0x20).region.translate(0, RO, 0)
    assert len(rig.translation.lookup.iotlb) == 1
    assert stale(rig, slots[:8]) == []


def test_frames_of_a_large_page_do_not_pile_up() -> None:
    rig = Rig()
    rig.tables_for(rig.legacy(), 4, 0, 0x4000_0083, level=3)
    rig.enable()
    for frame in range(MAX_FRAMES + 10):
        rig.translate(frame << 12)
    assert len(rig.space().front.readable) == 10


def test_a_full_walk_leaves_no_trace() -> None:
    rig, slots = rig_with_pages()
    rig.translation.invalidate_iotlb(GLOBAL)
    rig.translate(0, NONE)
    assert len(rig.translation.lookup.iotlb) == 0
    rig.store(slots[0], 0)
    assert rig.translate(0)[3] == 0


def test_turning_translation_off_and_on_forgets_all() -> None:
    rig, slots = rig_with_pages()
    rig.translation.set_enabled(False)
    assert rig.translate(0x1234) == (0x1000, 0x1000, 0xFFF, 3)
    rig.translation.set_enabled(True)
    assert stale(rig, slots) == []


# -- PASIDs


def first_level(pasids: tuple[int, ...] = (5, 6), did: int = 7) -> tuple[Rig, dict[int, int]]:
    """A page at 0 and one at 2 MiB for each PASID; where the entries of the pages at 0 are."""
    rig = Rig(scalable_mode=True, fsts=True, pasid_bits=20)
    slots = {}
    for pasid in pasids:
        table = rig.page()
        rig.scalable(pasid, 1 << 6 | 2 << 2 | 1, did, table)
        slots[pasid] = rig.tables_for(table, 4, 0, 0x10_0007 | pasid << 12, upper=7)
        rig.tables_for(table, 4, 0x20_0000, 0x40_0087, level=2, upper=7)
    rig.enable()
    for pasid, slot in slots.items():
        assert rig.translate(0, RW, pasid)[1] == 0x10_0000 | pasid << 12
        rig.translate(0x20_0000, RW, pasid)
        rig.store(slot, 0)
    return rig, slots


def left(rig: Rig, slots: dict[int, int]) -> list[int]:
    return [pasid for pasid in slots if rig.translate(0, RO, pasid)[3]]


def test_pasids_are_tags_of_first_level_translations() -> None:
    rig, slots = first_level()
    assert left(rig, slots) == [5, 6]
    rig.translation.invalidate_pasid_iotlb(8, 5)
    assert left(rig, slots) == [5, 6]
    rig.translation.invalidate_pasid_iotlb(7, 5)
    assert left(rig, slots) == [6]


@pytest.mark.parametrize(
    ("addr", "am", "expected"), [(0, 0, [6]), (0x1000, 0, [5, 6]), (0x3000, 2, [6]), (0x20_0000, 9, [5, 6])]
)
def test_pages_of_a_pasid(addr: int, am: int, expected: list[int]) -> None:
    rig, slots = first_level()
    rig.translation.invalidate_pasid_iotlb(7, 5, addr, am)
    assert left(rig, slots) == expected


def test_pages_of_a_domain_take_all_of_its_first_level_translations() -> None:
    rig, slots = first_level()
    rig.translation.invalidate_iotlb(SELECTIVE, 7, 0x8000_0000)
    assert left(rig, slots) == []


@pytest.mark.parametrize(
    ("granularity", "pasid", "moved"), [(GLOBAL, 0, [5, 6]), (DOMAIN, 0, [5, 6]), (SELECTIVE, 5, [5])]
)
def test_pasid_cache_invalidations(granularity: Granularity, pasid: int, moved: list[int]) -> None:
    rig, slots = first_level()
    other = rig.page()
    rig.tables_for(other, 4, 0, 0x2345_6007, upper=7)
    for each in slots:
        rig.scalable(each, 1 << 6 | 2 << 2 | 1, 9, other)
    rig.translation.invalidate_pasid_cache(granularity, 7, pasid)
    assert [each for each in slots if rig.translate(0, RO, each)[1] == 0x2345_6000] == moved


@pytest.mark.parametrize("by_source", [False, True])
@pytest.mark.parametrize("levels", [(1, 2, 3), (3, 2, 1), (2, 1, 3)])
def test_the_smallest_page_is_found(by_source: bool, levels: tuple[int, ...]) -> None:
    iotlb = Iotlb(by_source, lambda: None)
    pages = {level: Page(0, level, level << 30, 3, 0, True, 5, RID, False) for level in levels}
    for level in levels:
        iotlb.add(RID, pages[level])
    assert [iotlb.find(5, RID, addr) for addr in (0, 0x1000, 0x20_0000)] == [pages[1], pages[2], pages[3]]


def test_a_peer_has_a_page_of_a_source_once_whatever_its_domain() -> None:
    iotlb = Iotlb(True, lambda: None)
    for did in (5, 6):
        iotlb.add((0x18, RID), Page(0, 1, did << 12, 3, 0, True, did, RID, False))
    assert len(iotlb) == 1
    found = iotlb.find(5, (0x18, RID), 0)
    assert found is not None and found.did == 6


def test_a_peer_s_iotlb_is_looked_at_before_the_context_entry() -> None:
    rig, slots = rig_with_pages(quirks=frozenset({"iotlb-by-source", "no-fault-on-hit"}))
    rig.store(slots[0], 0x100_0001)
    rig.translation.invalidate_iotlb(GLOBAL)
    rig.translate(0)
    rig.translation.invalidate_contexts(GLOBAL)
    assert rig.blocked(0, WO) == []
    rig.store(CONTEXT, 0)
    assert rig.translate(0)[3] == 1
    assert rig.blocked(0x9000) == [2], "the hit cached no context entry"


def test_a_peer_s_iotlb_is_looked_at_before_the_pasid_entry_of_requests_without_pasid() -> None:
    rig = Rig(scalable_mode=True, quirks=frozenset({"iotlb-by-source"}))
    table = rig.page()
    rig.scalable(0, table | 2 << 6 | 2 << 2 | 1, 7)
    slot = rig.tables_for(table, 4, 0, 0x2345_6003)
    rig.enable()
    rig.translate(0)
    rig.store(slot, 0)
    assert rig.translate(0)[3]
    rig.store(TABLES + 0x2000, 0)
    rig.translation.invalidate_contexts(GLOBAL)
    assert rig.translate(0)[3]
    assert rig.blocked(0x9000) == [0x51]


STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 2), st.integers(0, 3), st.integers(0, 2), st.integers(0, 40)),
    st.tuples(st.just("drop"), st.integers(1, 2), st.integers(0, 3), st.integers(0, 2), st.integers(0, 40)),
)


@given(st.lists(STEPS, max_size=60), st.booleans())
def test_few_pages_are_dropped_as_if_all_were_looked_at(
    steps: list[tuple[str, int, int, int, int]], by_source: bool
) -> None:
    """Who 0 has no PASID; addresses are by pages, of which 512 are a page of level 2."""
    ranged, scanned = Iotlb(by_source, lambda: None), Iotlb(by_source, lambda: None)
    front, all_of_front = Front(), Front()
    for number, (kind, did, who, size, place) in enumerate(steps):
        first = place * 300 << 12
        if kind == "add":
            level = 1 + size // 2
            iova = first & ~((1 << 3 + 9 * level) - 1)
            page = Page(iova, level, number << 30, 3, 0, True, did, who, who > 0)
            for iotlb in (ranged, scanned):
                iotlb.add(who, page)
            for each in (front, all_of_front):
                each.add(first >> 12, IOMMUTLBEntry(None, first, number, 0xFFF, RW), page)
            continue
        last = first + (0x1000 << 4 * size) - 1
        tagged_too = who == 0

        def doomed(page: Page, who: int = who, first: int = first, last: int = last) -> bool:
            return page.tagged or page.meets(first, last) if who == 0 else page.pasid == who and page.meets(first, last)

        ranged.drop_range(did, first, last, doomed, tagged_too=tagged_too)
        scanned.drop(did, doomed)
        front.drop_range(did, first, last, doomed, tagged_too=tagged_too)
        all_of_front.drop(did, doomed)
        assert len(ranged) == len(scanned)
        assert front.readable == all_of_front.readable
    for did in (1, 2):
        for who in range(4):
            for place in range(42 * 300):
                if place % 50 == 0:
                    assert ranged.find(did, who, place << 12) == scanned.find(did, who, place << 12)
