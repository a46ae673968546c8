"""svm, the device for shared virtual memory: registers, commands, page request groups, what may happen meanwhile."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from vfio_model.devices.svm import regs
from vfio_model.devices.svm.command import MAX_REPEATS, PIECE
from vfio_model.devices.svm.device import SvmDevice
from vfio_model.memory.dma import DMAImpl
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.types import PCI_NO_PASID, IOMMUAccessFlags
from vfio_model.pci.express import CAP_ID_EXPRESS
from vfio_model.pci.iommu_ops import (
    Atc,
    AtcOutcome,
    AtsCompletion,
    AtsGate,
    AtsRequest,
    IotlbInfo,
    PageRequest,
    PageResponse,
    PageResponseFn,
)
from vfio_model.pci.msi import CAP_ID_MSI
from vfio_model.pci.translation_caps import ATS_ENABLE, PASID_ENABLE, PRI_ENABLE
from vfio_model.testing.bench import Bench, Host

PAGE = 4096
ALL_ONES = (1 << 64) - 1
BUFFER = 0x7F00_0000_0000
PASID = 9
RO, RW = IOMMUAccessFlags.RO, IOMMUAccessFlags.RW
WRITE, READ = regs.COMMAND_WRITE, regs.COMMAND_READ
PRI_STATUS_UNEXPECTED, PRI_STATUS_FAILED = 2, 1
SLICE_NS = 1000


class Cache:
    """An ``Atc`` that keeps what it is given until it is dropped, over the port's memory."""

    def __init__(self, port: Port, pasid: int, priv: bool) -> None:
        self._port, self._pasid, self._priv = port, pasid, priv
        self.pages: dict[int, IOMMUAccessFlags] = {}
        self.closed = False

    @property
    def entries(self) -> int:
        return len(self.pages)

    def fill(self, request: AtsRequest) -> AtsCompletion:
        self._port.meanwhile("fill")
        self._port.asked.append(request)
        end = min(request.addr + request.length, (request.addr & -PAGE) + request.max_entries * PAGE)
        wanted = (RO if request.no_write else RW) | (IOMMUAccessFlags.PRIV if self._priv else IOMMUAccessFlags.NONE)
        entries = []
        for page in range(request.addr & -PAGE, end, PAGE):
            perm = self._port.pages.get(page, IOMMUAccessFlags.NONE)
            good = perm & wanted == wanted
            entries.append(IOMMUTLBEntry(None, page if good else 0, page, PAGE - 1, perm, self._pasid))
            if good:
                self.pages[page] = perm
        return AtsCompletion(entries, complete=end >= request.addr + request.length)

    def access(self, addr: int, view: memoryview, is_write: bool) -> tuple[int, AtcOutcome]:
        self._port.meanwhile("access")
        page = addr & -PAGE
        if self.closed:
            return 0, AtcOutcome.FAILED
        if page not in self.pages:
            return 0, AtcOutcome.MISS
        if self.pages[page] & IOMMUAccessFlags.UNTRANSLATED_ONLY:
            return 0, AtcOutcome.UNTRANSLATED_ONLY
        memory = self._port.memory.setdefault(page, bytearray(PAGE))
        at = addr - page
        size = min(len(view), PAGE - at)
        if is_write:
            memory[at : at + size] = view[:size]
        else:
            view[:size] = memory[at : at + size]
        return size, AtcOutcome.OK

    def close(self) -> None:
        self.closed = True
        self.pages.clear()


