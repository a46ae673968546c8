"""Random programs of what a driver of VT-d does, mostly right, with every kind of wrong among it.

Each begins from a reset with the same tables: two domains, edu and iommu-testdev in the first. What the generator
believes of the unit (is the queue on, where is its tail) may become wrong by what it does: then a program does
something odd, on both machines.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from tests.interop.vtd.mistakes import mistakes, steps
from tests.interop.vtd.operations import (
    Operation,
    bring_up,
    clear,
    device_test,
    edu_dma,
    edu_message,
    entry,
    load,
    memory,
    register,
    sequence,
    store,
)
from tests.interop.vtd.places import (
    DATA,
    DOMAINS,
    LARGE,
    OUTSIDE,
    PAGE,
    PAGES,
    PASID_DID,
    PASID_DIRECTORY,
    PASID_TABLE,
    QUEUE,
    REMAPPING,
    ROOTS,
    STATUS,
    TABLES,
    UNIT,
    Domain,
    Place,
)
from tests.interop.vtd.topology import ROOT_BUS, Topology
from vfio_model.ranges import U64_MAX

VER, CAP, ECAP, GCMD, GSTS, RTADDR, CCMD, FSTS = 0x00, 0x08, 0x10, 0x18, 0x1C, 0x20, 0x28, 0x34
FECTL, FEDATA, FEADDR, FEUADDR = 0x38, 0x3C, 0x40, 0x44
IQH, IQT, IQA, ICS, IECTL, IEDATA, IEADDR, IEUADDR = 0x80, 0x88, 0x90, 0x9C, 0xA0, 0xA4, 0xA8, 0xAC
IRTA, PQH, PQT, PQA, PRS, PECTL, IVA, IOTLB, FRCD = 0xB8, 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xF0, 0xF8, 0x220
TE, SRTP, SFL, EAFL, WBF, QIE, IRE, SIRTP, CFI = (1 << bit for bit in (31, 30, 29, 28, 27, 26, 25, 24, 23))
R, W = 1, 2
PS, ACCESSED, DIRTY = 1 << 7, 1 << 5, 1 << 6
_QUEUE_SLOTS = 256
TOURS = 2
"""How often each mistake is in a program that is a tour of them."""


@dataclass(frozen=True)
class Variant:
    """A PC. ``properties``: of ``intel-iommu``; ``mode``: of its root table."""

    name: str
    properties: str = ""
    mode: str = "legacy"
    first_stage: bool = False
    levels: tuple[int, ...] = (3, 4)
    """Of the page tables that are right."""
    topology: Topology = ROOT_BUS


@dataclass
class Believed:
    """What the generator takes for granted."""

    queue: bool = False
    wide: bool = False
    """Whether descriptors have 256 bits."""
    tail: int = 0
    status: int = 0
    function_domain: dict[int, int] = field(default_factory=dict)
    """By source ID, index of the domain."""
    remapping: bool = False
    """Of interrupts."""
    latched: bool = False
    """Whether there is a table for it since the reset: QEMU keeps the size of the one before."""
    silent: bool = False
    """Whether context and PASID directory entries may have FPD. Then QEMU checks a PASID entry once only, and ends
    itself by an assertion over numbers of levels that there are not: a program has one or the other."""


class Generator:
    """Programs for ``variant`` out of ``rng``."""

    def __init__(self, variant: Variant, rng: random.Random) -> None:
        self.variant, self.rng = variant, rng
        self.sids = variant.topology.sids
        self.believed = Believed()
        self.left_out: Counter[str] = Counter()
        """Hazards: what was not done because it need not mean the same, and how often."""
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

    @property
    def topology(self) -> Topology:
        """Of the variant."""
        return self.variant.topology

    @property
    def scalable(self) -> bool:
        """The mode of the root table."""
        return self.variant.mode == "scalable"

    @property
    def first_stage(self) -> bool:
        """Whether page tables are those of the first stage."""
        return self.variant.first_stage

    @staticmethod
    def _end() -> Iterator[Operation]:
        yield from (memory(DATA.start, DATA.size), memory(TABLES.start, TABLES.size), memory(STATUS, PAGE))

    # -- the beginning -----------------------------------------------------------------------------------------------

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

    def _set_root(self, root: int) -> Operation:
        scalable = 1 << 10 if self.variant.mode == "scalable" else 0
        return sequence("command", "SRTP", (RTADDR, 8, root | scalable), (GCMD, 4, SRTP), (GSTS, 4, None))

    def _start_again(self) -> Iterator[Operation]:
        """A reset, from which the tables stay."""
        believed = self.believed
        believed.queue = believed.remapping = believed.latched = False
        yield Operation("reset", "system_reset", ("system_reset",))
        if self.rng.random() < 0.2:
            yield from self._registers()
        yield bring_up(self.topology)
        yield from self._set_up()

    def _good_roots(self) -> Iterator[Operation]:
        for root in ROOTS:
            for bus in self.topology.buses:
                yield entry("root", root + bus * 16, *self.good_root(bus))
        if self.variant.mode == "scalable":
            yield entry("directory", PASID_DIRECTORY, PASID_TABLE | 1)
            yield entry("pasid", PASID_TABLE, *self.good_pasid(0))
            yield entry("pasid", PASID_TABLE + 64, *self.good_pasid(1))

    def good_root(self, bus: int) -> tuple[int, int]:
        """The root entry of ``bus``."""
        contexts = self.topology.contexts(bus)
        return contexts | 1, 0 if self.variant.mode == "legacy" else (contexts + PAGE) | 1

    def _keep(self) -> int:
        """What a driver leaves on; here: queue, translation, interrupt remapping."""
        return TE | (QIE if self.believed.queue else 0) | (IRE if self.believed.remapping else 0)

    def _set_gcmd(self, bits: int) -> Operation:
        return sequence("command", f"GCMD {bits:#x}", (GCMD, 4, self._keep() | bits), (GSTS, 4, None))

    def _queue_on(self) -> Operation:
        believed = self.believed
        believed.queue, believed.tail = True, 0
        believed.wide = self.variant.mode == "scalable" and self.rng.random() < 0.9
        steps = (
            (IQT, 4, 0),
            (IQA, 8, QUEUE | believed.wide << 11),
            (GCMD, 4, self._keep()),
            (GSTS, 4, None),
            (IQH, 8, None),
        )
        return sequence("command", "queue on", *steps)

    # -- entries -----------------------------------------------------------------------------------------------------

    def _leaf_value(self, page: int, perm: int) -> int:
        if not self.variant.first_stage:
            return page | perm
        return page | (1 if perm & R else 0) | (2 if perm & W else 0) | 4

    def _inner_value(self, place: Place) -> int:
        return place.below | (7 if self.variant.first_stage else R | W)

    def _domain(self) -> Domain:
        return DOMAINS[self.rng.choice((0, 0, 0, 1))]

    def _odd(self, value: int) -> int:
        """Now and then a bit that is ignored, reserved or means something else."""
        rng = self.rng
        if rng.random() < 0.9:
            return value
        bit = rng.choice((2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 39, 45, 48, 51, 52, 55, 61, 62, 63))
        return value ^ 1 << bit

    def _leaf(self) -> Iterator[Operation]:
        domain = self._domain()
        place = self.rng.choice(domain.leaves)
        perm = self.rng.choice((3, 3, 3, 3, 1, 2, 0))
        page = self.rng.choice(PAGES) if self.rng.random() < 0.97 else OUTSIDE
        value = self._odd(self._leaf_value(page, perm)) if perm or self.rng.random() < 0.3 else 0
        value = value if self.rng.random() < 0.99 else U64_MAX
        yield entry("leaf", place.gpa, value)
        yield from self._after(domain, place)

    def _large(self) -> Iterator[Operation]:
        domain = self._domain()
        place = self.rng.choice(domain.large)
        page = self.rng.choice(LARGE) if place.level == 2 else 0
        perm = self.rng.choice((3, 3, 3, 1, 2))
        value = self._leaf_value(page, perm) | PS
        if self.rng.random() < 0.1:
            value |= 1 << self.rng.choice((11, 12, 13, 20, 29))
        yield entry("large", place.gpa, value if self.rng.random() < 0.8 else 0)
        yield from self._after(domain, place)

    def _inner(self) -> Iterator[Operation]:
        domain = self._domain()
        place = self.rng.choice(domain.inner)
        good = self._inner_value(place)
        value = self.rng.choice((good, good, good, good & ~W, good & ~R, 0, OUTSIDE | 7, self._odd(good), U64_MAX))
        yield entry("inner", place.gpa, value)
        yield from self._after(domain, place)
        if value != good and self.rng.random() < 0.9:
            yield from self._dma()
            yield entry("inner", place.gpa, good)
            yield from self._after(domain, place)

    def _after(self, domain: Domain, place: Place) -> Iterator[Operation]:
        """What a driver does when it changed an entry; or what it forgets."""
        kind = self.rng.random()
        if kind < 0.75:
            shift = (0, 0, 9, 18, 18)[place.level]
            yield self._flush_pages(domain.did, place.iova, shift)
        elif kind < 0.85:
            yield from self._invalidate()

    # -- contexts ----------------------------------------------------------------------------------------------------

    def good_context(self, index: int) -> tuple[int, ...]:
        """That of a domain."""
        if self.variant.mode == "scalable":
            return PASID_DIRECTORY | 1, index, 0, 0
        domain, levels = DOMAINS[index], self.rng.choice(self.variant.levels)
        table = domain.root3 if levels == 3 else domain.root
        return table | 1, domain.did << 8 | levels - 2

    def context_at(self, sid: int) -> int:
        """Where the context entry of ``sid`` is."""
        size = 16 if self.variant.mode == "legacy" else 32
        return self.topology.contexts(sid >> 8) + (sid & 0xFF) * size

    def _put_context(self, sid: int, words: tuple[int, ...]) -> Operation:
        return entry(f"context {sid:#x}", self.context_at(sid), *words)

    def _context(self) -> Iterator[Operation]:
        rng = self.rng
        sid = rng.choice(self.sids)
        index = rng.choice((0, 0, 1))
        words = list(self.good_context(index))
        kind = rng.random()
        if kind < 0.12:
            words[0] &= ~1
        elif kind < 0.2:
            words[0] |= 2 * self._may_be_silent()
        elif kind < 0.3 and self.variant.mode == "legacy":
            words[0] |= rng.choice((1, 2, 3)) << 2
        elif kind < 0.4:
            words[rng.randrange(len(words))] ^= 1 << rng.choice([bit for bit in range(64) if bit != 1])
        elif kind < 0.45 and self.variant.mode == "legacy":
            words[1] = words[1] & ~7 | rng.randrange(8)
        elif kind < 0.5:
            words[0] = OUTSIDE | 1
        self.believed.function_domain[sid] = index
        yield self._put_context(sid, tuple(words))
        if rng.random() < 0.9:
            yield self._flush_contexts(sid)
            if rng.random() < 0.9:
                yield from self._flush_domains()

    def _may_be_silent(self) -> bool:
        if self.variant.mode == "legacy":
            return True
        if not self.believed.silent:
            self.left_out["FPD above PASID entries with unsupported levels"] += 1
        return self.believed.silent

    def _root(self) -> Iterator[Operation]:
        rng = self.rng
        bus = self.sids[0] >> 8
        good, high = self.good_root(bus)
        low = rng.choice((0, good, good | 2, good | 1 << 50, OUTSIDE | 1))
        yield entry("root", ROOTS[0] + bus * 16, low, high if rng.random() < 0.9 else high ^ 1 << rng.randrange(64))
        yield self._flush_contexts(None)
        yield from self._flush_domains()
        yield from self._dma()
        yield from self._good_roots()
        yield self._flush_contexts(None)
        yield from self._flush_domains()

    def good_pasid(self, index: int) -> tuple[int, ...]:
        """That of a domain."""
        domain = DOMAINS[index]
        if self.variant.first_stage:
            return 1 | 2 << 2 | 1 << 6, PASID_DID + index, domain.root, 0, 0, 0, 0, 0
        levels = self.rng.choice(self.variant.levels)
        table = domain.root3 if levels == 3 else domain.root
        return table | 1 | levels - 2 << 2 | 2 << 6, domain.did, 0, 0, 0, 0, 0, 0

    def _pasid(self) -> Iterator[Operation]:
        rng = self.rng
        index = rng.choice((0, 0, 1))
        words = list(self.good_pasid(index))
        kind = rng.random()
        if kind < 0.1:
            words[0] &= ~1
        elif kind < 0.15:
            words[0] |= 2
        elif kind < 0.3:
            words[0] = words[0] & ~(7 << 6) | rng.choice((0, 1, 2, 3, 4, 5)) << 6
        elif kind < 0.35:
            words[0] = words[0] & ~(7 << 2) | (rng.randrange(2) if self.believed.silent else rng.randrange(8)) << 2
        elif kind < 0.4:
            words[2] ^= rng.choice((1, 1 << 4) if self.believed.silent else (1 << 2, 1 << 3, 1, 1 << 4))
        yield entry("pasid", PASID_TABLE + 64 * index, *words)
        if rng.random() < 0.1:
            value = rng.choice((0, PASID_TABLE, OUTSIDE | 1, PASID_TABLE | 1))
            yield entry("directory", PASID_DIRECTORY, value | 2 * (rng.random() < 0.3 and self._may_be_silent()))
        granularity = rng.choice((0, 1, 3))
        if self.believed.queue:
            yield self._push((7 | granularity << 4 | words[1] << 16 & 0xFFFF_0000 | index << 32, 0))
        yield self._flush_contexts(rng.choice((None, *self.sids)))
        yield from self._flush_domains()
        yield entry("directory", PASID_DIRECTORY, PASID_TABLE | 1)

    # -- invalidations -----------------------------------------------------------------------------------------------

    def _by_queue(self) -> bool:
        return self.believed.queue if self.rng.random() < 0.98 else not self.believed.queue

    def _push(self, *descriptors: tuple[int, int], wait: bool = True) -> Operation:
        """Descriptors at the tail, a wait behind them, the tail moved; then what came of it."""
        rng, commands, words = self.rng, [], list(descriptors)
        if wait:
            self.believed.status = self.believed.status % 500 + 1
            flags = rng.choice((1 << 5, 1 << 5, 1 << 5, 1 << 4, 3 << 4))
            words.append((5 | flags | self.believed.status << 32, STATUS + 8 * rng.randrange(64)))
        wide = self.believed.wide
        for low, high in words:
            at = QUEUE + self.believed.tail * (32 if wide else 16)
            commands += [store(at, 8, low), store(at + 8, 8, high)]
            commands += [store(at + 16, 8, 0), store(at + 24, 8, 0)] if wide else []
            self.believed.tail = (self.believed.tail + 1) % (_QUEUE_SLOTS >> wide)
        commands += [store(UNIT + IQT, 4, self.believed.tail << (5 if wide else 4))]
        commands += [load(UNIT + at, 4) for at in (IQH, FSTS, ICS, IECTL)]
        text = "queue " + ", ".join(f"{low:#x}:{high:#x}" for low, high in words)
        return Operation("queue", text, tuple(commands))

    def _global_by_register(self) -> Operation:
        steps = ((CCMD, 8, 1 << 63 | 1 << 61), (CCMD, 8, None), (IOTLB, 8, 1 << 63 | 1 << 60), (IOTLB, 8, None))
        return sequence("invalidate", "everything, by registers", *steps)

    def _flush_pages(self, did: int, iova: int, mask: int) -> Operation:
        if self.rng.random() < 0.08:
            mask = self.rng.choice((0, 1, 3, 9, 18) if self.rng.random() < 0.9 else (19, 63))
        if self._by_queue():
            if self.variant.first_stage and self.rng.random() < 0.6:
                return self._push((6 | 3 << 4 | PASID_DID << 16 | 0 << 32, iova | mask & 63))
            return self._push((2 | 3 << 4 | did << 16, iova | mask & 63))
        steps = ((IVA, 8, iova | mask & 63), (IOTLB, 8, 1 << 63 | 3 << 60 | did << 32), (IOTLB, 8, None))
        return sequence("invalidate", f"pages {iova:#x} am {mask} did {did}", *steps)

    def _flush_contexts(self, one: int | None) -> Operation:
        granularity, sid = (1, 0) if one is None else (3, one)
        mask = self.rng.choice((0, 0, 0, 1, 2, 3))
        if self._by_queue():
            return self._push((1 | granularity << 4 | DOMAINS[0].did << 16 | sid << 32 | mask << 48, 0))
        command = 1 << 63 | granularity << 61 | mask << 32 | sid << 16 | DOMAINS[0].did
        return sequence("invalidate", f"contexts {sid:#x}", (CCMD, 8, command), (CCMD, 8, None))

    def _flush_domains(self) -> Iterator[Operation]:
        for did in (*(domain.did for domain in DOMAINS), PASID_DID):
            granularity = self.rng.choice((1, 2, 2, 2))
            if self._by_queue():
                yield self._push((2 | granularity << 4 | did << 16, 0))
            else:
                command = 1 << 63 | granularity << 60 | did << 32
                yield sequence("invalidate", f"domain {did}", (IOTLB, 8, command), (IOTLB, 8, None))

    def _invalidate(self) -> Iterator[Operation]:
        rng = self.rng
        did = rng.choice((5, 5, 6, 7, 9))
        kind = rng.randrange(4)
        if kind == 0:
            place = rng.choice(self._domain().leaves)
            yield self._flush_pages(did, place.iova, 0)
        elif kind == 1:
            yield self._flush_contexts(rng.choice((None, *self.sids)))
        elif self._by_queue():
            yield self._push((2 | rng.choice((1, 2)) << 4 | did << 16 | rng.choice((0, 3)) << 6, 0))
        else:
            steps = (IOTLB, 8, 1 << 63 | rng.choice((0, 1, 2)) << 60 | did << 32), (IOTLB, 8, None)
            yield sequence("invalidate", f"domain {did}", *steps)

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

    def _recover(self) -> Iterator[Operation]:
        """From an error of the queue: a driver replaces the descriptor at its head by a wait, and goes on."""
        believed = self.believed
        if not believed.queue:
            return
        size = 32 if believed.wide else 16
        steps = ((IQH, 4, None), (FSTS, 4, 0x10), (FSTS, 4, None))
        yield sequence("command", "clear IQE", *steps)
        if self.rng.random() < 0.7:
            fill = [store(QUEUE + at, 8, 5 | 1 << 5 if at % size == 0 else STATUS if at % size == 8 else 0)
                    for at in range(0, PAGE, 8)]  # fmt: skip
            commands = [*fill, store(UNIT + IQT, 4, 0), *(load(UNIT + at, 4) for at in (IQH, IQT, FSTS))]
            yield Operation("command", "waits all over the queue", tuple(commands))
            believed.tail = 0
        steps = ((IQT, 4, 0), (GCMD, 4, self._keep() & ~QIE), (GSTS, 4, None), (IQH, 4, None))
        yield sequence("command", "queue off", *steps)
        yield self._queue_on()

    # -- registers ---------------------------------------------------------------------------------------------------

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

    def _look_at_faults(self) -> Iterator[Operation]:
        rng = self.rng
        steps: list[tuple[int, int, int | None]] = [(FSTS, 4, None), (FRCD, 8, None), (FRCD + 8, 8, None)]
        kind = rng.random()
        if kind < 0.5:
            steps += [(FRCD + 8, 8, 1 << 63), (FRCD + 8, 8, None)]
        elif kind < 0.7:
            steps += [(FRCD + 12, 4, 1 << 31), (FRCD + 12, 4, None)]
        if kind < 0.6:
            steps += [(FSTS, 4, rng.choice((1, 1, 0x10, 0x11, 0xFFFF_FFFF, 2)))]
        if rng.random() < 0.2:
            steps += [(FECTL, 4, rng.choice((0, 1 << 31, 3 << 30))), (FECTL, 4, None)]
        steps += [(FSTS, 4, None), (FRCD, 8, None), (FRCD + 8, 8, None), (FECTL, 4, None)]
        yield sequence("faults", "faults", *steps)

    def _registers(self) -> Iterator[Operation]:
        """Any register, in any size that the unit takes, or not."""
        rng = self.rng
        offset = rng.choice(
            (*range(0, 0x100, 4), FRCD, FRCD + 4, FRCD + 8, FRCD + 12, 0x100, 0x180, 0x21C, 0x230, 0x3FC)
        )
        size = rng.choice((4, 4, 8))
        if rng.random() < 0.6 or offset in (GCMD, IQA, IQA + 4, RTADDR, RTADDR + 4, IQT, IRTA, IRTA + 4):
            yield register(offset, size)
            return
        if (size == 8 and offset % 8) or offset in (CCMD + 4, IOTLB + 4, CCMD, IOTLB):
            size = 4
        value = rng.choice((0, 1, (1 << 8 * size) - 1, rng.getrandbits(8 * size)))
        if offset in (FEADDR, IEADDR, 0xE8, FEUADDR, IEUADDR, 0xEC):
            value = 0xFEE0_0000 if offset in (FEADDR, IEADDR, 0xE8) else 0
        yield register(offset, size, value)

    def _remap_interrupts(self) -> Iterator[Operation]:
        """The table pointer, and an entry."""
        rng = self.rng
        if rng.random() < 0.3 or not self.believed.remapping:
            self.believed.remapping, self.believed.latched = rng.random() < 0.9, True
            steps = ((IRTA, 8, REMAPPING | rng.choice((7, 7, 2, 0, 15))), (GCMD, 4, self._keep() & ~IRE | SIRTP))
            yield sequence("command", "SIRTP", *steps, (GSTS, 4, None))
            yield sequence("command", "IRE", (GCMD, 4, self._keep()), (GSTS, 4, None))
        sid = rng.choice((self.sids[0], self.sids[0], rng.getrandbits(16)))
        low = 1 | rng.randrange(32, 256) << 16 | rng.randrange(4) << 40
        high = sid | rng.randrange(4) << 16 | rng.choice((0, 1, 1, 2, 3)) << 18
        kind = rng.random()
        if kind < 0.1:
            low &= ~1
        elif kind < 0.2:
            low |= 2
        elif kind < 0.4:
            low ^= 1 << rng.randrange(64)
        elif kind < 0.45:
            high ^= 1 << rng.randrange(64)
        yield entry("irte", REMAPPING + 16 * rng.randrange(8), low, high)
        if self.believed.queue:
            yield self._push((4 | rng.choice((0, 1 << 4)) | rng.randrange(4) << 27 | rng.randrange(8) << 32, 0))

    def _message(self) -> Iterator[Operation]:
        """An interrupt: in remappable format, in compatibility format, or a write to somewhere else."""
        rng = self.rng
        index = rng.choice((rng.randrange(8), rng.randrange(8), rng.getrandbits(16)))
        address = 0xFEE0_0010 | (index & 0x7FFF) << 5 | index >> 15 << 2 | rng.choice((0, 0, 8))
        kind = rng.random()
        if kind < 0.15:
            address = 0xFEE0_0000 | rng.randrange(4) << 12
        elif kind < 0.25:
            place, offset = self._target(self.sids[0])
            address = place.iova + offset
        data = rng.choice((0, 0, rng.randrange(4), rng.randrange(32, 256), rng.getrandbits(16)))
        if kind >= 0.8 and self.believed.remapping:
            self.left_out["DMA as an interrupt request"] += 1
            kind = 0.0
        if kind < 0.8:
            yield edu_message(self.topology.edu, address, data)
        else:
            yield edu_dma(
                address & ~3, rng.choice((4, 4, 8, 12)), to_ram=rng.random() < 0.8, offset=8 * rng.randrange(16)
            )
        yield from self._look_at_faults()

    # -- traffic -----------------------------------------------------------------------------------------------------

    def _target(self, sid: int) -> tuple[Place, int]:
        """A place of the function's domain, and an offset in its page."""
        rng = self.rng
        domain = DOMAINS[self.believed.function_domain[sid]]
        place = rng.choice(domain.leaves) if rng.random() < 0.85 else rng.choice(domain.large)
        return place, 8 * rng.randrange(64)

    def _dma(self) -> Iterator[Operation]:
        rng = self.rng
        place, offset = self._target(self.sids[0])
        iova = place.iova + offset
        kind = rng.random()
        if kind < 0.02:
            iova = rng.choice((1 << 39, 1 << 47, 1 << 48, 1 << 57, (1 << 64) - PAGE, (1 << 38) + 8)) + offset
        elif kind < 0.04:
            iova = DATA.start + offset
        length = rng.choice((4, 8, 64, 64, 256))
        if rng.random() < 0.15:
            iova, length = iova | 0xE00, rng.choice((1024, 2048, 3000))
        yield edu_dma(iova, length, to_ram=rng.random() < 0.5, offset=8 * rng.randrange(16))
        if rng.random() < 0.4:
            yield from self._look_at_faults()

    def _testdev(self) -> Iterator[Operation]:
        place, offset = self._target(self.sids[1])
        page = self.rng.choice(PAGES)
        yield device_test(
            place.iova + (offset | 0xFE0 if self.rng.random() < 0.1 else offset),
            page + offset,
            self.rng.choice((4, 4, 8, 64)),
        )
        if self.rng.random() < 0.4:
            yield from self._look_at_faults()
