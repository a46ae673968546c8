"""What devices do, and what a driver sees of it: DMA, interrupts, faults, registers."""

from __future__ import annotations

from collections.abc import Iterator

from tests.interop.vtd.driver import Driver
from tests.interop.vtd.operations import (
    Operation,
    device_test,
    edu_dma,
    edu_message,
    entry,
    register,
    sequence,
)
from tests.interop.vtd.places import (
    DATA,
    PAGE,
    PAGES,
    REMAPPING,
)
from tests.interop.vtd.variants import (
    CCMD,
    FEADDR,
    FECTL,
    FEUADDR,
    FRCD,
    FSTS,
    GCMD,
    GSTS,
    IEADDR,
    IEUADDR,
    IOTLB,
    IQA,
    IQT,
    IRE,
    IRTA,
    RTADDR,
    SIRTP,
)


class Traffic(Driver):
    """Operations of devices."""

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