class Port:
    """An IOMMU with memory of its own: ``pages`` are there, the others are what :attr:`requests` ask for."""

    def __init__(self) -> None:
        self.pages: dict[int, IOMMUAccessFlags] = {}
        self.memory: dict[int, bytearray] = {}
        self.asked: list[AtsRequest] = []
        self.requests: list[PageRequest] = []
        self.listeners: dict[int, PageResponseFn] = {}
        self.caches: list[Cache] = []
        self.refuse: list[int] = []
        """errno of the next page requests."""
        self.meanwhile: Callable[[str], object] = lambda what: None
        """Told of each thing that is asked, before it is answered."""

    def get_iotlb_info(self) -> IotlbInfo:
        return IotlbInfo(48, PAGE)

    def register_iotlb_notifier(self, pasid: int, notifier: IOMMUNotifier) -> None:
        raise AssertionError("caches hear by themselves")

    unregister_iotlb_notifier = register_iotlb_notifier

    def ats_request_translation(self, request: AtsRequest) -> AtsCompletion:
        raise AssertionError("translations are for a cache")

    def translated_space(self, pasid: int) -> DMAImpl:
        raise AssertionError("accesses go through a cache")

    def watch_translated_requests(self, fn: AtsGate) -> Callable[[], None]:
        raise AssertionError("caches look themselves")

    def open_atc(self, pasid: int, *, priv: bool = False) -> Atc:
        self.meanwhile("open")
        cache = Cache(self, pasid, priv)
        self.caches.append(cache)
        return cache

    def pri_register_notifier(self, pasid: int, fn: PageResponseFn) -> None:
        self.meanwhile("register")
        self.listeners[pasid] = fn

    def pri_unregister_notifier(self, pasid: int) -> None:
        self.listeners.pop(pasid, None)

    def pri_request_page(self, request: PageRequest) -> None:
        self.meanwhile("page")
        if self.refuse:
            raise OSError(self.refuse.pop(0), "refused")
        self.requests.append(request)

    def groups(self) -> list[list[PageRequest]]:
        """The requests so far, by group."""
        found: list[list[PageRequest]] = [[]]
        for request in self.requests:
            found[-1].append(request)
            if request.last:
                found.append([])
        return [group for group in found if group]


class SvmHost(Host):
    """With an IOMMU."""

    def __init__(self) -> None:
        super().__init__()
        self.port = Port()
        self.iommu = self.port


class SvmBench(Bench[SvmDevice]):
    """The device with everything enabled, as its driver leaves it."""

    HOST = SvmHost

    @property
    def port(self) -> Port:
        assert isinstance(self.host, SvmHost)
        return self.host.port

    def bring_up(self) -> None:
        super().bring_up()
        device = self.device
        assert device.pasid is not None and device.ats is not None and device.pri is not None
        device.config_write(device.pasid.offset + 6, 2, PASID_ENABLE)
        device.config_write(device.ats.offset + 6, 2, ATS_ENABLE)
        self.allocate(32)
        device.config_write(device.pri.offset + 4, 2, PRI_ENABLE)
        self.enable_msi()

    def allocate(self, count: int) -> None:
        """How many page requests may be outstanding."""
        assert self.device.pri is not None
        self.device.config_write(self.device.pri.offset + 12, 4, count)

    def idle(self, slices: int = 50) -> None:
        """What the device does by itself."""
        for _ in range(slices):
            self.advance(SLICE_NS)

    def use(self, pasid: int) -> None:
        self.write(regs.PASID, pasid, 4)
        self.idle(3)

    def start(self, command: int, address: int, size: int, *, crc: int = 0, privileged: bool = False) -> None:
        for register, value in (
            (regs.ADDRESS, address),
            (regs.SIZE, size),
            (regs.EXPECTED_CRC, crc),
            (regs.OPTIONS, int(privileged)),
            (regs.COMMAND, command),
        ):
            self.write(register, value, 8)

    def serve(self, rounds: int = 100) -> None:
        """Bring in what is asked for until the device is done."""
        for _ in range(rounds):
            self.idle(10)
            if not self.device.busy:
                return
            for request in self.port.requests:
                self.port.pages[request.addr & -PAGE] = RW
            self.port.listeners[PASID](self.port.requests[-1].prgi, PageResponse.SUCCESS)
        raise AssertionError("it goes on and on")

    def ended(self) -> list[int]:
        """The statuses of the commands that ended since the last look, by their messages."""
        count = self.signals.count("msi 0")
        self.signals.clear()
        return [self.read(regs.ADDRESS, 8)] * count


@pytest.fixture
def bench() -> SvmBench:
    made = SvmBench(SvmDevice)
    made.use(PASID)
    return made


# -- registers


