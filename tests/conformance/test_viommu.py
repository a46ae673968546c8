"""What every guest IOMMU does for the devices behind it, and for who follows it."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping

import numpy as np
import pytest

from tests.conformance.viommus import (
    FIRST,
    FIRST_STAGE,
    GUEST_IOMMUS,
    IOVA_PAGES,
    PAGE,
    POOL,
    POOL_PAGES,
    RO,
    RW,
    WO,
    GuestIommu,
    Shadow,
)
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.types import DMADirection, IOMMUAccessFlags, IOMMUNotifierFlag, MemTxResult

IOVA, GPA, OTHER = FIRST + 3 * PAGE, POOL + 7 * PAGE, POOL + 9 * PAGE
DATA = bytes(range(64))

pytestmark = pytest.mark.machine


@pytest.fixture(params=GUEST_IOMMUS)
def one(request: pytest.FixtureRequest) -> GuestIommu:
    """A guest with a device behind its IOMMU."""
    return GUEST_IOMMUS[str(request.param)]()


@pytest.fixture(params=[name for name in GUEST_IOMMUS if name not in FIRST_STAGE])
def shadowed(request: pytest.FixtureRequest) -> GuestIommu:
    """One whose mappings can be shadowed: its guest tells of each."""
    return GUEST_IOMMUS[str(request.param)]()


@pytest.fixture(params=[name for name in GUEST_IOMMUS if name not in {*FIRST_STAGE, "spapr"}])
def shadowed_vtd(request: pytest.FixtureRequest) -> GuestIommu:
    """Both of the others."""
    return GUEST_IOMMUS[str(request.param)]()


@pytest.fixture(params=[name for name in GUEST_IOMMUS if name != "spapr"])
def vtd(request: pytest.FixtureRequest) -> GuestIommu:
    """One that records faults, and that a device can be let past."""
    return GUEST_IOMMUS[str(request.param)]()


def memory(one: GuestIommu, gpa: int, size: int = 64) -> bytes:
    found = bytearray(size)
    assert one.system.read(gpa, found) is MemTxResult.OK
    return bytes(found)


def reads(one: GuestIommu, iova: int, size: int = 64) -> bytes | None:
    """What the device reads; None for a failure."""
    found = bytearray(size)
    return None if one.space.read(iova, found) else bytes(found)


# -- map, unmap, permission ------------------------------------------------------------------------------------------


def test_a_mapped_page_is_read_and_written(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    assert one.space.write(IOVA + 8, DATA) is MemTxResult.OK
    assert memory(one, GPA + 8) == reads(one, IOVA + 8) == DATA
    assert memory(one, GPA + 72) == bytes(64)


def test_its_neighbours_are_not_there(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    for iova in (IOVA - PAGE, IOVA + PAGE):
        assert one.space.write(iova, DATA) is not MemTxResult.OK
        assert reads(one, iova) is None


def test_what_may_be_read_may_not_be_written(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RO)
    assert reads(one, IOVA) is not None
    assert one.space.write(IOVA, DATA) is not MemTxResult.OK
    assert memory(one, GPA) == bytes(64)


def test_what_may_be_written_may_not_be_read(shadowed: GuestIommu) -> None:
    shadowed.map(IOVA, GPA, WO)
    assert shadowed.space.write(IOVA, DATA) is MemTxResult.OK
    assert reads(shadowed, IOVA) is None
    assert memory(shadowed, GPA) == DATA


def test_a_failed_read_delivers_zeroes_behind_what_was_there(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    one.system.write(GPA + PAGE - 16, b"x" * 16)
    found = bytearray(b"?" * 64)
    assert one.space.read(IOVA + PAGE - 16, found) is not MemTxResult.OK
    assert found == b"x" * 16 + bytes(48)


def test_a_failed_write_leaves_what_came_before(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    assert one.space.write(IOVA + PAGE - 16, DATA) is not MemTxResult.OK
    assert memory(one, GPA + PAGE - 16, 16) == DATA[:16]
    assert memory(one, GPA + PAGE) == bytes(64)


def test_an_access_over_pages_that_lie_apart(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    one.map(IOVA + PAGE, OTHER, RW)
    assert one.space.write(IOVA + PAGE - 32, DATA) is MemTxResult.OK
    assert (memory(one, GPA + PAGE - 32, 32), memory(one, OTHER, 32)) == (DATA[:32], DATA[32:])


def test_an_unmapped_page_is_gone_when_the_guest_goes_on(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    assert reads(one, IOVA) is not None
    one.unmap(IOVA)
    assert one.space.write(IOVA, DATA) is not MemTxResult.OK
    assert reads(one, IOVA) is None
    assert memory(one, GPA) == bytes(64)


def test_a_page_that_is_mapped_elsewhere_is_there_when_the_guest_goes_on(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    one.space.write(IOVA, DATA)
    one.map(IOVA, OTHER, RW)
    one.space.write(IOVA, DATA[::-1])
    assert (memory(one, GPA), memory(one, OTHER)) == (DATA, DATA[::-1])


def test_a_narrower_permission_holds_when_the_guest_goes_on(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    one.space.write(IOVA, DATA)
    one.map(IOVA, GPA, RO)
    assert reads(one, IOVA) == DATA
    assert one.space.write(IOVA, bytes(64)) is not MemTxResult.OK
    assert memory(one, GPA) == DATA


def test_a_wider_permission_holds_when_the_guest_goes_on(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RO)
    assert one.space.write(IOVA, DATA) is not MemTxResult.OK
    one.map(IOVA, GPA, RW)
    assert one.space.write(IOVA, DATA) is MemTxResult.OK


# -- faults ----------------------------------------------------------------------------------------------------------


def test_failures_are_recorded_and_nothing_else(vtd: GuestIommu) -> None:
    vtd.map(IOVA, GPA, RO)
    assert vtd.space.write(IOVA, DATA) is not MemTxResult.OK
    assert vtd.faults() == 1
    assert reads(vtd, IOVA) is not None
    assert vtd.faults() == 0
    assert reads(vtd, IOVA + PAGE) is None
    assert vtd.faults() == 1


def test_looking_records_no_fault(shadowed: GuestIommu) -> None:
    """A full walk, many translations at once, and a replay are no requests of the device."""
    shadow = Shadow(shadowed)
    shadowed.map(IOVA, GPA, RO)
    shadowed.faults()
    region = shadowed.region
    assert region.translate(IOVA + PAGE, IOMMUAccessFlags.NONE, 0).perm == 0
    region.translate_many(np.array([IOVA, IOVA + PAGE], dtype=np.uint64), IOMMUAccessFlags.WO, 0)
    for notifier in region.notifiers:
        region.replay(notifier)
    assert shadow.pages == {IOVA: (GPA, RO)}
    assert not shadowed.faults()


# -- many at once ----------------------------------------------------------------------------------------------------


def test_many_translations_at_once_are_those_of_each(one: GuestIommu) -> None:
    rng = random.Random(3)
    for page in range(0, IOVA_PAGES, 2):
        one.map(FIRST + page * PAGE, POOL + rng.randrange(POOL_PAGES) * PAGE, rng.choice((RO, RW)))
    iovas = [FIRST + rng.randrange(IOVA_PAGES * PAGE) for _ in range(300)]
    for flag in (IOMMUAccessFlags.RO, IOMMUAccessFlags.WO):
        for iova in iovas:  # tables that remember accesses do now
            one.region.translate(iova, flag, 0)
        together = one.region.translate_many(np.array(iovas, dtype=np.uint64), flag, 0)
        assert together is not None, "tables are walked many at a time"
        _, addresses, perms = together
        each = np.broadcast_to(perms, len(iovas))
        for iova, address, perm in zip(iovas, addresses.tolist(), each.tolist(), strict=True):
            entry = one.region.translate(iova, IOMMUAccessFlags.NONE, 0)
            assert bool(perm & flag) == bool(entry.perm & flag)
            if perm & flag:
                assert address == entry.translated_addr & ~entry.addr_mask | iova & entry.addr_mask


def test_pieces_stop_at_the_first_that_fails(one: GuestIommu) -> None:
    for page in (0, 1, 3):
        one.map(FIRST + page * PAGE, POOL + page * PAGE, RW)
        one.system.write(POOL + page * PAGE, bytes([page + 1]) * 64)
    iovas, found = [FIRST + page * PAGE for page in range(4)], bytearray(b"?" * 256)
    assert one.space.read_many(iovas, 64, found) is not MemTxResult.OK
    assert found == b"\1" * 64 + b"\2" * 64 + bytes(128)


# -- who follows -----------------------------------------------------------------------------------------------------


def test_a_shadow_is_exact_after_anything(shadowed: GuestIommu) -> None:
    shadow, rng = Shadow(shadowed), random.Random(5)
    model: dict[int, tuple[int, int]] = {}
    for _ in range(300):
        iova = FIRST + rng.randrange(IOVA_PAGES) * PAGE
        if rng.random() < 0.6:
            gpa, perm = POOL + rng.randrange(POOL_PAGES) * PAGE, rng.choice((RO, WO, RW))
            shadowed.map(iova, gpa, perm)
            model[iova] = gpa, perm
        else:
            shadowed.unmap(iova)
            model.pop(iova, None)
        assert shadow.pages == model
        assert not shadow.unflushed, "the guest goes on when everything was flushed"


def test_who_comes_late_is_replayed_to(shadowed: GuestIommu) -> None:
    first = Shadow(shadowed)
    for page in (1, 2, 7, 40):
        shadowed.map(FIRST + page * PAGE, POOL + page * PAGE, RW)
    late = Shadow(shadowed)
    assert late.pages == first.pages == {FIRST + page * PAGE: (POOL + page * PAGE, RW) for page in (1, 2, 7, 40)}
    shadowed.unmap(FIRST + PAGE)
    assert late.pages == first.pages and len(late.pages) == 3


def test_who_went_hears_nothing(one: GuestIommu) -> None:
    shadow = Shadow(one)
    one.map(IOVA, GPA, RW)
    shadow.close()
    heard = list(shadow.heard)
    one.unmap(IOVA)
    assert shadow.heard == heard


def test_who_only_caches_hears_of_what_goes(one: GuestIommu) -> None:
    cache = Shadow(one, flags=IOMMUNotifierFlag.UNMAP)
    one.map(IOVA, GPA, RW)
    cache.heard.clear()
    one.unmap(IOVA)
    assert ("unmap", IOVA) in cache.heard or any(kind == "unmap" and iova <= IOVA for kind, iova in cache.heard)
    assert not any(kind == "map" for kind, _ in cache.heard)


def test_all_are_flushed_although_one_fails(shadowed: GuestIommu) -> None:
    shadows = [Shadow(shadowed) for _ in range(3)]
    shadowed.map(IOVA, GPA, RW)
    before = [shadow.flushed for shadow in shadows]
    shadows[0].fail.append(OSError(5, "no"))
    with contextlib.suppress(DriverError):  # a guest may be told
        shadowed.unmap(IOVA)
    assert all(shadow.flushed > count for shadow, count in zip(shadows, before, strict=True))
    left = bool(
        shadowed.region.translate(IOVA, IOMMUAccessFlags.NONE, 0).perm
    )  # shadowed that tells the guest may take it back
    assert all(shadow.pages == ({IOVA: (GPA, RW)} if left else {}) for shadow in shadows)


def test_what_changed_is_told_before_the_guest_goes_on_and_after_the_entry_changed(shadowed: GuestIommu) -> None:
    """A follower that looks when it hears of an unmap does not find the page any more."""
    shadow = Shadow(shadowed)
    shadowed.map(IOVA, GPA, RW)
    seen: list[int] = []
    notifier, *_ = shadowed.region.notifiers
    take = notifier.fn

    def look(this: object, entry: object) -> None:
        seen.append(int(shadowed.region.translate(IOVA, IOMMUAccessFlags.NONE, 0).perm))
        take(notifier, entry)  # type: ignore[arg-type]

    notifier.fn, notifier.fn_run = look, None
    shadowed.unmap(IOVA)
    assert seen and seen[-1] == 0
    assert shadow.pages == {}


# -- maps that outlive the call --------------------------------------------------------------------------------------


def test_a_map_is_recalled_before_the_guest_goes_on(one: GuestIommu) -> None:
    one.map(IOVA, GPA, RW)
    Shadow(one)
    rung: list[DMAMapping] = []

    def give_back(mapping: DMAMapping) -> None:
        rung.append(mapping)
        one.space.unmap(mapping, 64)

    mapping = one.space.map(IOVA, 64, DMADirection.FROM_DEVICE, give_back)
    assert mapping is not None
    one.map(IOVA + PAGE, OTHER, RW)
    assert not rung, "another page is none of its business"
    one.unmap(IOVA)
    assert rung == [mapping]


# -- bypass, reset, migration ------------------------------------------------------------------------------------------


def test_past_the_iommu_addresses_are_the_machines(vtd: GuestIommu) -> None:
    vtd.map(IOVA, GPA, RW)
    vtd.bypass(True)
    assert vtd.space.write(OTHER, DATA) is MemTxResult.OK
    assert memory(vtd, OTHER) == DATA
    vtd.bypass(False)
    assert vtd.space.write(OTHER, DATA) is not MemTxResult.OK
    assert vtd.space.write(IOVA, DATA) is MemTxResult.OK
    assert memory(vtd, GPA) == DATA


def test_followers_follow_past_the_iommu_and_back(shadowed_vtd: GuestIommu) -> None:
    shadow = Shadow(shadowed_vtd)
    shadowed_vtd.map(IOVA, GPA, RW)
    shadowed_vtd.bypass(True)
    assert shadow.pages == {}
    shadowed_vtd.bypass(False)
    assert shadow.pages == {IOVA: (GPA, RW)}


def test_after_a_reset_nothing_is_mapped(one: GuestIommu) -> None:
    shadow = Shadow(one)
    one.map(IOVA, GPA, RW)
    one.reset()
    assert shadow.pages == {}
    one.space.write(IOVA, DATA)
    assert memory(one, GPA) == bytes(64), "what was mapped before leads nowhere"


def test_a_machine_that_migrated_translates_as_before(one: GuestIommu) -> None:
    mapped = {page: (POOL + 2 * page * PAGE, RO if page % 2 else RW) for page in (0, 3, 4, 11)}
    for page, (gpa, perm) in mapped.items():
        one.map(FIRST + page * PAGE, gpa, perm)
    other = one.again()
    _same(one, other, mapped)
    other.unmap(FIRST)
    assert reads(other, FIRST) is None and reads(one, FIRST) is not None


def test_who_follows_a_machine_that_migrated_is_replayed_to(shadowed: GuestIommu) -> None:
    shadowed.map(IOVA, GPA, RW)
    other = shadowed.again()
    shadow = Shadow(other)
    assert shadow.pages == {IOVA: (GPA, RW)}
    other.map(IOVA, OTHER, RW)
    assert shadow.pages == {IOVA: (OTHER, RW)}


def _same(one: GuestIommu, other: GuestIommu, mapped: Mapping[int, tuple[int, int]]) -> None:
    for page in range(IOVA_PAGES):
        iova = FIRST + page * PAGE
        left, right = (each.region.translate(iova, IOMMUAccessFlags.NONE, 0) for each in (one, other))
        assert (left.perm, right.perm) == (mapped.get(page, (0, 0))[1],) * 2
        if left.perm:
            assert (left.translated_addr, left.addr_mask) == (right.translated_addr, right.addr_mask)
