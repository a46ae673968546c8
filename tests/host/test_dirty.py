"""Collecting dirty pages leaf by leaf says the same as page by page, and looks at a leaf once however large it is."""

from __future__ import annotations

import pytest

from tests.host.type1_rig import GIB, HVA, MIB, PAGE, Type1Rig
from vfio_model.host import dirty
from vfio_model.host.dirty import extents
from vfio_model.host.hpa import Placement
from vfio_model.host.layout import DIRTY_SHIFT, FIRST_HPA
from vfio_model.host.mm import Vma
from vfio_model.uapi.vfio import DmaMap, Ioctl

FAR = HVA + (1 << 44)


def _map_far(rig: Type1Rig, size: int, backing: int, *, flags: int = 3, iova: int = 0) -> None:
    """Map memory of which no byte is ever touched."""
    segment = rig.host.place_segment("far", size, backing)
    rig.mm.declare(Vma(FAR, size, segment))
    rig.run(Ioctl.VFIO_IOMMU_MAP_DMA, DmaMap(0, flags, FAR, iova, size).pack())


def _note(rig: Type1Rig, iova: int) -> None:
    """As a device does that has written there."""
    entry = next(entry + iova - at for at, size, entry in rig.container.table.mapped() if at <= iova < at + size)
    rig.dirty[(entry - FIRST_HPA) >> DIRTY_SHIFT] = 1


def _extents(rig: Type1Rig) -> list[tuple[int, int]]:
    return [(extent.pages, extent.entry != 0) for extent in extents(rig.container.table, list(rig.container.mappings))]


def test_a_leaf_is_one_extent() -> None:
    rig = Type1Rig()
    _map_far(rig, 8 * GIB, GIB)
    assert _extents(rig) == [(GIB // PAGE, True)] * 8


@pytest.mark.parametrize(("hpa", "most"), [("contiguous", 2), ("scatter", 514)])
def test_leaves_that_follow_one_another_are_one_extent(hpa: Placement, most: int) -> None:
    rig = Type1Rig(hpa=hpa)
    _map_far(rig, GIB + 2 * MIB, 2 * MIB, iova=PAGE << 9)
    found = _extents(rig)
    assert len(found) <= most and sum(pages for pages, _ in found) == (GIB + 2 * MIB) // PAGE
    assert all(leaves for _, leaves in found)


@pytest.mark.parametrize("hpa", ["contiguous", "scatter"])
def test_large_leaves_and_pages_beside_them(hpa: Placement) -> None:
    rig = Type1Rig(hpa=hpa)
    _map_far(rig, GIB + 4 * MIB, 2 * MIB, iova=GIB - 2 * MIB)
    rig.map(2 * GIB + 2 * MIB, 0, 6 * PAGE)
    wanted = {GIB - 2 * MIB, GIB + 5 * PAGE, 2 * GIB - PAGE, 2 * GIB + MIB, 2 * GIB + 2 * MIB + 4 * PAGE}
    for iova in wanted:
        _note(rig, iova)
    rig.track(1)
    assert rig.written(0, 4 * GIB) == set(), "what was noted before does not count"
    for iova in wanted:
        _note(rig, iova)
    assert rig.written(0, 4 * GIB) == {iova // PAGE for iova in wanted}
    assert rig.written(0, 4 * GIB) == set(), "a question clears"
    _note(rig, GIB)
    assert rig.unmap_dirty(GIB - 2 * MIB, GIB + 4 * MIB) == {2 * MIB // PAGE}


def test_leaves_that_may_only_be_read_are_never_dirty() -> None:
    rig = Type1Rig(dirty_map=False)
    _map_far(rig, 4 * MIB, 2 * MIB, flags=1)
    rig.track(1)
    assert rig.written(0, 4 * MIB) == set()


def test_leaves_beyond_the_map_count_as_written(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Type1Rig()
    _map_far(rig, 4 * GIB, GIB)
    entry = next(entry for at, _, entry in rig.container.table.mapped() if not at)
    inside = 5 * GIB // PAGE // 2
    monkeypatch.setattr(dirty, "DIRTY_BYTES", ((entry - FIRST_HPA) >> DIRTY_SHIFT) + inside)
    rig.track(1)
    for _ in range(2):
        assert rig.written(0, 4 * GIB) == set(range(inside, 4 * GIB // PAGE))
    rig.port.device_closed(1)
    assert rig.written(0, 4 * GIB) == set(range(4 * GIB // PAGE))
