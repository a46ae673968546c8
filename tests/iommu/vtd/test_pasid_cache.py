"""What QEMU remembers of PASID entries, and what an invalidation makes of a function that was passed through."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.rig import Rig
from vfio_model.iommu.vtd.pasid_cache import Words, invalidated
from vfio_model.iommu.vtd.ports import Granularity

GLOBAL, DOMAIN, SELECTIVE = Granularity.GLOBAL, Granularity.DOMAIN, Granularity.SELECTIVE
ZERO = (0,) * 8
OLD, NEW, OTHER = ((first, did, 0, 0, 0, 0, 0, 0) for first, did in ((0x109, 5), (0x49, 5), (0x49, 6)))


@pytest.mark.parametrize(
    ("known", "now", "granularity", "did", "same", "outcome"),
    [
        (None, None, GLOBAL, 0, True, (None, False)),
        (None, NEW, GLOBAL, 0, True, (NEW, True)),
        (None, NEW, DOMAIN, 5, False, (NEW, True)),
        (None, NEW, DOMAIN, 6, True, (None, False)),
        (None, NEW, SELECTIVE, 5, True, (NEW, True)),
        (None, NEW, SELECTIVE, 5, False, (None, False)),
        (OLD, NEW, GLOBAL, 0, True, (OLD, True)),
        (OLD, OLD, GLOBAL, 0, True, (OLD, False)),
        (OLD, OTHER, DOMAIN, 5, True, (OLD, True)),
        (OLD, OTHER, DOMAIN, 6, True, (OLD, False)),
        (OLD, NEW, SELECTIVE, 5, False, (OLD, False)),
        (OLD, None, GLOBAL, 0, True, (ZERO, True)),
        (OLD, None, DOMAIN, 9, False, (None, True)),
        (ZERO, NEW, GLOBAL, 0, True, (ZERO, True)),
        (ZERO, NEW, DOMAIN, 5, True, (ZERO, False)),
        (ZERO, NEW, DOMAIN, 0, True, (ZERO, True)),
    ],
)
def test_what_is_remembered_and_shown(
    known: Words | None,
    now: Words | None,
    granularity: Granularity,
    did: int,
    same: bool,
    outcome: tuple[Words | None, bool],
) -> None:
    assert invalidated(known, now, granularity, did, same) == outcome


def passed(*, quirk: bool, fsts: bool = False) -> tuple[Rig, int]:
    """A function that is passed through, and where its PASID entry is, which is gone."""
    rig = Rig(scalable_mode=True, fsts=fsts, quirks=frozenset({"pass-through-lingers"} if quirk else ()))
    at = rig.scalable(0, 0x109, 5)
    rig.store(at, 0)
    rig.enable()
    rig.space()
    rig.store(at, 0x109)
    rig.translation.invalidate_contexts(SELECTIVE, 5, rig.space().sid)
    assert not rig.space().translated
    rig.store(at, 0)
    return rig, at


@pytest.mark.parametrize(("fsts", "lingers"), [(False, True), (True, False)])
def test_pass_through_ends_with_the_pasid_entry_but_a_peer_s(fsts: bool, lingers: bool) -> None:
    for quirk in (False, True):
        rig, _ = passed(quirk=quirk, fsts=fsts)
        rig.translation.invalidate_pasid_cache(GLOBAL)
        assert rig.space().translated == (not quirk or not lingers)
        rig.translation.invalidate_contexts(GLOBAL)
        assert rig.space().translated


def test_a_peer_does_not_see_an_entry_that_is_again_as_it_was() -> None:
    for quirk in (False, True):
        rig = Rig(scalable_mode=True, quirks=frozenset({"pass-through-lingers"} if quirk else ()))
        table = rig.page()
        at = rig.scalable(0, table | 0x89, 5)
        rig.space()
        rig.enable()
        rig.store(at, 0x109)
        rig.translation.invalidate_contexts(GLOBAL)
        assert not rig.space().translated
        rig.store(at, table | 0x89)
        rig.translation.invalidate_pasid_cache(DOMAIN, 5)
        assert rig.space().translated != quirk