def test_identity_and_capabilities(bench: SvmBench) -> None:
    device = bench.device
    assert device.config_read(0, 4) == 0x0B11_1234 and device.config_read(8, 1) == 0x10
    assert device.pasid is not None and device.ats is not None and device.pri is not None
    assert device.config_read(device.pasid.offset + 4, 2) == 20 << 8 | 4
    assert device.config_read(device.ats.offset + 4, 2) & 1 << 5
    assert device.config_read(device.pri.offset + 8, 4) == 2048
    assert device.config_read(device.pri.offset + 6, 2) & 1 << 15
    assert [device.config_read(at, 1) for at in (0x40, device.config_read(0x41, 1))] == [CAP_ID_MSI, CAP_ID_EXPRESS]
    assert device.config_read(0x41, 1) == 0x80


def test_reads(bench: SvmBench) -> None:
    assert (bench.read(0, 8), bench.read(8, 8)) == (0x0B1C_5111, 0)
    assert [bench.read(offset, 8) for offset in (0x10, 0x18, 0x20, 0x50, 0x100)] == [ALL_ONES] * 5
    assert [bench.read(0, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFF_FFFF]


def test_writes_of_another_size_are_ignored(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, PAGE)
    bench.serve()
    bench.ended()
    bench.write(regs.COMMAND, WRITE, 4)
    bench.write(regs.PASID, regs.PASID_DISABLE, 8)
    bench.write(regs.SIZE, 0, 4)
    bench.idle()
    assert bench.ended() == [] and not bench.device.busy
    bench.write(regs.COMMAND, WRITE, 8)
    bench.serve()
    assert bench.port.memory[BUFFER] == regs.pattern(PAGE)


def test_other_commands_are_ignored(bench: SvmBench) -> None:
    for command in (0, 3, 1 << 32 | 1):
        bench.start(command, BUFFER, 1)
        bench.idle()
    assert bench.ended() == [] and bench.port.asked == []


def test_the_crc() -> None:
    assert regs.crc8((0xCAFE_CAFE_DEAD_C0DE).to_bytes(8, "little")) == 0x16
    assert (regs.crc8(b"123456789"), regs.crc8(bytes(4096))) == (0x7F, 0x47)
    assert regs.crc8(b"6789", regs.crc8(b"12345")) == 0x7F


def test_the_pattern() -> None:
    assert regs.pattern(4) == b"\0\1\2\3" and regs.pattern(3, 250) == b"\xfa\0\1"
    assert regs.pattern(1 << 20, 7)[-1] == (7 + (1 << 20) - 1) % 251


# -- PASID


def test_a_pasid_that_is_set_is_listened_to(bench: SvmBench) -> None:
    assert [*bench.port.listeners] == [PASID] and len(bench.port.caches) == 2
    bench.use(10)
    assert [*bench.port.listeners] == [10]
    assert [cache.closed for cache in bench.port.caches] == [True, True, False, False]
    bench.use(regs.PASID_DISABLE)
    assert not bench.port.listeners and all(cache.closed for cache in bench.port.caches)
    bench.use(regs.PASID_DISABLE + 1)
    bench.use(ALL_ONES >> 32)
    assert not bench.port.listeners and len(bench.port.caches) == 4


def test_without_a_pasid_commands_fail(bench: SvmBench) -> None:
    bench.use(regs.PASID_DISABLE)
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR] and bench.port.asked == []


def test_a_pasid_that_the_guest_has_not_enabled_is_none(bench: SvmBench) -> None:
    assert bench.device.pasid is not None
    bench.device.config_write(bench.device.pasid.offset + 6, 2, 0)
    bench.use(11)
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR]


@pytest.mark.parametrize("moment", ["register", "open"])
@pytest.mark.parametrize("then", [11, regs.PASID_DISABLE])
def test_the_pasid_changes_while_another_one_is_being_set(bench: SvmBench, moment: str, then: int) -> None:
    def once(what: str) -> None:
        if what == moment:
            bench.port.meanwhile = lambda what: None
            bench.write(regs.PASID, then, 4)

    bench.port.meanwhile = once
    bench.use(10)
    bench.idle()
    assert [*bench.port.listeners] == ([] if then == regs.PASID_DISABLE else [then])
    assert sum(not cache.closed for cache in bench.port.caches) == (0 if then == regs.PASID_DISABLE else 2)


