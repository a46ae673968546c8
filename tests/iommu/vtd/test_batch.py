"""Batches and single translations agree, with each other and with a straightforward reading of the specification."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.iommu.vtd.rig import LOW_BYTES, NONE, RO, RW, TABLE_BYTES, TABLES, WO, Rig
from vfio_model.iommu.vtd.ports import RID
from vfio_model.iommu.vtd.structures import Reason
from vfio_model.memory.types import IOMMUAccessFlags

_TABLE_PAGES = 6
_AREA = TABLES + 0x10_0000
"""Where random tables are."""
_PASID = 5


@dataclass(frozen=True)
class Case:
    """Random tables: first or second level, words by (table, index), requests (address, flag)."""

    first: bool
    levels: int
    words: dict[tuple[int, int], int]
    requests: list[tuple[int, IOMMUAccessFlags]]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    first = draw(st.booleans())
    levels = 4 if first else draw(st.sampled_from([3, 4]))
    numbers = st.sampled_from([0, 1, 511])
    table = st.integers(0, _TABLE_PAGES).map(lambda n: _AREA + n * 4096 if n < _TABLE_PAGES else 0x7000_0000)
    page = st.sampled_from([0, 0x8000, 0x4000_0000, 0xFEE0_0000, 0xFEDF_F000, 0xC000_0000])
    usual = [0x27, 0x67, 0x67, 0x25, 7, 0x61, 0x26] if first else [3, 3, 3, 1, 2, 0]
    bits = st.sampled_from(usual)
    rare = st.sampled_from([0] * 6 + [0x80, 0x80, 1 << 11, 1 << 13, 1 << 51, 1 << 52, 1 << 62, 1 << 63])
    entry = st.builds(lambda at, low, more: at | low | more, st.one_of(table, table, page), bits, rare)
    words = {(at, number): draw(entry) for at in range(_TABLE_PAGES) for number in (0, 1, 511)}
    path = st.builds(
        lambda parts, low, top: sum(part << 12 + 9 * at for at, part in enumerate(parts)) | low | top,
        st.lists(numbers, min_size=levels, max_size=levels),
        st.sampled_from([0, 0xFFF, 8]),
        st.sampled_from([0, 0, 0, 0, 1 << 48, 1 << 63]),
    )
    if first:
        path = path.map(lambda iova: iova | 0xFFFF << 48 if iova >> 47 == 1 else iova)
    flags = st.sampled_from([RO, WO, RW, NONE])
    return Case(first, levels, words, draw(st.lists(st.tuples(path, flags), min_size=1, max_size=12)))


def built(case: Case) -> Rig:
    rig = Rig(scalable_mode=case.first, fsts=case.first, pasid_bits=20 if case.first else 0)
    if case.first:
        rig.scalable(_PASID, 1 << 6 | 2 << 2 | 1, 7, _AREA)
    else:
        rig.legacy(aw=case.levels - 2)
        rig.store(TABLES + 0x1180, _AREA | 1)
    for (table, number), word in case.words.items():
        rig.store(_AREA + table * 4096 + number * 8, word)
    rig.enable()
    return rig


def expected(case: Case, rig: Rig, iova: int, flag: IOMMUAccessFlags) -> tuple[int, int, int]:
    """(reason, address, permission): sections 3.6, 3.7, 9.7 and 9.8 read aloud, of tables as they are. No caches."""
    if case.first:
        if iova >> 47 not in (0, (1 << 17) - 1):
            return Reason.NOT_CANONICAL, 0, 0
    elif iova >= 1 << 12 + 9 * case.levels:
        return Reason.BEYOND_WIDTH, 0, 0
    at, readable, writable = _AREA, True, True
    for level in range(case.levels, 0, -1):
        if not (at < LOW_BYTES or TABLES <= at < TABLES + TABLE_BYTES):
            unreadable = Reason.FIRST_UNREADABLE if case.first else Reason.PAGING_UNREADABLE
            return unreadable, 0, 0
        entry = rig.load(at + (iova >> 12 + 9 * (level - 1)) % 512 * 8)
        is_page = level == 1 or entry >> 7 & 1 == 1
        size = 1 << 12 + 9 * (level - 1)
        address = entry % (1 << 48) // 4096 * 4096
        reserved = entry >> 48 & 0xF
        if case.first:
            writable = writable and entry & 2 != 0
            reserved |= is_page and level > 1 and (level == 4 or address % size & ~0x1000)
            for blocks, reason in (
                (not entry & 1, Reason.FIRST_NOT_PRESENT),
                (not entry & 4, Reason.PRIVILEGE),
                (flag & WO and not entry & 2, Reason.SCALABLE_WRITE),
                (reserved, Reason.FIRST_RESERVED),
            ):
                if blocks:
                    return reason, 0, 0
        else:
            readable, writable = readable and entry & 1 != 0, writable and entry & 2 != 0
            reserved |= entry & (1 << 62 | 1 << 11) | (is_page and level > 1 and (level == 4 or address % size))
            if flag & WO and not entry & 2:
                return Reason.WRITE, 0, 0
            if (flag & RO and not entry & 1) or not entry & 3:
                return Reason.READ, 0, 0
            if reserved:
                return Reason.PAGING_RESERVED, 0, 0
        if is_page:
            page = address // size * size
            if page < 0xFEF0_0000 and page + size > 0xFEE0_0000:
                return Reason.SCALABLE_INTERRUPT_ADDRESS if case.first else Reason.INTERRUPT_ADDRESS, 0, 0
            return Reason.NONE, page + iova % size, readable | writable << 1
        at = address
    raise AssertionError("level 1 has pages only")


@given(cases())
def test_single_translations_are_what_the_specification_says(case: Case) -> None:
    rig = built(case)
    space = rig.space(_PASID if case.first else RID)
    for iova, flag in case.requests:
        reason, address, perm = expected(case, rig, iova, flag)
        rig.translation.lookup.iotlb.clear()
        space.front.clear()
        entry = space.region.translate(iova, flag, 0)
        assert rig.faults.reasons() == ([reason] if reason and flag else [])
        assert int(entry.perm) == perm
        if perm:
            assert entry.translated_addr | iova & entry.addr_mask == address
            again = space.region.translate(iova, flag, 0)
            assert again == entry


@given(cases())
def test_a_batch_says_what_single_translations_would_without_side_effects(case: Case) -> None:
    rig = built(case)
    space = rig.space(_PASID if case.first else RID)
    before = bytes(rig.tables)
    for flag in (RO, WO, RW):
        iovas = [iova for iova, _ in case.requests]
        answer = space.region.translate_many(np.array(iovas, dtype=np.uint64), flag, 0)
        assert answer is not None and answer[0] is rig.system
        assert (bytes(rig.tables), rig.faults.take()) == (before, [])
        for iova, address, perm in zip(iovas, answer[1].tolist(), answer[2].tolist(), strict=True):
            reason, single, allowed = expected(case, rig, iova, flag)
            if perm:
                assert (address, perm) == (single, allowed)
            elif not reason:
                assert case.first and marks_something(rig, space.region.translate, iova, flag)
                rig.tables[:] = before
                rig.translation.lookup.iotlb.clear()
                space.front.clear()


def marks_something(rig: Rig, translate: object, iova: int, flag: IOMMUAccessFlags) -> bool:
    before = bytes(rig.tables)
    assert callable(translate)
    translate(iova, flag, 0)
    return bytes(rig.tables) != before


def linear(pages: int = 300, **options: object) -> Rig:
    rig = Rig(**options)
    table = rig.legacy()
    for page in range(pages):
        rig.tables_for(table, 4, page << 12, (page * 7 % 256) << 12 | 3)
    rig.enable()
    return rig


def test_dma_in_many_pieces_goes_by_batches_and_reports_as_one_by_one() -> None:
    rig = linear()
    space = rig.space().address_space
    iovas = [page << 12 for page in range(300)]
    data = bytes(range(256)) * 75
    assert not space.write_many(iovas[:256], 64, data[: 256 * 64])
    for page in range(256):
        at = (page * 7 % 256) << 12
        assert rig.low[at : at + 64] == data[page * 64 : page * 64 + 64]
    out = bytearray(256 * 64)
    assert not space.read_many(iovas[:256], 64, out)
    assert out == data[: 256 * 64]
    rig.translation.invalidate_contexts(1)
    rig.store(TABLES + 0x1180, rig.load(TABLES + 0x1180))
    assert space.read_many([*iovas[:100], 0x9000_0000, 0x9000_1000], 64, bytearray(102 * 64))
    assert rig.faults.take() == [(6, 0x18, 0x9000_0000, False, RID)], "the first that fails ends it"


def test_pass_through_and_no_translation_are_identity() -> None:
    rig = Rig()
    iovas = np.arange(3, dtype=np.uint64) * np.uint64(4096)
    region = rig.space().region
    assert [list(part) if part is not rig.system else 0 for part in region.translate_many(iovas, RO, 0)[:2]] == [
        0,
        [0, 4096, 8192],
    ]
    rig.legacy(tt=2)
    rig.enable()
    assert list(region.translate_many(iovas, RO, 0)[1]) == [0, 4096, 8192]


@pytest.mark.parametrize("broken", ["context", "nested"])
def test_what_a_batch_leaves_to_single_translations(broken: str) -> None:
    rig = Rig(scalable_mode=True, nested=True)
    rig.scalable(0, 3 << 6 | 2 << 2 | 1, 7, 0)
    if broken == "context":
        rig.store(TABLES + 0x1300, 0)
    rig.enable()
    assert rig.space().region.translate_many(np.zeros(2, dtype=np.uint64), RO, 0) is None
    assert rig.faults.take() == []
