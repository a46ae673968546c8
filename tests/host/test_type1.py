"""Type 1 containers: what may be mapped and unmapped, in the kernel's order of checks, and what the device then sees.

The cases follow what the kernel's own selftests cover (``tools/testing/selftests/vfio``, ``.../iommu``): map and unmap,
ranges, everything at once, overflow, alignment, page sizes of 4K, 2M and 1G.
"""

from __future__ import annotations

import struct
from errno import EACCES, EBUSY, EEXIST, EFAULT, EINVAL, ENOENT, ENOMEM, ENOSPC, ENOTTY, EOVERFLOW
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.host.type1_rig import DEVICE, GIB, HVA, MIB, PAGE, Type1Rig
from vfio_model.host import type1
from vfio_model.host.explain import explain
from vfio_model.host.host import Host
from vfio_model.host.mm import Vma
from vfio_model.host.pending import Revocation
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.host.walk import load_tce, load_tces, page_shift_at
from vfio_model.memory.types import MemTxResult
from vfio_model.uapi.containers import IOMMU_TYPES, ContainerKind
from vfio_model.uapi.kvm import KvmIoctl
from vfio_model.uapi.vfio import (
    DIRTY_BITMAP_SIZE_MAX,
    DirtyBitmap,
    DmaMap,
    DmaUnmap,
    InfoCapHeader,
    Ioctl,
    SpaprTceCreate,
    Type1Info,
)
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import ContainerFile, VfioGroup

OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR
TOP = (1 << 64) - PAGE


def refused(call: Any, *args: Any, **kwargs: Any) -> int:
    with pytest.raises(OSError) as error:
        call(*args, **kwargs)
    return error.value.errno


@pytest.fixture(params=["v1", "v2"])
def rig(request: pytest.FixtureRequest) -> Type1Rig:
    return Type1Rig(v2=request.param == "v2")


# Mapping


def test_a_mapping_is_seen_by_the_device_until_it_is_unmapped(rig: Type1Rig) -> None:
    dma = rig.impl()
    for iova in (0, 1 << 21, 1 << 59, TOP):
        rig.map(iova, 5 * PAGE)
        for _ in range(3):
            assert dma.write(iova + 100, b"hello") == OK
        assert rig.ram.view[5 * PAGE + 100 : 5 * PAGE + 105] == b"hello"
        assert rig.unmap(iova, PAGE) == PAGE
        assert dma.write(iova + 100, b"hello") == DECODE_ERROR
    assert rig.mm.locked_vm == 0
    assert rig.memory.free_bytes == rig.free_with_root


@pytest.mark.parametrize(
    ("fields", "errno"),
    [
        ((0, 8, HVA, 0, PAGE), EINVAL),
        ((0, 3, HVA, 0, 0), EINVAL),
        ((0, 0, HVA, 0, 0), EINVAL),
        ((0, 0, HVA, TOP, 2 * PAGE), EOVERFLOW),
        ((0, 3, HVA + 1, TOP, 2 * PAGE), EOVERFLOW),
        ((0, 3, TOP, 0, 2 * PAGE), EOVERFLOW),
        ((0, 0, HVA, 0, PAGE), EINVAL),
        ((0, 7, HVA, 0, PAGE), EINVAL),
        ((0, 3, HVA + 1, 0, PAGE), EINVAL),
        ((0, 3, HVA, 1, PAGE), EINVAL),
        ((0, 3, HVA, 0, PAGE + 1), EINVAL),
        ((0, 3, HVA, 0x10_0000, PAGE), EEXIST),
        ((0, 3, HVA, 0x0F_F000, 3 * PAGE), EEXIST),
        ((0, 3, 0, 0x10_0000, PAGE), EEXIST),
        ((0, 3, 0, 0, PAGE), EFAULT),
        ((0, 3, HVA + 4 * MIB - PAGE, 0, 2 * PAGE), EFAULT),
        ((0, 4, HVA, 0, PAGE), ENOENT),
        ((0, 4, HVA, 0x10_0000, PAGE), EINVAL),
    ],
)
def test_what_may_not_be_mapped(rig: Type1Rig, fields: tuple[int, ...], errno: int) -> None:
    rig.map(0x10_0000, 0)
    before = rig.mm.locked_vm, rig.container.mappings.count, rig.memory.free_bytes
    assert refused(rig.run, Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(*fields).pack()) == errno
    assert (rig.mm.locked_vm, rig.container.mappings.count, rig.memory.free_bytes) == before