def test_a_command_that_comes_while_a_pasid_is_being_set_uses_it() -> None:
    bench = SvmBench(SvmDevice)

    def once(what: str) -> None:
        bench.port.meanwhile = lambda what: None
        bench.start(WRITE, BUFFER, 4)

    bench.port.meanwhile = once
    bench.use(PASID)
    bench.serve()
    assert bench.ended() == [regs.STATUS_OK] and bench.port.requests[0].pasid == PASID


# -- page request groups


def test_missing_pages_are_one_group(bench: SvmBench) -> None:
    bench.port.pages[BUFFER + PAGE] = RW
    bench.start(WRITE, BUFFER + 8, 4 * PAGE)
    bench.idle()
    assert [(one.addr, one.last, one.prgi) for one in bench.port.requests] == [
        (BUFFER + 8, False, 0),
        (BUFFER + 2 * PAGE, False, 0),
        (BUFFER + 3 * PAGE, False, 0),
        (BUFFER + 4 * PAGE, True, 0),
    ]
    assert all(
        (one.is_read, one.is_write, one.priv, one.pasid) == (False, True, False, PASID) for one in bench.port.requests
    )
    bench.serve()
    assert bench.ended() == [regs.STATUS_OK] and len(bench.port.requests) == 4
    assert bench.port.memory[BUFFER][8:] == regs.pattern(PAGE - 8)
    assert bench.port.memory[BUFFER + 4 * PAGE][:8] == regs.pattern(8, 4 * PAGE - 8)


def test_no_more_than_are_allocated_are_outstanding(bench: SvmBench) -> None:
    bench.allocate(3)
    bench.start(READ, BUFFER, 8 * PAGE, crc=regs.crc8(bytes(8 * PAGE)))
    bench.serve()
    assert [len(group) for group in bench.port.groups()] == [3, 3, 2]
    assert [group[0].prgi for group in bench.port.groups()] == [0, 1, 2]
    assert bench.port.requests[0].is_read and not bench.port.requests[0].is_write
    assert bench.ended() == [regs.STATUS_OK]


def test_groups_are_numbered_modulo_512(bench: SvmBench) -> None:
    bench.allocate(1)
    bench.start(WRITE, BUFFER, 514 * PAGE)
    bench.serve(600)
    assert [group[0].prgi for group in bench.port.groups()] == [*range(512), 0, 1]


def test_a_group_that_fails_is_the_command_s_failure(bench: SvmBench) -> None:
    for code, error in ((PageResponse.INVALID_REQUEST, 0), (PageResponse.RESPONSE_FAILURE, PRI_STATUS_FAILED)):
        bench.start(WRITE, BUFFER, 1)
        bench.idle()
        assert bench.device.busy
        bench.port.listeners[PASID](bench.port.requests[-1].prgi, code)
        bench.idle()
        assert bench.ended() == [regs.STATUS_ERROR]
        assert bench.device.pri is not None
        assert bench.device.config_read(bench.device.pri.offset + 6, 2) & 3 == error


def test_a_response_to_another_group_is_noted(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    bench.port.listeners[PASID](77, PageResponse.SUCCESS)
    bench.idle()
    assert bench.device.busy and bench.device.pri is not None
    assert bench.device.config_read(bench.device.pri.offset + 6, 2) & 3 == PRI_STATUS_UNEXPECTED


def test_a_full_queue_is_tried_again(bench: SvmBench) -> None:
    bench.port.refuse = [errno.ENOSPC] * 3
    bench.start(WRITE, BUFFER, 2 * PAGE)
    bench.idle()
    assert [one.last for one in bench.port.requests] == [False, True]
    bench.serve()
    assert bench.ended() == [regs.STATUS_OK]


def test_page_requests_that_are_forbidden_fail_the_command(bench: SvmBench) -> None:
    bench.port.refuse = [errno.EPERM]
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR]


