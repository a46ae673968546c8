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


GOOD, BAD_STATUS = RtasStatus.SUCCESS, RtasStatus.PARAM_ERROR
EACH = (
    *(
        f"{name} {int(code)}"
        for name in ("H_GET_TCE", "H_PUT_TCE", "H_STUFF_TCE", "H_PUT_TCE_INDIRECT")
        for code in (HReturn.H_SUCCESS, HReturn.H_PARAMETER)
    ),
    *(
        f"ibm,{name}-pe-dma-window {int(code)}"
        for name in ("query", "create", "remove", "reset")
        for code in (GOOD, BAD_STATUS)
    ),
    f"ibm,create-pe-dma-window {int(RtasStatus.HW_ERROR)}",
    *(f"ibm,{name}-pci-config {int(code)}" for name in ("read", "write") for code in (GOOD, RtasStatus.HW_ERROR)),
    *(f"ibm,set-tce-bypass {int(code)}" for code in (GOOD, BAD_STATUS)),
)
"""The same for each call."""


def test_no_return_value_table_entry_or_byte_differs(campaign: Campaign) -> None:
    assert not campaign.differences, "\n".join(map(str, campaign.differences))


def test_the_programs_are_long_and_mostly_good(campaign: Campaign) -> None:
    tally = campaign.tally
    assert tally.operations >= campaign.operations
    assert tally.good >= 0.6 * tally.operations


@pytest.mark.parametrize("code", RETURNS)
def test_every_return_code_occurs_often(campaign: Campaign, code: str) -> None:
    assert campaign.tally.returns[code] >= ENOUGH


@pytest.mark.parametrize("code", EACH)
def test_every_call_returns_each_of_its_codes_often(campaign: Campaign, code: str) -> None:
    assert campaign.tally.each[code] >= ENOUGH


def test_the_version_is_one_that_the_quirks_are_known_for(campaign: Campaign) -> None:
    major, minor = campaign.qemu_version.split(".")[:2]
    assert (int(major), int(minor)) >= (11, 1)
