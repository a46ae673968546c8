"""Translation requests, translated requests, page requests, device-TLB invalidations."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field

import pytest

from tests.iommu.vtd.rig import RO, TABLES, WO, Bus, Rig
from vfio_model.iommu.vtd.ports import RID
from vfio_model.memory.iommu_region import IOMMUNotifier
from vfio_model.memory.iotlb import IOMMUTLBEntry
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag, MemTxResult
from vfio_model.pci.iommu_ops import AtsCompletion, AtsRequest, IotlbInfo, PageRequest, PageResponse
from vfio_model.ranges import U64_MAX

CONTEXT = TABLES + 0x1300
BASE = 0x40_0000
OPTIONS = {"scalable_mode": True, "fsts": True, "device_iotlb": True, "pasid_bits": 20, "svm": True}


@dataclass
class Queue:
    """Keeps page requests."""

    requests: list[tuple[int, PageRequest]] = field(default_factory=list)

    def submit(self, sid: int, request: PageRequest) -> None:
        self.requests.append((sid, request))


class AtsRig(Rig):
    """PASID 5: pages at BASE + 0 (RW), 1 (RO), 3 (RW); a page of 2 MiB at BASE + 2 MiB."""

    def __init__(self, **options: object) -> None:
        super().__init__(**OPTIONS | options)
        self.queue = Queue()
        self.translation.attach_page_requests(self.queue)
        self.table = self.page()
        self.scalable(5, 1 << 6 | 2 << 2 | 1, 7, self.table)
        self.slots = {
            page: self.tables_for(self.table, 4, BASE + (page << 12), 0x10_0000 | page << 12 | bits, upper=7)
            for page, bits in ((0, 7), (1, 5), (3, 7))
        }
        self.tables_for(self.table, 4, BASE + 0x20_0000, 0x60_0087, level=2, upper=7)
        self.enable()

    def ask(self, addr: int, length: int, **more: object) -> AtsCompletion:
        request = AtsRequest(addr, length, **{"pasid": 5} | more)
        return self.translation.ops.ats_request_translation(self.bus, self.devfn, request)


def pieces(completion: AtsCompletion) -> list[tuple[int, int, int, int]]:
    return [(each.iova, each.translated_addr, each.addr_mask, int(each.perm)) for each in completion.entries]


def test_what_a_device_learns_first() -> None:
    rig = AtsRig()
    assert rig.translation.ops.get_iotlb_info(rig.bus, rig.devfn) == IotlbInfo(48, 4096)


def test_a_range_is_answered_piece_by_piece() -> None:
    rig = AtsRig()
    done = rig.ask(BASE, 0x4000)
    assert pieces(done) == [
        (BASE, 0x10_0000, 0xFFF, 3),
        (BASE + 0x1000, 0x10_1000, 0xFFF, 1),
        (0, 0, 0xFFF, 0),
        (BASE + 0x3000, 0x10_3000, 0xFFF, 3),
    ]
    assert (done.errors, done.complete) == (2, True)
    assert {each.pasid for each in done.entries} == {5}
    assert rig.faults.take() == [], "recoverable faults are not recorded"


def test_who_does_not_write_gets_no_permission_to() -> None:
    rig = AtsRig()
    done = rig.ask(BASE, 0x2000, no_write=True)
    assert [each[3] for each in pieces(done)] == [1, 1]
    assert done.errors == 0
    assert not rig.load(rig.slots[0]) & 0x40


def test_permission_to_write_sets_the_dirty_bit() -> None:
    rig = AtsRig()
    rig.ask(BASE, 0x1000, no_write=True)
    assert rig.load(rig.slots[0]) & 0x60 == 0x20
    rig.ask(BASE, 0x2000)
    assert [rig.load(rig.slots[page]) & 0x60 for page in (0, 1)] == [0x60, 0x20]


def test_large_pages_and_holes_take_one_entry() -> None:
    rig = AtsRig()
    done = rig.ask(BASE + 0x2F_F000, 0x4000_0000)
    assert pieces(done)[:2] == [(BASE + 0x20_0000, 0x60_0000, 0x1F_FFFF, 3), (0, 0, 0x1F_FFFF, 0)]
    assert done.entries[-1].addr_mask == 0x3FFF_FFFF
    assert len(done.entries) == 2 + (0x4000_0000 - BASE - 0x40_0000 >> 21)


def test_a_small_buffer_is_filled_and_the_range_goes_on() -> None:
    rig = AtsRig()
    done = rig.ask(BASE, 0x4000, max_entries=3)
    assert (len(done.entries), done.errors, done.complete) == (3, 2, False)
    assert rig.ask(BASE, 0x3000, max_entries=3).complete


@pytest.mark.parametrize("more", [{"priv": True}, {"exec": True}])
def test_privilege_and_execution_are_never_granted(more: dict[str, bool]) -> None:
    done = AtsRig().ask(BASE, 0x1000, **more)
    assert (done.errors, [each[3] for each in pieces(done)]) == (1, [3])


def test_a_request_in_the_interrupt_range_is_a_fault() -> None:
    rig = AtsRig()
    done = rig.ask(0xFEE0_0000, 0x2000)
    assert pieces(done) == [(0, 0, 0xFFF, 0)] * 2
    assert done.errors == 2
    assert rig.faults.reasons() == [0x87, 0x87]
    rig.ask(0xFEEF_FFFF, 1, pasid=RID)
    assert rig.faults.take()[0][::4] == (0x87, RID)


def test_other_faults_are_recorded() -> None:
    rig = AtsRig()
    rig.store(rig.slots[0], 0x10_0007 | 1 << 50)
    assert rig.ask(BASE, 0x1000).errors == 1
    assert rig.faults.take() == [(0x72, 0x18, BASE, False, 5)]
    rig.store(CONTEXT, 0)
    rig.enable()
    assert rig.ask(BASE, 0x1000).errors == 1
    assert rig.faults.reasons() == [2]


def test_a_context_entry_without_device_tlb_forbids_the_request() -> None:
    rig = AtsRig()
    rig.store(CONTEXT, rig.load(CONTEXT) & ~4)
    rig.enable()
    assert pieces(rig.ask(BASE, 0x1000)) == [(0, 0, 0xFFF, 0)]
    assert rig.faults.reasons() == [0xD]


def test_legacy_contexts_allow_it_by_their_translation_type() -> None:
    rig = Rig(device_iotlb=True)
    rig.tables_for(rig.legacy(tt=1), 4, 0x1000, 0x8001)
    rig.enable()
    done = rig.translation.ops.ats_request_translation(rig.bus, rig.devfn, AtsRequest(0x1000, 0x1000))
    assert pieces(done) == [(0x1000, 0x8000, 0xFFF, 1)]
    rig.legacy(tt=0)
    rig.enable()
    rig.translation.ops.ats_request_translation(rig.bus, rig.devfn, AtsRequest(0x1000, 0x1000))
    assert rig.faults.reasons() == [0xD]


def test_identity_while_translation_is_off() -> None:
    rig = AtsRig()
    rig.translation.set_enabled(False)
    assert pieces(rig.ask(BASE, 0x1001)) == [(BASE, BASE, 0xFFF, 3), (BASE + 0x1000, BASE + 0x1000, 0xFFF, 3)]


def test_the_last_page_of_all() -> None:
    rig = AtsRig()
    done = rig.ask(U64_MAX - 0xFFF, 0x1000)
    assert (len(done.entries), done.complete) == (1, True)


# -- translated requests


def translated(rig: Rig, pasid: int = RID) -> object:
    return rig.translation.ops.translated_space(rig.bus, rig.devfn, pasid)


def test_translated_requests_go_to_system_memory() -> None:
    rig = AtsRig()
    space = rig.translation.ops.translated_space(rig.bus, rig.devfn, RID)
    assert space is translated(rig)
    assert not space.write(0x2FFE, b"abcd")
    assert rig.low[0x2FFE:0x3002] == b"abcd"


def test_translated_requests_with_a_pasid_are_blocked() -> None:
    rig = AtsRig()
    space = rig.translation.ops.translated_space(rig.bus, rig.devfn, 5)
    assert space.write(0x2000, b"a") == MemTxResult.DECODE_ERROR
    assert rig.faults.take() == []


def test_translated_requests_to_the_interrupt_range_are_faults() -> None:
    rig = AtsRig()
    space = rig.translation.ops.translated_space(rig.bus, rig.devfn, RID)
    assert space.write(0xFEE0_0000, bytes(4))
    assert rig.faults.take() == [(0x87, 0x18, 0xFEE0_0000, True, RID)]
    assert rig.interrupts.requests == []


def test_translated_requests_need_the_context_entry_s_word() -> None:
    rig = AtsRig()
    space = rig.translation.ops.translated_space(rig.bus, rig.devfn, RID)
    rig.store(CONTEXT, rig.load(CONTEXT) & ~4)
    rig.enable()
    assert space.write(0x2000, b"a")
    assert space.read(0x2000, bytearray(1))
    assert rig.faults.reasons() == [0xD, 0xD]
    rig.translation.set_enabled(False)
    assert not space.write(0x2000, b"a")


# -- invalidations


def notified(rig: Rig, pasid: int = 5) -> tuple[IOMMUNotifier, list[IOMMUTLBEntry]]:
    heard: list[IOMMUTLBEntry] = []
    notifier = IOMMUNotifier(lambda _, entry: heard.append(entry), IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, U64_MAX)
    rig.translation.ops.register_iotlb_notifier(rig.bus, rig.devfn, pasid, notifier)
    return notifier, heard


def test_device_tlb_invalidations_reach_the_pasid_they_name() -> None:
    rig = AtsRig()
    notifier, five = notified(rig)
    _, rid = notified(rig, RID)
    rig.translation.invalidate_device_tlb(0x18, 5, 0x4000, 0x7FFF)
    rig.translation.invalidate_device_tlb(0x20, 5, 0, U64_MAX)
    rig.translation.invalidate_device_tlb(0x18, 6, 0, U64_MAX)
    assert [(each.iova, each.addr_mask, each.pasid) for each in five] == [(0x4000, 0x3FFF, 5)]
    assert rid == []
    rig.translation.invalidate_device_tlb(0x18, None, 0, U64_MAX)
    assert [(each[-1].iova, each[-1].last, each[-1].perm) for each in (five, rid)] == [(0, U64_MAX, 0)] * 2
    rig.translation.ops.unregister_iotlb_notifier(rig.bus, rig.devfn, 5, notifier)
    rig.translation.invalidate_device_tlb(0x18, 5, 0, U64_MAX)
    assert len(five) == 2


def test_iotlb_invalidations_are_not_for_device_tlbs() -> None:
    rig = AtsRig()
    _, heard = notified(rig)
    rig.translation.invalidate_pasid_iotlb(7, 5)
    assert heard == []


def test_a_flush_says_what_a_device_answered() -> None:
    rig = AtsRig()
    late = OSError(errno.ETIMEDOUT, "late")
    notifier = IOMMUNotifier(lambda *_: None, IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, U64_MAX, flush=lambda: late)
    rig.translation.ops.register_iotlb_notifier(rig.bus, rig.devfn, 5, notifier)
    assert rig.translation.flush() is None
    rig.translation.invalidate_device_tlb(0x18, 5, 0, 0xFFF)
    assert rig.translation.flush() is late
    assert rig.translation.flush() is None


def test_no_device_tlb_without_the_option() -> None:
    rig = Rig()
    with pytest.raises(OSError, match="device IOTLB") as refused:
        notified(rig)
    assert refused.value.errno == errno.ENOTSUP


# -- page requests


def request(**more: object) -> PageRequest:
    fields = {"addr": BASE + 0x2000, "pasid": 5, "prgi": 7, "last": True, "is_read": True, "is_write": True}
    return PageRequest(**fields | more)


def test_page_requests_go_to_the_queue_with_the_source_of_now() -> None:
    rig = AtsRig()
    rig.translation.ops.pri_request_page(rig.bus, rig.devfn, request())
    assert rig.queue.requests == [(0x18, request())]


def test_a_page_that_is_asked_for_is_not_found_as_it_was() -> None:
    rig = AtsRig()
    rig.translate(BASE + 0x1000, RO, 5)
    rig.store(rig.slots[1], 0)
    assert rig.translate(BASE + 0x1000, RO, 5)[3]
    rig.translation.ops.pri_request_page(rig.bus, rig.devfn, request(addr=BASE + 0x1000))
    assert rig.blocked(BASE + 0x1000, WO, 5) == [0x71]


@pytest.mark.parametrize(
    ("more", "error"), [({"pasid": RID}, errno.EPERM), ({"exec": True, "is_read": False}, errno.EINVAL)]
)
def test_page_requests_that_cannot_be(more: dict[str, object], error: int) -> None:
    rig = AtsRig()
    with pytest.raises(OSError) as refused:
        rig.translation.ops.pri_request_page(rig.bus, rig.devfn, request(**more))
    assert refused.value.errno == error
    assert rig.queue.requests == []


@pytest.mark.parametrize(("context", "reason"), [(0xD, 0x47), (0, 2), (0x1D | 1 << 5, 0xB)])
def test_the_context_entry_forbids_page_requests(context: int, reason: int) -> None:
    rig = AtsRig()
    rig.store(CONTEXT, context and TABLES + 0x2000 | context)
    rig.enable()
    with pytest.raises(OSError) as refused:
        rig.translation.ops.pri_request_page(rig.bus, rig.devfn, request())
    assert refused.value.errno == errno.EPERM
    assert rig.faults.take() == [(reason, 0x18, BASE + 0x2000, True, 5)]


def test_no_page_requests_without_the_option() -> None:
    rig = Rig(scalable_mode=True)
    with pytest.raises(OSError) as refused:
        rig.translation.ops.pri_request_page(rig.bus, rig.devfn, request())
    assert refused.value.errno == errno.EPERM


def test_responses_find_who_asked() -> None:
    rig = AtsRig()
    heard: list[tuple[int, PageResponse]] = []
    ops = rig.translation.ops
    ops.pri_register_notifier(rig.bus, rig.devfn, 5, lambda prgi, code: heard.append((prgi, code)))
    ops.pri_register_notifier(Bus("other", 1), rig.devfn, 5, lambda prgi, code: heard.append((-1, code)))
    for prgi, code in ((7, 0), (8, 1), (9, 15), (10, 4)):
        rig.translation.page_response(0x18, 5, prgi, code)
    rig.translation.page_response(0x20, 5, 1, 0)
    rig.translation.page_response(0x18, 6, 1, 0)
    ops.pri_unregister_notifier(rig.bus, rig.devfn, 5)
    rig.translation.page_response(0x18, 5, 1, 0)
    assert heard == [
        (7, PageResponse.SUCCESS),
        (8, PageResponse.INVALID_REQUEST),
        (9, PageResponse.RESPONSE_FAILURE),
        (10, PageResponse.RESPONSE_FAILURE),
    ]


def test_privilege_is_not_kept() -> None:
    entry = AtsRig().ask(BASE, 1).entries[0]
    assert not entry.perm & (IOMMUAccessFlags.GLOBAL | IOMMUAccessFlags.PRIV | IOMMUAccessFlags.EXEC)