def test_a_page_that_never_comes_is_not_asked_for_for_ever(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, 1)
    for _ in range(MAX_REPEATS + 1):
        bench.idle(3)
        if bench.device.busy:
            bench.port.listeners[PASID](bench.port.requests[-1].prgi, PageResponse.SUCCESS)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR] and len(bench.port.requests) == MAX_REPEATS


# -- data


def test_what_is_dropped_in_the_middle_is_requested_again(bench: SvmBench) -> None:
    pages = [BUFFER + number * PAGE for number in range(3)]
    bench.port.pages = dict.fromkeys(pages, RW)

    def drop(what: str) -> None:
        if what == "access" and bench.port.memory.get(pages[0]):
            bench.port.meanwhile = lambda what: None
            del bench.port.pages[pages[1]]
            for cache in bench.port.caches:
                cache.pages.pop(pages[1], None)

    bench.port.meanwhile = drop
    bench.start(WRITE, BUFFER, 3 * PAGE)
    bench.idle()
    assert [(one.addr, one.last) for one in bench.port.requests] == [(pages[1], True)]
    bench.serve()
    assert bench.ended() == [regs.STATUS_OK]
    assert b"".join(bench.port.memory[page] for page in pages) == regs.pattern(3 * PAGE)


def test_a_read_compares_the_crc(bench: SvmBench) -> None:
    data = bytes(range(256)) * 40
    for number in range(3):
        bench.port.pages[BUFFER + number * PAGE] = RO
        bench.port.memory[BUFFER + number * PAGE] = bytearray(data[number * PAGE :][:PAGE].ljust(PAGE, b"\0"))
    for crc, status in ((regs.crc8(data), 0), (regs.crc8(data) ^ 1, 1), (regs.crc8(data) | 1 << 8, 1)):
        bench.start(READ, BUFFER, len(data), crc=crc)
        bench.idle()
        assert bench.ended() == [status]
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    assert bench.port.requests[-1].is_write, "a page that can only be read is requested to be written"


def test_untranslated_only_is_a_failure(bench: SvmBench) -> None:
    bench.port.pages[BUFFER] = RW | IOMMUAccessFlags.UNTRANSLATED_ONLY
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR] and not bench.port.requests


def test_privileged_requests_have_a_cache_of_their_own(bench: SvmBench) -> None:
    bench.port.pages[BUFFER] = RW
    bench.start(READ, BUFFER, 1, crc=regs.crc8(b"\0"), privileged=True)
    bench.idle()
    assert bench.port.requests[-1].priv
    bench.port.pages[BUFFER] = RW | IOMMUAccessFlags.PRIV
    bench.port.listeners[PASID](0, PageResponse.SUCCESS)
    bench.idle()
    assert bench.ended() == [regs.STATUS_OK]
    assert [cache.entries for cache in bench.port.caches] == [0, 1] and bench.device.cached == 1


def test_a_range_that_needs_many_translations_is_asked_for_in_parts(bench: SvmBench) -> None:
    pages = 1100
    bench.port.pages = {BUFFER + number * PAGE: RW for number in range(pages)}
    bench.start(WRITE, BUFFER, pages * PAGE)
    bench.serve()
    assert [request.addr for request in bench.port.asked] == [BUFFER + part * 512 * PAGE for part in range(3)]
    assert bench.ended() == [regs.STATUS_OK]
    assert bench.port.memory[BUFFER + PIECE + PAGE] == regs.pattern(PAGE, PIECE + PAGE)


def test_nothing_is_done_at_once(bench: SvmBench) -> None:
    bench.port.pages[BUFFER] = RW
    bench.start(WRITE, BUFFER, 0)
    assert bench.device.busy
    bench.idle()
    assert bench.ended() == [regs.STATUS_OK]


def test_ranges_end_within_64_bits(bench: SvmBench) -> None:
    last = (1 << 64) - PAGE
    bench.port.pages[last] = RW
    bench.start(WRITE, last + 8, PAGE - 8)
    bench.idle()
    bench.start(WRITE, last + 8, PAGE - 7)
    bench.idle()
    assert bench.ended() == [regs.STATUS_ERROR] * 2 and len(bench.port.asked) == 1
    assert bench.port.memory[last][8:] == regs.pattern(PAGE - 8) and not bench.port.requests


