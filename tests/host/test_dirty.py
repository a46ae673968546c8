"""Collecting dirty pages leaf by leaf says the same as page by page, and looks at a leaf once however large it is."""

from __future__ import annotations

import struct

import pytest

from tests.host.type1_rig import GIB, HVA, MIB, PAGE, Type1Rig, bits
from vfio_model.host import dirty, pending
from vfio_model.host.dirty import extents
from vfio_model.host.hpa import Placement
from vfio_model.host.layout import DIRTY_SHIFT, FIRST_HPA, PE_DIRTY
from vfio_model.host.mm import Vma
from vfio_model.host.pending import Revocation
from vfio_model.uapi.vfio import DirtyBitmap, DirtyBitmapGet, DmaMap, Ioctl, dirty_bitmap_bytes

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


@pytest.fixture
def sliced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small slices: some of a few hundred pages."""
    monkeypatch.setattr(pending, "SLICE", 64)
    monkeypatch.setattr(dirty, "_CHUNK", 256)


def _begun(rig: Type1Rig, arg: bytes) -> Revocation:
    revocation = Revocation()
    rig.container.ioctl(rig.mm, Ioctl.VFIO_IOMMU_DIRTY_PAGES, arg, revocation)
    return revocation


def _question(size: int) -> tuple[bytes, int]:
    """A question about bus addresses from 0 on, and where the bitmap lies in it."""
    count, at = dirty_bitmap_bytes(size // PAGE), DirtyBitmap.SIZE + DirtyBitmapGet.SIZE
    return struct.pack("=II", at, 4) + DirtyBitmapGet(0, size, PAGE, count, at).pack() + bytes(count), at


def _steps(revocation: Revocation) -> int:
    steps = 0
    while revocation.work:
        revocation.step()
        steps += 1
    return steps


@pytest.mark.usefixtures("sliced")
def test_switching_tracking_on_goes_in_slices() -> None:
    rig = Type1Rig(size=16 * MIB)
    for number in range(8):
        rig.map(2 * number * MIB, 2 * number * MIB, 2 * MIB)
    for at in (0, 15 * MIB):
        _note(rig, at)
    revocation = _begun(rig, DirtyBitmap(0, 1).pack())
    assert revocation.work and not rig.device.pe.words[PE_DIRTY], "nothing is noted before old notes are forgotten"
    assert _steps(revocation) >= 8
    rig.settle(revocation)
    assert rig.device.pe.words[PE_DIRTY] and rig.written(0, 16 * MIB) == set()


@pytest.mark.usefixtures("sliced")
def test_a_question_goes_in_slices_and_clears_what_it_saw() -> None:
    rig = Type1Rig(size=16 * MIB)
    rig.map(0, 0, 16 * MIB)
    rig.track(1)
    for at in (0, 9 * MIB):
        _note(rig, at)
    arg, at = _question(16 * MIB)
    revocation = _begun(rig, arg)
    assert revocation.work and revocation.answer is None
    _note(rig, 0)
    _note(rig, 16 * MIB - PAGE)
    assert _steps(revocation) >= 8
    rig.settle(revocation)
    assert revocation.answer is not None
    assert bits(revocation.answer[at:]) == {0, 9 * MIB // PAGE, (16 * MIB - PAGE) // PAGE}
    assert rig.written(0, 16 * MIB) == {0}, "what was written behind the look is told the next time"


@pytest.mark.usefixtures("sliced")
def test_a_device_that_is_closed_in_the_middle_of_a_question_has_written_everything() -> None:
    rig = Type1Rig(size=4 * MIB)
    rig.map(0, 0, 4 * MIB)
    rig.track(1)
    arg, at = _question(4 * MIB)
    revocation = _begun(rig, arg)
    revocation.step()
    rig.device.closes += 1
    rig.settle(revocation)
    assert revocation.answer is not None and len(bits(revocation.answer[at:])) == 4 * MIB // PAGE
    assert rig.written(0, 4 * MIB) == set()
