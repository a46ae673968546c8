"""The numpy variants give the same bytes and numbers as the references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.batch import pages, table_vectors, tables
from vfio_model.batch.table_vectors import TableTranslator
from vfio_model.ranges import U64_MAX

entries = st.one_of(st.just(0), st.integers(0, (1 << 40) - 1).map(lambda n: n << 12 | 3), st.integers(0, U64_MAX))


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int, int, list[int]]:
    """Table, start, page shift, iovas: most inside, some far off."""
    shift = draw(st.sampled_from([12, 16, 24]))
    table = draw(st.lists(entries, min_size=1, max_size=20))
    start = draw(st.sampled_from([0, 1 << 59, U64_MAX - (len(table) << shift) + 1]))
    inside = st.integers(0, (len(table) << shift) - 1).map(lambda n: start + n)
    anywhere = st.one_of(inside, inside, inside, st.integers(0, U64_MAX)) if draw(st.booleans()) else inside
    return table, start, shift, draw(st.lists(anywhere, max_size=40))


@given(windows())
def test_translation_through_a_table(window: tuple[list[int], int, int, list[int]]) -> None:
    table, start, shift, iovas = window
    expected, inside, perms = tables.translate_reference(table, start, shift, iovas)
    translator = TableTranslator(np.array(table, dtype=np.uint64), start, shift)
    out = np.empty(len(iovas), dtype=np.uint64)
    assert translator.translate(np.array(iovas, dtype=np.uint64), out) == (inside, perms)
    if inside:
        assert out.tolist() == expected


@given(windows())
def test_translation_one_by_one(window: tuple[list[int], int, int, list[int]]) -> None:
    table, start, shift, iovas = window
    translator = TableTranslator(np.array(table, dtype=np.uint64), start, shift)
    addresses, perms = translator.translate_each(np.array(iovas, dtype=np.uint64))
    assert (addresses.tolist(), perms.tolist()) == tables.translate_each_reference(table, start, shift, iovas)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 24, 100])
def test_translation_in_chunks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(table_vectors, "CHUNK", 8)
    monkeypatch.setattr(table_vectors, "SMALL", 4)
    table = [(i * 7919 % 1000) << 16 | (3 if i % 5 else 1) for i in range(100)]
    iovas = [(1 << 59) + (i << 16) + i for i in range(count)]
    expected, inside, perms = tables.translate_reference(table, 1 << 59, 16, iovas)
    translator = TableTranslator(memoryview(np.array(table, dtype=np.uint64)), 1 << 59, 16)
    for _ in range(2):  # scratch is used again
        out = np.empty(count, dtype=np.uint64)
        assert translator.translate(np.array(iovas, dtype=np.uint64), out) == (inside, perms)
        assert out.tolist() == expected
    for outside in (0, (1 << 59) - 1, (1 << 59) + (100 << 16), U64_MAX):
        bad = np.array([*iovas, outside], dtype=np.uint64)
        assert translator.translate(bad, np.empty(count + 1, dtype=np.uint64)) == (False, 0)


def test_a_translator_sees_changes_of_a_shared_table() -> None:
    words = memoryview(bytearray(8 * 16)).cast("Q")
    translator = TableTranslator(words, 0, 12)
    iovas, out = np.array([0x3004], dtype=np.uint64), np.empty(1, dtype=np.uint64)
    assert translator.translate(iovas, out) == (True, 0)
    words[3] = 0x7000 | 1
    assert translator.translate(iovas, out) == (True, 1) and out[0] == 0x7004


@given(
    st.sampled_from([1, 2, 16, 48, 64]),
    st.lists(st.integers(0, 500), min_size=1, max_size=30),
    st.booleans(),
    st.booleans(),
)
def test_gather_and_scatter(size: int, places: list[int], aligned: bool, as_array: bool) -> None:
    ram = bytearray(i % 253 for i in range(1000))
    last = len(ram) - size
    offsets = [min(p, last) // size * size if aligned else min(p, last) for p in places]
    given_offsets = np.array(offsets, dtype=np.uint64) if as_array else offsets
    got, expected = bytearray(len(offsets) * size), bytearray(len(offsets) * size)
    pages.gather(memoryview(ram), given_offsets, size, memoryview(got))
    pages.gather_reference(memoryview(ram), offsets, size, memoryview(expected))
    assert got == expected
    data = memoryview(bytes(i * 31 % 256 for i in range(len(offsets) * size)))
    other = bytearray(ram)
    pages.scatter(memoryview(ram), given_offsets, size, data)
    pages.scatter_reference(memoryview(other), offsets, size, data)
    assert ram == other
