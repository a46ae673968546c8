"""From TCEs to structures to the host's TCEs: compiled as numpy does it, and what cannot be used is refused."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.batch import dma_map, tces, variant
from vfio_model.batch.variant import Variant
from vfio_model.host.hpa import HpaMap, HpaSpace
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.vfio import DmaMap

pytestmark = pytest.mark.skipif(variant.compiled is None, reason="not built: test_compiled says whether it had to")
library: Any = variant.compiled

u64 = st.integers(0, U64_MAX)
shifts = st.sampled_from([2, 12, 16, 24, 63])


def each_way(call: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``call`` returns with numpy, and compiled."""
    results = []
    ways: tuple[Variant, Variant] = ("numpy", "compiled")
    with pytest.MonkeyPatch.context() as patch:
        for way in ways:
            patch.setattr(variant, "chosen", way)
            results.append(call())
    return results[0], results[1]


def words(numbers: list[int]) -> memoryview:
    return memoryview(array("Q", numbers))


@given(st.lists(u64, min_size=1, max_size=40), shifts, st.sampled_from([None, 0, 1, 2, 3]))
def test_splitting_a_list(numbers: list[int], shift: int, perm: int | None) -> None:
    if perm is not None:
        numbers = [number & ~3 | perm for number in numbers]
    split = each_way(lambda: tces.split_tces(words(numbers), shift))
    pages, perms = zip(*split, strict=True)
    assert list(pages[0]) == list(pages[1]) == [number & -(1 << shift) & U64_MAX for number in numbers]
    each = [number & 3 for number in numbers]
    if each.count(each[0]) == len(each):
        assert perms == (each[0], each[0])
    else:
        assert list(perms[0]) == list(perms[1]) == each


@given(st.lists(u64, min_size=1, max_size=40), u64, u64, shifts, st.booleans())
def test_packing_structures(pages: list[int], to_vaddr: int, first: int, shift: int, writable: bool) -> None:
    bounds = each_way(lambda: dma_map.page_bounds(words(pages)))
    assert bounds == ((min(pages), max(pages)),) * 2
    last = (len(pages) - 1 << shift) + first & U64_MAX
    numpy, compiled = each_way(lambda: dma_map.pack_dma_maps(words(pages), to_vaddr, first, shift, writable=writable))
    assert bytes(numpy) == compiled
    page, flags = 1 << shift, 3 if writable else 1
    assert compiled[:32] == struct.pack("=IIQQQ", 32, flags, pages[0] + to_vaddr & U64_MAX, first, page)
    assert compiled[-32:] == struct.pack("=IIQQQ", 32, flags, pages[-1] + to_vaddr & U64_MAX, last, page)


@given(
    st.lists(u64, min_size=1, max_size=20),
    st.tuples(u64, u64, u64),
    st.one_of(st.none(), st.tuples(st.integers(0, 19), st.sampled_from([0, 2, 3]), st.integers(1, U64_MAX))),
)
def test_looking_at_structures(
    vaddrs: list[int], common: tuple[int, int, int], odd: tuple[int, int, int] | None
) -> None:
    head, iova, size = common
    rows = [[head, vaddr, iova + n * size & U64_MAX, size] for n, vaddr in enumerate(vaddrs)]
    if odd is not None:
        rows[odd[0] % len(rows)][odd[1]] ^= odd[2]
    packed = memoryview(b"".join(struct.pack("=4Q", *row) for row in rows) + b"tail")
    numpy, compiled = each_way(lambda: dma_map.look_at_dma_maps(packed, len(rows)))
    assert numpy == compiled
    if odd is None:
        bits = 0
        for vaddr in vaddrs:
            bits |= vaddr
        assert compiled == dma_map.UniformMaps(head, iova, size, min(vaddrs), max(vaddrs), bits)
    elif len(rows) > 1:
        assert compiled is None


