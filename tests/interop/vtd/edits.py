"""Edits of the tables, mostly right, and the invalidations behind them, mostly there."""

from __future__ import annotations

from collections.abc import Iterator

from tests.interop.vtd.operations import (
    Operation,
    entry,
)
from tests.interop.vtd.places import (
    LARGE,
    OUTSIDE,
    PAGES,
    PASID_DIRECTORY,
    PASID_TABLE,
    ROOTS,
    Domain,
    Place,
)
from tests.interop.vtd.traffic import Traffic
from tests.interop.vtd.variants import (
    PS,
    R,
    W,
)
from vfio_model.ranges import U64_MAX


class Edits(Traffic):
    """Operations on tables."""

    def _leaf_value(self, page: int, perm: int) -> int:
        if not self.variant.first_stage:
            return page | perm
        return page | (1 if perm & R else 0) | (2 if perm & W else 0) | 4

    def _inner_value(self, place: Place) -> int:
        return place.below | (7 if self.variant.first_stage else R | W)

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

    def _good_roots(self) -> Iterator[Operation]:
        for root in ROOTS:
            for bus in self.topology.buses:
                yield entry("root", root + bus * 16, *self.good_root(bus))
        if self.variant.mode == "scalable":
            yield entry("directory", PASID_DIRECTORY, PASID_TABLE | 1)
            yield entry("pasid", PASID_TABLE, *self.good_pasid(0))
            yield entry("pasid", PASID_TABLE + 64, *self.good_pasid(1))

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
