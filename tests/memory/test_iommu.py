"""DMA through IOMMU regions: pieces, permissions, levels."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.memory.fakes import PAGE, DictIOMMU, iommu_space, system_memory
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.region import MemoryRegion
from vfio_model.memory.translation import Translation, ram_target
from vfio_model.memory.types import DMADirection, IOMMUAccessFlags, MemTxResult

OK, DECODE = MemTxResult.OK, MemTxResult.DECODE_ERROR
RO, WO, RW = 1, 2, 3


def test_a_transfer_is_split_by_page_and_stops_at_the_hole() -> None:
    space, iommu, ram = iommu_space()
    iommu.pages = {1: (0x8000, RW), 2: (0x3000, RW)}
    data = bytes(range(256)) * 24  # 0x1800 bytes
    assert space.write(0x1C00, data) is DECODE
    assert bytes(ram.view[0x8C00:0x9000]) == data[:0x400]
    assert bytes(ram.view[0x3000:0x4000]) == data[0x400:0x1400]
    out = bytearray(b"?" * 0x1800)
    assert space.read(0x1C00, out) is DECODE
    assert out == data[:0x1400] + bytes(0x400)


def test_a_missing_permission_is_like_a_missing_page() -> None:
    space, iommu, ram = iommu_space()
    iommu.pages = {0: (0, RO), 1: (PAGE, WO)}
    assert space.write(0, b"x") is DECODE and ram.view[0] == 0
    out = bytearray(b"?")
    assert space.read(PAGE, out) is DECODE and out == b"\0"
    assert space.read(0, out) is OK
    assert space.write(PAGE, b"x") is OK


@given(
    st.dictionaries(st.integers(0, 5), st.tuples(st.integers(0, 9), st.integers(0, 3)), max_size=6),
    st.integers(0, 6 * PAGE),
    st.integers(1, 3 * PAGE),
)
def test_pieces_equal_a_walk_byte_by_byte(pages: dict[int, tuple[int, int]], start: int, length: int) -> None:
    space, iommu, ram = iommu_space(8 * PAGE)  # pages 8 and 9 translate to nothing
    iommu.pages = {iova: (target * PAGE, perm) for iova, (target, perm) in pages.items()}
    ram.view[:] = bytes(i % 251 for i in range(len(ram.view)))

    def good(need: int) -> list[int]:
        found: list[int] = []
        for iova in range(start, start + length):
            target, perm = iommu.pages.get(iova // PAGE, (0, 0))
            if not perm & need or target >= 8 * PAGE:
                break
            found.append(target + iova % PAGE)
        return found

    readable = good(RO)
    out = bytearray(b"\xff" * length)
    assert space.read(start, out) is (OK if len(readable) == length else DECODE)
    assert out == bytes(ram.view[a] for a in readable) + bytes(length - len(readable))
    writable = good(WO)
    expected = bytearray(ram.view)
    data = bytes(255 - i % 250 for i in range(length))
    for i, a in enumerate(writable):
        expected[a] = data[i]
    assert space.valid(start, length, DMADirection.FROM_DEVICE) is (len(writable) == length)
    assert space.write(start, data) is (OK if len(writable) == length else DECODE)
    assert bytes(ram.view) == expected


def two_levels() -> tuple[AddressSpace, DictIOMMU, DictIOMMU]:
    """Device -> 64 KiB pages -> 4 KiB pages -> RAM."""
    system, _ = system_memory(1 << 20)
    inner = DictIOMMU(system)
    outer = DictIOMMU(AddressSpace("inner", inner), page=65536)
    return AddressSpace("device", outer), outer, inner


def test_two_levels_translate_with_the_smaller_page() -> None:
    space, outer, inner = two_levels()
    outer.pages = {1: (0x40000, RW)}
    inner.pages = {0x40: (0x7000, RW), 0x41: (0x5000, RO)}
    found = space.translate(0x10010, True, 0x10000)
    assert isinstance(found, Translation)
    assert (found.offset, found.length, found.page_mask) == (0x7010, 0xFF0, 0xFFF)
    assert space.write(0x10FFC, b"12345678") is DECODE  # the second 4 KiB page is read-only
    out = bytearray(8)
    assert space.read(0x10FFC, out) is OK and out == b"1234\0\0\0\0"
    assert space.translate(0x11000, True) is None


def test_the_page_mask_is_the_and_of_all_levels_in_either_order() -> None:
    system, _ = system_memory(1 << 20)
    inner = DictIOMMU(system, page=65536)
    outer = DictIOMMU(AddressSpace("inner", inner))
    outer.pages, inner.pages = {1: (0x13000, RW)}, {1: (0x40000, RW)}
    found = AddressSpace("device", outer).translate(0x1010, True, 0x10000)
    assert found is not None
    assert (found.offset, found.length, found.page_mask) == (0x43010, 0xFF0, 0xFFF)


def test_an_iommu_region_placed_in_a_window_translates_relative_addresses() -> None:
    system, ram = system_memory(1 << 16)
    iommu = DictIOMMU(system, 1 << 20)
    iommu.pages = {0: (0x2000, RW)}
    root = MemoryRegion("bus", 1 << 64)
    root.add_subregion(1 << 59, iommu)
    space = AddressSpace("device", root)
    assert space.write((1 << 59) + 8, b"hi") is OK
    assert bytes(ram.view[0x2008:0x200A]) == b"hi"
    assert iommu.translations == [8]


def entry(system: AddressSpace, address: int, mask: int, perm: IOMMUAccessFlags) -> IOMMUTLBEntry:
    return IOMMUTLBEntry(system, 0, address, mask, perm)


def test_ram_target_of_an_entry() -> None:
    system, _ = system_memory(1 << 16)
    found = ram_target(entry(system, 0x3000, 0xFFF, IOMMUAccessFlags.RW))
    assert isinstance(found, Translation) and found.offset == 0x3000
    outside = ram_target(entry(system, 1 << 40, 0xFFF, IOMMUAccessFlags.RW))
    assert outside == "iommu map to non memory area 10000000000"
    system, _ = system_memory(0x1800)
    cut = ram_target(entry(system, 0x1000, 0xFFF, IOMMUAccessFlags.RW))
    assert cut == "iommu has granularity incompatible with target AS"
