"""Walks through tables of several levels: every variant gives what the reference gives, and writes nothing else."""

from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vfio_model.batch import variant
from vfio_model.batch.walk_variant import walk
from vfio_model.batch.walk_vectors import CHUNK, walk_vectors
from vfio_model.batch.walks import WalkSpec, walk_reference
from vfio_model.ranges import U64_MAX

needs_it = pytest.mark.skipif(variant.compiled is None, reason="not built: test_compiled says whether it had to")
library: Any = variant.compiled

TABLES = 6
BASE = 0x10_0000
SPEC = WalkSpec(BASE, 4, 48, 0, 0, 0, 0, 0xFFFF_FFFF_F000, 0xFEE0_0000, 0xFEEF_FFFF, (0,) * 6, (0, 0, 0, 0, 0x80, 0x80))


def compiled(spec: WalkSpec, base: int, words: Any, iovas: Any) -> tuple[list[int], list[int]]:
    out, perms = array("Q", [7]) * len(iovas), bytearray(b"\xff") * len(iovas)
    library.walk(words, base, array("Q", iovas), out, perms, spec.words())
    return out.tolist(), list(perms)


def vectors(spec: WalkSpec, base: int, words: Any, iovas: Any) -> tuple[list[int], list[int]]:
    out, perms = walk_vectors(spec, base, words, np.array(iovas, dtype=np.uint64))
    return out.tolist(), perms.tolist()


def check(spec: WalkSpec, words: Any, iovas: list[int], base: int = BASE) -> tuple[list[int], list[int]]:
    before = bytes(words)
    expected = walk_reference(spec, base, words, iovas)
    assert vectors(spec, base, words, iovas) == expected
    if library is not None:
        assert compiled(spec, base, words, iovas) == expected
    assert bytes(words) == before
    return expected


@st.composite
def walks(draw: st.DrawFn) -> tuple[WalkSpec, Any, list[int]]:
    """A spec, tables whose first 4 and last entries are used, and addresses that mostly use those."""
    level_bits = st.sampled_from([0, 0, 0x80, 1 << 51, 1 << 11, 1 << 62])
    tables = st.integers(-1, TABLES).map(lambda n: BASE + n * 4096)
    pages = st.sampled_from([0x20_0000, 0x4000_0000, 0xFEE0_0000, 0xFED0_0000, 0xC000_0000, 0])
    bits = st.sampled_from([0, 1, 2, 3, 3, 3, 7, 0x27, 0x67])
    entry = st.builds(lambda at, more, low: at | more | low, st.one_of(tables, tables, pages), level_bits, bits)
    numbers = st.sampled_from([0, 1, 2, 3, 511])
    words = array("Q", bytes(TABLES * 4096))
    for table in range(TABLES):
        for number in (0, 1, 2, 3, 511):
            words[table * 512 + number] = draw(entry)
    spec = WalkSpec(
        root=BASE + 4096 * draw(st.integers(-1, TABLES)),
        levels=draw(st.integers(1, 5)),
        width=draw(st.sampled_from([1, 12, 30, 39, 48, 57, 63, 64])),
        signed=draw(st.integers(0, 1)),
        want=draw(st.integers(0, 3)),
        required=draw(st.sampled_from([0, 0, 4, 0x25])),
        leaf_required=draw(st.sampled_from([0, 0x40])),
        address=draw(st.sampled_from([0xFFFF_FFFF_F000, 0xF_FFFF_FFFF_F000])),
        hole_first=0xFEE0_0000,
        hole_last=0xFEEF_FFFF,
        plain=tuple(draw(st.sampled_from([0, 1 << 11, 1 << 51])) for _ in range(6)),
        large=tuple(draw(st.sampled_from([0, 0x80, 1 << 62])) for _ in range(6)),
    )
    path = st.builds(
        lambda parts, low, top: sum(part << 12 + 9 * at for at, part in enumerate(parts)) | low | top,
        st.lists(numbers, min_size=5, max_size=5),
        st.sampled_from([0, 0xFFF, 8]),
        st.sampled_from([0, 0, 0, 1 << 63, U64_MAX << 47 & U64_MAX]),
    ).map(lambda iova: iova & U64_MAX)
    return spec, words, draw(st.lists(path, max_size=30))