# -- what comes between


def test_a_pasid_that_goes_ends_the_command(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    bench.use(regs.PASID_DISABLE)
    assert bench.ended() == [regs.STATUS_ERROR] and not bench.device.busy


@pytest.mark.parametrize("moment", ["fill", "page", "access"])
@pytest.mark.parametrize("reset", [False, True])
def test_something_happens_inside_a_request(bench: SvmBench, moment: str, reset: bool) -> None:
    bench.port.pages[BUFFER] = RW

    def once(what: str) -> None:
        if what == moment:
            bench.port.meanwhile = lambda what: None
            if reset:
                bench.device.reset()
            else:
                bench.write(regs.PASID, regs.PASID_DISABLE, 4)

    bench.port.meanwhile = once
    bench.start(WRITE, BUFFER, 2 * PAGE if moment == "page" else 8)
    bench.idle()
    assert not bench.device.busy and not bench.port.listeners
    assert bench.ended() == ([] if reset else [regs.STATUS_ERROR])
    assert all(cache.closed for cache in bench.port.caches)


def test_a_reset_forgets_everything(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, 1)
    bench.idle()
    bench.reset()
    assert not bench.port.listeners and all(cache.closed for cache in bench.port.caches)
    bench.idle()
    assert bench.ended() == [] and not bench.device.busy
    bench.use(PASID)
    bench.start(WRITE, BUFFER, 1)
    bench.serve()
    assert bench.ended() == [regs.STATUS_OK]


def test_a_command_goes_on_elsewhere(bench: SvmBench) -> None:
    """Also one that waits: it asks again, and what answered the first request is another group's."""
    bench.port.pages[BUFFER] = RO
    bench.port.memory[BUFFER] = bytearray(b"\x11" * PAGE)
    bench.start(READ, BUFFER, 2 * PAGE, crc=regs.crc8(b"\x11" * PAGE + bytes(PAGE)))
    bench.idle()
    assert bench.device.busy
    there = bench.migrate()
    there.port.pages, there.port.memory = bench.port.pages, bench.port.memory
    there.idle()
    assert there.port.requests[-1].prgi != bench.port.requests[-1].prgi
    there.serve()
    assert there.ended() == [regs.STATUS_OK]


def test_requests_without_pasid_are_none_of_it(bench: SvmBench) -> None:
    bench.start(WRITE, BUFFER, 3 * PAGE)
    bench.serve()
    assert all(request.pasid != PCI_NO_PASID for request in bench.port.requests)


@pytest.mark.parametrize("seed", range(4))
def test_whatever_a_guest_does(seed: int) -> None:
    """Wild registers, PASIDs, responses, resets: a command ends, and the next good one works."""
    chance = random.Random(seed)
    bench = SvmBench(SvmDevice)
    offsets = [*regs.PARAMETERS, regs.COMMAND, regs.COMMAND, regs.PASID, 0x58, 0x99]
    values = [0, 1, 2, PASID, BUFFER, PAGE, 1 << 20, 1 << 63, ALL_ONES]
    for _ in range(600):
        match chance.randrange(8):
            case 0:
                bench.reset()
            case 1:
                for fn in [*bench.port.listeners.values()]:
                    fn(chance.randrange(4), chance.choice([*PageResponse]))
            case 2:
                bench.port.pages[BUFFER + chance.randrange(4) * PAGE] = IOMMUAccessFlags(chance.randrange(64))
            case 3:
                bench.port.refuse = chance.choices([errno.ENOSPC, errno.EPERM, errno.EIO], k=2)
            case 4:
                bench.idle(chance.randrange(6))
            case _:
                size = chance.choice([4, 8, 8])
                value = chance.choice(values) & (1 << size * 8) - 1
                bench.write(chance.choice(offsets), value, size)
    bench.reset()
    bench.port.refuse.clear()
    bench.port.pages = {BUFFER: RW}
    bench.signals.clear()
    bench.use(PASID)
    bench.start(WRITE, BUFFER, PAGE)
    bench.idle()
    assert bench.ended() == [regs.STATUS_OK] and bench.port.memory[BUFFER] == regs.pattern(PAGE)
