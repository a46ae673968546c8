"""Whatever a guest maps, unmaps, pages out and reuses, between whatever a device asks for and moves: the device's cache
never leads it anywhere but where the process's tables lead."""

from __future__ import annotations

import pytest

from tests.guest_drivers.svm_life import Life
from tests.guest_drivers.svm_rig import SvmRig

STEPS = 600


@pytest.mark.parametrize("seed", range(6))
def test_the_cache_is_coherent_with_the_tables(seed: int) -> None:
    rig = SvmRig(order=0)
    life = Life(seed, rig.kernel, rig.device)
    life.run(STEPS)
    assert len(life.done) == 10, "each kind of step was taken"
