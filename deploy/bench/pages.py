"""A guest's IOMMU and devices in processes of their own: what an invalidation costs while they cache, and a page that
a device has to ask for.

The guest is guestd's code in this process, so that nobody's command stands between a register write and what it costs.
The limit of a page request is two bare round trips over the same kind of socket (:mod:`deploy.bench.stream_echo`): one
for the request and its response, one for the translation that is asked for again. Devices and echo run on one
processor, the guest on another (:mod:`deploy.bench.placement`).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

from deploy.bench.measure import Row, percentile, row_of
from deploy.bench.placement import opposite
from deploy.bench.stream_echo import echo
from deploy.inline.vtd_guest import VtdGuest, running
from protocols.vfio_user.iommu_messages import AtsAnswer, AtsQuery, TranslationEntry
from protocols.vfio_user.messages import HEADER_SIZE
from vfio_model.errors import VfioModelError
from vfio_model.guest_drivers.vtd import Domain
from vfio_model.iommu.vtd import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.iommu_ops import Atc, AtcOutcome, AtsRequest, PageRequest, PageResponse
from vfio_model.pci.translation_caps import AtsSpec, PasidSpec, PriSpec
from vfio_model.vmstate.fields import VMStateDescription

PAGE = 4096
IOVA = 0x7F12_3456_7000
DATA = 0x100_0000
PASID = 5
COUNTS = (1, 4, 8)
ROUNDS, FAULTS = 101, 400
_IN_A_ROW = 5
_PAGES = 3
"""Granularity: pages of a PASID."""
_TURNS = 4
"""Of the loop, in which the device does the rest."""
_ENTRY = TranslationEntry(IOVA, DATA, PAGE - 1, 3)
PASID_REG, ADDRESS, COMMAND, DONE, ELAPSED, STATE = range(0, 48, 8)
OPEN, FILL, ASK = 1, 2, 3
GOOD, FAILED = 1, 2


class PageAsker(PCIDevice):
    """1b36:00fb: caches translations of one PASID, and asks for pages.

    Registers of 8 bytes: the PASID, an address, a command; how many commands are done, the nanoseconds of the last
    :data:`ASK` from the page request to the byte that was written by the translation asked for again, and how it ended.
    """

    VENDOR_ID, DEVICE_ID = 0x1B36, 0x00FB
    EXPRESS = ExpressSpec()
    BARS = (BarSpec(0, PAGE, access=(8, 8)),)
    ATS, PRI, PASID = AtsSpec(), PriSpec(), PasidSpec()
    VMSTATE = VMStateDescription("page-asker", 1, (PARENT,))

    def realize(self) -> None:
        """Registers."""
        self.regs = dict.fromkeys(range(0, 48, 8), 0)
        self.atc: Atc | None = None
        self._began = 0

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register."""
        return self.regs.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """Commands are carried out in between: they ask the guest."""
        self.regs[offset] = value
        if offset == COMMAND:
            self.run_when_idle(lambda: self._do(value))
        return MemTxResult.OK

    def _do(self, command: int) -> bool:
        pasid, address = self.regs[PASID_REG], self.regs[ADDRESS]
        try:
            if command == OPEN:
                self.atc = self.open_atc(pasid)
                self.pri_register_notifier(pasid, self._responded)
                self._end(GOOD)
            elif command == FILL:
                self._end(self._fill())
            elif command == ASK:
                self._began = time.perf_counter_ns()
                self.pri_request_page(PageRequest(address, pasid, 1, last=True, is_read=True, is_write=True))
        except OSError:
            self._end(FAILED)
        return False

    def _fill(self) -> int:
        assert self.atc is not None, "open"
        self.atc.fill(AtsRequest(self.regs[ADDRESS], PAGE))
        moved = self.atc.access(self.regs[ADDRESS], memoryview(b"\x55"), True)
        return GOOD if moved == (1, AtcOutcome.OK) else FAILED

    def _responded(self, prgi: int, code: PageResponse) -> None:
        def retry() -> bool:
            ended = self._fill() if code is PageResponse.SUCCESS else FAILED
            self.regs[ELAPSED] = time.perf_counter_ns() - self._began
            self._end(ended)
            return False

        self.run_when_idle(retry)

    def _end(self, state: int) -> None:
        self.regs[STATE] = state
        self.regs[DONE] += 1


class Card:
    """Device ``number`` of ``guest``, its cache open."""

    def __init__(self, guest: VtdGuest, number: int) -> None:
        self._guest, self._bar = guest, guest.bars[number]
        self.domain: Domain = guest.domain(number, PASID + number)
        self.devfn, self.pasid = guest.devfn(number), PASID + number
        guest.requests.answer(self.devfn, self.pasid, self._bring_in)
        self._put(PASID_REG, self.pasid)
        self._done = 0
        self.do(OPEN)

    def _get(self, register: int) -> int:
        return self._guest.cpu.mmio_read(self._bar + register, 8)

    def _put(self, register: int, value: int) -> None:
        self._guest.cpu.mmio_write(self._bar + register, 8, value)

    def _bring_in(self, group: list[PageRequest]) -> PageResponse:
        for request in group:
            self._guest.driver.map(self.domain, request.addr, DATA, PAGE)
        return PageResponse.SUCCESS

    def start(self, command: int, address: int = IOVA) -> None:
        """Without waiting for its end."""
        self._put(ADDRESS, address)
        self._put(COMMAND, command)
        self._done += 1

    @property
    def over(self) -> bool:
        """Whether it has ended. :raise VfioModelError: badly."""
        if self._get(DONE) != self._done:
            return False
        if self._get(STATE) != GOOD:
            raise VfioModelError("a device of the benchmark could not do what it was told")
        return True

    def do(self, command: int, address: int = IOVA) -> None:
        """Carry out ``command``."""
        self.start(command, address)
        self._guest.until(lambda: self.over, f"command {command}")

    @property
    def seconds(self) -> float:
        """What the last ASK took."""
        return self._get(ELAPSED) / 1e9