def test_arguments_that_are_too_short(rig: Type1Rig) -> None:
    for cmd, size in (
        (Ioctl.VFIO_IOMMU_MAP_DMA, 32),
        (Ioctl.VFIO_IOMMU_UNMAP_DMA, 24),
        (Ioctl.VFIO_IOMMU_GET_INFO, 16),
    ):
        assert refused(rig.run, cmd, bytes(size - 1)) == EFAULT
        assert refused(rig.run, cmd, struct.pack("=I", size - 1).ljust(size, b"\0")) == EINVAL
    assert refused(rig.run, Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE, SpaprTceCreate().pack()) == ENOTTY


def test_the_memlock_limit_counts_each_mapping() -> None:
    rig = Type1Rig(memlock=3 * PAGE)
    rig.map(0, 0, 2 * PAGE)
    assert rig.mm.locked_vm == 2
    assert refused(rig.map, 0x10_0000, 0, 2 * PAGE) == ENOMEM
    assert refused(rig.run, Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, 3, 0, 0x10_0000, 2 * PAGE).pack()) == ENOMEM
    rig.map(0x10_0000, 0)
    assert rig.mm.locked_vm == 3
    rig.unmap(0, 2 * PAGE)
    assert rig.mm.locked_vm == 1


def test_the_number_of_mappings_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type1, "DMA_ENTRY_LIMIT", 3)
    rig = Type1Rig()
    for number in range(3):
        rig.map(number << 12, 0)
    assert refused(rig.map, 0x10_0000, 0) == ENOSPC
    assert refused(rig.map, 0, 0) == EEXIST
    rig.unmap(PAGE, PAGE)
    rig.map(0x10_0000, 0)


def test_only_valid_iova_ranges_can_be_mapped() -> None:
    hole = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))
    rig = Type1Rig(iova_ranges=hole)
    assert rig.container.table.levels == 4
    rig.map(0xFEDF_F000, 0)
    rig.map(0xFEF0_0000, 0)
    rig.map((1 << 48) - PAGE, 0)
    for iova, size in ((0xFEE0_0000, PAGE), (0xFEDF_E000 + PAGE * 2, PAGE), (1 << 48, PAGE), (1 << 59, PAGE)):
        assert refused(rig.map, iova, 0, size) == EINVAL
    assert refused(rig.map, 0xFED0_0000, 0, 0x8_0000 * 4) == EEXIST
    assert rig.impl().write(1 << 59, b"x") == DECODE_ERROR


def test_without_table_memory_nothing_is_mapped() -> None:
    rig = Type1Rig(domain_bytes=8 * PAGE)
    rig.map(0, 0)  # header and records, root, five tables: one page is left
    free = rig.memory.free_bytes
    assert refused(rig.map, 1 << 59, 0) == ENOMEM
    assert rig.memory.free_bytes == free and rig.mm.locked_vm == 1
    rig.map(1 << 21, PAGE)
    assert rig.impl().write(1 << 21, b"x") == OK


def test_permissions(rig: Type1Rig) -> None:
    dma = rig.impl()
    rig.map(0, 0, flags=1)
    rig.map(PAGE, PAGE, flags=2)
    for _ in range(3):
        assert dma.read(0, bytearray(4)) == OK
        assert dma.write(0, b"1234") == DECODE_ERROR
        assert dma.write(PAGE, b"1234") == OK
        assert dma.read(PAGE, bytearray(4)) == DECODE_ERROR


# Unmapping


def test_an_unmap_takes_all_mappings_of_its_range(rig: Type1Rig) -> None:
    for number in range(8):
        rig.map(number * 2 * PAGE, number * PAGE)
    assert rig.unmap(0, 4 * PAGE) == 2 * PAGE
    assert rig.unmap(0, 4 * PAGE) == 0
    assert rig.unmap(0, 1 << 63) == 6 * PAGE
    assert rig.container.mappings.count == 0 and rig.mm.locked_vm == 0


def test_unmap_all(rig: Type1Rig) -> None:
    for iova in (0, 1 << 40, TOP):
        rig.map(iova, 0)
    for iova, size in ((0, PAGE), (PAGE, 0)):
        assert refused(rig.unmap, iova, size, 2) == EINVAL
    assert rig.unmap(0, 0, 2) == 3 * PAGE
    assert rig.unmap(0, 0, 2) == 0
    assert rig.memory.free_bytes == rig.free_with_root


