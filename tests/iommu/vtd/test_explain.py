"""What a unit says of one translation: every entry that it looks at, and where it ends."""

from __future__ import annotations

import random

import pytest

from tests.iommu.vtd.rig import RO, RW, TABLES, WO, Rig
from vfio_model.iommu.vtd.explain import Explained, explain
from vfio_model.iommu.vtd.ports import RID, Granularity
from vfio_model.memory.types import IOMMUAccessFlags

IOVA, PAGE = 0x1234_5000, 0x4_2000


def said(rig: Rig, iova: int = IOVA, pasid: int = RID) -> Explained:
    return explain(rig.translation.lookup, rig.space(pasid), iova)


def names(found: Explained) -> list[str]:
    return [step.what for step in found.steps]


def failing(found: Explained) -> str:
    return next(f"{step.what}: {step.value}" for step in found.steps if not step.ok)


LEVELS = [f"level {level} entry" for level in (4, 3, 2, 1)]


def test_every_entry_of_a_legacy_translation() -> None:
    rig = Rig()
    table = rig.legacy()
    leaf = rig.tables_for(table, 4, IOVA, PAGE | 3)
    assert said(rig).passed and names(said(rig)) == ["translation"]
    rig.enable()
    found = said(rig)
    assert names(found) == ["root entry", "context entry", "domain", *LEVELS, "page", "IOTLB"]
    assert found.page is not None and (found.page.page, found.page.level, found.page.perm) == (PAGE, 1, 3)
    values = {step.what: step.value for step in found.steps}
    assert values["root entry"] == f"legacy mode, bus 00, at {TABLES:#x}: {TABLES + 0x1001:#x}"
    assert values["context entry"] == f"03.0, at {TABLES + 0x1180:#x}: {table | 1:#x} 0x502, not cached"
    assert values["domain"] == "5: second-stage tables"
    assert values["level 1 entry"] == f"at {leaf:#x}: {PAGE | 3:#x}: a page"
    assert values["page"] == f"{PAGE:#x}, 0x1000 bytes, rw" and values["IOTLB"] == "not cached"


def test_what_is_cached_and_what_has_changed_since() -> None:
    rig = Rig()
    table = rig.legacy()
    slot = rig.tables_for(table, 4, IOVA, PAGE | 3)
    rig.enable()
    rig.translate(IOVA, RO)
    values = {step.what: step.value for step in said(rig).steps}
    assert values["context entry"].endswith(", cached")
    assert values["IOTLB"] == f"{PAGE:#x}, 0x1000 bytes, rw, as in the tables"
    rig.store(slot, 0)
    found = said(rig)
    assert failing(found).startswith("page: read (fault reason 0x6)") and found.page is None
    assert found.steps[-1].value == f"{PAGE:#x}, 0x1000 bytes, rw: not as in the tables, until it is invalidated"
    assert names(found)[-3:] == ["level 1 entry", "page", "IOTLB"]
    rig.translation.invalidate_iotlb(Granularity.GLOBAL)
    assert said(rig).steps[-1].value == "not cached"
    rig.store(TABLES + 0x1188, 6 << 8 | 2)
    values = {step.what: step.value for step in said(rig).steps}
    assert values["context entry"].endswith(", cached as it was before") and values["domain"][0] == "6"


@pytest.mark.parametrize(
    ("at", "value", "failed"),
    [
        (TABLES, 0, "root entry: legacy mode, bus 00, at 0x10000000: 0x0: root not present (fault reason 0x1)"),
        (TABLES + 0x1180, 0, "context entry: 03.0, at 0x10001180: 0x0 0x502: context not present (fault reason 0x2)"),
        (TABLES + 0x1188, 0x507, "context entry: 03.0, at 0x10001180: 0x10020001 0x507: context invalid"),
    ],
)
def test_an_entry_that_is_wrong_ends_it(at: int, value: int, failed: str) -> None:
    rig = Rig()
    rig.legacy()
    rig.enable()
    rig.store(at, value)
    found = said(rig)
    assert failing(found).startswith(failed) and not found.passed and found.page is None
    assert not found.steps[-1].ok, "the last that was looked at"


def test_pass_through_and_where_messages_go() -> None:
    rig = Rig()
    rig.legacy(tt=2)
    rig.enable()
    assert said(rig).passed and said(rig).steps[-1].value == "5: pass-through"
    rig.legacy()
    found = said(rig)
    assert found.passed and all(step.ok for step in found.steps), "until the context is invalidated"
    rig.translation.invalidate_contexts(Granularity.GLOBAL)
    assert not said(rig).passed
    assert failing(said(rig, 0xFEE0_1000)) == "interrupt range: a write here is an interrupt message"


def test_the_entries_of_scalable_mode() -> None:
    rig = Rig(scalable_mode=True, fsts=True, pasid_bits=20)
    table = rig.page()
    rig.scalable(7, 1 | 1 << 6 | 2 << 2, 9, table)
    rig.tables_for(table, 4, IOVA, PAGE | 7, upper=7)
    rig.enable()
    found = said(rig, pasid=7)
    assert names(found) == [
        *("root entry", "context entry", "PASID directory entry", "PASID entry", "domain"),
        *LEVELS,
        *("page", "IOTLB"),
    ]
    assert found.steps[4].value == "9: first-stage tables" and found.steps[0].value.startswith("scalable mode")
    assert found.page is not None and found.page.page == PAGE
    assert "level 1" not in "".join(names(said(rig, 1 << 40, pasid=7)))
    assert failing(said(rig, pasid=8)).startswith("PASID entry: at 0x10003200: 0x0 0x0 0x0: pasid invalid")
    assert failing(said(rig, pasid=1 << 8)).startswith("PASID directory entry: PASID 0x100")


@pytest.mark.parametrize("seed", range(4))
def test_it_says_what_the_unit_does_and_changes_nothing(seed: int) -> None:
    rng = random.Random(seed)
    rig = Rig()
    table = rig.legacy()
    rig.enable()
    iovas = [page << 12 for page in range(8)] + [0x20_0000, 0x4000_0000, 0x8000_0000]
    for iova in iovas[:8]:
        if rng.random() < 0.7:
            rig.tables_for(table, 4, iova, PAGE + iova | rng.randrange(4))
    rig.tables_for(table, 4, 0x20_0000, 0x20_0080 | rng.randrange(4), level=2)
    rig.tables_for(table, 4, 0x4000_0000, 0x80 | rng.randrange(4), level=3)
    before = bytes(rig.tables)
    for iova in iovas:
        found = said(rig, iova + 0x123)
        answers: dict[IOMMUAccessFlags, int] = {}
        for flag in (RO, WO):
            rig.translation.invalidate_iotlb(Granularity.GLOBAL)
            answers[flag] = rig.translate(iova + 0x123, flag)[3] & int(flag)
        perm = answers[RO] | answers[WO]
        assert (found.page.perm if found.page is not None else 0) == perm & int(RW)
    assert bytes(rig.tables) == before
    assert {reason for reason in rig.faults.reasons()} <= {5, 6}, "those of the translations alone"
