"""The page request queue of a VT-d unit."""

from __future__ import annotations

import errno

import pytest

from tests.iommu.vtd.unit_rig import SCALABLE, TABLE, Rig
from vfio_model.iommu.vtd import regs
from vfio_model.pci.iommu_ops import PageRequest

SID = 0x18
REQUEST = PageRequest(0xC_0FFE_E000, 5, 7, True, False, True)
ADDRESS, DATA = 0xFEE0_2000, 0x42
ENTRIES = 128


def rig(*, size: int = 0, masked: bool = True) -> Rig:
    """A queue of ``128 << size`` requests at :data:`TABLE`."""
    made = Rig(SCALABLE)
    made.put(regs.PQA, TABLE | size, 8)
    made.put(regs.PEDATA, DATA)
    made.put(regs.PEADDR, ADDRESS | 1 << 40, 8)
    made.put(regs.PECTL, regs.EVENT_IM if masked else 0)
    return made


def submit(made: Rig, request: PageRequest = REQUEST) -> None:
    made.unit.page_requests.submit(SID, request)


def refused(made: Rig, request: PageRequest = REQUEST) -> int | None:
    with pytest.raises(OSError) as caught:
        submit(made, request)
    return caught.value.errno


def fill(made: Rig) -> None:
    """All slots but the one that stays free."""
    for _ in range(ENTRIES - 1):
        submit(made)


@pytest.mark.parametrize(
    ("request_", "low", "high"),
    [
        (REQUEST, 0x5_0018_0101, 0xC_0FFE_E03E),
        (PageRequest(0x1000, 0, 0x1FF, False, True, False), 0x18_0101, 0x1FF9),
        (PageRequest(0x1FFF, 0xF_FFFF, 0, True, True, True, True, True), 0x3F_FFFF_0018_0101, 0x1007),
    ],
)
def test_a_descriptor_and_nothing_behind_it(request_: PageRequest, low: int, high: int) -> None:
    made = rig()
    made.store(TABLE, *[(1 << 64) - 1] * 4)
    submit(made, request_)
    assert [made.load(TABLE + 8 * i, 8) for i in range(4)] == [low, high, 0, 0]
    assert made.get(regs.PQT, 8) == regs.PRQ_ENTRY
    assert made.get(regs.PRS) == regs.PRS_PPR


@pytest.mark.parametrize("size", [0, 1])
def test_the_queue_is_a_ring(size: int) -> None:
    made = rig(size=size)
    last = ((ENTRIES << size) - 1) * regs.PRQ_ENTRY
    made.put(regs.PQT, last, 8)
    made.put(regs.PQH, last, 8)
    submit(made)
    assert made.get(regs.PQT, 8) == 0
    assert made.load(TABLE + last, 8) == 0x5_0018_0101


def test_a_full_queue_overflows_and_accepts_nothing_until_software_clears_that() -> None:
    made = rig()
    fill(made)
    tail = made.get(regs.PQT, 8)
    assert refused(made) == errno.ENOSPC
    assert made.get(regs.PRS) == regs.PRS_PPR | regs.PRS_PRO
    made.put(regs.PQH, tail, 8)
    assert refused(made) == errno.ENOSPC
    made.put(regs.PRS, regs.PRS_PRO)
    submit(made)
    assert made.get(regs.PQT, 8) == (tail + regs.PRQ_ENTRY) % (ENTRIES * regs.PRQ_ENTRY)


def test_a_queue_outside_memory() -> None:
    made = rig()
    made.put(regs.PQA, 0xF000_0000, 8)
    assert refused(made) == errno.EIO
    assert made.get(regs.PQT, 8) == made.get(regs.PRS) == 0


# -- the event ----------------------------------------------------------------------------------------------------


def test_one_message_until_software_has_taken_the_condition_away() -> None:
    made = rig(masked=False)
    submit(made)
    submit(made)
    assert made.messages == [(ADDRESS | 1 << 40, DATA)]
    made.put(regs.PRS, regs.PRS_PPR)
    submit(made)
    assert len(made.messages) == 2


def test_overflow_of_a_queue_whose_requests_were_taken_notice_of_is_an_event_of_its_own() -> None:
    made = rig(masked=False)
    fill(made)
    made.put(regs.PRS, regs.PRS_PPR)
    assert refused(made) == errno.ENOSPC
    assert made.get(regs.PRS) == regs.PRS_PRO
    assert len(made.messages) == 2


def test_a_masked_event_is_pending_until_it_is_unmasked() -> None:
    made = rig()
    submit(made)
    assert made.get(regs.PECTL) == 0xC000_0000
    made.put(regs.PECTL, 0)
    assert made.messages == [(ADDRESS | 1 << 40, DATA)]
    assert made.get(regs.PECTL) == 0


def test_a_pending_event_goes_with_both_its_conditions() -> None:
    made = rig()
    fill(made)
    refused(made)
    made.put(regs.PRS, regs.PRS_PPR)
    assert made.get(regs.PECTL) == 0xC000_0000
    made.put(regs.PRS, regs.PRS_PRO)
    assert made.get(regs.PECTL) == 0x8000_0000
