"""The comparison itself: it finds what was planted in one of two models, and says so shortly."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.interop.comparison import Comparison, Difference, Tally
from tests.interop.operations import Call, DeviceTest, Edu
from tests.interop.peers import CallResult, ModelPeer
from tests.interop.programs import Generator
from tests.interop.variants import VARIANTS, Variant
from vfio_model.iommu.spapr.regs import HCall
from vfio_model.memory.iommu_region import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUAccessFlags

VARIANT = VARIANTS[0]
LENGTH = 150
PROGRAMS = 30


class Planted(ModelPeer):
    """A model with one fault."""

    name = "planted"

    def calls(self, wanted: Sequence[Sequence[int]]) -> list[CallResult]:
        """As the model."""
        return super().calls([self.changed(call) for call in wanted])

    def changed(self, call: Sequence[int]) -> Sequence[int]:
        """``call`` as it is done."""
        return call


class OneEntryLess(Planted):
    """STUFF leaves the last entry out when it should write more than 100."""

    def changed(self, call: Sequence[int]) -> Sequence[int]:
        """As the class says."""
        if call[0] == HCall.H_STUFF_TCE and 100 < call[4] < 1 << 20:
            return (*call[:4], call[4] - 1)
        return call


class ReadOnlyIsWritable(Planted):
    """Entries that say read-only let devices write; what they say is right."""

    def __init__(self, variant: Variant) -> None:
        super().__init__(variant)
        for table in self.machine.tables.values():
            table.translate = self._permissive(table.translate)  # type: ignore[method-assign, assignment]

    @staticmethod
    def _permissive(translate: Callable[[int], IOMMUTLBEntry]) -> Callable[[int], IOMMUTLBEntry]:
        def found(addr: int) -> IOMMUTLBEntry:
            entry = translate(addr)
            return entry if not entry.perm else entry._replace(perm=IOMMUAccessFlags.RW)

        return found


def first_difference(left: ModelPeer, right: ModelPeer, variant: Variant) -> Difference | None:
    """Of some programs, the first that shows one, shrunk."""
    rng = random.Random(11)
    generator = Generator(variant, rng)
    comparison = Comparison(variant, left, right, Tally())
    for _ in range(PROGRAMS):
        program = generator.program(LENGTH)
        found = comparison.run(program, [rng.randrange(1 << 30) for _ in range(4)])
        if found is not None:
            return comparison.shrink(found)
    return None


def test_two_models_do_not_differ() -> None:
    assert first_difference(ModelPeer(VARIANT), ModelPeer(VARIANT), VARIANT) is None


def test_an_entry_that_was_left_out_is_found_by_reading_the_table_back() -> None:
    found = first_difference(ModelPeer(VARIANT), OneEntryLess(VARIANT), VARIANT)
    assert found is not None
    last = found.program[found.at]
    assert found.at <= 4, f"the reset, at most a window, and the call are enough: {found}"
    assert isinstance(last, Call) and last.nr == HCall.H_STUFF_TCE


def test_a_permission_that_is_not_kept_is_found_by_dma() -> None:
    found = first_difference(ModelPeer(VARIANT), ReadOnlyIsWritable(VARIANT), VARIANT)
    assert found is not None
    assert isinstance(found.program[found.at], Edu | DeviceTest), str(found)
    assert found.at <= LENGTH // 10, str(found)