@given(
    st.sampled_from(["contiguous", "scatter"]),
    st.integers(1, 300),
    st.lists(st.integers(0, 300 << 16), max_size=40),
    st.integers(0, 40),
    st.sampled_from([0, 0x7F00_0000_0000, U64_MAX - 12345]),
)
def test_structures_to_entries(placement: Any, pages: int, offsets: list[int], first: int, hva: int) -> None:
    space = HpaSpace(placement)
    space.place("before", 1 << 20, 1 << 16)
    hpa = space.place("it", pages << 16, 1 << 16).hpa
    offsets = [offset % (pages << 16) for offset in offsets]
    first = min(first, len(offsets))
    maps = b"".join(DmaMap(32, 3, hva + offset & U64_MAX, 0, 4096).pack() for offset in offsets)
    out = array("Q", [7]) * (len(offsets) + 1)
    library.maps_to_tces(maps, first, len(offsets) - first, -hva & U64_MAX, 3, *_place(hpa), out)
    wanted = [hpa.to_hpa(offset) | 3 for offset in offsets[first:]]
    assert out.tolist() == wanted + [7] * (len(out) - len(wanted))
    assert (hpa.to_hpa_many(np.array(offsets[first:], dtype=np.uint64)) | np.uint64(3)).tolist() == wanted


@given(st.lists(u64, min_size=1, max_size=20), u64, st.one_of(st.none(), st.integers(0, 19)))
def test_pages_that_follow_one_another(pages: list[int], step: int, odd: int | None) -> None:
    run = [pages[0] + n * step & U64_MAX for n in range(len(pages))]
    assert each_way(lambda: dma_map.consecutive(words(run), step)) == (True, True)
    if odd is not None and len(run) > 1:
        run[odd % len(run)] ^= 1 << odd
        assert each_way(lambda: dma_map.consecutive(words(run), step)) == (False, False)


@given(
    st.sampled_from(["contiguous", "scatter"]),
    st.sampled_from([12, 16, 20]),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 5),
)
def test_a_run_of_entries(placement: Any, shift: int, start: int, count: int, first: int) -> None:
    space = HpaSpace(placement)
    space.place("before", 1 << 20, 1 << 16)
    hpa = space.place("it", 80 << 20, 1 << 20).hpa
    out = array("Q", [7]) * (first + count + 1)
    library.store_run(out, first, count, start << shift, shift, 3, *_place(hpa))
    assert out.tolist() == [7] * first + [hpa.to_hpa(start + n << shift) | 3 for n in range(count)] + [7]


@given(st.lists(st.sampled_from([0, 5, 2**32 - 1]), min_size=1, max_size=8), st.integers(0, 8), st.integers(0, 8))
def test_owners_change_together_or_not_at_all(before: list[int], first: int, count: int) -> None:
    first = min(first, len(before))
    count = min(count, len(before) - first)
    owners, part = array("I", before), before[first : first + count]
    was = library.claim(owners, first, count, 9)
    if len(set(part)) > 1:
        assert was is None
        assert owners.tolist() == before
    else:
        assert was == (part[0] if part else 0)
        assert owners.tolist() == before[:first] + [9] * count + before[first + count :]


def _place(hpa: HpaMap) -> tuple[int, int, int, int, int]:
    return hpa.base, hpa.page_shift, hpa.bits, hpa.multiplier, hpa.addend


