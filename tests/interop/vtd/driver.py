"""What a driver of VT-d does with a unit: commands, queue, invalidations; and what its tables are when right."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

from tests.interop.vtd.operations import (
    Operation,
    load,
    sequence,
    store,
)
from tests.interop.vtd.places import (
    DOMAINS,
    PAGE,
    PASID_DID,
    PASID_DIRECTORY,
    QUEUE,
    STATUS,
    UNIT,
    Domain,
    Place,
)
from tests.interop.vtd.topology import Topology
from tests.interop.vtd.variants import (
    CCMD,
    FSTS,
    GCMD,
    GSTS,
    ICS,
    IECTL,
    IOTLB,
    IQA,
    IQH,
    IQT,
    IRE,
    IVA,
    QIE,
    RTADDR,
    SRTP,
    TE,
    Believed,
    Variant,
)

_QUEUE_SLOTS = 256


class Driver:
    """Of ``variant``; chooses by ``rng``."""

    def __init__(self, variant: Variant, rng: random.Random) -> None:
        self.variant, self.rng = variant, rng
        self.sids = variant.topology.sids
        self.believed = Believed()
        self.left_out: Counter[str] = Counter()
        """Hazards: what was not done because it need not mean the same, and how often."""

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

    def _keep(self) -> int:
        """What a driver leaves on; here: queue, translation, interrupt remapping."""
        return TE | (QIE if self.believed.queue else 0) | (IRE if self.believed.remapping else 0)

    def _set_gcmd(self, bits: int) -> Operation:
        return sequence("command", f"GCMD {bits:#x}", (GCMD, 4, self._keep() | bits), (GSTS, 4, None))

    def _set_root(self, root: int) -> Operation:
        scalable = 1 << 10 if self.variant.mode == "scalable" else 0
        return sequence("command", "SRTP", (RTADDR, 8, root | scalable), (GCMD, 4, SRTP), (GSTS, 4, None))

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

    def good_root(self, bus: int) -> tuple[int, int]:
        """The root entry of ``bus``."""
        contexts = self.topology.contexts(bus)
        return contexts | 1, 0 if self.variant.mode == "legacy" else (contexts + PAGE) | 1

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

    def good_pasid(self, index: int) -> tuple[int, ...]:
        """That of a domain."""
        domain = DOMAINS[index]
        if self.variant.first_stage:
            return 1 | 2 << 2 | 1 << 6, PASID_DID + index, domain.root, 0, 0, 0, 0, 0
        levels = self.rng.choice(self.variant.levels)
        table = domain.root3 if levels == 3 else domain.root
        return table | 1 | levels - 2 << 2 | 2 << 6, domain.did, 0, 0, 0, 0, 0, 0

    def _domain(self) -> Domain:
        return DOMAINS[self.rng.choice((0, 0, 0, 1))]

    def _target(self, sid: int) -> tuple[Place, int]:
        """A place of the function's domain, and an offset in its page."""
        rng = self.rng
        domain = DOMAINS[self.believed.function_domain[sid]]
        place = rng.choice(domain.leaves) if rng.random() < 0.85 else rng.choice(domain.large)
        return place, 8 * rng.randrange(64)

    def _may_be_silent(self) -> bool:
        if self.variant.mode == "legacy":
            return True
        if not self.believed.silent:
            self.left_out["FPD above PASID entries with unsupported levels"] += 1
        return self.believed.silent

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
