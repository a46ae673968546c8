"""The registers of a VT-d unit: what they read, what writing keeps, and what it sets in motion."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.unit_rig import QUEUE, SCALABLE, TABLE, Rig, timed_out
from vfio_model.iommu.vtd import quirks, regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.ports import Granularity

U64 = (1 << 64) - 1
ALL_ONES_4 = {
    regs.RTADDR: 0xFFFF_FC00,
    regs.RTADDR + 4: 0xFFFF_FFFF,
    regs.CCMD: 0xFFFF,
    regs.FECTL: 0x8000_0000,
    regs.FEDATA: 0xFFFF,
    regs.FEADDR: 0xFFFF_FFFC,
    regs.FEUADDR: 0,
    regs.IQT: 0x7_FFF0,
    regs.IQT + 4: 0,
    regs.IQA: 0x807,
    regs.IQA + 4: 0,
    regs.IECTL: 0x8000_0000,
    regs.IEDATA: 0xFFFF_FFFF,
    regs.IEADDR: 0xFFFF_FFFC,
    regs.IEUADDR: 0,
    regs.IRTA: 0xFFFF_F80F,
    regs.IRTA + 4: 0xFFFF_FFFF,
    regs.IVA: 0,
    regs.IVA + 4: 0,
    regs.IOTLB: 0,
}
"""Of a unit of QEMU 11.1: what reads back after all bits were written in 4 bytes."""
PAGE_REQUEST_ONES_4 = {
    regs.PQH: 0x7_FFE0,
    regs.PQT: 0x7_FFE0,
    regs.PQA: 0xFFFF_F007,
    regs.PQA + 4: 0xFFFF_FFFF,
    regs.PRS: 0,
    regs.PECTL: 0x8000_0000,
    regs.PEDATA: 0xFFFF,
    regs.PEADDR: 0xFFFF_FFFC,
    regs.PEUADDR: 0xFFFF_FFFF,
}


def test_after_a_reset_only_capabilities_and_masks_are_not_zero() -> None:
    rig = Rig(SCALABLE)
    values = {offset: rig.get(offset) for offset in range(0, regs.SIZE, 4)}
    assert {offset: value for offset, value in values.items() if value} == {
        regs.VER: 0x10,
        regs.CAP: 0x222F_0606,
        regs.CAP + 4: 0x81D2_008C,
        regs.ECAP: 0x20F0_0F4E,
        regs.ECAP + 4: 0x8D9A,
        regs.FECTL: 0x8000_0000,
        regs.IECTL: 0x8000_0000,
    }


@pytest.mark.parametrize("offset", [*ALL_ONES_4, *PAGE_REQUEST_ONES_4])
def test_bits_that_keep_what_is_written(offset: int) -> None:
    rig = Rig(SCALABLE)
    rig.put(offset, 0xFFFF_FFFF)
    assert rig.get(offset) == (ALL_ONES_4 | PAGE_REQUEST_ONES_4)[offset]
    rig.put(offset, 0)
    assert rig.get(offset) == 0


@pytest.mark.parametrize("offset", PAGE_REQUEST_ONES_4)
def test_without_page_requests_their_registers_are_not_there(offset: int) -> None:
    rig = Rig()
    rig.put(offset, 0xFFFF_FFFF)
    assert rig.get(offset) == 0


@pytest.mark.parametrize("offset", [regs.VER, regs.CAP, regs.CAP + 4, regs.ECAP, regs.GSTS, regs.IQH, 0x48, 0x100])
def test_what_cannot_be_written_is_not(offset: int) -> None:
    rig = Rig()
    before = rig.get(offset)
    rig.put(offset, ~before & 0xFFFF_FFFF)
    assert rig.get(offset) == before


@pytest.mark.parametrize("offset", [regs.FECTL, regs.IECTL, regs.PECTL])
def test_eight_bytes_at_an_event_control_register_write_that_one_alone(offset: int) -> None:
    rig = Rig(SCALABLE)
    rig.put(offset, 0x1234_8000_0000, 8)
    assert rig.get(offset, 8) == 0x8000_0000


def test_eight_bytes_at_an_event_address_write_both_halves() -> None:
    rig = Rig(SCALABLE)
    rig.put(regs.PEADDR, U64, 8)
    assert rig.get(regs.PEADDR, 8) == 0xFFFF_FFFF_FFFF_FFFC


@pytest.mark.parametrize("size", [1, 2])
def test_smaller_accesses_read_zero_and_write_nothing(size: int) -> None:
    rig = Rig()
    assert rig.get(regs.CAP, size) == 0
    rig.put(regs.FEDATA, 0xFF, size)
    assert rig.get(regs.FEDATA) == 0


def test_eight_bytes_across_two_registers_are_two_accesses() -> None:
    rig = Rig()
    assert rig.get(regs.CAP + 4, 8) == 0xF0_0F4A_80D2_008C


# -- global commands ----------------------------------------------------------------------------------------------


def test_gcmd_reads_zero() -> None:
    rig = Rig()
    rig.put(regs.GCMD, regs.GCMD_TE)
    assert rig.get(regs.GCMD) == 0


def test_translation_is_switched_when_te_changes() -> None:
    rig = Rig()
    for command in (regs.GCMD_TE, regs.GCMD_TE, 0, 0):
        rig.put(regs.GCMD, command)
        assert rig.get(regs.GSTS) == command
    assert rig.translator.take() == [("enabled", True), ("enabled", False)]


def test_without_dma_translation_te_does_nothing() -> None:
    rig = Rig(VtdOptions(dma_translation=False))
    rig.put(regs.GCMD, regs.GCMD_TE)
    assert rig.get(regs.GSTS) == 0
    assert not rig.translator.take()


def test_the_root_takes_effect_at_srtp_every_time() -> None:
    rig = Rig()
    rig.put(regs.RTADDR, 0x1000_0000, 8)
    assert not rig.translator.take()
    rig.put(regs.GCMD, regs.GCMD_SRTP)
    rig.put(regs.GCMD, regs.GCMD_SRTP)
    assert rig.translator.take() == [("root", 0x1000_0000, False)] * 2
    assert rig.get(regs.GSTS) == regs.GCMD_SRTP
    rig.put(regs.GCMD, 0)
    assert rig.get(regs.GSTS) == regs.GCMD_SRTP


def test_scalable_mode_is_taken_where_there_is_one() -> None:
    for options, scalable in ((SCALABLE, True), (VtdOptions(), False)):
        rig = Rig(options)
        rig.put(regs.RTADDR, 0xFFF3_4567_8900_0400, 8)
        rig.put(regs.GCMD, regs.GCMD_SRTP)
        assert rig.translator.take() == [("root", 0x4567_8900_0000, scalable)]
        assert rig.get(regs.RTADDR, 8) == 0xFFF3_4567_8900_0400


def test_commands_of_one_write_are_carried_out_from_the_highest_bit_down() -> None:
    rig = Rig()
    rig.put(regs.GCMD, 0xFFFF_FFFF)
    assert [name for name in rig.log.names() if "enable" in name or "root" in name] == [
        "vtd_dmar_enable",
        "vtd_reg_dmar_root",
        "vtd_inv_qi_enable",
        "vtd_reg_ir_root",
        "vtd_ir_enable",
    ]
    assert rig.get(regs.GSTS) == (
        regs.GCMD_TE | regs.GCMD_SRTP | regs.GCMD_QIE | regs.GCMD_IRE | regs.GCMD_SIRTP | regs.GCMD_CFI
    )


def test_with_the_quirk_gsts_is_qemus() -> None:
    rig = Rig(VtdOptions(quirks=frozenset({quirks.ALL})))
    rig.put(regs.GCMD, 0xFFFF_FFFF)
    assert rig.get(regs.GSTS) == 0xC700_0000


def test_a_reset_forgets_everything() -> None:
    rig = Rig()
    rig.put(regs.RTADDR, 0x1000_0000, 8)
    rig.put(regs.IRTA, TABLE | 7, 8)
    rig.start_queue()
    rig.put(regs.GCMD, 0xFF80_0000)
    rig.unit.reset()
    assert rig.get(regs.GSTS) == rig.get(regs.RTADDR, 8) == rig.get(regs.IQA, 8) == 0
    assert rig.get(regs.FECTL) == regs.EVENT_IM
    assert not rig.unit.queue.enabled
    assert not rig.unit.remapping.enabled
    assert rig.translator.take()[-1] == ("reset",)


# -- invalidation -------------------------------------------------------------------------------------------------

ICC, IVT = regs.CCMD_ICC, regs.IOTLB_IVT


@pytest.mark.parametrize(
    ("command", "reads", "call"),
    [
        (ICC | 1 << 61, 0x2800_0000_0000_0000, ("contexts", Granularity.GLOBAL, 0, 0, 0)),
        (ICC | 2 << 61 | 5, 0x4800_0000_0000_0005, ("contexts", Granularity.GLOBAL, 0, 0, 0)),
        (
            ICC | 3 << 61 | 3 << 32 | 0x18 << 16 | 5,
            0x7800_0000_0000_0005,
            ("contexts", Granularity.SELECTIVE, 5, 0x18, 3),
        ),
        (ICC, 0, None),
    ],
)
def test_context_invalidation_says_what_it_did(command: int, reads: int, call: object) -> None:
    rig = Rig()
    rig.put(regs.CCMD, command, 8)
    assert rig.get(regs.CCMD, 8) == reads
    assert rig.translator.take() == ([call] if call else [])


@pytest.mark.parametrize(
    ("address", "command", "reads", "call"),
    [
        (0, IVT | 1 << 60, 0x1200_0000_0000_0000, ("iotlb", Granularity.GLOBAL, 0, 0, 0)),
        (0, IVT | 2 << 60 | 5 << 32, 0x2400_0005_0000_0000, ("iotlb", Granularity.DOMAIN, 5, 0, 0)),
        (
            0x20_0009,
            IVT | 3 << 60 | 5 << 32,
            0x3600_0005_0000_0000,
            ("iotlb", Granularity.SELECTIVE, 5, 0x20_0000, 9),
        ),
        (0x20_0013, IVT | 3 << 60 | 5 << 32, 0x3000_0005_0000_0000, None),
        (0, IVT, 0, None),
    ],
)
def test_iotlb_invalidation_says_what_it_did(address: int, command: int, reads: int, call: object) -> None:
    rig = Rig()
    rig.put(regs.IVA, address, 8)
    rig.put(regs.IOTLB, command, 8)
    assert rig.get(regs.IOTLB, 8) == reads
    assert rig.translator.take() == ([call] if call else [])


def test_the_upper_half_alone_starts_an_invalidation() -> None:
    rig = Rig()
    rig.put(regs.CCMD + 4, (ICC | 1 << 61) >> 32)
    rig.put(regs.IOTLB + 4, (IVT | 1 << 60) >> 32)
    assert [call[0] for call in rig.translator.take()] == ["contexts", "iotlb"]


def test_without_the_start_bit_nothing_is_invalidated() -> None:
    rig = Rig()
    rig.put(regs.CCMD, 1 << 61, 8)
    rig.put(regs.IOTLB, 1 << 60, 8)
    assert not rig.translator.take()


def test_while_the_queue_is_on_register_invalidation_is_refused() -> None:
    rig = Rig()
    rig.start_queue()
    rig.put(regs.CCMD, ICC | 1 << 61, 8)
    rig.put(regs.IOTLB, IVT | 1 << 60, 8)
    assert rig.get(regs.CCMD, 8) == 0xA000_0000_0000_0000
    assert rig.get(regs.IOTLB, 8) == 0x9000_0000_0000_0000
    assert not rig.translator.take()


def test_an_invalidation_is_complete_when_nobody_uses_what_it_took() -> None:
    rig = Rig()
    rig.put(regs.IOTLB, IVT | 1 << 60, 8)
    assert rig.translator.calls[-1] == ("flush",)


def test_a_device_that_does_not_follow_leaves_the_start_bit_set() -> None:
    rig = Rig()
    rig.translator.answers = [timed_out(), timed_out()]
    rig.put(regs.IOTLB, IVT | 1 << 60, 8)
    rig.put(regs.CCMD, ICC | 1 << 61, 8)
    assert rig.get(regs.IOTLB, 8) & IVT
    assert rig.get(regs.CCMD, 8) & ICC


def test_every_access_is_traced_as_qemu_does() -> None:
    rig = Rig()
    rig.get(regs.CAP, 8)
    rig.put(regs.IQA, QUEUE, 8)
    assert rig.log.events == [
        ("vtd_reg_read", {"addr": 8, "size": 8}),
        ("vtd_reg_write", {"addr": 0x90, "size": 8, "value": QUEUE}),
    ]
