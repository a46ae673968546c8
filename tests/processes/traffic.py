"""Traffic for a live system, with an oracle: hypercalls that map and unmap, DMA of both devices, every byte checked.

The oracle is a dictionary of what is mapped, and for each page and device the bytes that may be there. In the
*background* kind of traffic the assigned device hammers every page of the pool without pause, and what is mapped
writable may hold its pattern; in the other kind it is told each access. The remote device copies on command.

While the system is disturbed, an access may or may not have happened (:attr:`Traffic.disturbed`); what has become of it
is read back once (:meth:`Traffic.adopt`), and everything after that is exact again.
"""

from __future__ import annotations

import random
import struct

from deploy.dma_drivers import EduDma
from tests.processes.rig import CARD, NIC, GuestRam, Interrupted, Live, until
from vfio_model.devices.dma_burst import regs as burst
from vfio_model.guest_drivers.dma_burst import DmaBurstDriver
from vfio_model.iommu.spapr import regs

PAGE = 4096
PAGES = 48
LIOBN = 0x8000_0000
IOVA, GPA, LIST_GPA = 0x10_0000, 0x40_0000, 0x20_0000
AT = {NIC: 0, CARD: 1024}
"""Where in a page each device writes."""
SOURCE = 2048
"""Where in a page the remote device reads."""
SIZE = 64
PATTERN = 0x5AA5_0FF0_C33C_9669
HAMMERED = PATTERN.to_bytes(8, "little") * (SIZE // 8)
FOREVER = burst.COMMAND_WRITE | burst.COMMAND_BACKGROUND | burst.COMMAND_FOREVER
READ, WRITE = 1, 2
ALL_ONES = (1 << 64) - 1


class Traffic:
    """Traffic through ``live``, the same for the same ``seed``. A new guest needs a new one."""

    def __init__(self, live: Live, seed: int, *, background: bool) -> None:
        self.live, self.background = live, background
        self.rng = random.Random(seed)
        self.ram = GuestRam(live.pid("guestd"))
        self.mapped: dict[int, tuple[int, int]] = {}
        self.free = list(range(PAGES))
        self.allowed: dict[tuple[int, str], set[bytes]] = {}
        self.works = {NIC: True, CARD: True}
        self.disturbed = False
        self.late: dict[str, set[bytes]] = {NIC: set(), CARD: set()}
        """What a device was told to write while the system was disturbed: one that was stopped may do it any time
        later, wherever it is mapped by then.
        """
        self.steps = 0
        self.buffered = bytes(SIZE)
        """What the remote device was last told to read."""
        for page in range(PAGES):
            self.canary(page)
        if background:
            self.hammer()

    def close(self) -> None:
        """Forget the guest's memory."""
        self.ram.close()

    # -- steps -------------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One random operation, then every byte is checked."""
        self.steps += 1
        kinds = [self.put, self.put, self.indirect, self.stuff, self.assigned_write, self.copy, self.copy]
        try:
            self.rng.choice(kinds)()
        except Interrupted:
            if not self.disturbed:
                raise
        self.check()

    def run(self, steps: int) -> None:
        """So many steps."""
        for _ in range(steps):
            self.step()

    def canary(self, page: int) -> None:
        """New random bytes in a page that no device may write now."""
        for who in AT:
            data = self.rng.randbytes(SIZE)
            self.ram.write(GPA + page * PAGE + AT[who], data)
            self.allowed[page, who] = {data}

    def take(self, perm: int) -> int:
        """A free page for a mapping with ``perm``."""
        page = self.free.pop(self.rng.randrange(len(self.free)))
        self._allow(page, perm)
        return page

    def _allow(self, page: int, perm: int) -> None:
        """What devices may write to a page that is mapped with ``perm``, without being told."""
        if perm & WRITE:
            for who in AT:
                self.allowed[page, who] |= self.late[who]
            if self.background:
                self.allowed[page, NIC] |= {HAMMERED}

    def put(self) -> None:
        """H_PUT_TCE of one entry that is free, or of 0 to one that is not."""
        index = self.rng.randrange(PAGES)
        if index in self.mapped:
            self.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + index * PAGE, 0)
            self.released([index])
            return
        perm = self.rng.choice([READ, READ | WRITE, READ | WRITE])
        page = self.take(perm)
        self.mapped[index] = (page, perm)
        self.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + index * PAGE, GPA + page * PAGE | perm)

    def indirect(self) -> None:
        """H_PUT_TCE_INDIRECT of a few entries, all of them free."""
        first, count = self._free_run()
        if count == 0:
            return
        tces = []
        for index in range(first, first + count):
            page = self.take(READ | WRITE)
            self.mapped[index] = (page, READ | WRITE)
            tces.append(GPA + page * PAGE | READ | WRITE)
        self.ram.write(LIST_GPA, struct.pack(f">{count}Q", *tces))
        self.hcall(regs.HCall.H_PUT_TCE_INDIRECT, LIOBN, IOVA + first * PAGE, LIST_GPA, count)

    def _free_run(self) -> tuple[int, int]:
        first = self.rng.randrange(PAGES)
        count = 0
        while count < 8 and first + count < PAGES and first + count not in self.mapped:
            count += 1
        return first, count

    def stuff(self) -> None:
        """H_STUFF_TCE of 0 over a random range."""
        first = self.rng.randrange(PAGES)
        count = self.rng.randint(1, min(12, PAGES - first))
        self.hcall(regs.HCall.H_STUFF_TCE, LIOBN, IOVA + first * PAGE, 0, count)
        self.released([index for index in range(first, first + count) if index in self.mapped])

    def released(self, indices: list[int]) -> None:
        """Their unmap has returned: from now on nobody writes there."""
        for index in indices:
            page, _ = self.mapped.pop(index)
            self.free.append(page)
            self.canary(page)

    def hcall(self, *args: int) -> None:
        """A hypercall that must succeed, whatever happens to the host."""
        number, *rest = args
        ret, _ = self.live.cpu.hcall(number, *rest)
        assert ret == 0, f"hypercall {number:#x} returned {ret}"

    # -- devices -----------------------------------------------------------------------------------------------------

    @property
    def nic(self) -> DmaBurstDriver:
        """The assigned device's driver."""
        driver: DmaBurstDriver = self.live.drivers[NIC]
        return driver

    @property
    def card(self) -> EduDma:
        """The remote device's driver."""
        driver: EduDma = self.live.drivers[CARD]
        return driver

    def hammer(self) -> None:
        """Let the assigned device write every page of the pool for ever."""
        self.nic.start(IOVA, SIZE, PAGES, stride=PAGE, pattern=PATTERN, command=FOREVER)
        self.live.cpu.flush()

    def assigned_write(self) -> None:
        """One access of the assigned device somewhere in the pool; in the background kind, a look at its counter."""
        if self.background:
            self._look_at_the_background()
            return
        index, pattern = self.rng.randrange(PAGES), self.rng.getrandbits(64)
        page, perm = self.mapped.get(index, (0, 0))
        data = pattern.to_bytes(8, "little") * (SIZE // 8)
        may = bool(perm & WRITE) and (self.works[NIC] or self.disturbed)
        if self.disturbed:
            self.late[NIC].add(data)
        if may:
            self.allowed[page, NIC] |= {data}
        self.nic.store(IOVA + index * PAGE, SIZE, pattern=pattern)
        result = self.nic.result()
        if self.disturbed:
            return
        if not self.works[NIC]:
            assert result.completed == ALL_ONES, f"a dead device reads as all ones, not {result}"
            return
        assert result.completed == bool(perm & WRITE), f"DMA to {'a mapped' if perm else 'an unmapped'} page: {result}"
        if may:
            self.allowed[page, NIC] = {data}

    def _look_at_the_background(self) -> None:
        completed = self.nic.result().completed
        if self.disturbed:
            return
        assert (completed != ALL_ONES) == self.works[NIC], f"the device {'died' if self.works[NIC] else 'lives'}"

    def copy(self) -> None:
        """The remote device reads one page of the pool and writes another."""
        sources = [index for index, (_, perm) in self.mapped.items() if perm & READ]
        if not sources:
            return
        source, target = self.rng.choice(sources), self.rng.randrange(PAGES)
        data = self.rng.randbytes(SIZE)
        self.ram.write(GPA + self.mapped[source][0] * PAGE + SOURCE, data)
        page, perm = self.mapped.get(target, (0, 0))
        may = bool(perm & WRITE) and (self.works[CARD] or self.disturbed)
        if self.disturbed:
            self.late[CARD] |= {data, bytes(SIZE), self.buffered}
        if may:
            self.allowed[page, CARD] |= {data, *self.late[CARD]}
        ended = self.card.load(IOVA + source * PAGE + SOURCE, SIZE)
        ended = self.card.store(IOVA + target * PAGE + AT[CARD], SIZE) and ended
        self.buffered = data
        if self.disturbed:
            return
        assert ended == self.works[CARD], (
            f"the card {'did not end' if self.works[CARD] else 'is dead, but ended'} its DMA"
        )
        if may:
            self.allowed[page, CARD] = {data}

    # -- checks ------------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Every page of the pool holds what it may hold."""
        for (page, who), allowed in self.allowed.items():
            seen = self.ram.read(GPA + page * PAGE + AT[who], SIZE)
            if seen not in allowed and not self._torn(seen, page, who):
                owner = [hex(IOVA + index * PAGE) for index, (where, _) in self.mapped.items() if where == page]
                wanted = [data[:8].hex() for data in allowed]
                raise AssertionError(
                    f"page {GPA + page * PAGE:#x} (mapped at {owner or 'no address'}), written by {who}: "
                    f"{seen[:8].hex()}…, allowed are {wanted}, after {self.steps} steps"
                )

    def _torn(self, seen: bytes, page: int, who: str) -> bool:
        """Whether ``seen`` is a write of the background device that is under way."""
        if who != NIC or HAMMERED not in self.allowed[page, who]:
            return False
        return all(
            byte == new or any(byte == old[at] for old in self.allowed[page, who])
            for at, (byte, new) in enumerate(zip(seen, HAMMERED, strict=True))
        )

    def adopt(self) -> None:
        """The disturbance is over: what is mapped is what the guest says, what is in memory is what was done."""
        self.live.cpu.clock_step(200_000_000)  # ends a transfer that was under way
        self.disturbed = False
        self.check()
        entries = {}
        for index in range(PAGES):
            translated, perm, _ = self.live.cpu.translate(LIOBN, IOVA + index * PAGE)
            if perm:
                entries[index] = ((translated - GPA) // PAGE, perm)
        self.mapped = entries
        used = {page for page, _ in entries.values()}
        self.free = [page for page in range(PAGES) if page not in used]
        for page in self.free:
            self.canary(page)
        for page, _ in entries.values():
            for who in AT:
                self.allowed[page, who] = {self.ram.read(GPA + page * PAGE + AT[who], SIZE)}
        for page, perm in entries.values():
            self._allow(page, perm)

    def renewed(self, who: str) -> None:
        """``who`` is a new process now: its predecessor writes nothing any more."""
        self.works[who] = True
        self.late[who].clear()
        if who == NIC and self.background:
            self.hammer()

    def everywhere(self) -> None:
        """The assigned device reaches every mapped page, as far as its permission goes, and no other."""
        if self.background:
            for page, perm in self.mapped.values():
                if perm & WRITE:
                    self.ram.write(GPA + page * PAGE, bytes(SIZE))
                    self.allowed[page, NIC] |= {bytes(SIZE)}
                    where = GPA + page * PAGE
                    until(f"the device reaches {where:#x}", lambda: self.ram.read(where, SIZE) == HAMMERED)  # noqa: B023
            return
        for index in range(PAGES):
            page, perm = self.mapped.get(index, (0, 0))
            data = self.rng.randbytes(8)
            self.nic.store(IOVA + index * PAGE, SIZE, pattern=int.from_bytes(data, "little"))
            assert self.nic.result().completed == bool(perm & WRITE), f"DMA at {IOVA + index * PAGE:#x}, perm {perm}"
            if perm & WRITE:
                self.allowed[page, NIC] = {data * (SIZE // 8)}
            self.check()

    def finish(self) -> None:
        """Unmap everything, and make sure that nothing is written any more."""
        self.hcall(regs.HCall.H_STUFF_TCE, LIOBN, IOVA, 0, PAGES)
        self.released(list(self.mapped))
        self.check()
        if self.works[NIC] and self.background:
            self.nic.stop()
        self.check()
        self.close()

    def progress(self) -> None:
        """DMA of every device that works goes on with the right data; what is not mapped is not reached."""
        index = min(set(range(PAGES)) - set(self.mapped), default=None)
        if index is None:
            self.hcall(regs.HCall.H_STUFF_TCE, LIOBN, IOVA, 0, 4)
            self.released([index for index in range(4) if index in self.mapped])
            index = 0
        page = self.take(READ | WRITE)
        self.mapped[index] = (page, READ | WRITE)
        self.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + index * PAGE, GPA + page * PAGE | READ | WRITE)
        if self.works[NIC] and self.background:
            until(
                "the background device reaches a new page", lambda: self.ram.read(GPA + page * PAGE, SIZE) == HAMMERED
            )
        elif self.works[NIC]:
            data = self.rng.randbytes(8)
            self.allowed[page, NIC] = {data * (SIZE // 8)}
            self.nic.store(IOVA + index * PAGE, SIZE, pattern=int.from_bytes(data, "little"))
            assert self.nic.result().completed == 1, "the assigned device writes"
        self.check()
        self.hcall(regs.HCall.H_PUT_TCE, LIOBN, IOVA + index * PAGE, 0)
        self.released([index])
        self.check()
