"""Caching mode: what followers of a space hear."""

from __future__ import annotations

import errno

import pytest

from tests.iommu.vtd.rig import TABLES, Rig
from vfio_model.iommu.vtd.ports import Granularity
from vfio_model.iommu.vtd.spaces import VtdRegion
from vfio_model.memory.iommu_region import IOMMUNotifier
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX

GLOBAL, DOMAIN, SELECTIVE = Granularity.GLOBAL, Granularity.DOMAIN, Granularity.SELECTIVE
CONTEXT = TABLES + 0x1180
UNMAP, MAP, DEVIOTLB = IOMMUNotifierFlag.UNMAP, IOMMUNotifierFlag.MAP, IOMMUNotifierFlag.DEVIOTLB_UNMAP
Heard = tuple[int, int, int, int]


class Follower:
    """Hears events, and keeps the map that they make."""

    def __init__(self, region: VtdRegion, flags: IOMMUNotifierFlag = UNMAP | MAP, *, last: int = U64_MAX) -> None:
        self.heard: list[Heard] = []
        self.map: dict[int, Heard] = {}
        self.exact = bool(flags & MAP)
        self.notifier = IOMMUNotifier(self._hear, flags, 0, last)
        region.register_notifier(self.notifier)

    def _hear(self, _: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        event = (entry.iova, entry.addr_mask, entry.translated_addr, int(entry.perm))
        self.heard.append(event)
        if not self.exact or entry.target_as is None:
            return
        if entry.perm:
            assert not any(at <= entry.last and entry.iova <= at + had[1] for at, had in self.map.items()), "free"
            self.map[entry.iova] = event
        else:
            assert self.map.pop(entry.iova)[1:3] == event[1:3], "an UNMAP carries what is unmapped"

    def take(self) -> list[Heard]:
        heard, self.heard = self.heard, []
        return heard


def followed(flags: IOMMUNotifierFlag = UNMAP | MAP, **options: object) -> tuple[Rig, int, Follower]:
    """Pages 0 and 1 mapped and told; the page table's address."""
    rig = Rig(**{"caching_mode": True} | options)
    table = rig.legacy()
    for page in (0, 1):
        rig.tables_for(table, 4, page << 12, 0x10_0003 | page << 12)
    rig.enable()
    follower = Follower(rig.space().region, flags)
    rig.space().region.replay(follower.notifier)
    follower.take()
    return rig, table, follower


def test_replay_tells_all_that_is_mapped_after_an_unmap_of_the_range() -> None:
    rig, table, follower = followed()
    rig.tables_for(table, 4, 0x40_0000, 0x60_0081, level=2)
    rig.tables_for(table, 4, 0x8000_0000, 0x4000_0083, level=3)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    rig.tables_for(table, 4, 0x1000, 0)
    later = Follower(rig.space().region)
    rig.space().region.replay(later.notifier)
    assert later.take() == [
        (0, U64_MAX, 0, 0),
        (0, 0xFFF, 0x10_0000, 3),
        (0x1000, 0xFFF, 0x10_1000, 3),
        (0x40_0000, 0x1F_FFFF, 0x60_0000, 1),
        (0x8000_0000, 0x3FFF_FFFF, 0x4000_0000, 3),
    ]
    assert follower.map == later.map


def test_a_new_page_is_mapped_when_it_is_invalidated() -> None:
    rig, table, follower = followed()
    rig.tables_for(table, 4, 0x2000, 0x2345_6001)
    rig.translation.invalidate_iotlb(SELECTIVE, 6, 0x2000)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x3000)
    assert follower.take() == []
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x2000)
    assert follower.take() == [(0x2000, 0xFFF, 0x2345_6000, 1)]


def test_an_identical_page_is_not_told_again() -> None:
    rig, _, follower = followed()
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0, 2)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    rig.translation.invalidate_iotlb(GLOBAL)
    rig.translation.invalidate_contexts(GLOBAL)
    assert follower.take() == []


def test_a_changed_page_is_unmapped_with_its_old_translation_and_mapped() -> None:
    rig, table, follower = followed()
    rig.tables_for(table, 4, 0x1000, 0x2345_6003)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x1000)
    assert follower.take() == [(0x1000, 0xFFF, 0x10_1000, 0), (0x1000, 0xFFF, 0x2345_6000, 3)]
    rig.tables_for(table, 4, 0x1000, 0x2345_6001)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert follower.take() == [(0x1000, 0xFFF, 0x2345_6000, 0), (0x1000, 0xFFF, 0x2345_6000, 1)]
    rig.tables_for(table, 4, 0x1000, 0)
    rig.translation.invalidate_iotlb(GLOBAL)
    assert follower.take() == [(0x1000, 0xFFF, 0x2345_6000, 0)]


def test_a_large_page_that_is_split_or_joined_is_changed_as_a_whole() -> None:
    rig, table, follower = followed()
    slot = rig.tables_for(table, 4, 0x40_0000, 0x60_0083, level=2)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x40_0000, 9)
    follower.take()
    rig.store(slot, 0)
    rig.tables_for(table, 4, 0x40_3000, 0x10_3003)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x40_3000)
    assert follower.take() == [(0x40_0000, 0x1F_FFFF, 0x60_0000, 0), (0x40_3000, 0xFFF, 0x10_3000, 3)]
    rig.store(slot, 0x60_0083)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x41_0000)
    assert follower.take() == [(0x40_3000, 0xFFF, 0x10_3000, 0), (0x40_0000, 0x1F_FFFF, 0x60_0000, 3)]


