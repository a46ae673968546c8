"""What every DMA implementation must do, whatever stands behind the device.

The implementations are in :mod:`tests.conformance.dma_benches`; the tests never look behind a :class:`Bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conformance.dma_benches import EXPECTED, IMPLEMENTATIONS, PAGE, PAGES, WITHOUT_PERMISSIONS, Bench
from vfio_model.memory import dma as d
from vfio_model.memory.dma import BLOCKED, DMASpace
from vfio_model.memory.types import DMADirection, MemTxResult, ReadBuffer

OK = MemTxResult.OK
R, W, RW = 1, 2, 3


@pytest.fixture(params=EXPECTED)
def bench(request: pytest.FixtureRequest) -> Bench:
    return IMPLEMENTATIONS[request.param]()


@pytest.fixture
def dma(bench: Bench) -> DMASpace:
    space = DMASpace()
    space.bind(bench.impl)
    return space


def test_the_whole_set_is_collected(request: pytest.FixtureRequest) -> None:
    """Each of them runs each test over a bench: what silently drops out would not be missed."""
    assert set(IMPLEMENTATIONS) == set(EXPECTED)
    run: dict[str, set[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and "bench" in item.fixturenames:
            run.setdefault(item.originalname, set()).add(str(item.callspec.params["bench"]))
    strict = run.pop("test_permissions_hold_per_direction")
    assert strict == set(EXPECTED) - WITHOUT_PERMISSIONS
    assert all(names == set(EXPECTED) for names in run.values())


def pattern(length: int, seed: int = 1) -> bytes:
    return bytes((i * 7 + seed * 31) % 251 for i in range(length))


def test_bytes_go_where_the_mapping_says(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW)})
    assert dma.write(PAGE + 100, b"there") is OK
    assert bytes(bench.ram[5 * PAGE + 100 : 5 * PAGE + 105]) == b"there"
    out = bytearray(5)
    assert dma.read(PAGE + 100, out) is OK and out == b"there"


def test_a_transfer_crosses_pages_that_are_apart(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW), 2: (3, RW), 3: (0, RW)})
    data = pattern(PAGE + 2000)
    assert dma.write(2 * PAGE - 1000, data) is OK
    assert bytes(bench.ram[6 * PAGE - 1000 : 6 * PAGE]) == data[:1000]
    assert bytes(bench.ram[3 * PAGE : 4 * PAGE]) == data[1000 : 1000 + PAGE]
    assert bytes(bench.ram[:1000]) == data[-1000:]
    out = bytearray(len(data))
    assert dma.read(2 * PAGE - 1000, memoryview(out)) is OK and out == data


def test_the_first_failing_piece_ends_a_transfer(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW), 3: (4, RW)})
    data = pattern(2 * PAGE)
    assert dma.write(2 * PAGE - 50, data) != OK
    assert bytes(bench.ram[6 * PAGE - 50 : 6 * PAGE]) == data[:50]
    assert bytes(bench.ram[4 * PAGE : 5 * PAGE]) == bytes(PAGE)  # nothing behind the hole moved
    out = bytearray(b"?" * 100)
    assert dma.read(2 * PAGE - 50, out) != OK
    assert out == data[:50] + bytes(50)


def test_an_unmapped_read_is_zero_never_memory(bench: Bench, dma: DMASpace) -> None:
    bench.ram[:] = b"\xff" * len(bench.ram)
    bench.remap({})
    out = bytearray(b"?" * 64)
    assert dma.read(PAGE, out) != OK and out == bytes(64)
    assert d.ldl_le(dma, PAGE) == (dma.read(PAGE, bytearray(4)), 0)


@pytest.mark.parametrize("bench", [name for name in EXPECTED if name not in WITHOUT_PERMISSIONS], indirect=True)
def test_permissions_hold_per_direction(bench: Bench, dma: DMASpace) -> None:
    bench.remap({0: (1, R), 1: (2, W)})
    assert dma.read(0, bytearray(8)) is OK
    assert dma.write(0, b"x") != OK and bench.ram[PAGE] == 0
    assert dma.write(PAGE, b"x") is OK
    assert dma.read(PAGE, bytearray(8)) != OK


def test_a_remapped_page_is_seen_at_once(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW)})
    assert dma.write(PAGE, b"a") is OK
    bench.remap({1: (2, RW)})
    assert dma.write(PAGE, b"b") is OK
    bench.remap({})
    assert dma.write(PAGE, b"c") != OK
    assert (bench.ram[5 * PAGE], bench.ram[2 * PAGE]) == (ord("a"), ord("b"))


def test_an_empty_transfer_succeeds_anywhere(bench: Bench, dma: DMASpace) -> None:
    bench.remap({})
    assert dma.write(PAGE, b"") is OK
    assert dma.read(PAGE, bytearray()) is OK


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer(bench: Bench, dma: DMASpace, buffer: Callable[[bytes], ReadBuffer]) -> None:
    bench.remap({0: (0, RW)})
    assert dma.write(10, buffer(b"data")) is OK
    assert bytes(bench.ram[10:14]) == b"data"


@pytest.mark.parametrize("count", [1, 3, 64, 200])
@pytest.mark.parametrize("size", [64, 1000, 4096])
@pytest.mark.parametrize("as_array", [False, True])
def test_many_pieces_equal_single_ones(bench: Bench, dma: DMASpace, count: int, size: int, as_array: bool) -> None:
    bench.remap({0: (3, RW), 1: (1, RW), 2: (6, RW)})
    iovas = [(i * 7 % (3 * PAGE // size)) * size for i in range(count)]
    passed = np.array(iovas, dtype=np.uint64) if as_array else iovas
    data = pattern(count * size)
    expected = bytearray(3 * PAGE)
    for i, iova in enumerate(iovas):
        expected[iova : iova + size] = data[i * size : (i + 1) * size]
    assert dma.write_many(passed, size, data) is OK
    assert bytes(bench.ram[3 * PAGE : 4 * PAGE]) == expected[:PAGE]
    assert bytes(bench.ram[PAGE : 2 * PAGE]) == expected[PAGE : 2 * PAGE]
    assert bytes(bench.ram[6 * PAGE : 7 * PAGE]) == expected[2 * PAGE :]
    out = bytearray(count * size)
    assert dma.read_many(passed, size, out) is OK
    assert out == b"".join(expected[iova : iova + size] for iova in iovas)


@pytest.mark.parametrize("count", [5, 100])
def test_many_pieces_stop_at_the_first_that_fails(bench: Bench, dma: DMASpace, count: int) -> None:
    bench.remap({0: (3, RW), 2: (1, RW)})
    bench.ram[:] = b"\x11" * len(bench.ram)
    iovas = [64 * i for i in range(count)]
    iovas[count // 2] = PAGE + 64  # nothing there
    iovas[-1] = 2 * PAGE
    out = bytearray(b"?" * (64 * count))
    assert dma.read_many(iovas, 64, out) != OK
    good = 64 * (count // 2)
    assert out == b"\x11" * good + bytes(64 * count - good)
    assert dma.write_many(iovas, 64, b"\x22" * (64 * count)) != OK
    assert bytes(bench.ram[3 * PAGE : 3 * PAGE + good]) == b"\x22" * good
    assert bench.ram[PAGE] == 0x11


mappings = st.dictionaries(
    st.integers(0, 5), st.tuples(st.integers(0, PAGES - 1), st.sampled_from([R, W, RW, RW])), max_size=6
)
operations = st.lists(
    st.tuples(st.booleans(), st.integers(0, 6 * PAGE), st.one_of(st.integers(0, 300), st.integers(0, 2 * PAGE))),
    max_size=6,
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rounds=st.lists(st.tuples(mappings, operations), min_size=1, max_size=3))
def test_a_sequence_equals_a_dict_of_pages(
    bench: Bench, rounds: list[tuple[dict[int, tuple[int, int]], list[tuple[bool, int, int]]]]
) -> None:
    dma = DMASpace(bench.impl)
    bench.ram[:] = bytes(len(bench.ram))
    memory = bytearray(len(bench.ram))
    for pages, steps in rounds:
        bench.remap(pages)
        for n, (is_write, iova, length) in enumerate(steps):
            places = _places(pages, iova, length, (W if is_write else R) if bench.permissions else RW)
            whole = sum(size for _, size in places) == length
            if is_write:
                data, at = pattern(length, n), 0
                for place, size in places:
                    memory[place : place + size] = data[at : at + size]
                    at += size
                assert (dma.write(iova, data) is OK) is whole
            else:
                good = b"".join(bytes(memory[place : place + size]) for place, size in places)
                out = bytearray(b"?" * length)
                assert (dma.read(iova, out) is OK) is whole
                assert out == good + bytes(length - len(good))
    assert bench.ram == memory


def _places(pages: Mapping[int, tuple[int, int]], iova: int, length: int, need: int) -> list[tuple[int, int]]:
    """(offset in RAM, bytes) of the leading part of a transfer that is allowed."""
    found = []
    while length:
        page, perm = pages.get(iova // PAGE, (0, 0))
        if not perm & need:
            break
        size = min(length, PAGE - iova % PAGE)
        found.append((page * PAGE + iova % PAGE, size))
        iova, length = iova + size, length - size
    return found


# -- mappings


def test_a_mapping_for_writing_has_arrived_after_unmap(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW)})
    mapping = dma.map(PAGE + 16, 256, DMADirection.FROM_DEVICE)
    assert mapping is not None and (mapping.iova, mapping.last) == (PAGE + 16, PAGE + 16 + mapping.length - 1)
    mapping.view[:4] = b"data"
    dma.unmap(mapping, 4)
    assert bytes(bench.ram[5 * PAGE + 16 : 5 * PAGE + 20]) == b"data"
    assert len(dma.mappings) == 0


def test_a_mapping_for_reading_shows_memory_and_is_read_only(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW)})
    bench.ram[5 * PAGE : 5 * PAGE + 4] = b"data"
    mapping = dma.map(PAGE, 256, DMADirection.TO_DEVICE)
    assert mapping is not None
    assert bytes(mapping.view[:4]) == b"data"
    with pytest.raises(TypeError):
        mapping.view[0] = 1
    dma.unmap(mapping, 256)


@pytest.mark.parametrize("direction", list(DMADirection))
def test_nothing_maps_where_nothing_decodes(bench: Bench, dma: DMASpace, direction: DMADirection) -> None:
    bench.remap({})
    mapping = dma.map(PAGE, 16, direction)
    if mapping is not None:
        assert direction is DMADirection.FROM_DEVICE and not bench.knows
        mapping.view[:] = b"x" * 16
        dma.unmap(mapping, 16)
    assert not any(bench.ram) and not dma.mappings


def test_a_mapping_survives_being_bound_elsewhere_until_it_is_given_back(bench: Bench, dma: DMASpace) -> None:
    bench.remap({1: (5, RW)})
    rung: list[int] = []
    mapping = dma.map(PAGE, 64, DMADirection.FROM_DEVICE, lambda m: rung.append(m.handle))
    assert mapping is not None
    dma.bind(BLOCKED)
    assert rung == [mapping.handle]
    dma.unmap(mapping, 0)
    assert len(dma.mappings) == 0


# -- loads, stores, fills


def test_loads_and_stores(bench: Bench, dma: DMASpace) -> None:
    bench.remap({0: (2, RW)})
    assert d.stq_be(dma, 8, 0x1122334455667788) is OK
    assert d.ldq_le(dma, 8) == (OK, 0x8877665544332211)
    assert d.ldub(dma, 15) == (OK, 0x88)


def test_a_fill_covers_its_whole_length(bench: Bench, dma: DMASpace) -> None:
    bench.remap({0: (2, RW), 1: (3, RW)})
    assert d.memory_set(dma, 100, 0xAB, PAGE + 1000) is OK
    expected = bytes(100) + b"\xab" * (PAGE + 1000) + bytes(PAGE - 1100)
    assert bytes(bench.ram[2 * PAGE : 4 * PAGE]) == expected
