"""The compiled variant gives the bytes and numbers of the reference and of numpy, and refuses what it cannot use."""

from __future__ import annotations

import shutil
import sysconfig
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.batch import tables, variant
from vfio_model.batch.table_vectors import TableTranslator
from vfio_model.ranges import U64_MAX

needs_it = pytest.mark.skipif(variant.compiled is None, reason="not built: the first test here says whether it had to")
library: Any = variant.compiled

entries = st.one_of(
    st.just(0),
    st.builds(lambda page, perm: page << 12 | perm, st.integers(0, 40), st.integers(0, 3)),
    st.integers(0, U64_MAX),
)


def test_it_is_there_wherever_it_can_be_built() -> None:
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    assert variant.compiled is not None or compiler is None or not header.exists()


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int, int, list[int]]:
    """Table, start, page shift, iovas. The window may lie across 2**64."""
    shift = draw(st.sampled_from([2, 12, 16, 24, 60, 63]))
    table = draw(st.lists(entries, max_size=20))
    size = len(table) << shift
    start = draw(
        st.sampled_from([0, 1 << 59, U64_MAX - size + 1 & U64_MAX, U64_MAX - (size >> 1) & U64_MAX, 4095, U64_MAX])
    )
    inside = st.integers(0, max(0, size - 1)).map(lambda n: start + n & U64_MAX)
    edge = st.sampled_from([start - 1 & U64_MAX, start + size & U64_MAX, 0, U64_MAX])
    anywhere = st.one_of(inside, inside, edge, st.integers(0, U64_MAX)) if draw(st.booleans()) else inside
    return table, start, shift, draw(st.lists(anywhere, max_size=40))


@needs_it
@given(windows())
def test_translation(window: tuple[list[int], int, int, list[int]]) -> None:
    table, start, shift, iovas = window
    expected, inside, perms = tables.translate_reference(table, start, shift, iovas)
    out = array("Q", [7]) * len(iovas)
    assert library.translate(array("Q", table), start, shift, array("Q", iovas), out) == (inside, perms)
    if inside:
        assert out.tolist() == expected


@needs_it
@given(windows())
def test_translation_one_by_one(window: tuple[list[int], int, int, list[int]]) -> None:
    table, start, shift, iovas = window
    out, perms = array("Q", [7]) * len(iovas), bytearray(b"\xff") * len(iovas)
    library.translate_each(array("Q", table), start, shift, array("Q", iovas), out, perms)
    assert (out.tolist(), list(perms)) == tables.translate_each_reference(table, start, shift, iovas)


@needs_it
@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 65536, 65537, 200_000])
def test_translation_of_batches_of_every_length(count: int) -> None:
    numbers = np.random.default_rng(count)
    table = numbers.integers(0, 1 << 40, 300).astype(np.uint64) << np.uint64(16) | np.uint64(3)
    iovas = numbers.integers(0, 300 << 16, count).astype(np.uint64) + np.uint64(1 << 59)
    ours, theirs = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.uint64)
    answer = library.translate(table, 1 << 59, 16, iovas, ours)
    assert answer == TableTranslator(table, 1 << 59, 16).translate(iovas, theirs) == (True, 3)
    assert (ours == theirs).all()
    if count:
        iovas[count - 1] = (1 << 59) + (300 << 16)
        assert library.translate(table, 1 << 59, 16, iovas, ours) == (False, 0)