def test_what_cannot_be_translated_is_not_mapped() -> None:
    rig, table, follower = followed()
    for page, leaf in ((2, 0x10_0003 | 1 << 51), (3, 0xFEE0_0003), (4, 0x10_0000)):
        rig.tables_for(table, 4, page << 12, leaf)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert follower.take() == []


def test_moving_to_another_domain_tells_the_difference() -> None:
    rig, _, follower = followed()
    other = rig.page()
    rig.tables_for(other, 4, 0, 0x10_0003)
    rig.tables_for(other, 4, 0x5000, 0x10_5003)
    rig.store(CONTEXT, other | 1)
    rig.store(CONTEXT + 8, 6 << 8 | 2)
    rig.translation.invalidate_contexts(SELECTIVE, 5, 0x18, 0)
    assert follower.take() == [(0x1000, 0xFFF, 0x10_1000, 0), (0x5000, 0xFFF, 0x10_5000, 3)]
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert follower.take() == []


def test_a_context_entry_that_goes_takes_all_mappings() -> None:
    rig, _, follower = followed()
    rig.store(CONTEXT, 0)
    rig.translation.invalidate_contexts(GLOBAL)
    assert sorted(follower.take()) == [(0, 0xFFF, 0x10_0000, 0), (0x1000, 0xFFF, 0x10_1000, 0)]
    assert rig.faults.take() == []


def test_who_wants_unmaps_only_hears_ranges() -> None:
    rig, table, follower = followed(UNMAP)
    rig.tables_for(table, 4, 0x2000, 0x2345_6001)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x3000, 2)
    assert follower.take() == [(0, 0x3FFF, 0, 0)]
    rig.translation.invalidate_iotlb(SELECTIVE, 6, 0x3000, 2)
    assert follower.take() == []
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert follower.take() == [(0, U64_MAX, 0, 0)]


def test_both_kinds_of_followers_on_one_space() -> None:
    rig, table, exact = followed()
    ranges = Follower(rig.space().region, UNMAP)
    rig.tables_for(table, 4, 0x2000, 0x2345_6001)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0x2000)
    assert exact.take() == [(0x2000, 0xFFF, 0x2345_6000, 1)]
    assert ranges.take() == [(0x2000, 0xFFF, 0, 0)]


def test_neighbours_come_in_one_run() -> None:
    rig, table, _ = followed()
    runs = []
    notifier = IOMMUNotifier(lambda *_: None, UNMAP | MAP, 0, U64_MAX, fn_run=lambda _, run: runs.append(run))
    rig.space().region.register_notifier(notifier)
    for page in range(16, 24):
        rig.tables_for(table, 4, page << 12, 0x10_0003 | page << 13)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert [(run.iova, run.page_shift, run.count, list(run.translated), run.perms) for run in runs] == [
        (0x1_0000, 12, 8, [0x10_0000 | page << 13 for page in range(16, 24)], 3)
    ]


def test_a_range_that_a_follower_covers_in_part() -> None:
    rig, table, _ = followed()
    part = Follower(rig.space().region, last=0xFFF)
    rig.space().region.replay(part.notifier)
    assert part.take() == [(0, 0xFFF, 0, 0), (0, 0xFFF, 0x10_0000, 3)]
    rig.tables_for(table, 4, 0x1000, 0)
    rig.translation.invalidate_iotlb(DOMAIN, 5)
    assert part.take() == []


def test_a_replay_while_translation_is_off_maps_nothing() -> None:
    rig, _, _ = followed()
    rig.translation.set_enabled(False)
    later = Follower(rig.space().region)
    rig.space().region.replay(later.notifier)
    assert later.take() == [(0, U64_MAX, 0, 0)]


def test_turning_translation_off_takes_all_and_on_brings_it_back() -> None:
    rig, _, follower = followed()
    had = dict(follower.map)
    rig.translation.set_enabled(False)
    assert follower.map == {}
    rig.translation.set_enabled(True)
    assert follower.map == had
    rig.translation.reset()
    assert follower.map == {}


@pytest.mark.parametrize(
    ("options", "flags", "word"),
    [
        ({}, MAP | UNMAP, "caching mode"),
        ({"caching_mode": True, "snoop_control": True}, MAP | UNMAP, "Snoop Control"),
        ({"snoop_control": True}, UNMAP, "Snoop Control"),
        ({"caching_mode": True}, DEVIOTLB, "device IOTLB"),
    ],
)
def test_followers_that_are_refused(options: dict[str, bool], flags: IOMMUNotifierFlag, word: str) -> None:
    rig = Rig(**options)
    with pytest.raises(OSError, match=word) as refused:
        Follower(rig.space().region, flags)
    assert refused.value.errno == errno.ENOTSUP
    assert rig.space().region.notifiers == []


def test_the_last_follower_leaves_nothing_behind() -> None:
    rig, table, follower = followed()
    rig.space().region.unregister_notifier(follower.notifier)
    rig.tables_for(table, 4, 0, 0)
    later = Follower(rig.space().region)
    rig.space().region.replay(later.notifier)
    assert later.take() == [(0, U64_MAX, 0, 0), (0x1000, 0xFFF, 0x10_1000, 3)]


def test_followers_complete_at_the_flush() -> None:
    rig, table, _ = followed()
    flushed: list[int] = []
    notifier = IOMMUNotifier(lambda *_: None, UNMAP | MAP, 0, U64_MAX, flush=lambda: flushed.append(1))
    rig.space().region.register_notifier(notifier)
    rig.tables_for(table, 4, 0, 0)
    rig.translation.invalidate_iotlb(SELECTIVE, 5, 0)
    assert flushed == []
    assert rig.translation.flush() is None
    assert rig.translation.flush() is None
    assert flushed == [1]