def rows() -> Iterator[Row]:
    """Invalidations with 1, 4 and 8 devices, then page requests of one."""
    yield from _invalidations()
    yield from _page_requests()


def cards_of(guest: VtdGuest, count: int) -> list[Card]:
    """Each with a page cached, and following invalidations."""
    guest.until(lambda: guest.subscribers == count, "subscriptions")
    cards = [Card(guest, number) for number in range(count)]
    for card in cards:
        guest.driver.map(card.domain, IOVA, DATA + card.devfn * PAGE, PAGE)
        card.do(FILL)
    return cards


def invalidate(guest: VtdGuest, card: Card) -> float:
    """What the unit and ``card`` have of a page goes; seconds from the write of the tail to the wait's status."""
    iotlb = regs.DescriptorType.PASID_IOTLB | regs.TLB_G.put(_PAGES) | regs.TLB_DID.put(card.domain.did)
    device = regs.DescriptorType.PASID_DEVICE_TLB | regs.PASID_DEV_SID.put(card.devfn)
    guest.invalidation.submit(
        (iotlb | regs.PASID_TLB_PASID.put(card.pasid), IOVA), (device | regs.PASID_DEV_PASID.put(card.pasid), IOVA)
    )
    return guest.cpu.tail_seconds


def _invalidations() -> Iterator[Row]:
    with ExitStack() as stack:
        guests = [stack.enter_context(running(PageAsker, count)) for count in COUNTS]
        stack.enter_context(opposite(asking=(os.getpid(),), answering=[pid for _, pids in guests for pid in pids]))
        cards = [cards_of(guest, count)[0] for (guest, _), count in zip(guests, COUNTS, strict=True)]
        times: list[list[float]] = [[] for _ in COUNTS]
        every: list[list[float]] = [[] for _ in COUNTS]
        for _ in range(ROUNDS):
            for (guest, _), card, seconds, all_seconds in zip(guests, cards, times, every, strict=True):
                some = [invalidate(guest, card) for _ in range(_IN_A_ROW)]
                seconds.append(statistics.median(some))
                all_seconds += some
        for (guest, _), card in zip(guests, cards, strict=True):
            guest.driver.map(card.domain, IOVA, DATA, PAGE)
            invalidate(guest, card)
            card.do(FILL)
            if guest.cpu.read_memory(DATA, 1) != b"\x55":
                raise VfioModelError("a device did not follow the invalidation")
            guest.cpu.write_memory(DATA, b"\0")
    note = "PASID-based IOTLB and device-TLB invalidation, wait; from the tail's write to the wait's status"
    for count, mine, some in list(zip(COUNTS, times, every, strict=True))[1:]:
        name = f"invalidation by queue, {count} device processes that cache"
        row = row_of(name, mine, "the same with one", times[0], aim=2.0, note=note)
        yield replace(row, extra={"p99_us": round(percentile(some, 99) * 1e6, 1)})


def _page_requests() -> Iterator[Row]:
    request, reply = HEADER_SIZE + AtsQuery.SIZE, HEADER_SIZE + len(AtsAnswer.of(0, [_ENTRY], 0, complete=True).pack())
    with ExitStack() as stack:
        guest, pids = stack.enter_context(running(PageAsker, 1))
        trips = stack.enter_context(echo(request, reply))
        stack.enter_context(opposite(asking=(os.getpid(),), answering=(*pids, trips.pid)))
        (card,) = cards_of(guest, 1)
        asked, bare = [], []
        for number in range(1, FAULTS + 1):
            asked.append(fault(guest, card, IOVA + number * PAGE))
            began = time.perf_counter()
            trips.once()
            trips.once()
            bare.append(time.perf_counter() - began)
    yield Row(
        "page request, mapped by the guest, response, translated again",
        statistics.median(asked),
        "two bare AF_UNIX round trips",
        statistics.median(bare),
        note="one at a time, in turn with the limit; a third message is the response",
        extra={"p99_us": round(percentile(asked, 99) * 1e6, 1)},
    )


def fault(guest: VtdGuest, card: Card, address: int) -> float:
    """The device asks for a page that is not there; seconds, as it measures them."""
    card.start(ASK, address)
    guest.until(guest.requests.handle, "a page request")
    for _ in range(_TURNS):
        guest.loop.run_once(0.001)
    guest.until(lambda: card.over, "the translation asked for again")
    return card.seconds
