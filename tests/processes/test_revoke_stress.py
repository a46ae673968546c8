"""Unmaps against devices that never rest: after an unmap has returned, the bytes of the page never change.

Every way of taking a right away takes its turn: H_PUT_TCE of zero, H_STUFF_TCE, another page in the same entry, and the
loss of the right to write. The assigned device is revoked through the host's tables, the remote one through its ATC.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

import pytest

from tests.processes.disturbance import told
from tests.processes.rig import CARD, NIC, GuestRam, Live, until
from tests.processes.traffic import FOREVER, GPA, IOVA, LIOBN, PAGE
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.iommu.spapr.regs import HCall

pytestmark = pytest.mark.machine

WINDOW = 16
POOL = 64
SECONDS = 4.0
LEAST = 200
"""Fewer unmaps than this in :data:`SECONDS` would be no stress."""


@dataclass
class Stress:
    """Pages come and go under the devices; pages that were taken away hold random bytes, which must stay."""

    live: Live
    rng: random.Random
    ram: GuestRam
    entries: dict[int, int] = field(default_factory=dict)
    revoked: dict[int, bytes] = field(default_factory=dict)
    unmaps: int = 0

    def __post_init__(self) -> None:
        for page in range(POOL):
            self.take_away(page)
        self.unmaps = 0
        for index in range(WINDOW):
            self.map(index)

    def take_away(self, page: int) -> None:
        """Its unmap has returned."""
        self.unmaps += 1
        self.revoked[page] = self.rng.randbytes(PAGE)
        self.ram.write(GPA + page * PAGE, self.revoked[page])

    def unchanged(self, pages: list[int]) -> None:
        """Nobody has written to ``pages`` since they were taken away."""
        for page in pages:
            where = GPA + page * PAGE
            assert self.ram.read(where, PAGE) == self.revoked[page], (
                f"page {where:#x} was written after its unmap had returned, after {self.unmaps} unmaps"
            )

    def put(self, index: int, tce: int) -> None:
        """H_PUT_TCE."""
        assert self.live.cpu.hcall(HCall.H_PUT_TCE, LIOBN, IOVA + index * PAGE, tce)[0] == 0

    def map(self, index: int) -> None:
        """A page of the pool at entry ``index``, in place of what is there."""
        page = self.rng.choice(list(self.revoked))
        self.unchanged([page])
        del self.revoked[page]
        old, self.entries[index] = self.entries.get(index), page
        self.put(index, GPA + page * PAGE | 3)
        if old is not None:
            self.take_away(old)

    def unmap(self, index: int) -> None:
        """Zero in one entry."""
        self.put(index, 0)
        self.take_away(self.entries.pop(index))

    def stuff(self, first: int) -> None:
        """Zero in a few entries at once."""
        count = self.rng.randint(1, WINDOW - first)
        assert self.live.cpu.hcall(HCall.H_STUFF_TCE, LIOBN, IOVA + first * PAGE, 0, count)[0] == 0
        for index in range(first, first + count):
            if index in self.entries:
                self.take_away(self.entries.pop(index))

    def narrow(self, index: int) -> None:
        """The page stays, but may only be read; then it goes."""
        page = self.entries.pop(index)
        self.put(index, GPA + page * PAGE | 1)
        self.take_away(page)
        self.unchanged([page])
        self.put(index, 0)

    def step(self) -> None:
        """One change, and a look at what was taken away last and at some of the rest."""
        index = self.rng.randrange(WINDOW)
        if index in self.entries:
            self.rng.choice([self.unmap, self.stuff, self.narrow, self.map])(index)
        else:
            self.map(index)
        pages = list(self.revoked)
        self.unchanged(pages[-8:] + self.rng.sample(pages, 8))


@pytest.mark.parametrize("device", [NIC, CARD])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_page_never_changes_after_its_unmap_has_returned(device: str, seed: int) -> None:
    with Live(scale=1, card="dma-burst") as live, told(seed):
        ram = GuestRam(live.pid("guestd"))
        stress = Stress(live, random.Random(seed), ram)
        driver = live.drivers[device]
        batch = burst.COMMAND_BATCH if seed % 2 else 0
        driver.start(IOVA, PAGE, WINDOW, stride=PAGE, pattern=seed, command=FOREVER | batch)
        live.cpu.flush()
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            stress.step()
        stress.unchanged(list(stress.revoked))
        assert stress.unmaps > LEAST, f"{stress.unmaps} unmaps in {SECONDS} s"
        for index in range(WINDOW):
            if index not in stress.entries:
                stress.map(index)
        page = GPA + stress.entries[0] * PAGE
        ram.write(page, bytes(PAGE))
        until("the device still writes", lambda: ram.read(page, 8) == seed.to_bytes(8, "little"))
        ram.close()