Q4 = array("Q", [0] * 4)
PLACE = (0, 16, 3, 1, 0)
REFUSED: dict[str, tuple[str, tuple[Any, ...], type[Exception], str]] = {
    "split: short pages": ("split_tces", (Q4, 12, Q4[:3]), ValueError, "pages"),
    "split: frozen pages": ("split_tces", (Q4, 12, memoryview(Q4).toreadonly()), BufferError, "pages.*writable"),
    "split: bytes": ("split_tces", (bytes(32), 12, Q4), ValueError, "tces"),
    "split: shift": ("split_tces", (Q4, 64, Q4), ValueError, "page_shift"),
    "split: too few": ("split_tces", (Q4, 12), TypeError, "split_tces takes"),
    "bounds: none": ("page_bounds", (array("Q"),), ValueError, "pages"),
    "bounds: strided": ("page_bounds", (memoryview(Q4)[::2],), BufferError, "pages"),
    "pack: signed": ("pack_dma_maps", (np.zeros(4, np.int64), 0, 0, 12, 0), ValueError, "pages"),
    "pack: beyond u64": ("pack_dma_maps", (Q4, 1 << 64, 0, 12, 0), OverflowError, "big"),
    "pack: a list": ("pack_dma_maps", ([0], 0, 0, 12, 0), TypeError, "bytes-like"),
    "look: short": ("look_at_dma_maps", (bytes(63), 2), ValueError, "count"),
    "look: beyond": ("look_at_dma_maps", (bytes(64), U64_MAX), ValueError, "count"),
    "look: negative": ("look_at_dma_maps", (bytes(64), -1), OverflowError, "negative"),
    "store: short maps": ("maps_to_tces", (bytes(64), 1, 2, 0, 3, *PLACE, Q4), ValueError, "maps"),
    "store: first beyond": ("maps_to_tces", (bytes(64), U64_MAX, 2, 0, 3, *PLACE, Q4), ValueError, "maps"),
    "store: short table": ("maps_to_tces", (bytes(320), 0, 5, 0, 3, *PLACE, Q4), ValueError, "tces"),
    "store: shift": ("maps_to_tces", (bytes(32), 0, 1, 0, 3, 0, 64, 3, 1, 0, Q4), ValueError, "shift"),
    "store: bits": ("maps_to_tces", (bytes(32), 0, 1, 0, 3, 0, 16, 64, 1, 0, Q4), ValueError, "bits"),
    "store: frozen": (
        "maps_to_tces", (bytes(32), 0, 1, 0, 3, *PLACE, memoryview(Q4).toreadonly()), BufferError, "tces.*writable",
    ),
    "store: odd address": (
        "maps_to_tces", (bytes(32), 0, 1, 0, 3, *PLACE, np.frombuffer(bytearray(33), np.uint64, 4, 1)), ValueError,
        "aligned",
    ),
    "consecutive: a list": ("consecutive", ([0], 1), TypeError, "bytes-like"),
    "consecutive: beyond u64": ("consecutive", (Q4, 1 << 64), OverflowError, "big"),
    "run: beyond the words": ("store_run", (Q4, 1, 4, 0, 12, 3, *PLACE), ValueError, "words"),
    "run: far beyond": ("store_run", (Q4, U64_MAX, 2, 0, 12, 3, *PLACE), ValueError, "words"),
    "run: page shift": ("store_run", (Q4, 0, 1, 0, 64, 3, *PLACE), ValueError, "page_shift"),
    "run: bits": ("store_run", (Q4, 0, 1, 0, 12, 3, 0, 16, 64, 1, 0), ValueError, "bits"),
    "run: frozen": ("store_run", (memoryview(Q4).toreadonly(), 0, 1, 0, 12, 3, *PLACE), BufferError, "writable"),
    "run: odd address": (
        "store_run", (np.frombuffer(bytearray(33), np.uint64, 4, 1), 0, 1, 0, 12, 3, *PLACE), ValueError, "aligned",
    ),
    "claim: beyond": ("claim", (Q4, 7, 2, 1), ValueError, "owners"),
    "claim: too large": ("claim", (Q4, 0, 2, 1 << 32), ValueError, "owners"),
    "claim: frozen": ("claim", (memoryview(Q4).toreadonly(), 0, 2, 1), BufferError, "writable"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unusable_arguments_are_refused_and_nothing_is_stored(case: str) -> None:
    function, args, error, says = REFUSED[case]
    with pytest.raises(error, match=says):
        getattr(library, function)(*args)
    assert Q4.tolist() == [0] * 4


def test_no_structures_look_like_nothing() -> None:
    assert library.look_at_dma_maps(b"", 0) is None
    assert library.pack_dma_maps(array("Q"), 0, 0, 12, 0) == b""
    assert library.split_tces(array("Q"), 12, array("Q")) == (0, 3)


def test_buffers_are_given_back() -> None:
    maps, table = bytearray(64), array("Q", [0])
    library.split_tces(table, 12, table)
    library.page_bounds(table)
    library.pack_dma_maps(table, 0, 0, 12, 0)
    library.look_at_dma_maps(maps, 2)
    library.maps_to_tces(maps, 0, 1, 0, 3, *PLACE, table)
    library.consecutive(table, 1)
    library.store_run(table, 0, 1, 0, 12, 3, *PLACE)
    library.claim(table, 0, 2, 1)
    refusals: list[Callable[[], object]] = [
        lambda: library.store_run(table, 0, 2, 0, 12, 3, *PLACE),
        lambda: library.claim(table, 0, 3, 1),
        lambda: library.split_tces(table, 12, None),
        lambda: library.split_tces(table, 12, array("Q")),
        lambda: library.look_at_dma_maps(maps, 3),
        lambda: library.maps_to_tces(maps, 0, 1, 0, 3, *PLACE, None),
        lambda: library.maps_to_tces(maps, 0, 2, 0, 3, *PLACE, table),
    ]
    for refusal in refusals:
        with pytest.raises((TypeError, ValueError)):
            refusal()
    maps.extend(b"x")
    table.extend([1])