@pytest.mark.parametrize(
    ("iova", "size", "flags", "errno"),
    [
        (0, PAGE, 8, EINVAL),
        (0, 0, 0, EINVAL),
        (1, PAGE, 0, EINVAL),
        (0, PAGE - 1, 0, EINVAL),
        (TOP, 2 * PAGE, 0, EOVERFLOW),
        (0, 0, 3, EINVAL),
    ],
)
def test_what_may_not_be_unmapped(rig: Type1Rig, iova: int, size: int, flags: int, errno: int) -> None:
    rig.map(0, 0)
    assert refused(rig.unmap, iova, size, flags) == errno
    assert rig.container.mappings.count == 1


def test_version_2_cuts_no_mapping() -> None:
    rig = Type1Rig()
    rig.map(4 * PAGE, 0, 4 * PAGE)
    for iova, size in ((4 * PAGE, PAGE), (5 * PAGE, PAGE), (7 * PAGE, PAGE), (0, 5 * PAGE), (6 * PAGE, 16 * PAGE)):
        assert refused(rig.unmap, iova, size) == EINVAL
    assert rig.unmap(0, 8 * PAGE) == 4 * PAGE


def test_version_1_takes_what_the_range_begins_and_nothing_from_inside() -> None:
    rig = Type1Rig(v2=False)
    rig.map(4 * PAGE, 0, 4 * PAGE)
    assert rig.unmap(5 * PAGE, PAGE) == 0
    assert rig.unmap(7 * PAGE, 16 * PAGE) == 0
    assert rig.unmap(4 * PAGE, PAGE) == 4 * PAGE
    rig.map(4 * PAGE, 0, 4 * PAGE)
    assert rig.unmap(0, 5 * PAGE) == 4 * PAGE


def test_an_address_can_be_invalidated_and_given_anew(rig: Type1Rig) -> None:
    dma = rig.impl()
    rig.map(0, PAGE, 2 * PAGE)
    assert rig.unmap(0, 2 * PAGE, 4) == 2 * PAGE
    assert dma.write(0, b"x") == OK, "what is mapped stays so"
    assert refused(rig.unmap, 0, 2 * PAGE, 4) == EINVAL
    rig.container.groups.clear()
    assert refused(rig.container.attach, rig.group) == EBUSY
    rig.container.groups.append(rig.group)
    assert refused(rig.map, 0, PAGE, PAGE, 4) == EINVAL
    rig.map(0, PAGE, 2 * PAGE, 4)
    assert refused(rig.map, 0, PAGE, 2 * PAGE, 4) == EINVAL
    assert rig.unmap(0, 2 * PAGE) == 2 * PAGE


def test_an_emulated_iommu_needs_the_addresses(rig: Type1Rig) -> None:
    rig.map(0, 0)
    rig.group.iommu = "emulated"
    assert refused(rig.unmap, 0, PAGE, 4) == EBUSY


# Information


def capabilities(info: bytes) -> dict[int, bytes]:
    found, at = {}, Type1Info.unpack(info).cap_offset
    while at:
        header = InfoCapHeader.unpack(info[at:])
        found[header.id] = info[at + 8 : header.next or len(info)]
        at = header.next
    return found


def test_info_has_page_sizes_and_capabilities(rig: Type1Rig) -> None:
    rig.map(0, 0)
    short = Type1Info.unpack(rig.run(Ioctl.VFIO_IOMMU_GET_INFO, Type1Info().pack()))
    assert (short.flags, short.cap_offset) == (3, 0) and short.argsz > Type1Info.SIZE
    assert short.iova_pgsizes == PAGE | 2 * MIB | GIB
    info = rig.run(Ioctl.VFIO_IOMMU_GET_INFO, Type1Info(short.argsz).pack().ljust(short.argsz, b"\0"))
    chain = capabilities(info)
    assert struct.unpack_from("=IIQQ", chain[1]) == (1, 0, 0, (1 << 64) - 1)
    assert struct.unpack_from("=I4xQQ", chain[2]) == (0, PAGE, DIRTY_BITMAP_SIZE_MAX)
    assert struct.unpack_from("=I", chain[3]) == (65534,)
    oldest = rig.run(Ioctl.VFIO_IOMMU_GET_INFO, struct.pack("=IIQ", 16, 0, 0))
    assert len(oldest) == 16 and struct.unpack("=IIQ", oldest)[2] == PAGE | 2 * MIB | GIB


