"""Described state: what goes out comes back, and what is not as described is refused where it is."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.errors import VMStateError
from vfio_model.vmstate.fields import Field, Type, VMStateDescription, decode, encode, unused

INNER = VMStateDescription("inner", 1, (Field("x", Type.U16), Field("on", Type.BOOL)))
EXTRA = VMStateDescription("thing/extra", 2, (Field("late"), Field("later", since=2)), needed=lambda s: s["late"] != 7)
OTHER = VMStateDescription("thing/other", 1, (Field("other", Type.U8),), needed=lambda s: s["other"] != 0)
THING = VMStateDescription(
    "thing",
    3,
    (
        Field("id", equal=True),
        Field("small", Type.U8),
        unused(3),
        Field("words_num"),
        Field("words", Type.U64, array="words_num"),
        Field("bytes", Type.U8, array=4),
        Field("inners_num", Type.U8),
        Field("inners", array="inners_num", struct=INNER),
        Field("one", struct=INNER),
        Field("numbers", array=2),
        Field("new", Type.BOOL, since=3),
    ),
    minimum_version=2,
    subsections=(EXTRA, OTHER),
)
inners = st.builds(lambda x, on: {"x": x, "on": on}, st.integers(0, 0xFFFF), st.booleans())
u32 = st.integers(0, (1 << 32) - 1)


def state(**changes: Any) -> dict[str, Any]:
    made = {
        "id": 9, "small": 1, "words": [1 << 63, 2], "bytes": b"abcd", "inners": [{"x": 5, "on": True}],
        "one": {"x": 6, "on": False}, "numbers": [3, 4], "new": True, "late": 7, "later": 8, "other": 0, **changes,
    }  # fmt: skip
    return {**made, "words_num": len(made["words"]), "inners_num": len(made["inners"])}


def read(data: bytes, version: int = 3) -> dict[str, Any]:
    found = decode(THING, version, data, {"id": 9}, where="section thing")
    return {**found, "words": list(found["words"])}


@given(
    st.integers(0, 255), st.lists(st.integers(0, (1 << 64) - 1), max_size=5), st.binary(min_size=4, max_size=4),
    st.lists(inners, max_size=3), inners, st.tuples(u32, u32), st.booleans(), u32, st.integers(0, 255),
)  # fmt: skip
def test_what_goes_out_comes_back(
    small: int, words: list[int], raw: bytes, listed: list[Any], one: Any, two: tuple[int, int], new: bool, late: int,
    other: int,
) -> None:  # fmt: skip
    sent = state(
        small=small, words=words, bytes=raw, inners=listed, one=one, numbers=list(two), new=new, late=late, other=other
    )
    expected = dict(sent)
    if late == 7:
        del expected["late"], expected["later"]
    if other == 0:
        del expected["other"]
    assert read(encode(THING, sent)) == expected


def test_an_old_version_leaves_out_what_is_newer() -> None:
    old = encode(THING, state(), version=2)
    assert len(encode(THING, state())) == len(old) + 1
    assert "new" not in read(old, 2)


def test_numbers_are_big_endian_and_counted_arrays_follow_their_count() -> None:
    described = VMStateDescription("d", 1, (Field("n"), Field("words", Type.U64, array="n")))
    assert encode(described, {"n": 1, "words": memoryview(bytearray(8)).cast("Q")}) == bytes.fromhex(
        "00000001"
    ) + bytes(8)
    assert encode(described, {"n": 1, "words": [0x0102]}).hex() == "00000001" + "0000000000000102"


@given(st.data())
def test_cut_anywhere_it_is_refused_where_it_ends(data: st.DataObject) -> None:
    whole = encode(THING, state(other=1))
    cut = data.draw(st.integers(0, len(whole) - 1))
    if cut == len(encode(THING, state())):
        return  # exactly the subsection that may be missing
    with pytest.raises(VMStateError, match=r"section thing, byte \d+: .*needs \d+ bytes, \d+ are left"):
        read(whole[:cut])


@pytest.mark.parametrize(
    ("data", "version", "says"),
    [
        (encode(THING, state()) + b"\0", 3, "0x0 where a subsection of thing could begin"),
        (encode(THING, state(other=1)) + b"\5\5other\0\0\0\1\2", 3, "has no subsection 'other'"),
        (encode(THING, state(other=1)) + encode(THING, state(other=1))[-18:], 3, "subsection thing/other comes twice"),
        (encode(THING, state(id=8)), 3, "id is 0x8 in the stream and 0x9 here"),
        (encode(THING, state(new=2)), 3, "new is 0x2, which is no truth value"),
        (encode(THING, state()), 4, "thing has version 4; 2 to 3 can be read"),
        (encode(THING, state()), 1, "thing has version 1; 2 to 3 can be read"),
        (encode(THING, state(other=1))[:-2] + b"\2\1", 3, "thing/other has version 2; 1 to 1 can be read"),
    ],
)
def test_what_is_not_as_described(data: bytes, version: int, says: str) -> None:
    with pytest.raises(VMStateError, match="section thing, byte") as caught:
        read(data, version)
    assert says in str(caught.value)


def test_a_count_that_is_too_large_costs_nothing() -> None:
    described = VMStateDescription("d", 1, (Field("n"), Field("words", Type.U64, array="n")))
    with pytest.raises(VMStateError, match="words needs 34359738360 bytes, 8 are left"):
        decode(described, 1, b"\xff" * 4 + bytes(8), {}, where="d")


def test_bytes_behind_a_section_without_subsections() -> None:
    with pytest.raises(VMStateError, match="1 bytes behind the last field"):
        decode(INNER, 1, b"\0\1\0\0", {}, where="inner")
