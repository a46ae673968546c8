"""Scalable mode: contexts, PASID directory, PASID entries."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import NONE, RO, TABLES, WO, Rig
from vfio_model.iommu.vtd.ports import RID, Granularity

CONTEXT = TABLES + 0x1300
DIRECTORY = TABLES + 0x2000
SECOND = 2 << 6 | 2 << 2 | 1


def rig_with_page(pasid: int = 0, **options: object) -> tuple[Rig, int]:
    """Second-level translation of a page at 0x1000; where the PASID entry is."""
    rig = Rig(scalable_mode=True, **options)
    table = rig.page()
    entry = rig.scalable(pasid, table | SECOND, 7)
    rig.tables_for(table, 4, 0x1000, 0x2345_6003)
    rig.enable()
    return rig, entry


def test_requests_without_pasid_have_pasid_zero_whatever_the_context_entry_says() -> None:
    rig, _ = rig_with_page()
    rig.store(CONTEXT + 8, 5)
    assert rig.translate(0x1000)[1] == 0x2345_6000
    assert rig.translation.lookup.peek(rig.space()).did == 7


def test_a_fault_names_the_pasid_of_the_request_only() -> None:
    rig, _ = rig_with_page()
    rig.translate(0x2000, WO)
    rig.translate(0x2000, WO, pasid=0)
    assert rig.faults.take() == [(5, 0x18, 0x2000, True, RID), (5, 0x18, 0x2000, True, 0)]


def test_pasids_above_a_directory_entry() -> None:
    rig, _ = rig_with_page(pasid=0x12345, pasid_bits=20)
    assert rig.translate(0x1000, pasid=0x12345)[1] == 0x2345_6000
    assert rig.blocked(0x1000, pasid=0x12346) == [0x5B]


@pytest.mark.parametrize(
    ("at", "value", "reason", "qualified"),
    [
        (TABLES, 0, 1, False),
        (TABLES, TABLES + 0x1003, 0xA, False),
        (TABLES + 8, 2, 0xA, False),
        (TABLES, 0x7000_0001, 9, False),
        (CONTEXT, 0, 2, True),
        (CONTEXT, DIRECTORY | 0x1D | 1 << 5, 0xB, False),
        (CONTEXT + 8, 1 << 21, 0xB, False),
        (CONTEXT + 16, 1, 0xB, False),
        (CONTEXT + 24, 1, 0xB, False),
        (CONTEXT, 0x7000_001D, 0x50, False),
        (DIRECTORY, 0, 0x51, True),
        (DIRECTORY, 0x7000_0001, 0x58, False),
        (TABLES + 0x3000, 0, 0x5B, True),
        (TABLES + 0x3000, SECOND & ~1, 0x59, True),
        (TABLES + 0x3000, 1 << 6 | 2 << 2 | 1, 0x5B, True),
        (TABLES + 0x3000, 3 << 6 | 2 << 2 | 1, 0x5B, True),
        (TABLES + 0x3000, 2 << 6 | 3 << 2 | 1, 0x5B, True),
        (TABLES + 0x3000, 2 << 6 | 0 << 2 | 1, 0x5B, True),
        (TABLES + 0x3000, 5 << 6 | 2 << 2 | 1, 0x5B, True),
    ],
)
def test_each_structure_blocks_with_its_reason(at: int, value: int, reason: int, qualified: bool) -> None:
    rig, _ = rig_with_page()
    rig.store(at, value)
    rig.enable()
    assert rig.blocked(0x1000) == [reason]
    if at >= TABLES + 0x1000:
        rig.store(CONTEXT, rig.load(CONTEXT) | 2)
        rig.enable()
        assert rig.blocked(0x1000) == ([] if qualified else [reason])


@pytest.mark.parametrize(
    ("at", "value"),
    [(DIRECTORY, 2), (TABLES + 0x3000, 2), (TABLES + 0x3000, SECOND & ~1 | 2), (DIRECTORY, TABLES + 0x3003)],
)
def test_faults_are_disabled_by_the_entries_below_the_context_too(at: int, value: int) -> None:
    rig, _ = rig_with_page()
    rig.store(at, value)
    assert rig.blocked(0x9000) == []


def test_a_peer_s_fpd_counts_in_good_entries_only() -> None:
    rig, entry = rig_with_page(quirks=frozenset({"fpd-when-present"}))
    rig.store(entry, SECOND & ~1 | 2)
    assert rig.blocked(0x1000) == [0x59]
    rig.store(DIRECTORY, TABLES + 0x3003)
    assert rig.blocked(0x1000) == [0x59]
    rig.store(entry, rig.page() | SECOND | 2)
    assert rig.blocked(0x9000) == []


@pytest.mark.parametrize(
    ("fpd", "directory", "change", "reasons", "peer_s"),
    [
        (0, TABLES + 0x3001, -1, [0x59], [6]),
        (0, TABLES + 0x3001, 3 << 6, [0x5B], [0x5B]),
        (0, 0, 0, [0x51], [0x51]),
        (0, 1 << 40 | 1, 0, [0x58], [0x58]),
        (2, TABLES + 0x3001, -1, [], None),
        (2, TABLES + 0x3001, 3 << 6, [], None),
        (2, 0, 0, [], []),
        (2, 1 << 40 | 1, 0, [0x58], []),
    ],
)
def test_a_peer_checks_the_pasid_entry_when_it_caches_the_context_entry(
    fpd: int, directory: int, change: int, reasons: list[int], peer_s: list[int] | None
) -> None:
    """``peer_s`` None: it translates."""
    for quirks, expected in ((frozenset(), reasons), (frozenset({"pasid-checked-once"}), peer_s)):
        rig, entry = rig_with_page(quirks=quirks)
        rig.store(CONTEXT, DIRECTORY | 0x1D | fpd)
        rig.translation.invalidate_contexts(Granularity.GLOBAL)
        assert rig.translate(0x1000)[3]
        rig.store(DIRECTORY, directory)
        rig.store(entry, rig.load(entry) + change)
        rig.translation.invalidate_iotlb(Granularity.GLOBAL)
        if expected is None:
            assert rig.translate(0x1000)[1] == 0x2345_6000
        else:
            assert rig.blocked(0x9000) == expected
        rig.translation.invalidate_contexts(Granularity.GLOBAL)
        rig.blocked(0x9000)


def test_upper_functions_are_behind_the_upper_half_of_the_root_entry() -> None:
    rig, _ = rig_with_page()
    rig.store(TABLES + 8, TABLES + 0x5001)
    rig.store(TABLES + 0x5000 + 3 * 32, DIRECTORY | 0x1D)
    assert rig.space(devfn=0x83).region.translate(0x1000, RO, 0).translated_addr == 0x2345_6000
    rig.store(TABLES + 8, 0)
    assert not rig.space(devfn=0x84).region.translate(0x1000, RO, 0).perm
    assert rig.faults.reasons() == [1]


def test_pass_through_by_a_pasid_entry() -> None:
    rig, entry = rig_with_page()
    rig.store(entry, 4 << 6 | 1)
    rig.translation.invalidate_pasid_cache(Granularity.GLOBAL)
    assert not rig.space().translated
    rig.store(entry, rig.page() | SECOND)
    rig.translation.invalidate_pasid_cache(Granularity.SELECTIVE, 7, 0)
    assert rig.space().translated
    assert rig.blocked(0x1000) == [6]


def test_a_second_level_result_in_the_interrupt_range() -> None:
    rig = Rig(scalable_mode=True)
    table = rig.page()
    rig.scalable(0, table | SECOND, 7)
    rig.tables_for(table, 4, 0x1000, 0xFEE0_0003)
    rig.enable()
    assert rig.blocked(0x1000) == [0x87]
    assert rig.translate(0x1000, NONE)[3] == 0
