"""DMA that hits in a translation cache of the device's, against the assigned path in the same run.

As in :mod:`deploy.bench.dma`, RAM, ring, lane and gate are what a device process has, in this process's own memory;
both paths reach the same pages of the same RAM. Requests without PASID go by the cache of what guestd translates, those
with one by the device's own (ATS). The compiled variants are compared with each other, and so are those in Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from deploy.bench.dma import PAGE, RAM_BYTES, Assigned, assigned
from deploy.bench.measure import Action, Row, in_turn, row_of
from vfio_model.batch import variant
from vfio_model.host.dma import AssignedImpl
from vfio_model.memory.atc import CachedImpl
from vfio_model.memory.atc_cache import TranslationCache
from vfio_model.memory.ats_gate import AREA_SIZE, gate_of, init_gate, set_gate
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.iova_maps import READ, WRITE, IovaMap, IovaMaps
from vfio_model.memory.lane import Lane
from vfio_model.memory.ring import RecordFlags, RingReader, init_ring, ring_size
from vfio_model.memory.types import IOMMUAccessFlags, MemTxResult
from vfio_model.pci.atc import DeviceAtc
from vfio_model.pci.iommu_ops import AtcOutcome, AtsCompletion, AtsRequest
from vfio_model.pci.services import CheckedAtc

AS_ID, PASID = 7, 5
PAGES = 512
"""Among which accesses go round, in random order."""
AIM = 1.4
_ROUND = 512
_MASK = PAGE - 1


class CachingDevice:
    """A device that caches translations of the addresses at which ``view`` has the same pages. What it asks is counted
    in :attr:`asked`.
    """

    def __init__(self, view: Assigned, *, compiled: bool) -> None:
        self.asked = 0
        self._start = view.start
        first = view.impl.segments.find(view.table[0] & ~_MASK)
        assert first is not None, "mapped"
        self._places = [(entry & ~_MASK) - first[0].base for entry in view.table]
        ring, gate = memoryview(bytearray(ring_size())).cast("Q"), memoryview(bytearray(AREA_SIZE)).cast("Q")
        init_ring(ring)
        init_gate(gate)
        set_gate(gate, True)
        ram: IovaMaps[None] = IovaMaps()
        ram.add(IovaMap(0, RAM_BYTES, READ | WRITE, view.ram, None))
        self.plain = CachedImpl(
            lambda iova, _length, _is_write: self._entry(iova),
            RingReader(ring),
            Lane.private(),
            ram,
            as_id=AS_ID,
            compiled=compiled,
        )
        """Of requests without PASID."""
        self.plain.arm()
        cache = TranslationCache(
            RingReader(ring),
            Lane.private(),
            as_id=AS_ID,
            pasid=PASID,
            kind=RecordFlags.ATS,
            gate=gate_of(gate),
            compiled=compiled,
        )
        atc = DeviceAtc(cache, ram, self._translate, lambda *_: MemTxResult.DECODE_ERROR, lambda _: None, pasid=PASID)
        self.atc = CheckedAtc(atc, lambda _: None, lambda _: None, PASID)
        """Of requests with one, as a device class has it."""

    def _entry(self, iova: int) -> IOMMUTLBEntry:
        self.asked += 1
        place = self._places[iova - self._start >> 12]
        return IOMMUTLBEntry(None, iova & ~_MASK, place, _MASK, IOMMUAccessFlags.RW)

    def _translate(self, request: AtsRequest) -> tuple[AtsCompletion, int]:
        return AtsCompletion([self._entry(request.addr)], 0, True), 0

    def fill(self, iovas: list[int]) -> None:
        """Have all of ``iovas`` cached by both, and used once."""
        access, byte = self.atc.access, memoryview(b"\x55")
        for iova in iovas:
            self.atc.fill(AtsRequest(iova, PAGE))
            if self.plain.write(iova, byte) or access(iova + 1, byte, True) != (1, AtcOutcome.OK):
                raise AssertionError("a mapped page refused a write")


def rows() -> Iterator[Row]:
    """Both kinds of requests, of 64 bytes and of a page, to one page and to many."""
    view = assigned()
    pages = random.Random(4).sample(range(RAM_BYTES // PAGE), PAGES)
    everywhere = [view.start + page * PAGE for page in pages]
    for compiled in (True, False) if variant.chosen == "compiled" else (False,):
        device = CachingDevice(view, compiled=compiled)
        device.fill(everywhere)
        asked = device.asked
        path = AssignedImpl(view.impl.pe, view.impl.domain, view.impl.segments, Lane.private(), compiled=compiled)
        path.write(everywhere[0], b"\x55")
        how = "compiled" if compiled else "in Python"
        for size in (64, PAGE):
            yield from _three(
                f"{_label(size)}, hot, {how}", device, path.write, everywhere[:1] * _ROUND, size, compiled
            )
            yield from _three(f"{_label(size)}, random pages, {how}", device, path.write, everywhere, size, compiled)
        assert device.asked == asked, "every access was a hit"


def _label(size: int) -> str:
    return f"{size} B" if size < 1024 else f"{size >> 10} KiB"


def _three(
    label: str,
    device: CachingDevice,
    other: Callable[[int, memoryview], object],
    iovas: list[int],
    size: int,
    fast: bool,
) -> Iterator[Row]:
    """The two kinds of requests and the assigned path, in turn."""
    data, write, access = memoryview(bytes(size)), device.plain.write, device.atc.access

    def plain() -> None:
        for iova in iovas:
            write(iova, data)

    def with_pasid() -> None:
        for iova in iovas:
            access(iova, data, True)

    def assigned_path() -> None:
        for iova in iovas:
            other(iova, data)

    actions: list[Action] = [plain, with_pasid, assigned_path]
    times = in_turn(actions, number=2 if fast else 1, rounds=61)
    for what, mine in (("without PASID", times[0]), ("with PASID", times[1])):
        name = f"ATC-hit DMA {what}, {label}"
        yield row_of(name, mine, "assigned path", times[2], per=len(iovas), aim=AIM)
