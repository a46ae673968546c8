"""What a daemon's start leaves behind is not looked at again; cycles that come later still go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from protocols.transport import heap


@pytest.fixture
def _collector() -> Iterator[None]:
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


class Cycle:
    """Something that refers to itself."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("_collector")
def test_old_objects_are_frozen_and_young_ones_collected() -> None:
    garbage = weakref.ref(Cycle())
    heap.settle()
    assert gc.get_freeze_count() > 0 and garbage() is None
    assert gc.isenabled() and gc.get_threshold()[0] == heap.YOUNG_OBJECTS
    young = weakref.ref(Cycle())
    gc.collect()
    assert young() is None
