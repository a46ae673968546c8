"""Random programs mean the same on stock QEMU's ``intel-iommu`` and on ``guestd-system-x86_64``.

``VFIO_MODEL_INTEROP_SEED`` repeats a run, ``VFIO_MODEL_INTEROP_OPERATIONS`` makes it longer or shorter.
"""

from __future__ import annotations

import pytest

from tests.interop.vtd.campaign import Campaign

pytestmark = pytest.mark.timeout(1500)
KINDS = ("edu", "testdev", "entry", "invalidate", "queue", "register", "command", "faults")
REASONS = (0x1, 0x2, 0x3, 0x4, 0x5, 0x6, 0xA, 0xB, 0xC, 0x51, 0x59, 0x5B, 0x71, 0x72, 0x80, 0x85)
"""Those that a driver's mistakes lead to often."""


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