@given(walks())
@example((SPEC, array("Q", bytes(4096)), [0, 1 << 48, U64_MAX]))
def test_every_variant_gives_what_the_reference_gives(case: tuple[WalkSpec, Any, list[int]]) -> None:
    check(*case)


def linear(leaf_bits: int = 3, *, levels: int = 4, leaf_level: int = 1, pages: int = 512) -> tuple[Any, list[int]]:
    """One path of tables whose lowest has ``pages`` leaves; an address in each."""
    words = array("Q", bytes(8 * 4096))
    for table in range(levels - leaf_level):
        words[table * 512] = BASE + (table + 1) * 4096 | 3
    shift = 3 + 9 * leaf_level
    for page in range(pages):
        words[(levels - leaf_level) * 512 + page] = (page * 7 % pages) << shift | leaf_bits
    return words, [page << shift | page for page in range(pages)]


@pytest.mark.parametrize(("leaf_level", "bits", "pages"), [(1, 3, 512), (2, 0x83, 512), (3, 0x81, 2), (1, 1, 3)])
def test_chunks_that_are_alike(leaf_level: int, bits: int, pages: int) -> None:
    words, iovas = linear(bits, leaf_level=leaf_level, pages=pages)
    addresses, perms = check(SPEC, words, iovas)
    assert set(perms) == {bits & 3}
    assert addresses[1] == iovas[7 % pages] - 7 % pages + 1


def test_a_chunk_in_which_one_is_different() -> None:
    for bad in (0, 2 << 12, 1 << 12 | 1, 0xFEE0_0003, 0x5003 | 1 << 51):
        words, iovas = linear()
        words[3 * 512 + 100] = bad
        _, perms = check(SPEC._replace(want=1, plain=(1 << 51,) * 6), words, iovas)
        assert perms[100] == (1 if bad & 3 == 1 else 0)
        assert perms[99] == perms[101] == 3


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1023, 1024, 1025, CHUNK, CHUNK + 1, 70_000])
def test_batches_of_every_length(count: int) -> None:
    words, iovas = linear()
    many = (iovas * (count // len(iovas) + 1))[:count]
    _, perms = check(SPEC, words, many)
    assert perms == [3] * count


def test_no_ram_at_all() -> None:
    assert check(SPEC, array("Q"), [0, 5]) == ([0, 0], [0, 0])


@needs_it
@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({0: b"12345678"}, ValueError),
        ({1: -1}, OverflowError),
        ({1: 1 << 64}, OverflowError),
        ({2: None}, TypeError),
        ({3: array("Q", [0])}, ValueError),
        ({3: bytes(16)}, BufferError),
        ({4: bytearray(3)}, ValueError),
        ({4: bytes(2)}, BufferError),
        ({5: array("Q", [0])}, ValueError),
        ({5: SPEC._replace(levels=0).words()}, ValueError),
        ({5: SPEC._replace(levels=6).words()}, ValueError),
        ({5: SPEC._replace(width=0).words()}, ValueError),
        ({5: SPEC._replace(width=65).words()}, ValueError),
        ({5: SPEC._replace(signed=2).words()}, ValueError),
        ({5: SPEC._replace(hole_last=SPEC.hole_first - 1).words()}, ValueError),
        ({0: memoryview(bytearray(24))[1:17].cast("Q")}, ValueError),
    ],
)
def test_what_it_refuses(change: dict[int, Any], error: type[Exception]) -> None:
    words, _ = linear()
    arguments: list[Any] = [words, BASE, array("Q", [0, 1]), array("Q", [0, 0]), bytearray(2), SPEC.words()]
    library.walk(*arguments)
    for at, value in change.items():
        arguments[at] = value
    with pytest.raises(error):
        library.walk(*arguments)
    with pytest.raises(TypeError):
        library.walk(*arguments[:5])


@pytest.mark.parametrize("chosen", ["reference", "numpy", "compiled"])
def test_every_variant_can_be_chosen(chosen: variant.Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    if chosen == "compiled" and library is None:
        chosen = "numpy"
    monkeypatch.setattr(variant, "chosen", chosen)
    words, iovas = linear()
    addresses, perms = walk(SPEC, BASE, words, np.array(iovas, dtype=np.uint64))
    assert (addresses.tolist(), perms.tolist()) == walk_reference(SPEC, BASE, words, iovas)
