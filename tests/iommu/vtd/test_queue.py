"""The invalidation queue of a VT-d unit: what each descriptor does, errors, waits, time-outs."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from tests.iommu.vtd.unit_rig import QUEUE, SCALABLE, STATUS, Rig, timed_out
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.invalidation import device_tlb_range
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import RID, Granularity

GLOBAL, DOMAIN, SELECTIVE = Granularity
WAIT = (0x2_0000_0025, STATUS)
"""Writes 2."""
U64 = (1 << 64) - 1


def rig(*, wide: bool = True, options: VtdOptions = SCALABLE) -> Rig:
    made = Rig(options)
    made.start_queue(wide=wide)
    return made


GOOD = [
    ((0x11,), ("contexts", GLOBAL, 0, 0, 0)),
    ((0x5_0021,), ("contexts", GLOBAL, 0, 0, 0)),
    ((0x18_0005_0031,), ("contexts", SELECTIVE, 5, 0x18, 0)),
    ((0x3_0018_0005_0031,), ("contexts", SELECTIVE, 5, 0x18, 3)),
    ((0x12,), ("iotlb", GLOBAL, 0, 0, 0)),
    ((0x5_0022,), ("iotlb", DOMAIN, 5, 0, 0)),
    ((0x5_0032, 0x20_0009), ("iotlb", SELECTIVE, 5, 0x20_0000, 9)),
    ((0x5_0032, 0x20_0052), ("iotlb", SELECTIVE, 5, 0x20_0000, 18)),
    ((0x5_00F2, 0xFFFF_D040), ("iotlb", SELECTIVE, 5, 0xFFFF_D000, 0)),
    ((0x18_0000_0003, 0x1000), ("device tlb", 0x18, RID, 0x1000, 0x1FFF)),
    ((0x18_0000_0003, 0x2001), ("device tlb", 0x18, RID, 0x2000, 0x3FFF)),
]
"""Of every queue."""
WIDE = [
    ((0x5_0001_0026,), ("pasid iotlb", 1, 5, None, 0)),
    ((0x5_0001_0036, 0x1049), ("pasid iotlb", 1, 5, 0x1000, 9)),
    ((0x1_0026,), ("pasid iotlb", 1, 0, None, 0)),
    ((0x5_0001_0007,), ("pasid cache", DOMAIN, 1, 5)),
    ((0x5_0001_0017,), ("pasid cache", SELECTIVE, 1, 5)),
    ((0x1_0017,), ("pasid cache", SELECTIVE, 1, 0)),
    ((0x37,), ("pasid cache", GLOBAL, 0, 0)),
    ((0x5_0018_0008, 0xC_0FFE_E000), ("device tlb", 0x18, 5, 0xC_0FFE_E000, 0xC_0FFE_EFFF)),
    ((0x5_0018_0008, 0xC_0FFE_D800), ("device tlb", 0x18, 5, 0xC_0FFE_C000, 0xC_0FFE_FFFF)),
    ((0x5_0018_0008, 0xC_0FFE_E001), ("device tlb", 0x18, None, 0xC_0FFE_E000, 0xC_0FFE_EFFF)),
    ((0x5_0018_0008, 0x7FFF_FFFF_FFFF_F800), ("device tlb", 0x18, 5, 0, U64)),
    ((0x5_0018_0019, 0x38), ("response", 0x18, 5, 7, 0)),
    ((0x5_0018_1019, 0xFF8), ("response", 0x18, 5, 0x1FF, 1)),
    ((0x5_0018_F019, 0x38), ("response", 0x18, 5, 7, 15)),
    ((0x5_0018_2019, 0x38), ("response", 0x18, 5, 7, 15)),
]


@pytest.mark.parametrize(("descriptor", "call"), GOOD)
@pytest.mark.parametrize("wide", [False, True])
def test_what_a_descriptor_does(descriptor: tuple[int, ...], call: object, wide: bool) -> None:
    made = rig(wide=wide)
    made.submit(descriptor, WAIT)
    assert made.translator.take() == [call]
    assert (made.status, made.head, made.load(STATUS, 4)) == (0, 2, 2)


@pytest.mark.parametrize(("descriptor", "call"), WIDE)
def test_what_a_descriptor_with_a_pasid_does(descriptor: tuple[int, ...], call: object) -> None:
    made = rig()
    made.submit(descriptor)
    assert made.translator.take() == [call]
    assert (made.status, made.head) == (0, 1)


@pytest.mark.parametrize("low", [0x4, 0x10_1000_0014])
def test_interrupt_entries_are_never_cached(low: int) -> None:
    made = rig()
    made.submit((low,))
    assert (made.status, made.head) == (0, 1)
    fields = {"granularity": low >> 4 & 1, "index": low >> 32, "mask": low >> 27 & 0x1F}
    assert ("vtd_inv_desc_iec", fields) in made.log.events


@pytest.mark.parametrize(
    ("word", "first", "last"),
    [
        (0x1000, 0x1000, 0x1FFF),
        (0x2001, 0x2000, 0x3FFF),
        (0x1001, 0, 0x3FFF),
        (0x2F_F001, 0x20_0000, 0x3F_FFFF),
        (0x7FFF_FFFF_FFFF_F001, 0, U64),
        (0xFFFF_FFFF_FFFF_F001, 0, U64),
        (0x3FFF_FFFF_FFFF_F001, 0, (1 << 63) - 1),
        (0xBFFF_FFFF_FFFF_F001, 1 << 63, U64),
        (0xFFFF_FFFF_FFFF_F000, 0xFFFF_FFFF_FFFF_F000, U64),
    ],
)
def test_ranges_of_device_tlb_invalidations(word: int, first: int, last: int) -> None:
    assert device_tlb_range(word, 1) == (first, last)


# -- errors -------------------------------------------------------------------------------------------------------


def fails(made: Rig, *descriptor: int) -> None:
    """The descriptor stops the queue, does nothing, and the one behind it is not executed."""
    made.submit((0x12,), descriptor, WAIT)
    assert made.status == regs.FSTS_IQE
    assert made.get(regs.FECTL) == regs.EVENT_IM | regs.EVENT_IP
    assert made.head == 1
    assert made.translator.take() == [("iotlb", GLOBAL, 0, 0, 0)]
    assert made.load(STATUS, 4) == 0


BASES = {
    1: (0x11, 0), 2: (0x12, 0), 3: (3, 0x1000), 4: (4, 0), 5: (0x25, STATUS),
    6: (0x26, 0), 7: (0x37, 0), 8: (8, 0), 9: (0x19, 0),
}  # fmt: skip
RESERVED = {
    1: (0xFFFC_0000_0000_F1C0, U64), 2: (0xFFFF_FFFF_0000_F100, 0xF80), 3: (0xFFFF_0000_FFE0_F1F0, 0xFFE),
    4: (0xFFFF_0000_07FF_F1E0, U64), 5: (0xFFFF_F100, 3), 6: (0xFFF0_0000_0000_F1C0, 0xF80),
    7: (0xFFF0_0000_0000_F1C0, U64), 8: (0xFFF0_0000_0000_F000, 0x7FE), 9: (0xFFF0_0000_0000_01E0, U64 & ~0xFFC),
}  # fmt: skip
"""As QEMU 11.1 has them; what is above the first 128 bits is reserved but in a page group response."""


def is_bad(made: Rig, descriptor: tuple[int, ...]) -> bool:
    """Whether it stops the queue; if so, a fence in its place makes it go on."""
    made.submit(descriptor)
    bad = made.status == regs.FSTS_IQE
    if bad:
        made.fill(made.tail - 1, 0x45)
        made.put(regs.FSTS, regs.FSTS_IQE)
        made.submit()
    assert made.head == made.tail
    return bad


@pytest.mark.parametrize("kind", BASES)
def test_each_reserved_bit_is_an_error_and_no_other_is(kind: int) -> None:
    made = Rig(SCALABLE)
    made.start_queue(wide=True, size=4)
    free = regs.TYPE_LOW.mask | regs.TYPE_HIGH.mask | regs.TLB_G.mask
    skipped = (free, U64 & ~3 if kind == regs.DescriptorType.WAIT else 0, 0, 0)
    above = 0 if kind == regs.DescriptorType.PAGE_GROUP_RESPONSE else U64
    for quad, reserved in enumerate((*RESERVED[kind], above, above)):
        bits = [1 << bit for bit in range(64) if not skipped[quad] >> bit & 1]
        base = (*BASES[kind], 0, 0)
        bad = sum(bit for bit in bits if is_bad(made, (*base[:quad], base[quad] ^ bit, *base[quad + 1 :])))
        assert bad == reserved & ~skipped[quad], f"quadword {quad}: {bad:#x}"


@pytest.mark.parametrize(
    "descriptor",
    [
        (0x0,),
        (0xA,),
        (0xD,),
        (0x211,),
        (0x01,),
        (0x02,),
        (0x32, 19),
        (0x06,),
        (0x16,),
        (0x36, 19),
        (0x27,),
        (0x05,),
        (0x85,),
        (0x09,),
        (0x25, 0x8000_0000_0000),
    ],
    ids=lambda descriptor: f"{descriptor[0]:#x}",
)
def test_bad_descriptors(descriptor: tuple[int, ...]) -> None:
    fails(rig(), *descriptor)


@pytest.mark.parametrize("kind", [6, 7, 8])
def test_descriptors_with_pasid_are_an_error_in_a_queue_of_128_bits(kind: int) -> None:
    fails(rig(wide=False), *BASES[kind])


def test_page_request_drain_is_reserved_without_page_requests() -> None:
    fails(rig(wide=False, options=VtdOptions()), 0xA5, STATUS)
    made = rig()
    made.submit((0xA5, STATUS))
    assert made.status == 0


def test_without_scalable_mode_every_queue_is_one_of_128_bits() -> None:
    made = Rig()
    made.start_queue(wide=True)
    assert not made.unit.queue.wide
    assert made.unit.queue.size == 256


def test_the_queue_rests_until_the_error_is_cleared_and_the_tail_is_written() -> None:
    made = rig()
    fails(made, 0xD)
    made.put(regs.IQT, 3 * 32, 8)
    assert made.head == 1
    made.fill(1, 0x22)
    made.put(regs.FSTS, regs.FSTS_IQE)
    assert made.status == 0
    assert made.get(regs.FECTL) == regs.EVENT_IM
    assert made.head == 1
    made.put(regs.IQT, 3 * 32, 8)
    assert (made.head, made.load(STATUS, 4)) == (3, 2)


@pytest.mark.parametrize(("wide", "tail"), [(False, 256 * 16), (True, 128 * 32), (True, 0x7_FFE0)])
def test_a_tail_outside_the_queue_is_an_error(wide: bool, tail: int) -> None:
    made = rig(wide=wide)
    made.put(regs.IQT, tail, 8)
    assert (made.status, made.head) == (regs.FSTS_IQE, 0)


def test_a_tail_within_a_descriptor_of_256_bits_is_an_error() -> None:
    made = rig()
    made.put(regs.IQT, 0x30, 8)
    assert (made.status, made.head) == (regs.FSTS_IQE, 0)
    assert made.unit.queue.tail == 0


def test_a_queue_outside_memory_is_an_error() -> None:
    made = Rig()
    made.put(regs.IQA, 0xF000_0000, 8)
    made.put(regs.GCMD, regs.GCMD_QIE)
    made.put(regs.IQT, 0x10, 8)
    assert made.status == regs.FSTS_IQE


def test_no_event_while_an_earlier_condition_waits() -> None:
    made = rig()
    made.put(regs.FECTL, 0)
    made.submit((0xD,))
    made.unit.faults.queue_failed(regs.FSTS_IQE)
    assert len(made.messages) == 1


# -- on and off ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wide", "size", "entries"), [(False, 0, 256), (False, 7, 32768), (True, 0, 128), (True, 4, 2048)]
)
def test_sizes(wide: bool, size: int, entries: int) -> None:
    made = Rig(SCALABLE)
    made.start_queue(wide=wide, size=size)
    assert made.unit.queue.size == entries
    assert made.get(regs.GSTS) == regs.GCMD_QIE


def test_the_queue_is_a_ring() -> None:
    made = rig(wide=False)
    for round_ in range(3):
        for index in range(256):
            made.fill(index, *((round_ << 32 | 0x25), STATUS + 4 * index))
        made.put(regs.IQT, 255 * 16, 8)
        made.put(regs.IQT, 0, 8)
        assert made.head == 0
        assert {made.load(STATUS + 4 * index, 4) for index in range(256)} == {round_}


def test_a_tail_from_before_the_queue_was_switched_on_is_processed_at_once() -> None:
    made = Rig()
    made.put(regs.IQA, QUEUE, 8)
    made.fill(0, *WAIT)
    made.put(regs.IQT, 0x10, 8)
    assert made.load(STATUS, 4) == 0
    made.put(regs.GCMD, regs.GCMD_QIE)
    assert (made.head, made.load(STATUS, 4)) == (1, 2)


def test_it_is_switched_off_only_behind_a_wait() -> None:
    made = rig()
    for descriptors, off in ((((0x12,),), False), ((WAIT,), True)):
        made.submit(*descriptors)
        made.put(regs.GCMD, 0)
        assert bool(made.get(regs.GSTS)) != off
    assert made.get(regs.IQH, 8) == 0
    assert made.get(regs.IQA, 8) == QUEUE | regs.IQA_DW


def test_it_is_not_switched_off_before_anything_was_executed_nor_while_something_is_left() -> None:
    made = rig()
    made.put(regs.GCMD, 0)
    assert made.get(regs.GSTS) == regs.GCMD_QIE
    made.submit(WAIT, (0xD,))
    made.put(regs.GCMD, 0)
    assert made.get(regs.GSTS) == regs.GCMD_QIE


# -- wait descriptors ---------------------------------------------------------------------------------------------


def test_everything_before_a_wait_is_complete_when_it_writes() -> None:
    made = rig()
    seen: list[int] = []
    flush = made.translator.flush

    def looking() -> OSError | None:
        seen.append(made.load(STATUS, 4))
        return flush()

    made.translator.flush = looking  # type: ignore[method-assign]
    made.submit((0x12,), WAIT)
    assert seen == [0]
    assert made.load(STATUS, 4) == 2


def test_a_fence_does_nothing_else() -> None:
    made = rig()
    made.submit((0x45,))
    assert (made.status, made.head, made.get(regs.ICS)) == (0, 1, 0)


def test_status_and_interrupt_in_one() -> None:
    made = rig()
    made.put(regs.IEDATA, 0x77)
    made.put(regs.IEADDR, 0xFEE0_3000)
    made.put(regs.IECTL, 0)
    made.submit((0x2_0000_0035, STATUS))
    assert (made.load(STATUS, 4), made.get(regs.ICS)) == (2, regs.ICS_IWC)
    assert made.messages == [(0xFEE0_3000, 0x77)]
    made.submit((0x15,))
    assert len(made.messages) == 1
    made.put(regs.ICS, regs.ICS_IWC)
    made.submit((0x15,))
    assert len(made.messages) == 2


@pytest.mark.parametrize("address", [0x8000_0000_0000, regs.BASE + 0x18])
@pytest.mark.parametrize(("quirks", "sent"), [((), 0), (("wait-interrupt-anyway",), regs.ICS_IWC)])
def test_a_status_that_nobody_takes(address: int, quirks: tuple[str, ...], sent: int) -> None:
    """Not even the unit itself; a peer sends the interrupt for it."""
    made = rig(options=replace(SCALABLE, quirks=frozenset(quirks)))
    before = made.get(regs.GSTS)
    made.submit((0x2_0000_0035, address))
    assert (made.status & regs.FSTS_IQE, made.head, made.get(regs.ICS)) == (regs.FSTS_IQE, 0, sent)
    assert made.get(regs.GSTS) == before


def test_a_masked_completion_event_is_pending_until_unmasked_or_taken_away() -> None:
    made = rig()
    made.submit((0x15,))
    assert made.get(regs.IECTL) == regs.EVENT_IM | regs.EVENT_IP
    made.put(regs.IECTL, 0)
    assert (len(made.messages), made.get(regs.IECTL)) == (1, 0)
    made.put(regs.IECTL, regs.EVENT_IM)
    made.put(regs.ICS, regs.ICS_IWC)
    made.submit((0x15,))
    made.put(regs.ICS, regs.ICS_IWC)
    assert made.get(regs.IECTL) == regs.EVENT_IM


# -- time-outs, and completion that takes its time ----------------------------------------------------------------


def test_a_device_that_does_not_follow_stops_the_queue_on_the_wait() -> None:
    made = rig()
    made.translator.answers = [timed_out()]
    made.submit((0x18_0000_0003,), WAIT, (0x12,), WAIT)
    assert made.status == regs.FSTS_ITE
    assert made.get(regs.FECTL) == regs.EVENT_IM | regs.EVENT_IP
    assert (made.head, made.load(STATUS, 4)) == (1, 0)
    made.put(regs.IQT, 4 * 32, 8)
    assert made.head == 1
    made.put(regs.FSTS, regs.FSTS_ITE)
    assert (made.status, made.head, made.load(STATUS, 4)) == (0, 4, 2)


def test_a_time_out_behind_the_last_descriptor_stops_the_queue_too() -> None:
    made = rig()
    made.translator.answers = [timed_out()]
    made.submit((0x18_0000_0003,))
    assert (made.status, made.head) == (regs.FSTS_ITE, 1)
    made.submit(WAIT)
    assert made.head == 1
    made.put(regs.FSTS, regs.FSTS_ITE)
    assert (made.head, made.load(STATUS, 4)) == (2, 2)


def test_another_error_of_a_follower_is_no_time_out() -> None:
    made = rig()
    made.translator.answers = [OSError(errno.ENOSPC, "no window")]
    made.submit((0x12,), WAIT)
    assert (made.status, made.head) == (0, 2)
    assert ("vtd_flush_failed", {"errno": errno.ENOSPC}) in made.log.events


def later() -> tuple[Rig, list[int]]:
    """A queue whose waits are pending; how often it said so."""
    made = Rig(VtdOptions(invalidation="async"))
    made.start_queue()
    said: list[int] = []
    made.unit.queue.on_pending = lambda: said.append(1)
    return made, said


def test_async_a_wait_is_pending_until_the_next_step() -> None:
    made, said = later()
    made.submit((0x12,), WAIT, (0x5_0022,), WAIT)
    assert (made.head, made.load(STATUS, 4), said) == (1, 0, [1])
    assert ("flush",) not in made.translator.calls
    made.put(regs.IQT, 4 * 16, 8)
    assert made.head == 1
    made.unit.queue.step()
    assert (made.head, made.load(STATUS, 4), said) == (3, 2, [1, 1])
    made.unit.queue.step()
    assert (made.head, made.unit.queue.pending) == (4, False)
    made.unit.queue.step()
    assert made.translator.calls.count(("flush",)) == 2


def test_async_what_nobody_waits_for_is_completed_too() -> None:
    made, said = later()
    made.submit((0x12,))
    assert (made.head, said, made.unit.queue.pending) == (1, [1], True)
    made.unit.queue.step()
    assert made.translator.calls[-1] == ("flush",)
    assert not made.unit.queue.pending


def test_async_a_wait_with_nothing_before_it_is_executed_at_once() -> None:
    made, said = later()
    made.submit(WAIT)
    assert (made.head, made.load(STATUS, 4), said) == (1, 2, [])


def test_async_a_time_out_is_seen_in_the_step() -> None:
    made, _ = later()
    made.submit((0x12,), WAIT)
    made.translator.answers = [timed_out()]
    made.unit.queue.step()
    assert (made.status, made.head) == (regs.FSTS_ITE, 1)
    made.put(regs.FSTS, regs.FSTS_ITE)
    assert made.unit.queue.pending
    made.unit.queue.step()
    assert (made.head, made.load(STATUS, 4)) == (2, 2)


def test_a_reset_forgets_a_pending_wait() -> None:
    made, _ = later()
    made.submit((0x12,), WAIT)
    made.unit.reset()
    made.unit.queue.step()
    assert made.load(STATUS, 4) == 0


@pytest.mark.parametrize("during", ["flush", "invalidate_iotlb"])
def test_a_reset_while_descriptors_are_executed_ends_it(during: str) -> None:
    made = rig()
    once = [made.unit.reset]
    setattr(made.translator, during, lambda *_: once.pop()() if once else None)
    made.submit((0x12,), WAIT, (0xD,))
    assert (made.status, made.get(regs.IQH, 8), made.load(STATUS, 4)) == (0, 0, 0)
    assert not made.unit.queue.enabled


def test_the_tail_may_move_while_descriptors_are_executed() -> None:
    made = rig()
    made.fill(1, *WAIT)
    answers = [lambda: made.put(regs.IQT, 2 * 32, 8)]
    made.translator.invalidate_iotlb = lambda *_: answers.pop()()  # type: ignore[method-assign]
    made.submit((0x12,))
    assert (made.head, made.load(STATUS, 4)) == (2, 2)


def test_the_trace_reads_as_qemus() -> None:
    made = rig(wide=False)
    made.log.events.clear()
    made.submit((0x4_00F2, 0xFFFF_D040), WAIT)
    names = made.log.names()
    assert names[: names.index("vtd_inv_desc_wait_sw") + 1][-9:] == [
        "vtd_reg_write",
        "vtd_inv_qi_tail",
        "vtd_inv_qi_fetch",
        "vtd_inv_qi_head",
        "vtd_inv_desc",
        "vtd_inv_desc_iotlb_pages",
        "vtd_inv_qi_head",
        "vtd_inv_desc",
        "vtd_inv_desc_wait_sw",
    ]
