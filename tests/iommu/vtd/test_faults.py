"""Fault records and the fault event of a VT-d unit."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.unit_rig import Rig
from vfio_model.iommu.vtd import regs
from vfio_model.iommu.vtd.ports import RID, Fault
from vfio_model.iommu.vtd.structures import Reason

ADDRESS, DATA = 0xFEE0_1000, 0x21


def rig(*, masked: bool = True) -> Rig:
    """The event goes to :data:`ADDRESS` with :data:`DATA`."""
    made = Rig()
    made.put(regs.FEDATA, DATA)
    made.put(regs.FEADDR, ADDRESS)
    made.put(regs.FECTL, regs.EVENT_IM if masked else 0)
    return made


def report(
    made: Rig, reason: int = 5, sid: int = 0x18, address: int = 0x1234_5678, *, write: bool = True, pasid: int = RID
) -> None:
    made.unit.faults.report(Fault(reason, sid, address, write, pasid))


def record(made: Rig) -> tuple[int, int]:
    """The upper and the lower half."""
    return made.get(regs.FRCD + 8, 8), made.get(regs.FRCD, 8)


def clear(made: Rig) -> None:
    """As software does: F, then PFO."""
    made.put(regs.FRCD + 12, regs.FRCD_F >> 32)
    made.put(regs.FSTS, regs.FSTS_PFO)


@pytest.mark.parametrize(
    ("fault", "high", "low"),
    [
        (Fault(5, 0x18, 0x1234_5678, True), 0x8000_0005_0000_0018, 0x1234_5000),
        (Fault(6, 0x18, 0x1234_5678, False), 0xC000_0006_0000_0018, 0x1234_5000),
        (Fault(0x71, 0x18, 0xC_0FFE_E000, True, 5), 0x8000_0571_8000_0018, 0xC_0FFE_E000),
        (Fault(0x71, 0x18, 0xC_0FFE_E000, True, 0), 0x8000_0071_8000_0018, 0xC_0FFE_E000),
        (Fault(0x85, 0xFFFF, (1 << 64) - 1, False, 0xF_FFFF), 0xCFFF_FF85_8000_FFFF, 0xFFFF_FFFF_FFFF_F000),
    ],
)
def test_a_record_holds_source_reason_direction_and_pasid(fault: Fault, high: int, low: int) -> None:
    made = rig()
    made.unit.faults.report(fault)
    assert record(made) == (high, low)
    assert made.status == regs.FSTS_PPF


@pytest.mark.parametrize("reason", [each for each in Reason if each])
def test_every_reason_of_translation_is_recorded(reason: int) -> None:
    made = rig()
    report(made, reason)
    assert regs.FRCD_REASON.of(record(made)[0]) == reason


def test_a_second_fault_of_the_same_source_collapses() -> None:
    made = rig()
    report(made, 5)
    before = record(made)
    report(made, 6, address=0x9999_9000)
    assert record(made) == before
    assert made.status == regs.FSTS_PPF


def test_a_fault_of_another_source_without_room_sets_overflow() -> None:
    made = rig()
    report(made, sid=0x18)
    before = record(made)
    report(made, sid=0x20)
    assert record(made) == before
    assert made.status == regs.FSTS_PPF | regs.FSTS_PFO


def test_while_overflow_is_set_nothing_is_recorded() -> None:
    made = rig()
    report(made, sid=0x18)
    report(made, sid=0x20)
    made.put(regs.FRCD + 8, regs.FRCD_F, 8)
    assert made.status == regs.FSTS_PFO
    report(made, sid=0x28)
    assert not record(made)[0] & regs.FRCD_F
    made.put(regs.FSTS, regs.FSTS_PFO)
    report(made, sid=0x28)
    assert record(made)[0] == 0x8000_0005_0000_0028


@pytest.mark.parametrize(("offset", "size"), [(8, 8), (12, 4)])
def test_writing_one_to_f_clears_it_and_ppf(offset: int, size: int) -> None:
    made = rig()
    report(made)
    made.put(regs.FRCD + offset, 0, size)
    assert made.status == regs.FSTS_PPF
    made.put(regs.FRCD + offset, regs.FRCD_F >> (64 - 8 * size), size)
    assert made.status == 0
    assert record(made) == (0x5_0000_0018, 0x1234_5000)


def test_other_bits_of_a_record_cannot_be_written() -> None:
    made = rig()
    report(made)
    made.put(regs.FRCD, 0, 8)
    made.put(regs.FRCD + 8, 0, 8)
    assert record(made) == (0x8000_0005_0000_0018, 0x1234_5000)


# -- the event ----------------------------------------------------------------------------------------------------


def test_an_unmasked_event_is_a_message() -> None:
    made = rig(masked=False)
    report(made)
    assert made.messages == [(ADDRESS, DATA)]
    assert made.get(regs.FECTL) == 0


def test_a_masked_event_stays_pending_until_it_is_unmasked() -> None:
    made = rig()
    report(made)
    assert made.messages == []
    assert made.get(regs.FECTL) == 0xC000_0000
    made.put(regs.FECTL, 0)
    assert made.messages == [(ADDRESS, DATA)]
    assert made.get(regs.FECTL) == 0


def test_no_second_event_before_the_first_was_served() -> None:
    made = rig(masked=False)
    report(made)
    report(made, sid=0x20)
    assert len(made.messages) == 1
    clear(made)
    report(made, sid=0x20)
    assert len(made.messages) == 2


def test_status_without_a_condition_takes_a_pending_event_away() -> None:
    made = rig()
    report(made)
    clear(made)
    assert made.status == 0
    assert made.get(regs.FECTL) == 0x8000_0000
    made.put(regs.FECTL, 0)
    assert made.messages == []


def test_status_with_a_condition_leaves_it_pending() -> None:
    made = rig()
    report(made)
    made.put(regs.FSTS, regs.FSTS_PFO)
    assert made.get(regs.FECTL) == 0xC000_0000


def test_switching_translation_off_begins_with_the_first_record() -> None:
    made = rig()
    made.put(regs.GCMD, regs.GCMD_TE)
    report(made)
    made.put(regs.GCMD, 0)
    assert made.unit.faults.next == 0
    assert made.status == regs.FSTS_PPF
