"""Accesses of a space that goes on after what fails."""

from __future__ import annotations

from tests.memory.fakes import PAGE, DictIOMMU, ram_block, system_memory
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion, RAMRegion
from vfio_model.memory.types import MemTxResult

OK, ERROR, DECODE = MemTxResult.OK, MemTxResult.ERROR, MemTxResult.DECODE_ERROR


class Words:
    """Four words of registers; the third is broken."""

    min_access_size, max_access_size = 4, 8

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []

    def read(self, addr: int, size: int) -> int | None:
        return None if addr == 8 else 0x1111_1111_1111_1111

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        self.seen.append((addr, size, value))
        return ERROR if addr == 8 else OK


def test_a_page_that_is_not_mapped_is_passed_over() -> None:
    system, ram = system_memory(8 * PAGE)
    iommu = DictIOMMU(system)
    space = AddressSpace("dma", iommu, goes_on=True)
    iommu.pages = {0: (0, 3), 2: (5 * PAGE, 3)}
    data = bytes(range(256)) * 48
    assert space.write(0x800, data[:0x2000]) is DECODE
    assert ram.view[0x800:PAGE] == data[:0x800]
    assert ram.view[5 * PAGE : 5 * PAGE + 0x800] == data[0x1800:0x2000]
    out = bytearray(b"?" * 0x2000)
    assert space.read(0x800, out) is DECODE
    assert out == data[:0x800] + bytes(PAGE) + data[0x1800:0x2000]
    assert space.read(0x2010, bytearray(4)) is OK


def test_what_a_region_does_not_take_is_passed_over() -> None:
    """An access at an odd address has pieces that are too small, and one in the middle that is not."""
    root, ops = MemoryRegion("root", 1 << 20), Words()
    root.add_subregion(0x1000, IORegion("words", 16, ops))
    space = AddressSpace("memory", root, goes_on=True)
    out = bytearray(b"?" * 8)
    assert space.read(0x1001, out) is DECODE and out == b"\0\0\0\x11\x11\x11\x11\0"
    assert space.write(0x1002, bytes(range(8))) is DECODE and ops.seen == [(4, 4, 0x05040302)]
    out = bytearray(b"?" * 16)
    assert space.read(0x1000, out) is ERROR and out == b"\x11" * 8 + bytes(8)
    assert AddressSpace("other", root).read(0x1001, out) is DECODE and out == bytes(16)


def test_holes_between_ranges_are_passed_over() -> None:
    root, block = MemoryRegion("root", 1 << 20), ram_block(2 * PAGE)
    ram = RAMRegion("ram", block)
    root.add_subregion(PAGE, AliasRegion("low", ram, 0, PAGE))
    root.add_subregion(3 * PAGE, AliasRegion("high", ram, PAGE, PAGE))
    space = AddressSpace("memory", root, goes_on=True)
    assert space.write(0xFF0, b"a" * 0x3020) is DECODE
    assert bytes(block.view) == b"a" * (2 * PAGE)
    out = bytearray(b"?" * 0x3020)
    assert space.read(0xFF0, out) is DECODE
    assert out == bytes(0x10) + b"a" * PAGE + bytes(PAGE) + b"a" * PAGE + bytes(0x10)
    assert space.read(0xF_FFF0, bytearray(0x20)) is DECODE and space.read(0, bytearray(0)) is OK
