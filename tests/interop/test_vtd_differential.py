"""Random programs mean the same on stock QEMU's ``intel-iommu`` and on ``guestd-system-x86_64``.

``VFIO_MODEL_INTEROP_SEED`` repeats a run, ``VFIO_MODEL_INTEROP_OPERATIONS`` makes it longer or shorter.
"""

from __future__ import annotations

import pytest

from tests.interop.vtd.campaign import Campaign

pytestmark = pytest.mark.timeout(1500)
KINDS = ("edu", "testdev", "entry", "invalidate", "queue", "register", "command", "faults", "message", "reset")
REASONS = (
    *(0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0x7, 0x9, 0xA, 0xB, 0xC, 0x21, 0x22, 0x24, 0x26),
    *(0x50, 0x51, 0x58, 0x59, 0x5B, 0x70, 0x71, 0x72, 0x73, 0x80, 0x81, 0x85, 0x87),
)
"""Of the mistakes that every run makes."""


@pytest.fixture(scope="module")
def vtd_campaign() -> Campaign:
    """One run for all tests."""
    campaign = Campaign.from_environment()
    campaign.run()
    print("\n".join(campaign.report()))
    return campaign


def test_no_register_fault_record_or_byte_differs(vtd_campaign: Campaign) -> None:
    assert not vtd_campaign.differences, "\n".join(map(str, vtd_campaign.differences))


def test_there_are_enough_operations(vtd_campaign: Campaign) -> None:
    assert vtd_campaign.done >= vtd_campaign.operations


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_operation_occurs_often(vtd_campaign: Campaign, kind: str) -> None:
    assert vtd_campaign.kinds[kind] >= 100


@pytest.mark.parametrize("reason", REASONS, ids=hex)
def test_faults_of_every_reason_are_seen(vtd_campaign: Campaign, reason: int) -> None:
    assert vtd_campaign.seen[f"reason {reason:#x}"] >= 3


def test_faults_overflow_and_the_queue_stops(vtd_campaign: Campaign) -> None:
    assert vtd_campaign.seen["PFO"] >= 50 and vtd_campaign.seen["IQE"] >= 50
