"""A device's cache of translations, in the process of the IOMMU and in a process of the device's own: what it keeps,
what it may use, and every order of answer and invalidation."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestd.function_iommu import MAX_FOLLOWED, MAX_PASIDS
from tests.conformance.atcs import (
    PAGE,
    PASID,
    RIGS,
    RO,
    RW,
    SHARED,
    MessageRig,
    RemoteRig,
    Rig,
)
from vfio_model.batch import variant
from vfio_model.memory import atc_path
from vfio_model.memory.notifier import IOMMUNotifier
from vfio_model.memory.ring import RecordFlags, pasid_flags
from vfio_model.memory.types import PCI_NO_PASID, IOMMUAccessFlags, IOMMUNotifierFlag
from vfio_model.pci.atc import MAX_ASKS
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER
from vfio_model.pci.iommu_ops import Atc, AtcOutcome, AtsRequest, PageRequest, PageResponse
from vfio_model.pci.translation_caps import PASID_ENABLE
from vfio_model.ranges import U64_MAX

IOVA = 0x7F12_3456_7000
BIG = 1 << 21
OK, MISS, FAILED, UNTRANSLATED = AtcOutcome.OK, AtcOutcome.MISS, AtcOutcome.FAILED, AtcOutcome.UNTRANSLATED_ONLY


@pytest.fixture(params=["compiled", "Python"], autouse=True, scope="module")
def variant_of_hits(request: pytest.FixtureRequest) -> Iterator[None]:
    """What serves hits, in every test here."""
    if request.param == "compiled" and atc_path.Path is None:
        pytest.skip("not built")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(variant, "chosen", "compiled" if request.param == "compiled" else "numpy")
        yield


@pytest.fixture(params=list(RIGS))
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = RIGS[request.param]()
    yield rig
    rig.close()


@pytest.fixture
def atc(rig: Rig) -> Atc:
    """Of :data:`PASID`, whose table maps one page."""
    rig.iommu.map(IOVA, 0x3000)
    return rig.open()


def ask(addr: int = IOVA, length: int = PAGE, **more: object) -> AtsRequest:
    return AtsRequest(addr, length, **more)  # type: ignore[arg-type]


def write(atc: Atc, addr: int, data: bytes) -> AtcOutcome:
    moved, outcome = atc.access(addr, memoryview(bytearray(data)), True)
    assert moved == (len(data) if outcome is OK else 0)
    return outcome


def read(atc: Atc, addr: int, size: int) -> tuple[bytes, AtcOutcome]:
    out = bytearray(size)
    moved, outcome = atc.access(addr, memoryview(out), False)
    return bytes(out[:moved]), outcome


def test_what_was_filled_is_used_without_asking(rig: Rig, atc: Atc) -> None:
    assert write(atc, IOVA, b"x") is MISS, "nothing is cached before it was asked for"
    completion = atc.fill(ask())
    assert (len(completion.entries), completion.errors, completion.complete) == (1, 0, True)
    for turn in range(4):
        assert write(atc, IOVA + 8 * turn, b"abcdefgh") is OK
    assert read(atc, IOVA + 4, 8) == (b"efghabcd", OK)
    assert rig.ram[0x3000:0x3008] == b"abcdefgh" and rig.iommu.asked == 1 and atc.entries == 1


def test_shared_ram_costs_no_message_and_the_rest_of_it_one(rig: Rig, atc: Atc) -> None:
    rig.iommu.map(IOVA + PAGE, SHARED)
    atc.fill(ask(IOVA, 2 * PAGE))
    before = len(rig.calls) if isinstance(rig, RemoteRig) else 0
    assert write(atc, IOVA, b"here") is OK
    if isinstance(rig, RemoteRig):
        assert len(rig.calls) - before == (0 if rig.mapped else 1)
    assert write(atc, IOVA + PAGE, b"there") is OK and rig.ram[SHARED : SHARED + 5] == b"there"
    assert read(atc, IOVA + PAGE, 5) == (b"there", OK)


def test_an_access_ends_with_the_page(rig: Rig, atc: Atc) -> None:
    atc.fill(ask())
    assert atc.access(IOVA + PAGE - 4, memoryview(bytearray(b"abcdefgh")), True) == (4, OK)
    assert rig.ram[0x3FFC:0x4000] == b"abcd" and rig.ram[0x4000] == 0


def test_a_range_is_as_many_entries_as_there_are_pieces(rig: Rig, atc: Atc) -> None:
    rig.iommu.map(IOVA + PAGE, 0x9000)
    rig.iommu.map(IOVA + 3 * PAGE, 0xA000)
    completion = atc.fill(ask(IOVA, 4 * PAGE))
    assert [entry.addr_mask for entry in completion.entries] == [PAGE - 1] * 4
    assert (completion.errors, completion.complete, atc.entries) == (1, True, 3)
    assert not atc.fill(ask(IOVA, 4 * PAGE, max_entries=2)).complete


# -- the orders of request R, translation T, invalidation I, completion C, use U


@pytest.fixture(params=[PASID, PCI_NO_PASID], ids=["pasid", "no-pasid"])
def pasid(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def opened(rig: Rig, pasid: int) -> Atc:
    rig.iommu.map(IOVA, 0x3000, pasid=pasid)
    return rig.open(pasid)


def test_order_invalidation_before_the_request(rig: Rig, pasid: int) -> None:
    atc = opened(rig, pasid)
    rig.iommu.invalidate(IOVA, IOVA + PAGE - 1, pasid=pasid)
    atc.fill(ask())
    assert write(atc, IOVA, b"x") is OK and rig.iommu.asked == 1


@pytest.mark.parametrize("when", ["before", "after"], ids=["R-I-T-C", "R-T-I-C"])
@pytest.mark.parametrize("overlaps", [True, False])
def test_order_invalidation_while_the_request_is_out(rig: Rig, pasid: int, when: str, overlaps: bool) -> None:
    atc = opened(rig, pasid)
    at = IOVA if overlaps else IOVA + PAGE
    setattr(rig.iommu, when, lambda: rig.iommu.invalidate(at, at + PAGE - 1, pasid=pasid))
    atc.fill(ask())
    if overlaps and isinstance(rig, MessageRig):  # whose request finds that out
        assert write(atc, IOVA, b"x") is MISS
        atc.fill(ask())
    assert rig.iommu.asked == (2 if overlaps else 1)
    assert write(atc, IOVA, b"x") is OK


def test_a_stale_answer_is_never_used(rig: Rig, pasid: int) -> None:
    atc = opened(rig, pasid)

    def remap() -> None:
        rig.iommu.unmap(IOVA, pasid=pasid)
        rig.iommu.map(IOVA, 0x9000, pasid=pasid)

    rig.iommu.after = remap
    atc.fill(ask())
    if isinstance(rig, MessageRig):
        assert write(atc, IOVA, b"old!") is MISS and rig.ram[0x3000] == 0
        atc.fill(ask())
    assert write(atc, IOVA, b"new!") is OK
    assert rig.ram[0x9000:0x9004] == b"new!" and rig.ram[0x3000] == 0


def test_order_invalidation_between_completion_and_use(rig: Rig, pasid: int) -> None:
    atc = opened(rig, pasid)
    atc.fill(ask())
    assert rig.iommu.unmap(IOVA, pasid=pasid) is None
    assert write(atc, IOVA, b"y") is MISS and rig.ram[0x3000] == 0


def test_order_invalidation_inside_the_section_is_waited_for() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    cache = rig.remote._atcs[0]._cache
    find = cache.entries.find

    def interrupted(iova: int, is_write: bool) -> object:
        hit = find(iova, is_write)
        error = rig.iommu.unmap(IOVA)
        assert error is not None and error.errno == errno.ETIMEDOUT, "the section is open: the guest is not told that"
        return hit

    cache.entries.find = interrupted  # type: ignore[method-assign,assignment]
    assert write(atc, IOVA, b"y") is OK, "a section that began before may finish"
    cache.entries.find = find  # type: ignore[method-assign]
    assert all(revoke.poll() for revoke in rig.ring.revokes), "the section is over"
    assert write(atc, IOVA, b"z") is MISS and rig.ram[0x3000] == ord("y")
    rig.close()


def test_order_invalidation_after_the_use_needs_no_wait(rig: Rig, pasid: int) -> None:
    atc = opened(rig, pasid)
    atc.fill(ask())
    assert write(atc, IOVA, b"x") is OK
    assert rig.iommu.unmap(IOVA, pasid=pasid) is None
    assert write(atc, IOVA, b"y") is MISS and rig.ram[0x3000] == ord("x")


def test_an_address_that_has_left_its_section_is_not_used_after_an_invalidation() -> None:
    """A request by message, overtaken on its way."""
    rig = RemoteRig()
    rig.iommu.map(IOVA, SHARED)
    atc = rig.open()
    atc.fill(ask())
    serve = rig.guest.serve

    def overtaken(request: object) -> object:
        rig.iommu.unmap(IOVA)
        return serve(request)  # type: ignore[arg-type]

    rig.guest.serve = overtaken  # type: ignore[method-assign,assignment]
    assert write(atc, IOVA, b"y") is MISS and rig.ram[SHARED] == 0
    rig.close()


def test_invalidations_without_end_are_an_error(rig: Rig, atc: Atc) -> None:
    def again() -> None:
        rig.iommu.invalidate(IOVA, IOVA + PAGE - 1)
        rig.iommu.after = again

    rig.iommu.after = again
    if isinstance(rig, MessageRig):
        atc.fill(ask())
        assert write(atc, IOVA, b"x") is MISS
        return
    with pytest.raises(OSError) as caught:
        atc.fill(ask())
    assert caught.value.errno == errno.EAGAIN and rig.iommu.asked == MAX_ASKS


def test_a_fill_inside_a_fill_keeps_its_own_account(rig: Rig, atc: Atc) -> None:
    rig.iommu.map(IOVA + PAGE, 0x5000)

    def nested() -> None:
        atc.fill(ask(IOVA + PAGE))
        rig.iommu.invalidate(IOVA, IOVA + PAGE - 1)

    rig.iommu.after = nested
    atc.fill(ask())
    assert write(atc, IOVA + PAGE, b"x") is OK and atc.entries == 2
    if isinstance(rig, MessageRig):
        assert write(atc, IOVA, b"x") is MISS
    else:
        assert rig.iommu.asked == 3 and write(atc, IOVA, b"x") is OK


# -- what an invalidation takes


def test_a_larger_entry_goes_with_any_of_its_pages(rig: Rig) -> None:
    rig.iommu.map(BIG, BIG, size=BIG)
    atc = rig.open()
    atc.fill(ask(BIG + 0x5000))
    assert write(atc, 2 * BIG - 8, b"far away") is OK and rig.ram[2 * BIG - 8 : 2 * BIG] == b"far away"
    rig.iommu.invalidate(BIG + 0x7000, BIG + 0x7FFF)
    assert write(atc, BIG + 0x5000, b"x") is MISS and write(atc, 2 * BIG - 8, b"x") is MISS
    assert atc.entries == 0


def test_smaller_entries_go_with_a_large_range(rig: Rig) -> None:
    for page in range(8):
        rig.iommu.map(BIG + page * PAGE, 0x1_0000 + page * PAGE)
    rig.iommu.map(2 * BIG, 0x3_0000)
    atc = rig.open()
    atc.fill(ask(BIG, 8 * PAGE))
    atc.fill(ask(2 * BIG))
    rig.iommu.tell(BIG, 2 * BIG - 1)
    rig.iommu.flush()
    assert all(write(atc, BIG + page * PAGE, b"x") is MISS for page in range(8)) and atc.entries == 1


def test_the_whole_range_takes_everything(rig: Rig, atc: Atc) -> None:
    top = U64_MAX - PAGE + 1
    rig.iommu.map(top, 0x4000)
    atc.fill(ask())
    atc.fill(ask(top))
    assert write(atc, top + 8, b"top") is OK
    rig.iommu.invalidate(0, U64_MAX)
    assert write(atc, IOVA, b"x") is MISS and write(atc, top, b"x") is MISS and atc.entries == 0


def test_other_pasids_are_other_spaces(rig: Rig, atc: Atc) -> None:
    rig.iommu.map(IOVA, 0x9000, pasid=6)
    rig.iommu.map(IOVA, 0xA000, pasid=PCI_NO_PASID)
    others = rig.open(6), rig.open(PCI_NO_PASID)
    for one in (atc, *others):
        one.fill(ask())
    rig.iommu.invalidate(IOVA, IOVA + PAGE - 1, pasid=6)
    assert write(atc, IOVA, b"5") is OK and write(others[1], IOVA, b"-") is OK
    assert rig.ram[0x3000] == ord("5") and rig.ram[0xA000] == ord("-")
    assert write(others[0], IOVA, b"6") is MISS and rig.ram[0x9000] == 0


def test_a_pasid_that_is_used_again_finds_nothing(rig: Rig, atc: Atc) -> None:
    atc.fill(ask())
    atc.close()
    rig.iommu.map(IOVA, 0x9000)  # another process has the PASID: the guest need not invalidate what nobody follows
    again = rig.open()
    assert again.entries == 0 and write(again, IOVA, b"x") is MISS
    again.fill(ask())
    assert write(again, IOVA, b"new") is OK and rig.ram[0x9000:0x9003] == b"new" and rig.ram[0x3000] == 0


def test_more_records_than_a_ring_has_take_everything() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    for page in range(40):
        rig.ring.append(99, page, page, pasid_flags(PASID, RecordFlags.ATS))
        rig.ring.flush_ats()
    assert write(atc, IOVA, b"x") is MISS and atc.entries == 0
    rig.close()


def test_invalidations_of_untranslated_requests_are_none_of_a_cache_of_the_devices() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    rig.ring.append(77, 0, U64_MAX, pasid_flags(PASID))
    rig.ring.flush_ats()
    assert write(atc, IOVA, b"x") is OK
    rig.close()


# -- permissions


def test_without_the_permission_to_write_it_is_a_miss(rig: Rig) -> None:
    rig.iommu.map(IOVA, 0x3000, RO)
    atc = rig.open()
    assert atc.fill(ask(no_write=True)).errors == 0
    assert read(atc, IOVA, 4)[1] is OK and write(atc, IOVA, b"x") is MISS and rig.ram[0x3000] == 0


def test_an_entry_with_some_of_what_was_asked_for_is_an_error_and_not_cached(rig: Rig) -> None:
    rig.iommu.map(IOVA, 0x3000, RO)
    atc = rig.open()
    assert atc.fill(ask()).errors == 1 and atc.entries == 0
    assert read(atc, IOVA, 4)[1] is MISS and write(atc, IOVA, b"x") is MISS


def test_who_wants_to_execute_needs_that_too(rig: Rig, atc: Atc) -> None:
    assert atc.fill(ask(exec=True)).errors == 1 and atc.entries == 0
    rig.iommu.map(IOVA, 0x3000, RW | IOMMUAccessFlags.EXEC)
    assert atc.fill(ask(exec=True)).errors == 0 and atc.entries == 1


def test_more_permission_replaces_less(rig: Rig) -> None:
    rig.iommu.map(IOVA, 0x3000, RO)
    atc = rig.open()
    atc.fill(ask(no_write=True))
    rig.iommu.map(IOVA, 0x3000, RW)
    atc.fill(ask())
    assert write(atc, IOVA, b"x") is OK and atc.entries == 1


def test_untranslated_only_is_said_and_not_done(rig: Rig) -> None:
    rig.iommu.map(IOVA, 0x3000, RW | IOMMUAccessFlags.UNTRANSLATED_ONLY)
    atc = rig.open()
    atc.fill(ask())
    assert write(atc, IOVA, b"x") is UNTRANSLATED and read(atc, IOVA, 1)[1] is UNTRANSLATED
    assert rig.ram[0x3000] == 0


def test_privileged_and_other_translations_are_apart(rig: Rig, atc: Atc) -> None:
    privileged = rig.open(priv=True)
    assert privileged.fill(ask()).errors == 1, "a page for users only"
    assert atc.fill(ask()).errors == 0
    assert write(privileged, IOVA, b"x") is MISS and write(atc, IOVA, b"u") is OK
    rig.iommu.map(IOVA + PAGE, 0x8000, RW | IOMMUAccessFlags.PRIV)
    assert privileged.fill(ask(IOVA + PAGE)).errors == 0
    assert write(privileged, IOVA + PAGE, b"p") is OK and write(atc, IOVA + PAGE, b"x") is MISS
    rig.iommu.invalidate(IOVA, IOVA + 2 * PAGE - 1)
    assert write(privileged, IOVA + PAGE, b"x") is MISS, "an invalidation of a PASID takes both"


# -- rights that are taken away


def test_translated_requests_that_the_context_forbids_are_blocked_with_a_fault(rig: Rig, atc: Atc) -> None:
    atc.fill(ask())
    assert write(atc, IOVA, b"x") is OK
    rig.iommu.block(True)
    assert write(atc, IOVA + 8, b"y") is FAILED and rig.ram[0x3008] == 0
    assert rig.iommu.faults == [0x3008], "the IOMMU says what it blocked"
    rig.iommu.block(False)
    assert write(atc, IOVA + 8, b"z") is OK and rig.ram[0x3008] == ord("z")


def test_taking_the_right_away_waits_for_the_section_that_uses_it() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    rig.lane.enter()
    rig.iommu.block(True)
    assert len(rig.ring.revokes) == 1
    rig.lane.leave()
    assert rig.ring.revokes[0].poll()
    rig.close()


@pytest.mark.parametrize("what", ["bus mastering", "ATS"])
def test_what_the_guest_has_disabled_lets_nothing_through(rig: Rig, atc: Atc, what: str) -> None:
    atc.fill(ask())
    function = rig.function
    assert function.ats is not None
    function.config_write(COMMAND if what == "bus mastering" else function.ats.offset + 6, 2, 0)
    assert write(atc, IOVA, b"x") is FAILED and rig.ram[0x3000] == 0
    with pytest.raises(OSError):
        atc.fill(ask())


def test_a_cache_that_is_closed_holds_and_gets_nothing(rig: Rig, atc: Atc) -> None:
    atc.fill(ask())
    assert len(rig.iommu.notifiers) == 1
    atc.close()
    atc.close()
    assert rig.iommu.notifiers == [] and write(atc, IOVA, b"x") is FAILED
    with pytest.raises(OSError) as caught:
        atc.fill(ask())
    assert caught.value.errno == errno.ENODEV


def test_an_iommu_without_device_tlbs_says_so(rig: Rig) -> None:
    rig.iommu.refusal = errno.ENOTSUP
    with pytest.raises(OSError) as caught:
        rig.open()
    assert caught.value.errno == errno.ENOTSUP
    rig.iommu.refusal = 0
    rig.open().close()


# -- a process of its own


def test_a_subscription_that_comes_and_goes_takes_nothing_stale_along() -> None:
    rig = MessageRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    assert write(atc, IOVA, b"m") is OK
    rig.arm()
    assert write(atc, IOVA, b"x") is MISS, "what was cached before is not followed by the ring"
    atc.fill(ask())
    calls = len(rig.calls)
    assert write(atc, IOVA, b"r") is OK and len(rig.calls) == calls
    rig.remote.disarm()
    assert write(atc, IOVA, b"x") is MISS
    rig.close()


def test_an_answer_that_comes_after_the_subscription_changed_is_asked_for_again() -> None:
    rig = MessageRig()
    atc = opened(rig, PASID)
    rig.iommu.after = rig.arm
    atc.fill(ask())
    assert rig.iommu.asked == 2 and write(atc, IOVA, b"x") is OK
    rig.close()


def test_ram_that_is_taken_away_is_reached_by_message() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    rig.remote._ram.remove(0, U64_MAX)  # type: ignore[attr-defined]
    rig.remote.forget()
    assert write(atc, IOVA, b"x") is MISS
    atc.fill(ask())
    calls = len(rig.calls)
    assert write(atc, IOVA, b"x") is OK and len(rig.calls) == calls + 1
    rig.close()


def test_a_client_that_goes_leaves_caches_that_fail() -> None:
    rig = RemoteRig()
    atc = opened(rig, PASID)
    atc.fill(ask())
    rig.close()
    assert write(atc, IOVA, b"x") is FAILED
    with pytest.raises(OSError):
        rig.remote.open_atc(PASID)
    assert rig.iommu.notifiers == [] and rig.iommu.gates == []


def test_a_process_that_speaks_of_every_pasid_there_is_gets_no_further() -> None:
    rig = RemoteRig()
    with pytest.raises(OSError) as caught:
        for pasid in range(MAX_FOLLOWED + 1):
            rig.open(pasid)
    assert caught.value.errno == errno.ENOSPC and len(rig.iommu.notifiers) == MAX_FOLLOWED
    with pytest.raises(OSError) as caught:
        for pasid in range(MAX_PASIDS + 1):
            rig.remote.ats_request_translation(ask(pasid=pasid))
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as caught:
        rig.remote.ats_request_translation(ask(pasid=1 << 20))
    assert caught.value.errno == errno.EINVAL
    rig.close()


# -- page requests and invalidations, as a device may hear of them itself


def page(addr: int, prgi: int = 1, **more: bool) -> PageRequest:
    fields = {"last": True, "is_read": True, "is_write": True} | more
    return PageRequest(addr, PASID, prgi, **fields)


def respond(rig: Rig, prgi: int, code: PageResponse) -> None:
    rig.iommu.responses[PASID](prgi, code)
    if isinstance(rig, RemoteRig):
        rig.run_soon()


def test_page_requests_arrive_as_they_were_made_and_responses_come_back(rig: Rig) -> None:
    heard: list[tuple[int, PageResponse]] = []
    rig.port.pri_register_notifier(PASID, lambda prgi, code: heard.append((prgi, code)))
    asked = [page(IOVA, 3, last=False, is_write=False), page(IOVA + PAGE, 3, priv=True, exec=True)]
    for one in asked:
        rig.port.pri_request_page(one)
    assert rig.iommu.pages == asked
    respond(rig, 3, PageResponse.SUCCESS)
    respond(rig, 4, PageResponse.INVALID_REQUEST)
    assert heard == [(3, PageResponse.SUCCESS), (4, PageResponse.INVALID_REQUEST)]
    rig.port.pri_unregister_notifier(PASID)
    assert rig.iommu.responses == {}


def test_a_full_queue_is_the_devices_to_know(rig: Rig) -> None:
    rig.port.pri_register_notifier(PASID, lambda prgi, code: None)
    for _ in range(3):
        rig.port.pri_request_page(page(IOVA))
    with pytest.raises(OSError) as caught:
        rig.port.pri_request_page(page(IOVA))
    assert caught.value.errno == errno.ENOSPC


def test_inside_a_region_access_no_page_is_requested() -> None:
    rig = RemoteRig()
    rig.in_access = True
    with pytest.raises(OSError) as caught:
        rig.port.pri_request_page(page(IOVA))
    assert caught.value.errno == errno.EDEADLK and rig.iommu.pages == []
    rig.close()


def test_a_device_may_hear_of_invalidations_itself(rig: Rig) -> None:
    heard: list[tuple[int, int]] = []
    notifier = IOMMUNotifier(
        lambda _, entry: heard.append((entry.iova, entry.last)), IOMMUNotifierFlag.DEVIOTLB_UNMAP, 0, U64_MAX
    )
    rig.port.register_iotlb_notifier(PASID, notifier)
    if isinstance(rig, RemoteRig):
        rig.remote.hear()
        heard.clear()
    rig.iommu.invalidate(IOVA, IOVA + PAGE - 1)
    if isinstance(rig, RemoteRig):
        rig.remote.hear()
    assert heard == ([] if isinstance(rig, MessageRig) else [(IOVA, IOVA + PAGE - 1)])
    rig.port.unregister_iotlb_notifier(PASID, notifier)
    assert rig.iommu.notifiers == []


def test_what_a_device_learns_first(rig: Rig) -> None:
    assert rig.port.get_iotlb_info() == rig.iommu.get_iotlb_info(rig, 0)  # type: ignore[arg-type]


# -- nothing is used after its invalidation was acknowledged


PAGES = 8
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["map", "map-big", "unmap", "invalidate", "fill", "write", "read", "race", "reopen"]),
        st.integers(0, PAGES - 1),
        st.integers(0, 63),
        st.booleans(),
    ),
    max_size=40,
)


@pytest.mark.parametrize("kind", list(RIGS))
@given(steps=STEPS)
@settings(deadline=None)
def test_no_access_by_what_was_taken_away(kind: str, steps: list[tuple[str, int, int, bool]]) -> None:
    """Random tables, fills that are overtaken, and accesses: each goes where the table says now, with its permission,
    or nowhere. A guest changes an entry only together with its invalidation."""
    rig = RIGS[kind]()
    iommu, table = rig.iommu, rig.iommu.tables.setdefault(PASID, {})
    atc = rig.open()
    expected = bytearray(rig.ram)

    def forget(first: int, last: int) -> None:
        for iova in [at for at, one in table.items() if at <= last and first <= at + one.mask]:
            assert iommu.unmap(iova) is None

    def change(page_number: int, frame: int, writable: bool, size: int = PAGE) -> None:
        iova = page_number * PAGE & -size
        forget(iova, iova + size - 1)
        iommu.map(iova, 0x10_0000 + frame * PAGE & -size, RW if writable else RO, size=size)

    for step, page_number, frame, flag in steps:
        iova = page_number * PAGE
        match step:
            case "map":
                change(page_number, frame, flag)
            case "map-big":
                change(page_number, frame, flag, 4 * PAGE)
            case "unmap":
                forget(iova, iova + PAGE - 1)
            case "invalidate":
                iommu.invalidate(0, U64_MAX)
            case "fill":
                atc.fill(ask(iova, 2 * PAGE, no_write=flag))
            case "race":
                setattr(iommu, "before" if flag else "after", lambda n=page_number, f=frame: change(n, f, True))
                atc.fill(ask(iova))
            case "reopen":
                atc.close()
                atc = rig.open()
            case "write" | "read":
                found = next((entry for at, entry in table.items() if at <= iova <= at + entry.mask), None)
                start = next((at for at, entry in table.items() if at <= iova <= at + entry.mask), 0)
                gpa = 0 if found is None else found.gpa + iova - start
                if step == "write":
                    data = bytes([frame + 1]) * 16
                    outcome = write(atc, iova, data)
                    if outcome is OK:
                        assert found is not None and found.perm == RW, "written without the right"
                        expected[gpa : gpa + 16] = data
                else:
                    got, outcome = read(atc, iova, 16)
                    assert outcome is not OK or (found is not None and got == bytes(expected[gpa : gpa + 16]))
                assert outcome in (OK, MISS)
        assert rig.ram == expected, "an access by a translation that was taken away"
    rig.close()


def test_what_the_function_may_do_counts_at_each_access() -> None:
    rig = RIGS["plugged"]()
    rig.iommu.map(IOVA, 0x3000)
    atc = rig.open()
    atc.fill(ask())
    assert write(atc, IOVA, b"a") is OK
    pasid, function = rig.function.pasid, rig.function
    assert pasid is not None
    for offset, on in ((pasid.offset + 6, PASID_ENABLE), (COMMAND, COMMAND_MASTER)):
        function.config_write(offset, 2, 0)
        assert write(atc, IOVA, b"b") is FAILED
        function.config_write(offset, 2, on)
        assert write(atc, IOVA, b"c") is OK
    assert rig.ram[0x3000:0x3001] == b"c"