def test_the_hosts_page_is_the_smallest() -> None:
    rig = Type1Rig(host_page=0x1_0000, backing=0x1_0000)
    assert rig.container.pgsizes == 0x1_0000 | 2 * MIB | GIB
    assert refused(rig.map, 0, 0, PAGE) == EINVAL
    rig.map(0x1_0000, 0, 0x1_0000)
    assert rig.sizes() == {PAGE: 16}
    assert rig.mm.locked_vm == 1


# Page sizes


@pytest.mark.parametrize(("backing", "shift"), [(PAGE, 12), (2 * MIB, 21), (GIB, 30)])
def test_leaves_are_as_large_as_the_backing(backing: int, shift: int) -> None:
    rig = Type1Rig(size=2 * GIB, backing=backing)
    size = max(backing, 2 * MIB)
    rig.map(GIB, 0, size)
    assert rig.sizes() == {1 << shift: size >> shift}
    window, domain = rig.container.table.window, rig.memory.words
    assert page_shift_at(domain, window, GIB + size - 1) == shift
    assert page_shift_at(domain, window, 1 << 50) == 12
    steps = explain(rig.device.pe.words, domain, rig.host.segments, GIB + size - 1, True)
    assert (steps[-1].what, steps[-1].value) == ("memory", place(rig) + size - 1)
    assert steps[-3].what.startswith("leaf" if shift > 12 else "TCE")
    dma = rig.impl()
    for at in (0, size - 1, size // 2, size // 2 + PAGE - 2):
        for _ in range(2):
            assert dma.write(GIB + at, b"z") == OK
        assert rig.ram.view[at] == ord("z")
    assert dma.write(GIB + size, b"z") == DECODE_ERROR
    assert rig.unmap(GIB, size) == size
    assert dma.write(GIB, b"z") == DECODE_ERROR
    assert rig.memory.free_bytes == rig.free_with_root


def test_leaves_of_all_sizes_in_one_mapping() -> None:
    rig = Type1Rig(size=3 * GIB, backing=GIB)
    rig.map(GIB - 2 * MIB - PAGE, GIB - 2 * MIB - PAGE, GIB + 4 * MIB + 2 * PAGE)
    assert rig.sizes() == {PAGE: 2, 2 * MIB: 2, GIB: 1}
    assert rig.unmap(GIB - 2 * MIB - PAGE, GIB + 4 * MIB + 2 * PAGE) == GIB + 4 * MIB + 2 * PAGE
    rig.map(PAGE, 0, GIB)  # addresses that are not alike modulo a large page
    assert set(rig.sizes()) == {PAGE}
    rig.unmap(PAGE, GIB)
    assert rig.memory.free_bytes == rig.free_with_root


@pytest.mark.parametrize("power", range(12, 22))
def test_alignment_sweep(power: int) -> None:
    rig = Type1Rig(size=8 * MIB, backing=2 * MIB)
    size = 1 << power
    for iova, offset in ((0, 0), (size, 0), (0, size), (3 * size, size), (2 * MIB - size, 2 * MIB - size)):
        rig.map(iova, offset, size)
        assert rig.impl().write(iova + size - 1, b"k") == OK
        assert rig.ram.view[offset + size - 1] == ord("k")
        rig.ram.view[offset + size - 1] = 0
        assert rig.unmap(iova, size) == size
    assert rig.memory.free_bytes == rig.free_with_root


# Batches


def structs(iova: int, size: int, offsets: list[int], flags: int = 3) -> bytes:
    return b"".join(
        DmaMap(0, flags, HVA + offset, iova + number * size, size).pack() for number, offset in enumerate(offsets)
    )


@pytest.mark.parametrize("size", [PAGE, 16 * PAGE])
@pytest.mark.parametrize("hpa", ["contiguous", "scatter"])
def test_a_batch_ends_as_one_by_one(size: int, hpa: Any) -> None:
    offsets = [(number * 37 % 60) * size for number in range(60)]
    backing = 16 * PAGE
    one, many = (Type1Rig(hpa=hpa, backing=backing) for _ in range(2))
    for number, offset in enumerate(offsets):
        one.map(MIB - size * 3 + number * size, offset, size)
    assert many.run_many(Ioctl.VFIO_IOMMU_MAP_DMA, structs(MIB - size * 3, size, offsets), len(offsets))
    assert sorted(one.container.table.mapped()) == sorted(many.container.table.mapped())
    assert one.mm.locked_vm == many.mm.locked_vm and one.container.dma_avail == many.container.dma_avail
    unmaps = b"".join(DmaUnmap(0, 0, MIB + number * size, size).pack() for number in range(20))
    for number in range(20):
        one.unmap(MIB + number * size, size)
    assert many.run_many(Ioctl.VFIO_IOMMU_UNMAP_DMA, unmaps, 20)
    assert sorted(one.container.table.mapped()) == sorted(many.container.table.mapped())
    assert one.mm.locked_vm == many.mm.locked_vm and one.container.dma_avail == many.container.dma_avail
    assert many.unmap(0, 1 << 63) == one.unmap(0, 1 << 63) == 40 * size
    assert many.mm.locked_vm == 0 and many.memory.free_bytes == many.free_with_root


def test_what_is_unusual_is_left_to_the_way_one_by_one() -> None:
    rig = Type1Rig(memlock=64 * PAGE)
    offsets = [number * PAGE for number in range(16)]
    rig.map(8 * PAGE, 0)
    before = sorted(rig.container.table.mapped())
    for args in (
        structs(0, PAGE, offsets),
        structs(MIB, PAGE, offsets, 4),
        structs(MIB, PAGE, [*offsets[:-1], 8 * MIB]),
        structs(MIB + 1, PAGE, offsets),
        structs(MIB, 2048, offsets),
        structs(MIB, 16 * PAGE, [0] * 16),
    ):
        assert not rig.run_many(Ioctl.VFIO_IOMMU_MAP_DMA, args, 16)
    cut = b"".join(DmaUnmap(0, 0, number * PAGE * 2, 2 * PAGE).pack() for number in range(16))
    assert not rig.run_many(Ioctl.VFIO_IOMMU_UNMAP_DMA, cut, 16)
    assert sorted(rig.container.table.mapped()) == before and rig.mm.locked_vm == 1


# Against a model


@st.composite
def programs(draw: st.DrawFn) -> list[tuple[str, int, int, int]]:
    step = st.tuples(
        st.sampled_from(["map", "map", "unmap", "batch"]),
        st.sampled_from([0, 1, 2, 3, 511, 512, 513, 1024, 1 << 18, (1 << 18) + 512, (1 << 47)]),
        st.sampled_from([1, 2, 3, 16, 511, 512, 1024]),
        st.integers(0, 1024),
    )
    return draw(st.lists(step, min_size=1, max_size=25))


@settings(max_examples=40, deadline=None)
@given(programs(), st.booleans(), st.sampled_from(["contiguous", "scatter"]))
def test_the_table_is_the_model(program: list[tuple[str, int, int, int]], v2: bool, hpa: Any) -> None:
    rig = Type1Rig(v2=v2, size=8 * MIB, backing=2 * MIB, hpa=hpa, dirty_map=False)
    model: dict[int, tuple[int, int]] = {}
    """Mappings: first page → (pages, page of RAM)."""

    def hit(first: int, count: int) -> list[int]:
        return [start for start in model if start < first + count and first < start + model[start][0]]

    for what, first, count, ram in program:
        if what == "map":
            good = not hit(first, count)
            if good:
                rig.map(first << 12, ram << 12, count << 12)
                model[first] = count, ram
            else:
                assert refused(rig.map, first << 12, ram << 12, count << 12) == EEXIST
        elif what == "batch":
            good = not hit(first, 16)
            args = structs(first << 12, PAGE, [(ram + n * 5 % 16) << 12 for n in range(16)])
            assert rig.run_many(Ioctl.VFIO_IOMMU_MAP_DMA, args, 16) is good
            if good:
                model.update({first + n: (1, ram + n * 5 % 16) for n in range(16)})
        else:
            found = hit(first, count)
            cuts = [s for s in found if s < first or s + model[s][0] > first + count]
            if v2 and cuts:
                assert refused(rig.unmap, first << 12, count << 12) == EINVAL
                continue
            gone = [] if any(s < first for s in found) else found
            assert rig.unmap(first << 12, count << 12) == sum(model[s][0] for s in gone) << 12
            for start in gone:
                del model[start]
    pages = {start + n: ram + n for start, (count, ram) in model.items() for n in range(count)}
    place = rig.mm.find(HVA).segment.hpa  # type: ignore[union-attr]
    seen = {}
    for iova, size, entry in rig.container.table.mapped():
        for n in range(size >> 12):
            seen[(iova >> 12) + n] = (entry & ~7) + (n << 12)
    assert seen == {page: place.to_hpa(ram << 12) for page, ram in pages.items()}
    assert rig.mm.locked_vm == len(pages) and rig.container.mappings.count == len(model)
    window, words = rig.container.table.window, rig.memory.words
    import numpy as np  # noqa: PLC0415

    probe = sorted({*pages, *(page + 1 for page in pages), 0, 5, 1 << 40})
    many = load_tces(np.frombuffer(words, "u8"), window, np.array(probe, "i8"))
    assert many.tolist() == [load_tce(words, window, page << 12) for page in probe]
    rig.unmap(0, 0, 2)
    assert rig.memory.free_bytes == rig.free_with_root and rig.mm.locked_vm == 0


# Dirty pages


def test_version_1_tracks_nothing() -> None:
    rig = Type1Rig(v2=False)
    assert refused(rig.track, 1) == EACCES


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("backing", [PAGE, 2 * MIB])
def test_the_bitmap_says_what_was_written(compiled: bool, backing: int) -> None:
    rig = Type1Rig(backing=backing)
    dma = rig.impl(compiled=compiled)
    rig.map(2 * MIB, 0, 2 * MIB)
    rig.map(8 * MIB, 2 * MIB, PAGE * 8)
    assert dma.write(2 * MIB, b"before") == OK
    rig.track(1)
    assert rig.written(2 * MIB, 2 * MIB) == set()
    for page in (3, 7, 7, 500):
        assert dma.write(2 * MIB + page * PAGE + 5, b"x") == OK
    assert dma.write(2 * MIB + 10 * PAGE - 2, b"1234") == OK
    assert dma.read(2 * MIB + 20 * PAGE, bytearray(4)) == OK
    assert dma.write(8 * MIB + PAGE, bytes(2 * PAGE)) == OK
    assert rig.written(2 * MIB, 2 * MIB, into=b"\1") == {0, 3, 7, 9, 10, 500}
    assert rig.written(2 * MIB, 2 * MIB) == set(), "a question clears"
    assert rig.written(0, 16 * MIB) == {8 * MIB // PAGE + 1, 8 * MIB // PAGE + 2}
    dma.write_many([2 * MIB + n * PAGE * 2 for n in range(40)], 8, bytes(320))
    assert rig.written(2 * MIB, 2 * MIB) == {n * 2 for n in range(40)}
    rig.track(2)
    dma.write(2 * MIB, b"x")
    assert refused(rig.written, 2 * MIB, 2 * MIB) == EINVAL
    rig.track(1)
    assert rig.written(2 * MIB, 2 * MIB) == set()


def test_what_a_bitmap_may_not_be_asked() -> None:
    rig = Type1Rig()
    rig.map(4 * PAGE, 0, 4 * PAGE)
    assert refused(rig.written, 0, 8 * PAGE) == EINVAL
    rig.track(1)
    rig.track(1)
    for flags in (0, 3, 8):
        assert refused(rig.run, Ioctl.VFIO_IOMMU_DIRTY_PAGES, DirtyBitmap(0, flags).pack()) == EINVAL
    assert refused(rig.track, 4) == EINVAL
    assert refused(rig.written, 0, 8 * PAGE, 2 * PAGE) == EINVAL
    assert refused(rig.written, 0, 5 * PAGE) == EINVAL
    assert refused(rig.written, 1, 8 * PAGE) == EINVAL
    assert refused(rig.written, TOP, 8 * PAGE) == EINVAL
    assert rig.written(0, 9 * PAGE) == set()


def test_an_unmap_collects_what_was_written_until_its_end() -> None:
    rig = Type1Rig()
    dma = rig.impl()
    rig.map(0, 0, 16 * PAGE)
    assert refused(rig.unmap_dirty, 0, 16 * PAGE) == EINVAL
    rig.track(1)
    assert dma.write(2 * PAGE, b"x") == OK
    # A section that is under way when the entries go: it notes its page before the lane is even.
    rig.on_wait = lambda: rig.dirty.__setitem__((place(rig) + 9 * PAGE - (1 << 32)) >> 12, 1)
    assert rig.unmap_dirty(0, 16 * PAGE) == {2, 9}
    assert rig.container.mappings.count == 0 and rig.mm.locked_vm == 0


def place(rig: Type1Rig) -> int:
    vma = rig.mm.find(HVA)
    assert vma is not None
    return vma.segment.hpa.base


def test_all_that_a_writer_could_write_is_dirty_when_it_is_gone() -> None:
    rig = Type1Rig()
    rig.map(0, 0, 4 * PAGE)
    rig.map(4 * PAGE, 0, 4 * PAGE, flags=1)
    rig.track(1)
    rig.port.device_closed(1)
    assert rig.written(0, 8 * PAGE) == {0, 1, 2, 3}
    assert rig.written(0, 8 * PAGE) == set()


def test_a_writer_without_a_map_may_have_written_everything() -> None:
    rig = Type1Rig(dirty_map=False)
    rig.map(0, 0, 4 * PAGE)
    rig.track(1)
    assert rig.written(0, 4 * PAGE) == rig.written(0, 4 * PAGE) == {0, 1, 2, 3}


def test_part_of_a_batch_can_be_asked_for() -> None:
    rig = Type1Rig()
    dma = rig.impl()
    assert rig.run_many(Ioctl.VFIO_IOMMU_MAP_DMA, structs(0, PAGE, [n * PAGE for n in range(32)]), 32)
    rig.track(1)
    for page in (1, 5, 30):
        assert dma.write(page * PAGE, b"x") == OK
    assert rig.written(4 * PAGE, 4 * PAGE) == {1}
    assert rig.written(0, 32 * PAGE) == {1, 30}
    assert rig.unmap(0, 32 * PAGE) == 32 * PAGE


@pytest.mark.parametrize(("backing", "iova"), [(PAGE, 0), (2 * MIB, PAGE)])
def test_a_mapping_whose_tables_can_not_fit_is_refused_before_any_is_made(backing: int, iova: int) -> None:
    rig = Type1Rig(domain_bytes=MIB)
    segment = rig.host.place_segment("far", 1 << 40, backing)
    rig.mm.declare(Vma(HVA + (1 << 44), 1 << 40, segment))
    made = DmaMap(0, 3, HVA + (1 << 44), iova, 1 << 40).pack()
    assert refused(rig.container.ioctl, rig.mm, Ioctl.VFIO_IOMMU_MAP_DMA, made, Revocation()) == ENOMEM
    assert rig.memory.free_bytes == rig.free_with_root and not rig.container.table.take_retired()
    assert rig.mm.locked_vm == 0 and len(rig.container.table) == 1


@pytest.mark.parametrize(
    ("kind", "info", "dirty"),
    [
        ("type1v2", "VFIO_IOMMU_GET_INFO", "VFIO_IOMMU_DIRTY_PAGES"),
        ("spapr-v2", "VFIO_IOMMU_SPAPR_TCE_GET_INFO", "VFIO_IOMMU_SPAPR_REGISTER_MEMORY"),
    ],
)
def test_a_number_with_two_meanings_is_named_by_the_containers_type(kind: ContainerKind, info: str, dirty: str) -> None:
    groups = (GroupSpec(26, (DeviceSpec(DEVICE, "edu"),)),)
    host = Host(HostTopology(groups=groups, containers=("spapr-v2", "type1v2"), domain_bytes=16 * MIB))
    port = DirectPort(host, host.create_mm())
    container = ContainerFile(port, port.open("/dev/vfio/vfio"))
    VfioGroup(port, port.open("/dev/vfio/26")).set_container(container.handle)
    container.set_iommu(IOMMU_TYPES[kind])
    assert host.ioctl_name(container.handle, Ioctl.VFIO_IOMMU_GET_INFO) == info
    assert host.ioctl_name(container.handle, Ioctl.VFIO_IOMMU_DIRTY_PAGES) == dirty
    assert host.ioctl_name(container.handle, KvmIoctl.KVM_CHECK_EXTENSION) == "KVM_CHECK_EXTENSION"
