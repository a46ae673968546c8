"""What a function sees: system memory, translations, the interrupt range; and DMA through all of it."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import RO, TABLES, Bus, Rig
from vfio_model.iommu.vtd.ports import RID, Granularity
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.types import DMADirection, MemTxResult

CONTEXT = TABLES + 0x1180
INTERRUPT = 0xFEE0_1234 & ~3


def rig_with_pages() -> Rig:
    rig = Rig()
    table = rig.legacy()
    rig.tables_for(table, 4, 0x4000, 0x8003)
    rig.tables_for(table, 4, 0x5000, 0x6001)
    rig.enable()
    return rig


def test_a_space_is_made_once_and_belongs_to_a_bus_object() -> None:
    rig = Rig()
    ops, other = rig.translation.ops, Bus("other", 0)
    assert ops.get_address_space(rig.bus, 0x18) is ops.get_address_space(rig.bus, 0x18)
    assert ops.get_address_space(rig.bus, 0x18) is not ops.get_address_space(other, 0x18)
    assert ops.get_address_space(rig.bus, 0x18) is not ops.get_address_space(rig.bus, 0x19)
    assert rig.space(5) is not rig.space(RID)


def test_without_translation_a_function_sees_system_memory() -> None:
    rig = Rig()
    space = rig.translation.ops.get_address_space(rig.bus, 0x18)
    assert not space.write(0x2000, b"abcd")
    assert rig.low[0x2000:0x2004] == b"abcd"
    assert rig.interrupts.requests == []


def test_dma_is_translated_piece_by_piece_and_stops_at_a_fault() -> None:
    rig = rig_with_pages()
    space = rig.space().address_space
    assert not space.write(0x4FFE, b"ab")
    assert rig.low[0x8FFE:0x9000] == b"ab"
    assert space.write(0x4FFE, b"abcd") == MemTxResult.DECODE_ERROR
    assert rig.faults.take() == [(5, 0x18, 0x5000, True, RID)]
    data = bytearray(4)
    assert not space.read(0x4FFE, data)
    assert data == b"ab\0\0"


def test_bound_devices_follow_the_switch() -> None:
    rig = rig_with_pages()
    dma = DMASpace(rig.space().address_space)
    dma.write(0x4000, b"x")
    assert rig.low[0x8000:0x8001] == b"x"
    rig.translation.set_enabled(False)
    dma.write(0x4000, b"y")
    assert rig.low[0x4000:0x4001] == b"y"
    rig.translation.reset()
    assert not rig.space().translated


def test_writes_to_the_interrupt_range_are_interrupts() -> None:
    rig = rig_with_pages()
    for _ in range(2):
        assert not rig.space().address_space.write(INTERRUPT, b"\x31\x00\x00\x00")
        rig.translation.set_enabled(False)
    assert rig.interrupts.requests == [(0x18, INTERRUPT, 0x31)] * 2
    data = bytearray(b"zzzz")
    assert not rig.space().address_space.read(INTERRUPT, data)
    assert data == b"\0\0\0\0"
    assert rig.faults.take() == []


def test_the_source_of_an_interrupt_is_numbered_late() -> None:
    rig = Rig()
    space = rig.translation.ops.get_address_space(rig.bus, 0x18)
    rig.bus.number = 3
    space.write(INTERRUPT, bytes(4))
    assert rig.interrupts.requests == [(0x318, INTERRUPT, 0)]


def test_requests_with_a_pasid_are_never_interrupts() -> None:
    rig = Rig(scalable_mode=True, fsts=True, pasid_bits=20)
    table = rig.page()
    entry = rig.scalable(5, 1 << 6 | 2 << 2 | 1, 7, table)
    rig.tables_for(table, 4, INTERRUPT & ~0xFFF, 0x8007, upper=7)
    rig.enable()
    space = rig.space(5).address_space
    assert not space.write(INTERRUPT, b"abcd")
    assert rig.low[0x8000 | INTERRUPT & 0xFFF :][:4] == b"abcd"
    rig.store(entry, 4 << 6 | 1)
    rig.translation.invalidate_pasid_cache(Granularity.SELECTIVE, 7, 5)
    assert space.write(INTERRUPT, b"abcd")
    assert space.read(INTERRUPT, bytearray(4))
    assert rig.faults.take() == [(0x87, 0x18, INTERRUPT, True, 5), (0x87, 0x18, INTERRUPT, False, 5)]
    assert rig.interrupts.requests == []


def test_pass_through_switches_the_space_when_the_context_is_invalidated() -> None:
    rig = rig_with_pages()
    assert rig.space().translated
    good = rig.load(CONTEXT)
    rig.store(CONTEXT, good | 2 << 2)
    assert rig.space().translated
    rig.translation.invalidate_contexts(Granularity.SELECTIVE, 5, 0x18, 0)
    assert not rig.space().translated
    assert not rig.space().address_space.write(0x4000, b"x")
    assert rig.low[0x4000:0x4001] == b"x"
    rig.store(CONTEXT, good)
    rig.translation.invalidate_contexts(Granularity.GLOBAL)
    assert rig.space().translated


def test_pass_through_that_appears_without_an_invalidation_is_found_by_the_first_access() -> None:
    rig = Rig()
    rig.enable()
    space = rig.space()
    assert space.translated
    rig.legacy(tt=2)
    dma = DMASpace(space.address_space)
    assert not dma.write(0xFFE, b"abcd")
    assert rig.low[0xFFE:0x1002] == b"abcd"
    assert not space.translated
    assert rig.faults.take() == []


def test_a_space_stays_as_it_is_while_nobody_can_be_told() -> None:
    rig = Rig()
    rig.enable()
    space = rig.space()
    rig.legacy(tt=2)
    rig.translation.lookup.may_switch = lambda: False
    dma = DMASpace(space.address_space)
    assert not dma.write(0x1000, b"abcd") and rig.low[0x1000:0x1004] == b"abcd"
    assert space.translated
    rig.translation.lookup.may_switch = lambda: True
    assert not dma.write(0x1004, b"efgh") and rig.low[0x1004:0x1008] == b"efgh"
    assert not space.translated


def test_a_mapping_in_place_rings_when_its_page_is_invalidated() -> None:
    rig = rig_with_pages()
    rung: list[int] = []
    mapping = rig.space().address_space.map(0x4000, 16, DMADirection.TO_DEVICE, lambda each: rung.append(each.iova))
    assert mapping is not None and not mapping.bounce
    rig.translation.invalidate_iotlb(Granularity.SELECTIVE, 5, 0x7000)
    assert rig.translation.flush() is None
    assert rung == []
    rig.translation.invalidate_iotlb(Granularity.SELECTIVE, 5, 0x4000)
    assert rung == [], "told, not yet complete"
    assert rig.translation.flush() is None
    assert rung == [0x4000]
    mapping.unmap(0)


@pytest.mark.parametrize("granularity", [Granularity.DOMAIN, Granularity.GLOBAL])
def test_a_mapping_in_place_rings_when_much_is_invalidated(granularity: Granularity) -> None:
    rig = rig_with_pages()
    rung: list[int] = []
    mapping = rig.space().address_space.map(0x4000, 16, DMADirection.TO_DEVICE, lambda each: rung.append(each.iova))
    assert mapping is not None
    rig.translation.invalidate_iotlb(granularity, 5)
    rig.translation.flush()
    assert rung == [0x4000]
    mapping.unmap(0)


def test_traces_bear_the_peer_s_names() -> None:
    rig = rig_with_pages()
    rig.space()
    rig.trace.enabled = True
    rig.trace.records.clear()
    rig.translate(0x4123)
    rig.translate(0x4123)
    names = [name for name, _ in rig.trace.records]
    assert names == [
        "vtd_iotlb_cc_update",
        "vtd_iotlb_page_update",
        "vtd_dmar_translate",
        "vtd_iotlb_page_hit",
        "vtd_dmar_translate",
    ]
    page = {"sid": 0x18, "iova": 0x4123, "slpte": 0x8003, "domain": 5}
    assert rig.trace.records[1][1] == page == rig.trace.records[3][1]
    translated = {"bus": 0, "slot": 3, "function": 0, "iova": 0x4000, "gpa": 0x8000, "mask": 0xFFF}
    assert rig.trace.records[2][1] == translated


def test_a_table_in_memory_that_moves_is_read_where_it_is_now() -> None:
    rig = rig_with_pages()
    tables = next(each for each in rig.root.subregions if each.name == "tables")
    tables.set_offset(0x2000_0000)
    rig.translation.set_root(0x2000_0000, False)
    assert rig.blocked(0x4000) == [9]
    tables.set_offset(TABLES)
    rig.translation.set_root(TABLES, False)
    assert rig.translate(0x4000, RO)[1] == 0x8000