@st.composite
def moves(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a gather or scatter over a RAM of a few pages of 64 bytes; pieces overlap, cross pages, miss."""
    shift, base = 6, draw(st.sampled_from([0, 1 << 40, 64 * 7, 17, U64_MAX - 200]))
    length = draw(st.integers(0, 64 * 8))
    good = st.builds(
        lambda page, perm: (base + page * 64 & U64_MAX & ~63) | perm, st.integers(-1, 8), st.integers(2, 3)
    )
    table = draw(st.lists(st.one_of(good, good, good, entries), min_size=1, max_size=12))
    start = draw(st.sampled_from([0, 1 << 59, U64_MAX - 64 * len(table) + 1, U64_MAX - 63]))
    size = draw(st.sampled_from([1, 2, 3, 8, 63, 64, 65, 5000]))
    near = st.integers(0, 64 * len(table) + 10).map(lambda n: start + n & U64_MAX)
    aligned = st.integers(0, len(table) - 1).map(lambda n: start + 64 * n & U64_MAX)
    iovas = draw(st.lists(st.one_of(aligned, near, st.integers(0, U64_MAX)), max_size=12))
    stop = draw(st.integers(0, len(iovas)))
    first = draw(st.integers(0, stop))
    return {
        "window": (table, start, shift, base), "ram": bytes(n % 251 for n in range(length)),
        "iovas": iovas, "size": size, "first": first, "stop": stop,
    }  # fmt: skip


@needs_it
@given(moves(), st.booleans())
def test_moving_pieces(move: dict[str, Any], to_ram: bool) -> None:
    (table, start, shift, base), iovas, size = move["window"], move["iovas"], move["size"]
    results = []
    for reference in (True, False):
        ram = bytearray(move["ram"])
        pieces = bytearray(n * 7 % 256 for n in range(len(iovas) * size))
        if reference:
            args = (table, start, shift, base, memoryview(ram), iovas, size, memoryview(pieces))
            moved = tables.move_reference(*args, move["first"], move["stop"], to_ram=to_ram)
        else:
            words = array("Q", table), array("Q", iovas)
            function = library.scatter if to_ram else library.gather
            moved = function(words[0], start, shift, base, ram, words[1], size, pieces, move["first"], move["stop"])
        results.append((moved, ram, pieces))
    assert results[0] == results[1]


@needs_it
def test_a_piece_may_come_out_of_the_ram_that_it_goes_to() -> None:
    ram, table = bytearray(range(128)), array("Q", [3, 64 | 3])
    assert library.scatter(table, 0, 6, 0, ram, array("Q", [32]), 32, memoryview(ram)[16:48], 0, 1) == 1
    assert ram == bytes([*range(32), *range(16, 48), *range(64, 128)])


@needs_it
def test_words_of_addresses_need_no_alignment_but_those_of_a_table_do() -> None:
    odd = np.frombuffer(bytearray(33), dtype=np.uint64, count=4, offset=1)
    odd[:] = [0, 4096, 8, 4097]
    out = np.frombuffer(bytearray(33), dtype=np.uint64, count=4, offset=1)
    assert library.translate(array("Q", [0x7003, 0x5003]), 0, 12, odd, out) == (True, 3)
    assert out.tolist() == [0x7000, 0x5000, 0x7008, 0x5001]
    with pytest.raises(ValueError, match="table"):
        library.translate(odd, 0, 12, odd, out)


Q4 = array("Q", [0] * 4)
TRANSLATE: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "strided iovas": ((Q4, 0, 12, memoryview(Q4)[::2], Q4[:2]), BufferError, "iovas"),
    "strided numpy table": ((np.zeros(8, np.uint64)[::2], 0, 12, Q4, Q4), BufferError, "table"),
    "read-only out": ((Q4, 0, 12, Q4, memoryview(Q4).toreadonly()), BufferError, "out.*writable"),
    "frozen numpy out": ((Q4, 0, 12, Q4, np.frombuffer(bytes(32), np.uint64)), BufferError, "out.*writable"),
    "signed iovas": ((Q4, 0, 12, np.zeros(4, np.int64), Q4), ValueError, "iovas"),
    "bytes for words": ((bytes(32), 0, 12, Q4, Q4), ValueError, "table"),
    "double words": ((Q4, 0, 12, array("d", [0.0] * 4), Q4), ValueError, "iovas"),
    "a list": ((Q4, 0, 12, [0], Q4), TypeError, "bytes-like"),
    "short out": ((Q4, 0, 12, Q4, Q4[:3]), ValueError, "out"),
    "shift 1": ((Q4, 0, 1, Q4, Q4), ValueError, "page_shift"),
    "shift 64": ((Q4, 0, 64, Q4, Q4), ValueError, "page_shift"),
    "negative start": ((Q4, -1, 12, Q4, Q4), OverflowError, "negative"),
    "start beyond u64": ((Q4, 1 << 64, 12, Q4, Q4), OverflowError, "big"),
    "no int": ((Q4, "0", 12, Q4, Q4), TypeError, "int"),
    "too few": ((Q4, 0, 12, Q4), TypeError, "translate takes"),
}


@needs_it
@pytest.mark.parametrize("case", TRANSLATE)
def test_unusable_arguments_are_refused(case: str) -> None:
    args, error, says = TRANSLATE[case]
    with pytest.raises(error, match=says):
        library.translate(*args)


@needs_it
@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({4: bytes(8192)}, BufferError, "ram.*writable"),
        ({4: memoryview(bytearray(8192))[::2]}, BufferError, "ram"),
        ({7: memoryview(bytearray(16))[::2]}, BufferError, "data"),
        ({6: 0}, ValueError, "size"),
        ({6: U64_MAX}, ValueError, "stop"),
        ({6: -1}, OverflowError, "negative"),
        ({7: bytes(31)}, ValueError, "stop"),
        ({9: 5}, ValueError, "stop"),
        ({8: 3, 9: 2}, ValueError, "stop"),
        ({8: U64_MAX, 9: U64_MAX}, ValueError, "stop"),
    ],
)  # fmt: skip
def test_moves_that_cannot_be_are_refused_and_move_nothing(
    change: dict[int, Any], error: type[Exception], says: str
) -> None:
    ram = bytearray(8192)
    args = [array("Q", [3, 4099]), 0, 12, 0, ram, Q4, 8, b"x" * 32, 0, 4]
    for at, value in change.items():
        args[at] = value
    with pytest.raises(error, match=says):
        library.scatter(*args)
    assert ram == bytes(8192)


@needs_it
def test_buffers_are_given_back() -> None:
    ram, table, iovas = bytearray(4096), array("Q", [3]), array("Q", [0])
    library.scatter(table, 0, 12, 0, ram, iovas, 4, b"abcd", 0, 1)
    refusals: list[Callable[[], object]] = [
        lambda: library.scatter(table, 0, 12, 0, ram, iovas, 4, b"abc", 0, 1),
        lambda: library.scatter(table, 0, 12, 0, ram, iovas, 4, None, 0, 1),
        lambda: library.scatter(table, 0, 12, 0, ram, None, 4, b"abcd", 0, 1),
        lambda: library.translate(table, 0, 12, iovas, None),
        lambda: library.translate_each(table, 0, 12, iovas, iovas, None),
    ]
    for refusal in refusals:
        with pytest.raises((TypeError, ValueError)):
            refusal()
    for buffer in (ram, table, iovas):  # a bytearray or array that is exported refuses to grow
        buffer.extend(buffer[:1])
