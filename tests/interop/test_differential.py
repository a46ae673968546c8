"""Random programs mean the same on stock QEMU and on ``guestd-system-ppc64``.

``VFIO_MODEL_INTEROP_SEED`` repeats a run, ``VFIO_MODEL_INTEROP_OPERATIONS`` makes it longer or shorter,
``VFIO_MODEL_INTEROP_PEER=model`` puts the machine in this process in guestd's place.
"""

from __future__ import annotations

import pytest

from tests.interop.campaign import Campaign
from vfio_model.iommu.spapr.regs import HReturn, RtasStatus

pytestmark = pytest.mark.timeout(1500)
ENOUGH = 50
"""How often each return code occurs at least."""
RETURNS = (
    *(f"hcall {int(code)}" for code in (HReturn.H_SUCCESS, HReturn.H_FUNCTION, HReturn.H_PARAMETER)),
    *(f"H_RTAS {int(code)}" for code in (HReturn.H_SUCCESS, HReturn.H_PARAMETER)),
    *(f"RTAS {int(status)}" for status in (RtasStatus.SUCCESS, RtasStatus.HW_ERROR, RtasStatus.PARAM_ERROR)),
)
"""What a machine without assigned devices and without acceleration can answer."""


def test_no_return_value_table_entry_or_byte_differs(campaign: Campaign) -> None:
    assert not campaign.differences, "\n".join(map(str, campaign.differences))


def test_the_programs_are_long_and_mostly_good(campaign: Campaign) -> None:
    tally = campaign.tally
    assert tally.operations >= campaign.operations
    assert tally.good >= 0.6 * tally.operations


@pytest.mark.parametrize("code", RETURNS)
def test_every_return_code_occurs_often(campaign: Campaign, code: str) -> None:
    assert campaign.tally.returns[code] >= ENOUGH


def test_the_version_is_one_that_the_quirks_are_known_for(campaign: Campaign) -> None:
    major, minor = campaign.qemu_version.split(".")[:2]
    assert (int(major), int(minor)) >= (11, 1)
