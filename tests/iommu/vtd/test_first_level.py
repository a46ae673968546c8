"""First-level and nested walks, accessed and dirty bits."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import NONE, RO, RW, TABLES, WO, Rig
from vfio_model.iommu.vtd.ports import Granularity
from vfio_model.memory.types import IOMMUAccessFlags

IOVA = 0x7F12_3456_7ABC
EXAMPLE = (
    (0x1000_0000, 0x1000_1001),
    (0x1000_1300, 0x1000_201D),
    (0x1000_2000, 0x1000_3001),
    (0x1000_3140, 0x49),
    (0x1000_3148, 1),
    (0x1000_3150, 0x1000_4000),
    (0x1000_47F0, 0x1000_5027),
    (0x1000_5240, 0x1000_6027),
    (0x1000_6D10, 0x1000_7027),
    (0x1000_7B38, 0x2345_6007),
)
LEAF = 0x1000_7B38
OPTIONS = {"scalable_mode": True, "fsts": True, "pasid_bits": 20}


def example(**options: object) -> Rig:
    rig = Rig(**OPTIONS | options)
    for at, value in EXAMPLE:
        rig.store(at, value)
    rig.enable()
    return rig


def test_the_worked_example_of_scalable_mode() -> None:
    rig = example()
    assert rig.translate(IOVA, RO, 5) == (IOVA & ~0xFFF, 0x2345_6000, 0xFFF, 3)
    assert rig.load(LEAF) == 0x2345_6027
    assert rig.translate(IOVA, WO, 5)[1] == 0x2345_6000
    assert rig.load(LEAF) == 0x2345_6067
    rig.store(0x1000_6D10, 0x4000_0087)
    rig.translation.invalidate_pasid_iotlb(1, 5)
    assert rig.translate(IOVA, WO, 5) == (IOVA & ~0x1F_FFFF, 0x4000_0000, 0x1F_FFFF, 3)
    assert rig.load(0x1000_6D10) == 0x4000_00E7


def test_a_read_that_is_cached_does_not_let_a_write_skip_the_dirty_bit() -> None:
    rig = example()
    for _ in range(2):
        rig.translate(IOVA, RO, 5)
    assert not rig.load(LEAF) & 0x40
    rig.translate(IOVA, WO, 5)
    assert rig.load(LEAF) & 0x40
    rig.store(LEAF, 0x2345_6007)
    rig.translate(IOVA, WO, 5)
    assert rig.load(LEAF) == 0x2345_6007, "a cached write needs the table no more"


def test_accessed_is_set_on_every_level_and_by_no_full_walk() -> None:
    rig = example()
    tables = (0x1000_47F0, 0x1000_5240, 0x1000_6D10)
    for at in tables:
        rig.store(at, rig.load(at) & ~0x20)
    assert rig.translate(IOVA, NONE, 5)[3] == 3
    assert [rig.load(at) & 0x20 for at in (*tables, LEAF)] == [0, 0, 0, 0]
    rig.translate(IOVA, RO, 5)
    assert [rig.load(at) & 0x60 for at in (*tables, LEAF)] == [0x20] * 4


@pytest.mark.parametrize(
    ("at", "value", "flag", "reason"),
    [
        (LEAF, 0x2345_6006, RO, 0x71),
        (LEAF, 0x2345_6003, RO, 0x81),
        (LEAF, 0x2345_6005, WO, 0x85),
        (LEAF, 0x2345_6007 | 1 << 51, RO, 0x72),
        (LEAF, 0x2345_6007 | 1 << 48, RO, 0x72),
        (LEAF, 0xFEE0_0007, RO, 0x87),
        (0x1000_6D10, 0x4000_2087, RO, 0x72),
        (0x1000_5240, 0x4020_0087, RO, 0x72),
        (0x1000_47F0, 0x87, RO, 0x72),
        (0x1000_47F0, 0x7000_0007, RO, 0x70),
        (0x1000_3150, 0x7000_0000, RO, 0x73),
        (0x1000_3150, 0x1000_4004, RO, 0x5B),
    ],
)
def test_what_blocks(at: int, value: int, flag: int, reason: int) -> None:
    rig = example()
    rig.store(at, value)
    assert rig.blocked(IOVA, flag, 5) == [reason]


@pytest.mark.parametrize("leaf", [0x2345_6F07, 0x2345_6087, 0x2345_6007 | 0xFFF << 52, 0x2345_601F])
def test_bits_that_are_ignored(leaf: int) -> None:
    rig = example()
    rig.store(LEAF, leaf)
    assert rig.translate(IOVA, RO, 5)[1] == 0x2345_6000


@pytest.mark.parametrize(
    ("before", "flag", "after", "peer_s"),
    [(0, RO, 0x20, 0x20), (0, WO, 0x60, 0x60), (0x20, WO, 0x60, 0x20), (0x40, WO, 0x60, 0x40), (0x40, RO, 0x60, 0x60)],
)
def test_a_peer_sets_flags_of_a_leaf_that_has_none_of_them(
    before: int, flag: IOMMUAccessFlags, after: int, peer_s: int
) -> None:
    for quirks, expected in ((frozenset(), after), (frozenset({"flags-set-once"}), peer_s)):
        rig = example(quirks=quirks)
        rig.store(LEAF, 0x2345_6007 | before)
        assert rig.translate(IOVA, flag, 5)[3]
        assert rig.load(LEAF) == 0x2345_6007 | expected


def test_a_page_that_was_read_becomes_dirty_but_a_peer_s() -> None:
    for quirks, expected in ((frozenset(), 0x60), (frozenset({"flags-set-once"}), 0x20)):
        rig = example(quirks=quirks)
        for flag in (RO, WO):
            assert rig.translate(IOVA, flag, 5)[3]
        assert rig.load(LEAF) == 0x2345_6007 | expected


def test_a_page_may_be_read_only_at_any_level() -> None:
    rig = example()
    rig.store(0x1000_5240, 0x1000_6025)
    assert rig.translate(IOVA, RO, 5)[3] == 1
    assert rig.blocked(IOVA, WO, 5) == [0x85]


def test_pages_of_1_gib() -> None:
    rig = example()
    rig.store(0x1000_5240, 0x4000_0087)
    assert rig.translate(IOVA, RO, 5)[1:3] == (0x4000_0000, 0x3FFF_FFFF)
    rig = example(fs1gp=False)
    rig.store(0x1000_5240, 0x4000_0087)
    assert rig.blocked(IOVA, RO, 5) == [0x72]
    rig = example(fs1gp=False, quirks=frozenset({"fs1gp-ignored"}))
    rig.store(0x1000_5240, 0x4000_0087)
    assert rig.translate(IOVA, RO, 5)[1] == 0x4000_0000


def test_addresses_are_canonical() -> None:
    rig = example()
    for addr in (1 << 47, 1 << 60, 0xFFFF_7FFF_FFFF_FFFF):
        assert rig.blocked(addr, RO, 5) == [0x80]
    assert rig.blocked(0xFFFF_8000_0000_0000, RO, 5) == [0x71]
    rig.store(0x1000_3140, 0x41)
    rig.translation.invalidate_pasid_cache(Granularity.GLOBAL)
    assert rig.blocked(1 << 29, RO, 5) == [0x80], "AW narrows what is canonical"


def test_an_entry_that_cannot_be_written_back() -> None:
    rig = example()
    rig.write_protect_tables()
    assert rig.blocked(IOVA, RO, 5) == [0x91]


def test_supervisor_pages_stop_before_they_are_marked() -> None:
    rig = example()
    rig.store(LEAF, 0x2345_6003)
    rig.blocked(IOVA, RO, 5)
    assert rig.load(LEAF) == 0x2345_6003


# -- nested


def nested(leaf: int = 0x5007, *, rw: int = 3) -> tuple[Rig, int, int]:
    """First level over guest addresses that second level moves up by TABLES; where the leaf and the root are."""
    rig = Rig(scalable_mode=True, nested=True, pasid_bits=20)
    second = rig.page()
    for page in range(0, 0x8000, 0x1000):
        rig.tables_for(second, 4, page, (TABLES + 0x10_0000 + page) | rw)
    for at, below in ((0x0, 0x1007), (0x1000, 0x2007), (0x2000, 0x3007), (0x3000, leaf)):
        rig.store(TABLES + 0x10_0000 + at, below)
    rig.scalable(5, second | 3 << 6 | 2 << 2 | 1, 1, 0)
    rig.enable()
    return rig, TABLES + 0x10_3000, second


def test_nested_translation_goes_through_both() -> None:
    rig, leaf, _ = nested()
    assert rig.translate(0x123, WO, 5) == (0, TABLES + 0x10_5000, 0xFFF, 3)
    assert rig.load(leaf) == 0x5067


def test_nested_permissions_are_those_of_both() -> None:
    rig, _, second = nested()
    rig.tables_for(second, 4, 0x5000, (TABLES + 0x10_5000) | 1)
    assert rig.translate(0, RO, 5)[3] == 1
    assert rig.blocked(0, WO, 5) == [5]
    rig.tables_for(second, 4, 0x5000, 0)
    rig.translation.invalidate_iotlb(Granularity.GLOBAL)
    assert rig.blocked(0, RO, 5) == [6]


def test_nested_tables_that_may_not_be_marked() -> None:
    rig, _, _ = nested(rw=1)
    assert rig.blocked(0, RO, 5) == [0x91]


def test_a_nested_page_is_as_large_as_the_smaller_one() -> None:
    rig, _, second = nested()
    rig.store(TABLES + 0x10_2000, 0x40_0087)
    rig.tables_for(second, 4, 0x40_3000, 0x2345_6003)
    assert rig.translate(0x3000, RO, 5) == (0x3000, 0x2345_6000, 0xFFF, 3)


def test_every_type_alone_in_a_unit_that_nests() -> None:
    rig, _, second = nested()
    rig.scalable(5, second | 2 << 6 | 2 << 2 | 1, 1, 0)
    assert rig.translate(0x5000, RW, 5)[1] == TABLES + 0x10_5000
    rig.scalable(6, 1 << 6 | 2 << 2 | 1, 1, TABLES + 0x10_0000)
    assert rig.blocked(0, RO, 6) == [0x71], "its tables are where it says, not behind the second level"


@pytest.mark.parametrize(("at", "peer_s"), [(0x1000_47F0, 0x73), (0x1000_5240, 0x70), (LEAF, 0x70)])
def test_an_entry_of_all_ones_has_reserved_bits_but_a_peer_s(at: int, peer_s: int) -> None:
    for quirks, expected in ((frozenset(), 0x72), (frozenset({"all-ones-unreadable"}), peer_s)):
        rig = example(quirks=quirks)
        rig.store(at, (1 << 64) - 1)
        assert rig.blocked(IOVA, RO, 5) == [expected]
