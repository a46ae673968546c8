"""Maps of a device's user and DMA through them, against a dict of bytes."""

from __future__ import annotations

import errno
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_model.memory.dma import BLOCKED
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.mapped_dma import MappedDma
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.types import DMADirection, MemTxResult
from vfio_model.ranges import U64_MAX

UNIT = 64
"""Bytes of a map in these tests."""
UNITS = 96


@dataclass
class File:
    """Memory that maps are cut from."""

    view: memoryview


class Rig:
    """Maps over two files, and what each address should hold."""

    def __init__(self) -> None:
        self.files = [File(memoryview(bytearray(UNIT * UNITS))) for _ in range(2)]
        self.maps: IovaMaps[File] = IovaMaps()
        self.refused: list[tuple[int, int, bool, str]] = []
        self.dma = MappedDma(self.maps, BLOCKED, lambda *failure: self.refused.append(failure))
        self.oracle: dict[int, tuple[int, File, int]] = {}
        """By address: permission, file, offset."""

    def add(self, unit: int, count: int, perm: int, number: int, at: int) -> None:
        file, offset = self.files[number], at * UNIT
        view = file.view[offset : offset + count * UNIT]
        iova = unit * UNIT
        if any(iova + place in self.oracle for place in range(count * UNIT)):
            with pytest.raises(OSError) as refused:
                self.maps.add(IovaMap(iova, len(view), perm, view, file, offset))
            assert refused.value.errno == errno.EEXIST
            return
        self.maps.add(IovaMap(iova, len(view), perm, view, file, offset))
        for place in range(count * UNIT):
            self.oracle[iova + place] = (perm, file, offset + place)

    def allowed(self, iova: int, size: int, wanted: int) -> int:
        """How many leading bytes may be accessed."""
        good = 0
        while good < size and self.oracle.get(iova + good, (0,))[0] & wanted:
            good += 1
        return good

    def bytes_at(self, iova: int, size: int) -> bytes:
        return bytes(file.view[at] for _, file, at in (self.oracle[iova + place] for place in range(size)))


