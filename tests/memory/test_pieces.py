"""read_many and write_many equal one access per piece, on every path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.fakes import PAGE, DictIOMMU, iommu_space, system_memory
from vfio_model.memory import pieces
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

OK, DECODE = MemTxResult.OK, MemTxResult.DECODE_ERROR
N = pieces.VECTOR_MIN


def one_by_one_read(space: AddressSpace, iovas: list[int], size: int) -> tuple[MemTxResult, bytes]:
    out = bytearray(b"\xee" * (len(iovas) * size))
    for i, iova in enumerate(iovas):
        piece = bytearray(size)
        result = space.read(iova, piece)
        out[i * size : (i + 1) * size] = piece
        if result:
            out[(i + 1) * size :] = bytes((len(iovas) - i - 1) * size)
            return result, bytes(out)
    return OK, bytes(out)


def one_by_one_write(space: AddressSpace, iovas: list[int], size: int, data: bytes) -> MemTxResult:
    for i, iova in enumerate(iovas):
        result = space.write(iova, data[i * size : (i + 1) * size])
        if result:
            return result
    return OK


def make(kind: str) -> tuple[AddressSpace, memoryview]:
    """A space whose first 16 pages are RAM, the 12th only readable and the 14th nothing behind an IOMMU."""
    if kind == "plain":
        space, ram = system_memory(16 * PAGE)
    elif kind == "nested":
        inner_space, inner, ram = iommu_space(16 * PAGE, vectors=True)
        inner.pages = {i: (i * PAGE, 3) for i in range(16)}
        outer = DictIOMMU(inner_space, vectors=True)
        outer.pages = {i: (((i * 5) % 16) * PAGE, 3) for i in range(16)}
        space = AddressSpace("outer", outer)
    else:
        space, iommu, ram = iommu_space(16 * PAGE, vectors=kind == "vectors")
        iommu.pages = {i: (((i * 7) % 16) * PAGE, 1 if i == 12 else 3) for i in range(16) if i != 14}
    ram.view[:] = bytes(i * 13 % 251 for i in range(16 * PAGE))
    return space, ram.view


@pytest.mark.parametrize("kind", ["plain", "loop", "vectors", "nested"])
@given(
    size=st.sampled_from([1, 8, 64, 100, PAGE]),
    count=st.sampled_from([0, 1, N - 1, N, N + 20]),
    places=st.lists(st.integers(0, 11 * PAGE), min_size=1, max_size=12),
    odd=st.one_of(st.none(), st.tuples(st.integers(0, N + 20), st.integers(11 * PAGE, 18 * PAGE))),
    aligned=st.booleans(),
    as_array=st.booleans(),
)
def test_many_equal_one_by_one(
    kind: str,
    size: int,
    count: int,
    places: list[int],
    odd: tuple[int, int] | None,
    aligned: bool,
    as_array: bool,
) -> None:
    iovas = [(places[i % len(places)] + i * size) % (11 * PAGE) for i in range(count)]
    if aligned:
        iovas = [iova // size * size for iova in iovas]
    if odd is not None and odd[0] < count:
        iovas[odd[0]] = odd[1]
    (space, ram), (other, other_ram) = make(kind), make(kind)
    passed = np.array(iovas, dtype=np.uint64) if as_array else iovas
    out = bytearray(b"?" * (count * size))
    assert (space.read_many(passed, size, out), bytes(out)) == one_by_one_read(other, iovas, size)
    data = bytes(i * 37 % 256 for i in range(count * size))
    assert space.write_many(passed, size, data) == one_by_one_write(other, iovas, size, data)
    assert ram == other_ram


def test_the_first_piece_that_fails_is_asked_for_the_ordinary_way() -> None:
    space, iommu, _ = iommu_space(vectors=True)
    iommu.pages = {i: (i * PAGE, 3) for i in range(N)}
    del iommu.pages[10]
    out = bytearray(N * 8)
    assert space.read_many([i * PAGE for i in range(N)], 8, out) is DECODE
    assert iommu.translations == [10 * PAGE]  # one fault, for the piece that faults


def test_good_pieces_do_not_go_one_by_one() -> None:
    space, iommu, _ = iommu_space(vectors=True)
    iommu.pages = {i: (i * PAGE, 3) for i in range(N)}
    assert space.write_many([i * PAGE for i in range(N)], 8, bytes(N * 8)) is OK
    assert iommu.translations == []


def test_addresses_wrap_here_too() -> None:
    space, ram = system_memory(4096)
    assert space.write_many([(1 << 64) + 8 * i for i in range(N)], 8, b"abcdefgh" * N) is OK
    assert bytes(ram.view[: 8 * N]) == b"abcdefgh" * N
    out = bytearray(b"?" * 8 * N)
    assert space.read_many([U64_MAX] * N, 8, out) is DECODE and out == bytes(8 * N)


def test_the_buffer_must_hold_exactly_the_pieces() -> None:
    space, _ = system_memory(4096)
    with pytest.raises(AssertionError):
        space.read_many([0, 8], 8, bytearray(15))
    with pytest.raises(AssertionError):
        space.write_many([0, 8], 8, bytes(17))
