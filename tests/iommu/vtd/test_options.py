"""Options of a VT-d unit and the capabilities they give. The numbers are those of QEMU 11.1's intel-iommu."""

from __future__ import annotations

import pytest

from vfio_model.errors import ConfigError
from vfio_model.iommu.vtd import quirks, regs
from vfio_model.iommu.vtd.options import VtdOptions


@pytest.mark.parametrize(
    ("options", "cap", "ecap"),
    [
        ({}, 0x80D2_008C_222F_0606, 0xF0_0F4A),
        ({"caching_mode": True}, 0x80D2_008C_222F_0686, 0xF0_0F4A),
        ({"aw_bits": 39}, 0x80D2_008C_2226_0206, 0xF0_0F4A),
        ({"intremap": False}, 0x80D2_008C_222F_0606, 0xF42),
        ({"eim": True}, 0x80D2_008C_222F_0606, 0xF0_0F5A),
        ({"scalable_mode": True}, 0x80D2_008C_222F_0606, 0x4800_80F0_0F4A),
        ({"scalable_mode": True, "intremap": False}, 0x80D2_008C_222F_0606, 0x4800_8000_0F42),
        ({"scalable_mode": True, "fsts": True}, 0x81D2_008C_222F_0606, 0x8800_00F0_0F4A),
        ({"scalable_mode": True, "fsts": True, "fs1gp": False}, 0x80D2_008C_222F_0606, 0x8800_00F0_0F4A),
        ({"scalable_mode": True, "pasid_bits": 1}, 0x80D2_008C_222F_0606, 0x4900_80F0_0F4A),
        ({"scalable_mode": True, "pasid_bits": 8}, 0x80D2_008C_222F_0606, 0x4938_80F0_0F4A),
        ({"scalable_mode": True, "pasid_bits": 20}, 0x80D2_008C_222F_0606, 0x4998_80F0_0F4A),
        (
            {"scalable_mode": True, "fsts": True, "svm": True, "device_iotlb": True, "pasid_bits": 20},
            0x81D2_008C_222F_0606,
            0x8D9A_20F0_0F4E,
        ),
        ({"device_iotlb": True}, 0x80D2_008C_222F_0606, 0xF0_0F4E),
        ({"snoop_control": True}, 0x80D2_008C_222F_0606, 0xF0_0FCA),
        ({"dma_translation": False}, 0x80D2_008C_222F_0006, 0xF0_0F4A),
        ({"stale_tm": True}, 0x80D2_008C_222F_0606, 0xF0_0F4A),
    ],
)
def test_capabilities(options: dict[str, object], cap: int, ecap: int) -> None:
    unit = VtdOptions(**options)  # type: ignore[arg-type]
    assert (unit.cap, unit.ecap) == (cap, ecap)


def test_page_requests_without_drain_and_write_flag_are_the_first_version_of_them() -> None:
    """Before page-request drain (PDS) and no-write-flag (NWFS) came, eight PASID bits were all there were."""
    options = VtdOptions(scalable_mode=True, fsts=True, svm=True, device_iotlb=True, pasid_bits=8, intremap=False)
    assert options.ecap & ~(regs.ECAP_PDS | regs.ECAP_NWFS) == 0x8938_2000_0F46


def test_nested_is_both_stages() -> None:
    ecap = VtdOptions(scalable_mode=True, nested=True).ecap
    assert ecap & (regs.ECAP_NEST | regs.ECAP_FSTS | regs.ECAP_SSTS) == regs.ECAP_NEST | regs.ECAP_FSTS | regs.ECAP_SSTS


def test_without_drain_and_pass_through_their_bits_are_clear() -> None:
    options = VtdOptions(dma_drain=False, pass_through=False)
    assert not options.cap & (regs.CAP_DRD | regs.CAP_DWD)
    assert not options.ecap & regs.ECAP_PT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eim": True, "intremap": False}, "eim=on cannot be selected without intremap=on"),
        ({"fsts": True}, "fsts is only available in scalable mode"),
        ({"nested": True}, "nested is only available in scalable mode"),
        (
            {"scalable_mode": True, "fsts": True, "aw_bits": 39},
            "Scalable mode(fsts=on): supported value for aw-bits is: 48",
        ),
        ({"aw_bits": 40}, "Legacy mode: supported values for aw-bits are: 39, 48"),
        ({"scalable_mode": True, "aw_bits": 57}, "Scalable mode(fsts=off): supported values for aw-bits are: 39, 48"),
        ({"scalable_mode": True, "dma_drain": False}, "Need to set dma_drain for scalable mode"),
        ({"pasid_bits": 8}, "Need to set scalable mode for PASID"),
        (
            {"scalable_mode": True, "pasid_bits": 21},
            "PASID width 21 exceeds Max PASID Width 20 allowed in PCI spec",
        ),
        ({"svm": True}, "Need to set device IOTLB for svm"),
        ({"scalable_mode": True, "svm": True, "device_iotlb": True}, "Need to set fsts for svm"),
        (
            {"scalable_mode": True, "fsts": True, "svm": True, "device_iotlb": True},
            "Need to set PASID support for svm",
        ),
        ({"invalidation": "later"}, "invalidation=later: sync and async are known"),
    ],
)
def test_combinations_that_there_are_not(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VtdOptions(**options)  # type: ignore[arg-type]
    assert caught.value.what == words


def test_qemu_selects_every_selectable_quirk() -> None:
    options = VtdOptions(quirks=frozenset({quirks.ALL}))
    assert options.quirks == {each.name for each in quirks.QUIRKS if each.selectable}
    assert options.has(quirks.SVT_BUS_SWAPPED)
    assert not VtdOptions().quirks


@pytest.mark.parametrize("name", ["no-such", "page-request-descriptor"])
def test_an_unknown_quirk_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        VtdOptions(quirks=frozenset({name}))