MAPS = st.lists(
    st.tuples(
        st.integers(0, UNITS - 1), st.integers(1, 4), st.integers(0, 3), st.integers(0, 1), st.integers(0, UNITS - 4)
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(MAPS, st.integers(0, UNIT * UNITS), st.integers(1, 5 * UNIT), st.binary(min_size=1, max_size=1))
def test_single_accesses_move_what_is_allowed_and_zero_the_rest(
    maps: list[tuple[int, int, int, int, int]], iova: int, size: int, byte: bytes
) -> None:
    rig = Rig()
    for each in maps:
        rig.add(*each)
    for file in rig.files:
        file.view[:] = bytes(index * 7 & 0xFF for index in range(len(file.view)))
    out = bytearray(b"\xee" * size)
    good = rig.allowed(iova, size, READ)
    assert (rig.dma.read(iova, out) is MemTxResult.OK) == (good == size)
    assert bytes(out[:good]) == rig.bytes_at(iova, good) and not any(out[good:])
    good = rig.allowed(iova, size, WRITE)
    assert (rig.dma.write(iova, byte * size) is MemTxResult.OK) == (good == size)
    assert bool(rig.refused) == (rig.allowed(iova, size, READ) < size or good < size)


@settings(max_examples=60)
@given(
    MAPS,
    st.lists(st.integers(0, UNIT * UNITS), min_size=64, max_size=90),
    st.sampled_from([1, 4, 16, UNIT]),
    st.booleans(),
)
def test_many_at_once_are_as_one_after_another(
    maps: list[tuple[int, int, int, int, int]], iovas: list[int], size: int, aligned: bool
) -> None:
    if aligned:
        iovas = [iova & -size for iova in iovas]
    many, single = Rig(), Rig()
    for rig in (many, single):
        for each in maps:
            rig.add(*each)
        for number, file in enumerate(rig.files):
            file.view[:] = bytes((index * 7 + number) & 0xFF for index in range(len(file.view)))
    data = bytes(index * 13 & 0xFF for index in range(size * len(iovas)))
    got, expected = bytearray(len(data)), bytearray(len(data))
    results = many.dma.read_many(iovas, size, got), many.dma.write_many(iovas, size, data)
    assert results == (_each(single, iovas, size, expected), _each(single, iovas, size, data))
    assert got == expected
    assert [bytes(file.view) for file in many.files] == [bytes(file.view) for file in single.files]
    assert len(many.refused) == len(single.refused)


def _each(rig: Rig, iovas: list[int], size: int, buffer: bytes | bytearray) -> MemTxResult:
    for number, iova in enumerate(iovas):
        part = memoryview(buffer)[number * size : (number + 1) * size]
        result = rig.dma.read(iova, part) if isinstance(buffer, bytearray) else rig.dma.write(iova, part)
        if result:
            return result
    return MemTxResult.OK


@settings(max_examples=60)
@given(MAPS, st.integers(0, UNITS), st.integers(1, UNITS))
def test_an_unmap_takes_whole_maps_or_nothing(
    maps: list[tuple[int, int, int, int, int]], unit: int, count: int
) -> None:
    rig = Rig()
    for each in maps:
        rig.add(*each)
    start, last = unit * UNIT, (unit + count) * UNIT - 1
    before = list(rig.maps)
    touched = [known for known in before if known.iova <= last and start <= known.last]
    if all(start <= known.iova and known.last <= last for known in touched):
        assert rig.maps.remove(start, last) == touched
        assert list(rig.maps) == [known for known in before if known not in touched]
    else:
        with pytest.raises(OSError):
            rig.maps.remove(start, last)
        assert list(rig.maps) == before


def test_a_mapping_is_in_place_for_who_hears_of_its_end_and_a_copy_for_others() -> None:
    rig = Rig()
    rig.add(0, 4, READ | WRITE, 0, 0)
    told: list[DMAMapping] = []
    mapping = rig.dma.map(8, 10 * UNIT, DMADirection.FROM_DEVICE, told.append)
    assert mapping is not None and mapping.length == 4 * UNIT - 8 and not mapping.bounce
    mapping.view[:4] = b"here"
    assert bytes(rig.files[0].view[8:12]) == b"here"
    rig.dma.mappings.invalidate(0, 7)
    assert told == []
    assert rig.dma.mappings.invalidate(0, 8) == [mapping] and told == [mapping]
    mapping.unmap(4)
    assert not len(rig.dma.mappings)
    copy = rig.dma.map(0, 16, DMADirection.FROM_DEVICE)
    assert copy is not None and copy.bounce
    copy.view[:4] = b"late"
    assert bytes(rig.files[0].view[:4]) != b"late"
    copy.unmap(4)
    assert bytes(rig.files[0].view[:4]) == b"late"


def test_a_failure_says_where_and_what_is_near() -> None:
    rig = Rig()
    rig.add(2, 2, READ, 0, 0)
    out = bytearray(8)
    assert rig.dma.read(0, out) is MemTxResult.DECODE_ERROR
    assert rig.dma.write(2 * UNIT, b"x") is MemTxResult.ACCESS_ERROR
    assert rig.dma.read(U64_MAX - 3, out) is MemTxResult.DECODE_ERROR
    assert rig.dma.map(UNIT, 8, DMADirection.TO_DEVICE) is None
    assert [(iova, length, is_write) for iova, length, is_write, _ in rig.refused] == [
        (0, 8, False), (2 * UNIT, 1, True), (U64_MAX - 3, 8, False), (UNIT, 8, False)
    ]  # fmt: skip
    assert "not mapped; the nearest map is 0x80..0xff r-" in rig.refused[0][3]
    assert "does not permit it" in rig.refused[1][3]


def test_an_address_space_that_ends_at_its_top_is_mapped_to_the_last_byte() -> None:
    maps: IovaMaps[None] = IovaMaps(limit=2)
    maps.add(IovaMap(U64_MAX - 15, 16, READ | WRITE, memoryview(bytearray(16)), None))
    dma = MappedDma(maps, BLOCKED)
    assert dma.write(U64_MAX, b"x") is MemTxResult.OK
    assert dma.write(U64_MAX, b"xy") is MemTxResult.DECODE_ERROR, "what wraps goes on at 0"
    with pytest.raises(OSError):
        maps.check(U64_MAX, 2)
    maps.check(0, 1)
    maps.add(IovaMap(0, 1, READ, None, None))
    with pytest.raises(OSError) as refused:
        maps.check(64, 1)
    assert refused.value.errno == errno.ENOSPC
