"""Second-level walks: worked examples, sizes, permissions, reserved bits."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import NONE, RO, RW, TABLES, WO, Rig
from vfio_model.iommu.vtd.ports import RID

IOVA = 0x7F12_3456_7ABC


def mapped(leaf: int = 0x2345_6003, *, level: int = 1, aw: int = 2, **options: object) -> tuple[Rig, int]:
    """A rig whose function has one page at IOVA; where its entry is."""
    rig = Rig(**options)
    table = rig.legacy(aw=aw)
    slot = rig.tables_for(table, 2 + aw, IOVA & ((1 << 12 + 9 * (2 + aw)) - 1), leaf, level=level)
    rig.enable()
    return rig, slot


def test_the_worked_example_of_legacy_mode() -> None:
    rig = Rig()
    for at, value in (
        (0x1000_0000, 0x1000_1001),
        (0x1000_1180, 0x1000_8001),
        (0x1000_1188, 0x502),
        (0x1000_87F0, 0x1000_5003),
        (0x1000_5240, 0x1000_6003),
        (0x1000_6D10, 0x1000_7003),
        (0x1000_7B38, 0x2345_6003),
    ):
        rig.store(at, value)
    rig.enable()
    assert rig.translate(IOVA) == (IOVA & ~0xFFF, 0x2345_6000, 0xFFF, 3)
    assert rig.translation.lookup.peek(rig.space()).did == 5


@pytest.mark.parametrize(
    ("leaf", "level", "mask", "page"),
    [
        (0x4000_0083, 2, 0x1F_FFFF, 0x4000_0000),
        (0x8000_0083, 3, 0x3FFF_FFFF, 0x8000_0000),
        (0x2345_6083, 1, 0xFFF, 0x2345_6000),
    ],
)
def test_pages_of_every_size(leaf: int, level: int, mask: int, page: int) -> None:
    rig, _ = mapped(leaf, level=level)
    assert rig.translate(IOVA, RW) == (IOVA & ~mask, page, mask, 3)


def test_three_levels_reach_39_bits() -> None:
    rig, _ = mapped(aw=1, aw_bits=39)
    assert rig.translate(IOVA & ((1 << 39) - 1))[1] == 0x2345_6000
    assert rig.blocked(1 << 39) == [4]


def test_an_address_beyond_the_width_of_the_context_entry() -> None:
    rig, _ = mapped(aw=1)
    assert rig.blocked(1 << 39, WO) == [4]
    rig, _ = mapped(aw=2)
    assert rig.blocked(1 << 48) == [4]
    assert rig.blocked((1 << 64) - 1) == [4]


@pytest.mark.parametrize(
    ("leaf", "flag", "reasons"),
    [
        (0, RO, [6]),
        (0, WO, [5]),
        (0x2345_6002, RO, [6]),
        (0x2345_6001, WO, [5]),
        (0x2345_6001, RW, [5]),
        (0x2345_6002, RW, [6]),
        (0x2345_6003 | 1 << 51, RO, [0xC]),
        (0x2345_6003 | 1 << 48, RO, [0xC]),
        (0x2345_6003 | 1 << 62, RO, [0xC]),
        (0x2345_6803, RO, [0xC]),
        (0xFEE0_0003, RO, [0xE]),
        (0xFEEF_F003, WO, [0xE]),
    ],
)
def test_a_leaf_that_blocks(leaf: int, flag: int, reasons: list[int]) -> None:
    rig, _ = mapped(leaf)
    assert rig.blocked(IOVA, flag) == reasons
    assert rig.translate(IOVA, NONE)[3] == (0 if reasons[0] not in (5, 6) else leaf & 3)
    assert rig.faults.take() == [], "a full walk reports nothing"


@pytest.mark.parametrize("leaf", [0x2345_6003 | 1 << 63, 0x2345_6003 | 0x3FF << 52, 0x2345_607B])
def test_bits_that_are_ignored(leaf: int) -> None:
    rig, _ = mapped(leaf)
    assert rig.translate(IOVA)[1] == 0x2345_6000


@pytest.mark.parametrize(("leaf", "level"), [(0x4000_1083, 2), (0x4010_0083, 2), (0x6000_0083, 3), (0x4000_0883, 2)])
def test_large_leaves_have_reserved_address_bits(leaf: int, level: int) -> None:
    rig, _ = mapped(leaf, level=level)
    assert rig.blocked(IOVA) == [0xC]


def test_the_top_level_has_no_leaves() -> None:
    rig, _ = mapped(0x83, level=4)
    assert rig.blocked(IOVA) == [0xC]


def test_snoop_and_transient_bits_are_allowed_by_their_options() -> None:
    for options in ({"snoop_control": True}, {"scalable_mode": False, "snoop_control": True}):
        rig, _ = mapped(0x2345_6803, **options)
        assert rig.translate(IOVA)[1] == 0x2345_6000
    rig, _ = mapped(0x2345_6003 | 1 << 62, device_iotlb=True, stale_tm=True)
    assert rig.translate(IOVA)[1] == 0x2345_6000
    rig, _ = mapped(0x2345_6003 | 1 << 62, device_iotlb=True)
    assert rig.blocked(IOVA) == [0xC]


def test_permissions_of_all_levels_are_and_ed() -> None:
    rig = Rig()
    table = rig.legacy()
    rig.tables_for(table, 4, IOVA, 0x2345_6003, upper=1)
    rig.enable()
    assert rig.translate(IOVA)[3] == 1
    assert rig.blocked(IOVA, WO) == [5]


def test_tables_that_cannot_be_read() -> None:
    rig = Rig()
    table = rig.legacy()
    rig.store(table + (IOVA >> 36 & 0xFF8), 0x7000_0003)
    rig.enable()
    assert rig.blocked(IOVA) == [7]
    rig.store(TABLES + 0x1180, 0x7000_0001)
    rig.enable()
    assert rig.blocked(IOVA) == [3]


def test_a_hole_has_the_size_of_the_level_at_which_the_walk_ended() -> None:
    rig, slot = mapped()
    rig.store(slot, 0)
    assert rig.translate(IOVA) == (0, 0, 0xFFF, 0)
    assert rig.translate(IOVA ^ 1 << 21) == (0, 0, 0x1F_FFFF, 0)
    assert rig.translate(IOVA ^ 1 << 30) == (0, 0, 0x3FFF_FFFF, 0)
    assert rig.translate(1 << 48) == (0, 0, 0xFFF, 0)


def test_a_fault_says_who_where_and_how() -> None:
    rig, _ = mapped(0x2345_6000)
    rig.bus.number = 2
    rig.store(TABLES + 2 * 16, TABLES + 0x1001)
    rig.translate(IOVA, WO)
    rig.translate(IOVA + 8, RO)
    assert rig.faults.take() == [(5, 0x218, IOVA, True, RID), (6, 0x218, IOVA + 8, False, RID)]


def test_a_page_over_the_interrupt_range_is_no_translation() -> None:
    rig, _ = mapped(0xFEE0_0083, level=2)
    assert rig.blocked(IOVA) == [0xE]
    rig, _ = mapped(0xC000_0083, level=3)
    assert rig.blocked(IOVA) == [0xE]
    rig, _ = mapped(0xFEF0_0003)
    assert rig.translate(IOVA)[1] == 0xFEF0_0000


@pytest.mark.parametrize(("level", "peer_s"), [(4, 3), (3, 7), (2, 7), (1, 7)])
def test_an_entry_of_all_ones_has_reserved_bits_but_a_peer_s(level: int, peer_s: int) -> None:
    for quirks, expected in ((frozenset(), 0xC), (frozenset({"all-ones-unreadable"}), peer_s)):
        rig = Rig(quirks=quirks)
        table = rig.legacy()
        rig.tables_for(table, 4, 0, (1 << 64) - 1, level=level)
        rig.enable()
        assert rig.blocked(0) == [expected]
