"""A run of random programs survives that QEMU ends by an assertion of its own, says so, and goes on."""

from __future__ import annotations

import pytest

from tests.interop.vtd import campaign
from tests.interop.vtd.campaign import Campaign
from tests.interop.vtd.generator import Generator
from tests.interop.vtd.operations import Operation, edu_dma, entry, sequence
from tests.interop.vtd.places import CONTEXTS, DOMAINS, EDU_SLOT, PASID_DIRECTORY, PASID_TABLE
from tests.interop.vtd.variants import Variant

SCALABLE = Variant("scalable", "scalable-mode=on", mode="scalable")
FIVE_LEVELS = 1 | 3 << 2 | 2 << 6 | DOMAINS[0].base
"""A PASID entry with a table of five levels, which the unit has not got."""
FATAL = (
    sequence("command", "translation off", (0x18, 4, 0)),
    entry("context", CONTEXTS + (EDU_SLOT << 3) * 32, PASID_DIRECTORY | 3, 0, 0, 0),
    sequence("command", "translation on", (0x18, 4, 1 << 31)),
    edu_dma(0, 64, to_ram=True),
    entry("pasid", PASID_TABLE, FIVE_LEVELS),
    edu_dma(0x1000, 64, to_ram=True),
)
"""With fault processing disabled QEMU 11.1 does not look at a PASID entry again once the context entry is cached, and
ends where it walks such a table."""


@pytest.fixture
def fatal(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The second program of a run, and any more that the list counts, ends QEMU."""
    left = [1]
    plain = Generator.program

    def program(self: Generator, length: int) -> list[Operation]:
        made = plain(self, length)
        if left[0]:
            left[0] -= 1
            return [*made[: self.prologue], *FATAL]
        return made

    monkeypatch.setattr(Generator, "program", program)
    return left


def test_a_run_goes_on_with_another_pair(fatal: list[int]) -> None:
    run = Campaign(5, 1600)
    run.run([SCALABLE])
    assert fatal == [0]
    assert len(run.aborts) == 1 and "Assertion" in run.aborts[0]
    assert run.done >= 1600 and not run.differences
    assert any("QEMU ended in scalable" in line for line in run.report())


def test_a_run_in_which_qemu_ends_again_and_again_fails(fatal: list[int]) -> None:
    fatal[0] = campaign.MOST_ABORTS + 1
    with pytest.raises(AssertionError, match="too often"):
        Campaign(5, 4000).run([SCALABLE])
