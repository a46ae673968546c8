"""The flat view: what a tree shows, against a byte-by-byte oracle."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from tests.memory.fakes import Registers, ram_block
from vfio_model.memory.flatview import FlatView, render
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion, RAMRegion
from vfio_model.ranges import U64_MAX

SPACE = 48


def io(name: str, size: int) -> IORegion:
    return IORegion(name, size, Registers())


def shown(view: FlatView) -> dict[int, tuple[MemoryRegion, int]]:
    return {a: (r.region, r.offset + a - r.start) for r in view.ranges for a in range(r.start, r.last + 1)}


def oracle(mr: MemoryRegion, addr: int) -> tuple[MemoryRegion, int] | None:
    """Which region answers at ``addr`` relative to ``mr``: asked of one byte, by recursion, nothing shared with the
    renderer.
    """
    if not mr.enabled or not 0 <= addr < mr.size:
        return None
    if isinstance(mr, AliasRegion):
        return oracle(mr.target, addr + mr.target_offset)
    for child in mr.subregions:
        found = oracle(child, addr - child.offset)
        if found is not None:
            return found
    return (mr, addr) if mr.terminates else None


@st.composite
def trees(draw: st.DrawFn) -> MemoryRegion:
    """A container with containers, I/O and aliases of anything made before, at random places and priorities."""
    made: list[MemoryRegion] = []
    containers = [MemoryRegion("root", SPACE)]
    for i in range(draw(st.integers(1, 9))):
        size = draw(st.integers(1, SPACE))
        kind = draw(st.sampled_from(["io", "io", "container", "alias"]))
        region: MemoryRegion
        if kind == "alias" and made:
            region = AliasRegion(f"alias{i}", draw(st.sampled_from(made)), draw(st.integers(0, SPACE)), size)
        elif kind == "container":
            region = MemoryRegion(f"container{i}", size)
        else:
            region = io(f"io{i}", size)
        region.enabled = draw(st.integers(0, 4)) > 0
        if draw(st.integers(0, 5)):  # else it is reachable through an alias only
            parent = draw(st.sampled_from(containers))
            parent.add_subregion(draw(st.integers(0, SPACE)), region, draw(st.integers(-1, 2)))
        if kind == "container":
            containers.append(region)
        else:
            made.append(region)  # aliases never lead back to a container: no circles
    return containers[0]


@given(trees())
def test_the_view_shows_at_every_address_what_the_tree_shows(root: MemoryRegion) -> None:
    view = render(root)
    expected = {a: found for a in range(SPACE) if (found := oracle(root, a)) is not None}
    assert shown(view) == expected


@given(trees())
def test_ranges_are_sorted_disjoint_and_maximal(root: MemoryRegion) -> None:
    ranges = render(root).ranges
    for left, right in pairwise(ranges):
        assert left.last < right.start
        assert not left.joins(right)


def test_among_equal_priorities_the_last_added_lies_on_top() -> None:
    root = MemoryRegion("root", 16)
    first, second = io("first", 8), io("second", 8)
    root.add_subregion(0, first)
    root.add_subregion(4, second)
    assert [(r.start, r.last, r.region) for r in render(root).ranges] == [(0, 3, first), (4, 11, second)]


def test_a_container_hides_nothing_where_it_is_empty() -> None:
    root = MemoryRegion("root", 16)
    low = io("low", 16)
    root.add_subregion(0, low, -1)
    hole = MemoryRegion("hole", 16)
    hole.add_subregion(4, io("top", 4))
    root.add_subregion(0, hole, 5)
    assert [(r.start, r.last, r.region.name) for r in render(root).ranges] == [
        (0, 3, "low"),
        (4, 7, "top"),
        (8, 15, "low"),
    ]


def test_a_region_of_the_whole_64_bit_space() -> None:
    whole = io("whole", 1 << 64)
    window = io("window", 1 << 40)
    whole.add_subregion(1 << 59, window)
    view = render(whole)
    assert [(r.start, r.last) for r in view.ranges] == [
        (0, (1 << 59) - 1),
        (1 << 59, (1 << 59) + (1 << 40) - 1),
        ((1 << 59) + (1 << 40), U64_MAX),
    ]
    found = view.lookup(U64_MAX)
    assert found is not None and found.region is whole


def test_a_region_that_sticks_out_at_the_top_is_cut() -> None:
    root = MemoryRegion("root", 1 << 64)
    root.add_subregion(U64_MAX - 3, io("edge", 16))
    (only,) = render(root).ranges
    assert (only.start, only.last, only.size) == (U64_MAX - 3, U64_MAX, 4)


def test_read_only_is_inherited_through_an_alias() -> None:
    rom = RAMRegion("rom", ram_block(16), readonly=True)
    root = MemoryRegion("root", 32)
    root.add_subregion(8, AliasRegion("alias", rom, 4, 8))
    (only,) = render(root).ranges
    assert only.readonly and only.offset == 4


def test_lookup_in_a_gap_finds_nothing() -> None:
    root = MemoryRegion("root", 64)
    root.add_subregion(8, io("a", 8))
    root.add_subregion(32, io("b", 8))
    view = render(root)
    assert view.lookup(20) is None and view.gap_last(20) == 31
    assert view.lookup(0) is None and view.gap_last(50) == U64_MAX
