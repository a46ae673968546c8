"""A random program of one seed against the running daemons: after every step the host's table, as hostd explains it, is
the guest's, as H_GET_TCE tells it; the host dies and comes back meanwhile.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator

import pytest

from protocols.control import messages as control
from tests.processes.rig import NIC, RAM, Live, target, until
from vfio_model.iommu.spapr.regs import HCall, RtasToken, pci_liobn, phb_buid
from vfio_model.ranges import U32_MAX

SEED = 20260
STEPS = 150
DMA64 = 1 << 59
LIST = RAM // 2
"""Where the lists of H_PUT_TCE_INDIRECT lie."""
WINDOWS = {pci_liobn(0, 0): (0, 12), pci_liobn(0, 1): (DMA64, 16)}
"""(bus address, page shift) by LIOBN."""
PAGES = 12
"""Of each window, that are looked at."""
WEIGHTS = {"put": 9, "indirect": 8, "stuff": 4, "create": 4, "remove": 1, "reset_windows": 1}
UPHEAVALS = ("kill", "unplug", "kill", "plug", "reset", "kill")
"""One after another, evenly spread over the steps."""


class Program:
    """What the guest does, and both views of its tables."""

    def __init__(self, live: Live, rng: random.Random) -> None:
        self.live, self.rng, self.plugged = live, rng, True
        self.succeeded: dict[str, int] = {}

    def _target(self) -> tuple[int, int]:
        liobn = self.rng.choice(sorted(WINDOWS))
        base, shift = WINDOWS[liobn]
        return liobn, base + (self.rng.randrange(PAGES) << shift)

    def _tce(self) -> int:
        return self.rng.randrange((RAM >> 16) + 20) << 16 | self.rng.choice((0, 1, 2, 3, 3))

    def _rtas(self, token: RtasToken, *args: int, nret: int = 1) -> int:
        return self.live.cpu.rtas(token, args, nret)[0]

    def _bridge(self) -> tuple[int, int, int]:
        return 0, phb_buid(0) >> 32, phb_buid(0) & U32_MAX

    def put(self) -> int:
        return self.live.cpu.hcall(HCall.H_PUT_TCE, *self._target(), self._tce())[0]

    def indirect(self) -> int:
        tces = [self._tce() for _ in range(self.rng.randint(1, 6))]
        self.live.cpu.write_memory(LIST, b"".join(tce.to_bytes(8, "big") for tce in tces))
        return self.live.cpu.hcall(HCall.H_PUT_TCE_INDIRECT, *self._target(), LIST, len(tces))[0]

    def stuff(self) -> int:
        value = self.rng.choice((0, self._tce()))
        return self.live.cpu.hcall(HCall.H_STUFF_TCE, *self._target(), value, self.rng.randint(1, 6))[0]

    def create(self) -> int:
        return self._rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, *self._bridge(), 16, 20, nret=4)

    def remove(self) -> int:
        return self._rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, pci_liobn(0, 1))

    def reset_windows(self) -> int:
        return self._rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, *self._bridge())

    def step(self) -> None:
        (name,) = self.rng.choices(list(WEIGHTS), list(WEIGHTS.values()))
        status = getattr(self, name)()
        self.succeeded[name] = self.succeeded.get(name, 0) + (status == 0)

    def upheaval(self, what: str) -> None:
        live = self.live
        if what == "unplug":
            live.unplug(NIC)
            self.plugged = False
            assert live.locked_vm() == live.locked_unassigned()
        elif what == "plug":
            live.plug(NIC)
            self.plugged = True
        elif what == "reset":
            live.link("guestd").ask(control.Reset())
            if self.plugged:
                live.bring_up(NIC)
        else:
            with target(live.pid("hostd")) as victim:
                victim.signal(signal.SIGKILL)
                victim.gone()
            until("the guest knows", lambda: live.status("guestd")["host"]["lost"] or not self.plugged)
            self.step()
            live.revive("hostd")
            until("the guest has found the host", lambda: not live.status("guestd")["host"]["lost"])
            if self.plugged:
                until("the device is back", lambda: live.device(NIC)["state"] == "running")

    def guest_view(self) -> Iterator[tuple[int, int, str]]:
        """(bus address, guest-physical address, permission that VFIO is asked for) of what is mapped to RAM."""
        for liobn, (base, shift) in WINDOWS.items():
            for page in range(PAGES):
                iova = base + (page << shift)
                status, outs = self.live.cpu.hcall(HCall.H_GET_TCE, liobn, iova)
                tce = outs[0] if status == 0 else 0
                gpa = tce & -(1 << shift)
                if tce & 3 and gpa < RAM:
                    yield iova, gpa, "rw" if tce & 2 else "r-"

    def host_view(self) -> Iterator[tuple[int, int, str]]:
        """The same, with host-physical addresses."""
        host, name = self.live.link("hostd"), self.live.device(NIC)["host"]
        for base, shift in WINDOWS.values():
            for page in range(PAGES):
                found: dict[str, object] = host.document(control.Explain(name, base + (page << shift)))
                if (hpa := found["result"]) is not None:
                    assert isinstance(hpa, int)
                    yield base + (page << shift), hpa, str(found["perm"])

    def compare(self) -> int:
        """The number of pages that both have."""
        if not self.plugged:
            return 0
        guest, host = list(self.guest_view()), list(self.host_view())
        assert [(iova, perm) for iova, _, perm in host] == [(iova, perm) for iova, _, perm in guest]
        places = {found[1] - given[1] for given, found in zip(guest, host, strict=True)}
        assert len(places) <= 1, "the guest's RAM is in one place"
        for iova, gpa, perm in self.rng.sample(guest, min(2, len(guest))):
            self.reach(iova, gpa, perm)
        return len(guest)

    def reach(self, iova: int, gpa: int, perm: str) -> None:
        """The device writes where it may, and there alone."""
        pattern, driver, cpu = self.rng.randrange(1 << 64), self.live.drivers[NIC], self.live.cpu
        before = cpu.read_memory(gpa, 24)
        driver.store(iova + 8, 8, pattern=pattern)
        assert driver.result().completed == (perm == "rw")
        written = pattern.to_bytes(8, "little") if perm == "rw" else before[8:16]
        assert cpu.read_memory(gpa, 24) == before[:8] + written + before[16:]


@pytest.mark.parametrize(("seed", "kvm"), [(SEED, False), (SEED + 1, True)])
def test_the_hosts_table_is_the_guests(seed: int, kvm: bool) -> None:
    with Live(kvm=kvm) as live:
        before = live.locked_vm()
        program, compared = Program(live, random.Random(seed)), 0
        for number in range(STEPS):
            if number % (STEPS // len(UPHEAVALS)) == 5:
                what = UPHEAVALS[number * len(UPHEAVALS) // STEPS]
                program.upheaval(what)
            program.step()
            compared += program.compare()
        assert compared > 100 and all(program.succeeded[name] for name in WEIGHTS), (seed, program.succeeded)
        live.link("guestd").ask(control.Reset())
        assert program.compare() == 0
        assert live.locked_vm() == before, "what the windows of the start take"
