"""MAP_DMA of ranges against a model that goes page by page, with numpy and compiled."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_model.batch import variant
from vfio_model.batch.variant import Variant
from vfio_model.host.hpa import HpaSpace, Placement
from vfio_model.host.mm import Mm, Vma
from vfio_model.host.platform import table_geometry
from vfio_model.host.spapr_map import MapRequest, map_range
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.tce_table import Dropped, TceTable, give_back

WAYS: list[Variant] = [way for way in ("numpy", "compiled") if way == "numpy" or variant.compiled is not None]
HVA, START = 0x7F00_0000_0000, 1 << 59
PAGES = 1 << 14
"""Of the window and of the memory, which is two regions; 64 KiB each."""
SHIFT = 16

Operation = tuple[bool, int, int, int, int]
operations = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(0, PAGES - 1),
        st.integers(0, PAGES - 1),
        st.sampled_from([1, 2, 3, 5, 31, 33, 512, 4096, 6000]),
        st.sampled_from([1, 3]),
    ),
    max_size=8,
)


class Rig:
    """A table, a process with its memory registered, and what each entry should be."""

    def __init__(self, levels: int, placement: Placement) -> None:
        self.mm = Mm(1 << SHIFT)
        space = HpaSpace(placement)
        half = PAGES // 2 << SHIFT
        segments = [space.place(name, half, 1 << 20) for name in ("low", "high")]
        for number, segment in enumerate(segments):
            self.mm.declare(Vma(HVA + number * half, half, segment))
            self.mm.register(HVA + number * half, PAGES // 2)
        self.places = [segment.hpa for segment in segments]
        geometry = table_geometry("powernv", SHIFT, PAGES << SHIFT, levels, 1 << SHIFT)
        self.table = TceTable(TableMemory(memoryview(bytearray(4 << 20)).cast("Q"), 1 << SHIFT), geometry, START, 0, 1)
        self.wanted: dict[int, tuple[int, int]] = {}
        """Index → TCE, and which half it points into."""

    def map(self, index: int, page: int, count: int, perm: int) -> None:
        count = min(count, PAGES - index, PAGES - page)
        request = MapRequest(perm, HVA + (page << SHIFT), START + (index << SHIFT), count << SHIFT)
        dropped, error = map_range(self.table, self.mm, request)
        assert error is None
        assert dropped == self._expected(index, count)
        give_back(self.mm, dropped)
        for n in range(count):
            which, within = divmod(page + n, PAGES // 2)
            self.wanted[index + n] = self.places[which].to_hpa(within << SHIFT) | perm, which

    def clear(self, index: int, count: int) -> None:
        count = min(count, PAGES - index)
        dropped = self.table.clear(index, count)
        assert dropped == self._expected(index, count)
        give_back(self.mm, dropped)
        for n in range(count):
            self.wanted.pop(index + n, None)

    def _expected(self, index: int, count: int) -> Dropped:
        numbers = sorted(self.mm.regions)
        dropped: Dropped = {}
        for n in range(index, index + count):
            if n in self.wanted:
                number = numbers[self.wanted[n][1]]
                dropped[number] = dropped.get(number, 0) + 1
        return dropped


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None)
@given(operations, st.sampled_from([1, 2]), st.sampled_from(["contiguous", "scatter"]))
def test_ranges_are_mapped_as_page_by_page(
    way: Variant, script: list[Operation], levels: int, placement: Placement
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "chosen", way)
        rig = Rig(levels, placement)
        for is_map, index, page, count, perm in script:
            if is_map:
                rig.map(index, page, count, perm)
            else:
                rig.clear(index, count)
        assert dict(rig.table.mapped()) == {index: tce for index, (tce, _) in rig.wanted.items()}
        halves = [which for _, which in rig.wanted.values()]
        assert [region.mapped for _, region in sorted(rig.mm.regions.items())] == [halves.count(0), halves.count(1)]
