"""Root and context entries: what is looked at in which order, and when fault processing is disabled."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import RO, TABLES, WO, Bus, Rig

CONTEXT = TABLES + 0x1180


def rig_with_page(**options: object) -> Rig:
    rig = Rig(**options)
    rig.tables_for(rig.legacy(), 4, 0x1000, 0x2345_6003)
    rig.enable()
    return rig


def test_root_table_faults() -> None:
    rig = rig_with_page()
    rig.store(TABLES, 0)
    rig.enable()
    assert rig.blocked(0x1000) == [1]
    for lo, hi in ((TABLES + 0x1003, 0), (TABLES + 0x1801, 0), (TABLES + 0x1001 | 1 << 48, 0), (TABLES + 0x1001, 1)):
        rig.store(TABLES, lo)
        rig.store(TABLES + 8, hi)
        rig.enable()
        assert rig.blocked(0x1000) == [0xA]
    rig.translation.set_root(0x7000_0000, False)
    assert rig.blocked(0x1000) == [8]


def test_context_table_faults() -> None:
    rig = rig_with_page()
    good = rig.load(CONTEXT)
    for lo, hi, reason in (
        (0, 0x502, 2),
        (good | 0x10, 0x502, 0xB),
        (good | 1 << 48, 0x502, 0xB),
        (good, 0x502 | 1 << 7, 0xB),
        (good, 0x502 | 1 << 24, 0xB),
        (good, 0x500, 3),
        (good, 0x503, 3),
        (good | 3 << 2, 0x502, 3),
        (good | 1 << 2, 0x502, 3),
    ):
        rig.store(CONTEXT, lo)
        rig.store(CONTEXT + 8, hi)
        rig.enable()
        assert rig.blocked(0x1000) == [reason], hex(lo)
    rig.store(TABLES, 0x7000_0001)
    rig.enable()
    assert rig.blocked(0x1000) == [9]


def test_the_level_is_looked_at_before_the_translation_type() -> None:
    rig = rig_with_page()
    rig.store(CONTEXT, rig.load(CONTEXT) | 2 << 2)
    rig.store(CONTEXT + 8, 0x503)
    rig.enable()
    assert rig.blocked(0x1000) == [3]


def test_a_context_entry_for_device_tlbs_needs_the_option() -> None:
    rig = rig_with_page(device_iotlb=True)
    rig.store(CONTEXT, rig.load(CONTEXT) | 1 << 2)
    rig.enable()
    assert rig.translate(0x1000)[1] == 0x2345_6000


def test_no_pass_through_without_the_option() -> None:
    rig = Rig(pass_through=False)
    rig.legacy(tt=2)
    rig.enable()
    assert rig.blocked(0x1000) == [3]


@pytest.mark.parametrize(
    ("aw_bits", "aw", "reasons"), [(39, 1, [6]), (39, 2, [3]), (48, 1, [6]), (48, 2, [6]), (48, 0, [3])]
)
def test_supported_levels(aw_bits: int, aw: int, reasons: list[int]) -> None:
    rig = Rig(aw_bits=aw_bits)
    rig.legacy(aw=aw)
    rig.enable()
    assert rig.blocked(0x1000) == reasons


def test_fault_processing_disabled() -> None:
    rig = rig_with_page()
    good = rig.load(CONTEXT)
    for lo, hi, reasons in (
        (good | 2, 0x502, []),
        (2, 0x502, []),
        (good | 2, 0x503, []),
        (good | 2 | 0x10, 0x502, [0xB]),
    ):
        rig.store(CONTEXT, lo)
        rig.store(CONTEXT + 8, hi)
        rig.enable()
        assert rig.blocked(0x9000) == reasons, hex(lo)


def test_faults_of_the_root_cannot_be_disabled() -> None:
    rig = Rig()
    rig.legacy(fpd=True)
    rig.store(TABLES, 0)
    rig.enable()
    assert rig.blocked(0x1000) == [1]


def test_a_context_entry_is_cached_and_its_absence_is_not() -> None:
    rig = Rig()
    table = rig.legacy()
    good = rig.load(CONTEXT)
    rig.store(CONTEXT, 0)
    rig.enable()
    assert rig.blocked(0x1000) == [2]
    rig.store(CONTEXT, good)
    rig.tables_for(table, 4, 0x1000, 0x2345_6003)
    rig.tables_for(table, 4, 0x2000, 0x2345_7003)
    assert rig.translate(0x1000)[1] == 0x2345_6000
    rig.store(CONTEXT, 0)
    assert rig.translate(0x2000)[1] == 0x2345_7000, "still cached"


def test_bus_numbers_are_looked_up_late() -> None:
    rig = rig_with_page()
    bus = Bus("bridge", 0)
    region = rig.translation.space(bus, 0x18, 0xFFFF_FFFF).region
    bus.number = 7
    region.translate(0x1000, WO, 0)
    assert rig.faults.take() == [(1, 0x718, 0x1000, True, 0xFFFF_FFFF)]
    rig.store(TABLES + 7 * 16, TABLES + 0x1001)
    assert region.translate(0x1000, RO, 0).translated_addr == 0x2345_6000


def test_two_functions_have_their_own_entries() -> None:
    rig = rig_with_page()
    rig.legacy(did=6, devfn=0x20)
    region = rig.space(devfn=0x20).region
    assert not region.translate(0x1000, RO, 0).perm
    assert rig.faults.take()[0][:2] == (6, 0x20)
    assert rig.translate(0x1000)[1] == 0x2345_6000
