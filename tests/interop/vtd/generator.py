"""Random programs of what a driver of VT-d does, mostly right, with every kind of wrong among it.

Each begins from a reset with the same tables: two domains, edu and iommu-testdev in the first. What the generator
believes of the unit (is the queue on, where is its tail) may become wrong by what it does: then a program does
something odd, on both machines.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from tests.interop.vtd.edits import Edits
from tests.interop.vtd.mistakes import mistakes, steps
from tests.interop.vtd.operations import (
    Operation,
    bring_up,
    clear,
    entry,
    memory,
    register,
    sequence,
)
from tests.interop.vtd.places import (
    DATA,
    DOMAINS,
    LARGE,
    PAGE,
    PAGES,
    REMAPPING,
    ROOTS,
    STATUS,
    TABLES,
)
from tests.interop.vtd.variants import (
    CAP,
    CCMD,
    CFI,
    EAFL,
    ECAP,
    FRCD,
    FSTS,
    GCMD,
    GSTS,
    IQA,
    IQH,
    IQT,
    IRE,
    IRTA,
    RTADDR,
    SFL,
    SIRTP,
    SRTP,
    TE,
    VER,
    WBF,
    Believed,
    R,
    Variant,
    W,
)

TOURS = 2
"""How often each mistake is in a program that is a tour of them."""


class Generator(Edits):
    """Programs for ``variant`` out of ``rng``."""

    def __init__(self, variant: Variant, rng: random.Random) -> None:
        super().__init__(variant, rng)
        self.prologue = 0
        """How many of the operations of the last program are the tables that all begin with."""
        self._kinds: list[tuple[int, Callable[[], Iterator[Operation]]]] = [
            (22, self._leaf),
            (4, self._large),
            (4, self._inner),
            (7, self._context),
            (1, self._root),
            (6, self._invalidate),
            (2, self._odd_descriptors),
            (2, self._recover),
            (3, self._command),
            (8, self._look_at_faults),
            (3, self._registers),
            (45, self._dma),
            (12, self._testdev),
            (3, self._remap_interrupts),
            (5, self._message),
            (1, self._start_again),
        ]
        if variant.mode == "scalable":
            self._kinds += [(7, self._pasid), (3, self._pasid_descriptors)]

    def program(self, length: int) -> list[Operation]:
        """At least ``length`` operations, from a reset on."""
        made = list(self._begin())
        self.prologue = len(made)
        weights = [weight for weight, _ in self._kinds]
        while len(made) < length:
            (_, make), *_ = self.rng.choices(self._kinds, weights)
            made += make()
        return [*made, *self._end()]

    def tour(self) -> list[Operation]:
        """Each mistake some times, in no order: queue off, translation and interrupt remapping on."""
        made = list(self._tables())
        self.prologue = len(made)
        remapping = "intremap=off" not in self.variant.properties
        self.believed.remapping = remapping
        made += [self._set_root(ROOTS[0]), sequence("command", "IRTA", (IRTA, 8, REMAPPING | 7))]
        made += [self._set_gcmd(SIRTP), self._global_by_register()]
        each = list(mistakes(self, remapping=remapping)) * TOURS
        self.rng.shuffle(each)
        for mistake in each:
            wrong, met, right = steps(mistake, self.topology)
            made += [wrong, self._global_by_register(), met, self._faults_taken(), right]
        return [*made, *self._end()]

    @staticmethod
    def _faults_taken() -> Operation:
        first = (FSTS, 4, None), (FRCD, 8, None), (FRCD + 8, 8, None)
        return sequence("faults", "faults", *first, (FRCD + 8, 8, 1 << 63), (FSTS, 4, 0x11), (FSTS, 4, None))

    @staticmethod
    def _end() -> Iterator[Operation]:
        yield from (memory(DATA.start, DATA.size), memory(TABLES.start, TABLES.size), memory(STATUS, PAGE))

    def _begin(self) -> Iterator[Operation]:
        yield from self._tables()
        yield from self._set_up()

    def _tables(self) -> Iterator[Operation]:
        self.believed = Believed(function_domain=dict.fromkeys(self.sids, 0), silent=self.rng.random() < 0.4)
        yield Operation("reset", "system_reset", ("system_reset",))
        yield bring_up(self.topology)
        yield clear(ROOTS[0], TABLES.last + 1 - ROOTS[0])
        fills = [f"memset {page:#x} {PAGE:#x} {number + 1:#x}" for number, page in enumerate((*PAGES, *LARGE))]
        yield Operation("clear", "fill the pages", (f"memset {DATA.start:#x} {DATA.size:#x} 0xee", *fills))
        for domain in DOMAINS:
            for place in domain.inner:
                yield entry("inner", place.gpa, self._inner_value(place))
            for place in domain.leaves[:5]:
                yield entry("leaf", place.gpa, self._leaf_value(self.rng.choice(PAGES), R | W))
        yield from self._good_roots()
        for sid in self.sids:
            yield self._put_context(sid, self.good_context(0))

    def _set_up(self) -> Iterator[Operation]:
        """The unit, after a reset."""
        yield self._set_root(ROOTS[0])
        yield self._global_by_register()
        if self.rng.random() < 0.6:
            yield self._queue_on()
        if self.rng.random() < 0.95:
            yield self._set_gcmd(TE)

    def _start_again(self) -> Iterator[Operation]:
        """A reset, from which the tables stay."""
        believed = self.believed
        believed.queue = believed.remapping = believed.latched = False
        yield Operation("reset", "system_reset", ("system_reset",))
        if self.rng.random() < 0.2:
            yield from self._registers()
        yield bring_up(self.topology)
        yield from self._set_up()

    def _command(self) -> Iterator[Operation]:
        rng, believed = self.rng, self.believed
        kind = rng.randrange(7)
        if kind == 0:
            keep = self._keep() & ~TE
            yield sequence("command", "TE off", (GCMD, 4, keep), (GSTS, 4, None))
            yield from self._dma()
            yield sequence("command", "TE on", (GCMD, 4, keep | TE), (GSTS, 4, None))
        elif kind == 1:
            scalable = 1 << 10 if self.variant.mode == "scalable" else 0
            root = rng.choice(ROOTS)
            steps = ((RTADDR, 8, root | scalable), (GCMD, 4, SRTP | self._keep()))
            yield sequence("command", f"SRTP {root:#x}", *steps, (GSTS, 4, None), (RTADDR, 8, None))
        elif kind == 2 and believed.queue:
            believed.queue = False
            yield sequence(
                "command", "queue off", (GCMD, 4, self._keep()), (GSTS, 4, None), (IQH, 4, None), (IQT, 4, None)
            )
        elif kind == 3 or not believed.queue:
            yield self._queue_on()
        elif kind == 4:
            yield from self._odd_command(rng.choice((SFL, EAFL, WBF, CFI, IRE, SIRTP, 1 << rng.randrange(23))))
        else:
            yield register(rng.choice((VER, CAP, ECAP, GSTS, RTADDR, CCMD, FSTS, IQH, IQT, IQA)), rng.choice((4, 8)))

    def _odd_command(self, bit: int) -> Iterator[Operation]:
        believed = self.believed
        if bit == IRE and not believed.latched:
            self.left_out["interrupt remapping without a table since the reset"] += 1
            return
        believed.latched = believed.latched or bit == SIRTP
        believed.remapping = believed.remapping or bit == IRE
        yield self._set_gcmd(bit)

    def _pasid_descriptors(self) -> Iterator[Operation]:
        """What there is for requests with PASIDs, and for caches of devices."""
        rng = self.rng
        did, sid, pasid = rng.choice((5, 6, 7, 8)), rng.choice(self.sids), rng.choice((0, 0, 0, 1, 5))
        iova, mask = rng.choice(self._domain().leaves).iova, rng.choice((0, 0, 1, 9, 18))
        kinds = (
            (
                6 | rng.choice((2, 2, 3, 1)) << 4 | did << 16 | pasid << 32,
                rng.choice((0, iova | mask, iova | mask | 1 << 6)),
            ),
            (7 | rng.choice((0, 1, 3)) << 4 | did << 16 | pasid << 32, 0),
            (3 | sid << 32 | rng.choice((0, 4)) << 16, rng.choice((iova, iova | 1, (1 << 64) - PAGE | 1))),
            (8 | rng.choice((0, 4)) << 4 | sid << 16 | pasid << 32, rng.choice((iova, iova | 1 << 11, 1))),
            (9 | sid << 16 | 1 << 4 | pasid << 32, rng.getrandbits(9) << 3),
        )
        yield self._push(rng.choice(kinds))
        if rng.random() < 0.3:
            yield from self._recover()

    def _odd_descriptors(self) -> Iterator[Operation]:
        """Unknown types, reserved bits; then the error is cleared, as a driver that goes on would."""
        rng = self.rng
        good = rng.choice(((2 | 1 << 4, 0), (1 | 1 << 4, 0), (5 | 1 << 5, STATUS), (4, 0), (2 | 2 << 4 | 5 << 16, 0)))
        low, high = good
        kind = rng.randrange(5)
        if kind == 0:
            low = rng.choice((0, 0xA, 0xD, 0xF, 3, 6, 7, 8, 9)) | rng.getrandbits(20) << 4
        elif kind == 1:
            low ^= 1 << rng.randrange(64)
        elif kind == 2:
            high ^= 1 << rng.randrange(64)
        elif kind == 3:
            low &= ~0x70
        else:
            low |= 1 << rng.choice((9, 10, 11, 12))
        yield self._push((low, high), wait=rng.random() < 0.5)
        if rng.random() < 0.95:
            yield from self._recover()
