"""IOMMU notifiers: registration, cropping, runs, replay, flush."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.fakes import PAGE, DictIOMMU, system_memory
from vfio_model.memory.iommu_region import IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBEvent, IOMMUTLBRun, iommu_behind
from vfio_model.memory.region import AliasRegion, MemoryRegion
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.ranges import U64_MAX

NONE, RO, RW = IOMMUAccessFlags.NONE, IOMMUAccessFlags.RO, IOMMUAccessFlags.RW
MAP, UNMAP, DEVIOTLB = IOMMUNotifierFlag.MAP, IOMMUNotifierFlag.UNMAP, IOMMUNotifierFlag.DEVIOTLB_UNMAP
BOTH = IOMMUNotifierFlag.IOTLB_EVENTS


class Follower:
    """Shadows what it hears in a dict of pages, and keeps what it heard."""

    def __init__(self, *, runs: bool = False) -> None:
        self.entries: list[IOMMUTLBEntry] = []
        self.runs: list[IOMMUTLBRun] = []
        self.takes_runs = runs
        self.flushes = 0
        self.error: OSError | None = None

    def notifier(
        self, flags: IOMMUNotifierFlag = BOTH, start: int = 0, last: int = (1 << 32) - 1, idx: int = 0
    ) -> IOMMUNotifier:
        fn_run = (lambda _, run: self.runs.append(run)) if self.takes_runs else None
        return IOMMUNotifier(
            lambda _, entry: self.entries.append(entry), flags, start, last, idx, fn_run=fn_run, flush=self.flush
        )

    def flush(self) -> OSError | None:
        self.flushes += 1
        return self.error


@pytest.fixture
def iommu() -> DictIOMMU:
    return DictIOMMU(system_memory(1 << 16)[0])


def map_event(iova: int, address: int, mask: int = 0xFFF, perm: IOMMUAccessFlags = RW) -> IOMMUTLBEvent:
    return IOMMUTLBEvent(MAP, IOMMUTLBEntry(None, iova, address, mask, perm))


def unmap_event(iova: int, mask: int = 0xFFF, kind: IOMMUNotifierFlag = UNMAP) -> IOMMUTLBEvent:
    return IOMMUTLBEvent(kind, IOMMUTLBEntry(None, iova, 0, mask, NONE))


# -- registration


def test_flags_are_the_or_of_all_and_told_only_when_they_change(iommu: DictIOMMU) -> None:
    first, second, third = Follower().notifier(UNMAP), Follower().notifier(BOTH), Follower().notifier(MAP)
    for notifier in (first, second, third):
        iommu.register_notifier(notifier)
    assert iommu.flag_changes == [(IOMMUNotifierFlag.NONE, UNMAP), (UNMAP, BOTH)]
    iommu.unregister_notifier(second)
    iommu.unregister_notifier(third)
    iommu.unregister_notifier(first)
    assert iommu.flag_changes[2:] == [(BOTH, UNMAP), (UNMAP, IOMMUNotifierFlag.NONE)]


def test_a_refused_notifier_is_not_there(iommu: DictIOMMU) -> None:
    iommu.register_notifier(Follower().notifier(UNMAP))
    iommu.refused, iommu.refusal = DEVIOTLB, OSError(errno.ENOTSUP, "no ATS")
    follower = Follower()
    with pytest.raises(OSError, match="no ATS"):
        iommu.register_notifier(follower.notifier(DEVIOTLB))
    assert len(iommu.notifiers) == 1 and iommu.notify_flags is UNMAP
    iommu.notify(unmap_event(0, kind=DEVIOTLB))
    assert follower.entries == []


def test_errors_on_the_way_out_are_ignored(iommu: DictIOMMU) -> None:
    stays, goes = Follower().notifier(UNMAP), Follower().notifier(MAP)
    iommu.register_notifier(stays)
    iommu.register_notifier(goes)
    iommu.refused, iommu.refusal = UNMAP, OSError(errno.EINVAL, "no")
    iommu.unregister_notifier(goes)
    assert iommu.notifiers == [stays] and iommu.notify_flags == UNMAP


def test_a_notifier_must_want_something_of_a_range_and_index_that_exist(iommu: DictIOMMU) -> None:
    for bad in (
        Follower().notifier(IOMMUNotifierFlag.NONE),
        Follower().notifier(start=2, last=1),
        Follower().notifier(idx=1),
    ):
        with pytest.raises(AssertionError):
            iommu.register_notifier(bad)


def test_an_alias_forwards_to_its_target(iommu: DictIOMMU) -> None:
    alias = AliasRegion("outer", AliasRegion("inner", iommu, 0, 1 << 20), 0, 1 << 20)
    notifier = Follower().notifier()
    iommu_behind(alias).register_notifier(notifier)
    assert iommu.notifiers == [notifier]
    iommu_behind(alias).unregister_notifier(notifier)
    assert iommu.notifiers == []


def test_other_regions_have_no_notifiers() -> None:
    with pytest.raises(AssertionError):
        iommu_behind(MemoryRegion("plain", 16))


# -- delivery


def test_an_entry_is_cropped_to_the_range(iommu: DictIOMMU) -> None:
    follower = Follower()
    iommu.register_notifier(follower.notifier(start=0x1800, last=0x2FFF))
    iommu.notify(unmap_event(0, 0xFFFF))
    iommu.notify(map_event(0x1000, 0x9000))
    iommu.notify(unmap_event(0x3000))
    iommu.notify(unmap_event(0))
    assert [(e.iova, e.addr_mask, e.translated_addr) for e in follower.entries] == [
        (0x1800, 0x17FF, 0),  # not a power of two minus one
        (0x1800, 0x7FF, 0x9800),
    ]


def test_kinds_and_indexes_are_told_apart(iommu: DictIOMMU) -> None:
    iommu.num_indexes = lambda: 2  # type: ignore[method-assign]
    unmaps, devices, other = Follower(), Follower(), Follower()
    iommu.register_notifier(unmaps.notifier(UNMAP))
    iommu.register_notifier(devices.notifier(DEVIOTLB))
    iommu.register_notifier(other.notifier(IOMMUNotifierFlag.ALL, idx=1))
    iommu.notify(unmap_event(0))
    iommu.notify(unmap_event(PAGE, kind=DEVIOTLB))
    iommu.notify(map_event(0, 0), idx=1)
    assert [len(f.entries) for f in (unmaps, devices, other)] == [1, 1, 1]
    assert unmaps.entries[0].iova == 0 and devices.entries[0].iova == PAGE


def test_an_unmap_with_a_permission_is_a_bug(iommu: DictIOMMU) -> None:
    iommu.register_notifier(Follower().notifier())
    with pytest.raises(AssertionError, match="perm NONE"):
        iommu.notify(IOMMUTLBEvent(UNMAP, IOMMUTLBEntry(None, 0, 0, 0xFFF, RO)))
    with pytest.raises(AssertionError, match="perm NONE"):
        iommu.notify_run(IOMMUTLBRun(UNMAP, None, 0, 12, 4, perms=RO))


def test_unmap_range_is_one_event_up_to_the_whole_space() -> None:
    whole = DictIOMMU(system_memory(4096)[0], 1 << 64)
    follower = Follower()
    notifier = follower.notifier(UNMAP, 0, U64_MAX)
    whole.register_notifier(notifier)
    whole.unmap_range(notifier)
    (only,) = follower.entries
    assert (only.iova, only.addr_mask, only.perm) == (0, U64_MAX, NONE)
    cache = Follower()
    device = cache.notifier(DEVIOTLB, 0, U64_MAX)
    whole.register_notifier(device)
    whole.unmap_range(device)
    assert len(cache.entries) == 1


# -- runs


def run(iova: int, pages: list[int], perms: list[int] | IOMMUAccessFlags, shift: int = 12) -> IOMMUTLBRun:
    return IOMMUTLBRun(MAP, None, iova, shift, len(pages), np.array(pages, dtype=np.uint64), perms)


def test_a_run_reaches_those_who_take_runs_at_once_and_others_page_by_page(iommu: DictIOMMU) -> None:
    at_once, singly = Follower(runs=True), Follower()
    iommu.register_notifier(at_once.notifier())
    iommu.register_notifier(singly.notifier())
    iommu.notify_run(run(0x4000, [0x1000, 0x2000], RW))
    assert len(at_once.runs) == 1 and at_once.entries == []
    heard = [(e.iova, e.translated_addr, e.perm) for e in singly.entries]
    assert heard == [(0x4000, 0x1000, RW), (0x5000, 0x2000, RW)]


def test_a_run_is_cropped_with_its_arrays(iommu: DictIOMMU) -> None:
    follower = Follower(runs=True)
    iommu.register_notifier(follower.notifier(start=0x5000, last=0x6FFF))
    iommu.notify_run(run(0x4000, [0x1000, 0x2000, 0x3000, 0x4000], [3, 1, 3, 2]))
    (only,) = follower.runs
    assert (only.iova, only.count, list(only.translated), list(only.perms)) == (0x5000, 2, [0x2000, 0x3000], [1, 3])
    iommu.notify_run(run(0x8000, [0x1000], RW))
    assert len(follower.runs) == 1


def test_a_range_that_cuts_pages_gets_entries_instead(iommu: DictIOMMU) -> None:
    follower = Follower(runs=True)
    iommu.register_notifier(follower.notifier(start=0x4800, last=0x5FFF))
    iommu.notify_run(run(0x4000, [0x1000, 0x2000], RW))
    assert follower.runs == []
    assert [(e.iova, e.addr_mask, e.translated_addr) for e in follower.entries] == [
        (0x4800, 0x7FF, 0x1800),
        (0x5000, 0xFFF, 0x2000),
    ]


def test_holes_in_a_map_run_are_unmaps(iommu: DictIOMMU) -> None:
    caches, shadows = Follower(runs=True), Follower(runs=True)
    iommu.register_notifier(caches.notifier(UNMAP))
    iommu.register_notifier(shadows.notifier(BOTH))
    iommu.notify_run(run(0, [0x1000, 0, 0x3000], [3, 0, 3]))
    assert [(e.iova, e.perm) for e in caches.entries] == [(0x1000, NONE)]
    assert len(shadows.runs) == 1
    maps = Follower(runs=True)
    iommu.register_notifier(maps.notifier(MAP))
    iommu.notify_run(run(0, [0x1000, 0, 0x3000], [3, 0, 3]))
    assert maps.runs == [] and [e.iova for e in maps.entries] == [0, 0x2000]
    iommu.notify_run(IOMMUTLBRun(UNMAP, None, 0, 12, 512))
    assert len(caches.runs) == 1 and len(shadows.runs) == 3


@given(
    st.integers(0, 6),
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6),
    st.one_of(st.integers(0, 12).map(lambda n: n * PAGE), st.integers(0, 12 * PAGE)),
    st.one_of(st.integers(1, 12).map(lambda n: n * PAGE), st.integers(1, 6 * PAGE)),
    st.booleans(),
    st.sampled_from([UNMAP, MAP, BOTH]),
)
def test_a_run_means_what_its_events_mean(
    first: int, pages: list[tuple[int, int]], start: int, length: int, takes_runs: bool, flags: IOMMUNotifierFlag
) -> None:
    whole = run(first * PAGE, [p * PAGE for p, _ in pages], [perm for _, perm in pages])
    expected, got = Follower(), Follower(runs=takes_runs)
    one = DictIOMMU(system_memory(4096)[0])
    one.register_notifier(expected.notifier(flags, start, start + length - 1))
    other = DictIOMMU(system_memory(4096)[0])
    other.register_notifier(got.notifier(flags, start, start + length - 1))
    for event in whole.events():
        one.notify(event)
    other.notify_run(whole)
    heard = got.entries + [event.entry for part in got.runs for event in part.events()]
    assert heard == expected.entries


# -- replay


def test_replay_tells_every_translation_in_range_page_by_page(iommu: DictIOMMU) -> None:
    iommu.pages = {0: (0x9000, 3), 2: (0x5000, 1), 5: (0x6000, 3)}
    follower = Follower()
    notifier = follower.notifier(start=0x1000, last=0x5FFF)
    iommu.register_notifier(notifier)
    iommu.replay(notifier)
    heard = [(e.iova, e.translated_addr, e.perm) for e in follower.entries]
    assert heard == [(0x2000, 0x5000, RO), (0x5000, 0x6000, RW)]
    assert iommu.translations == [0x1000, 0x2000, 0x3000, 0x4000, 0x5000]


def test_replay_ends_at_the_top_of_the_space() -> None:
    whole = DictIOMMU(system_memory(4096)[0], 1 << 64)
    whole.pages = {U64_MAX // PAGE: (0x1000, 3)}
    follower = Follower()
    notifier = follower.notifier(start=U64_MAX - 2 * PAGE + 1, last=U64_MAX)
    whole.register_notifier(notifier)
    whole.replay(notifier)
    assert [e.iova for e in follower.entries] == [U64_MAX - PAGE + 1]


# -- flush


def test_flush_asks_every_notifier_once_and_returns_the_first_error(iommu: DictIOMMU) -> None:
    followers = [Follower() for _ in range(3)]
    followers[1].error, followers[2].error = OSError(errno.ENOMEM, "first"), OSError(errno.EBUSY, "second")
    for follower in followers:
        iommu.register_notifier(follower.notifier())
    assert iommu.flush() is followers[1].error
    assert [f.flushes for f in followers] == [1, 1, 1]
    followers[1].error = followers[2].error = None
    assert iommu.flush() is None


def test_attributes_and_indexes_by_default(iommu: DictIOMMU) -> None:
    with pytest.raises(OSError) as caught:
        iommu.get_attr("spapr_tce_fd")
    assert caught.value.errno == errno.EINVAL
    assert iommu.num_indexes() == 1
