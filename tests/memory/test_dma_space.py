"""The device's side: binding, loads and stores, fills."""

from __future__ import annotations

from tests.memory.fakes import iommu_space, ram_block, system_memory
from vfio_model.memory import dma as d
from vfio_model.memory.dma import BLOCKED, DMASpace
from vfio_model.memory.region import RAMRegion
from vfio_model.memory.types import DMADirection, MemTxResult

OK, DECODE = MemTxResult.OK, MemTxResult.DECODE_ERROR


def test_without_an_iommu_the_bound_method_is_the_system_space_s_own() -> None:
    system, _ = system_memory(4096)
    dma = DMASpace()
    dma.bind(system)
    assert dma.read is system.read and dma.write is system.write


def test_a_commit_renews_what_is_bound() -> None:
    system, _ = system_memory(4096)
    dma, gone = DMASpace(system), DMASpace(system)
    gone.bind(BLOCKED)
    old = dma.write
    assert system.root is not None
    system.root.add_subregion(0x10000, RAMRegion("more", ram_block(4096)))
    assert dma.write is system.write and dma.write is not old
    assert dma.write(0x10000, b"x") is OK
    assert gone.write(0x10000, b"x") is DECODE


def test_an_unbound_space_decodes_nothing() -> None:
    dma = DMASpace()
    out = bytearray(b"xx")
    assert dma.read(0, out) is DECODE and out == bytes(2)
    assert dma.write(0, b"x") is DECODE
    assert dma.read_many([0, 8], 4, bytearray(8)) is DECODE
    assert dma.write_many([0, 8], 4, bytes(8)) is DECODE
    assert dma.map(0, 16, DMADirection.TO_DEVICE) is None
    assert dma.write(0, b"") is OK


def test_binding_anew_invalidates_what_was_mapped() -> None:
    system, _ = system_memory(4096)
    dma = DMASpace(system)
    rung: list[int] = []
    mapping = dma.map(0x100, 16, DMADirection.FROM_DEVICE, lambda m: rung.append(m.handle))
    assert mapping is not None
    dma.bind(system)
    assert rung == []
    dma.bind(BLOCKED)
    assert rung == [mapping.handle] and mapping.invalidated
    dma.unmap(mapping, 0)
    assert len(dma.mappings) == 0 and len(system.mappings) == 0


def test_loads_and_stores_in_both_byte_orders() -> None:
    system, ram = system_memory(4096)
    dma = DMASpace(system)
    value = 0x1122334455667788
    for width, load_le, load_be, store_le, store_be in (
        (2, d.ldw_le, d.ldw_be, d.stw_le, d.stw_be),
        (4, d.ldl_le, d.ldl_be, d.stl_le, d.stl_be),
        (8, d.ldq_le, d.ldq_be, d.stq_le, d.stq_be),
    ):
        cut = value & ((1 << 8 * width) - 1)
        assert store_le(dma, 64, value) is OK
        assert bytes(ram.view[64 : 64 + width]) == cut.to_bytes(width, "little")
        assert load_le(dma, 64) == (OK, cut)
        assert store_be(dma, 64, value) is OK
        assert bytes(ram.view[64 : 64 + width]) == cut.to_bytes(width, "big")
        assert load_be(dma, 64) == (OK, cut)
    assert d.stb(dma, 0, 0x1FF) is OK
    assert d.ldub(dma, 0) == (OK, 0xFF)


def test_a_failed_load_is_zero_never_memory() -> None:
    system, ram = system_memory(4096)
    ram.view[4094:] = b"\xff\xff"
    dma = DMASpace(system)
    assert d.ldl_le(dma, 4094) == (DECODE, 0)


def test_a_fill_reaches_every_byte() -> None:
    system, ram = system_memory(1 << 18)
    dma = DMASpace(system)
    length = d.FILL_CHUNK * 2 + 513
    assert d.memory_set(dma, 7, 0xA5, length) is OK
    assert bytes(ram.view[: length + 8]) == bytes(7) + b"\xa5" * length + b"\0"
    assert d.memory_set(dma, (1 << 18) - 100, 1, 200) is DECODE
    assert ram.view[-1] == 1
    assert d.memory_set(dma, 1 << 40, 1, 0) is OK


def test_validity_is_asked_without_moving_data() -> None:
    space, iommu, _ = iommu_space()
    iommu.pages = {0: (0, 1), 1: (0x1000, 3)}
    dma = DMASpace(space)
    assert d.memory_valid(dma, 0x800, 0x1000, DMADirection.TO_DEVICE)
    assert not d.memory_valid(dma, 0x800, 0x1000, DMADirection.FROM_DEVICE)
    assert not d.memory_valid(dma, 0x1800, 0x1000, DMADirection.TO_DEVICE)
    assert d.memory_valid(dma, 1 << 60, 0, DMADirection.TO_DEVICE)
    dma.bind(BLOCKED)
    assert not d.memory_valid(dma, 0, 1, DMADirection.TO_DEVICE)
