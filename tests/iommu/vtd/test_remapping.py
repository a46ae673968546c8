"""Interrupt remapping: which message an interrupt request becomes, and why one is blocked."""

from __future__ import annotations

import pytest

from tests.iommu.vtd.unit_rig import TABLE, Rig
from vfio_model.iommu.vtd import quirks, regs
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.memory.types import MemTxResult

SID = 0x18
ENTRY = 0x100_0031_0001
"""Destination APIC 1, vector 0x31, edge, fixed, physical."""
FOR_SID = 0x4_0000 | SID
REASON = regs.FaultReason


def rig(options: VtdOptions = VtdOptions(), *, commands: int = 0, eime: bool = False, bits: int = 8) -> Rig:
    """Remapping is on, with a table of ``1 << bits`` entries."""
    made = Rig(options)
    made.put(regs.IRTA, TABLE | bits - 1 | (regs.IRTA_EIME if eime else 0), 8)
    made.put(regs.GCMD, regs.GCMD_SIRTP | regs.GCMD_IRE | commands)
    return made


def request(handle: int, *, shv: bool = False) -> int:
    """The address of an interrupt request in remappable format."""
    return 0xFEE0_0010 | (handle & 0x7FFF) << 5 | (handle >> 15) << 2 | (8 if shv else 0)


def entry(made: Rig, index: int, low: int, high: int = FOR_SID) -> None:
    made.store(TABLE + index * regs.IRTE_SIZE, low, high)


def send(made: Rig, address: int, data: int = 0, sid: int = SID) -> MemTxResult:
    return made.unit.remapping.request(sid, address, data)


def blocked(made: Rig, reason: int, index: int, address: int, data: int = 0, sid: int = SID) -> None:
    """The request is blocked, and so it is recorded."""
    assert send(made, address, data, sid) == MemTxResult.ERROR
    assert not made.messages
    assert made.get(regs.FRCD + 8, 8) == regs.FRCD_F | reason << 32 | sid
    assert made.get(regs.FRCD, 8) == index << 48
    assert made.status == regs.FSTS_PPF


def test_a_handle_selects_the_entry_and_a_subhandle_is_added() -> None:
    made = rig()
    entry(made, 0x12, ENTRY)
    entry(made, 0x14, ENTRY | 0x50 << 16)
    assert request(0x12, shv=True) == 0xFEE0_0258
    assert send(made, 0xFEE0_0258, 0) == MemTxResult.OK
    assert send(made, 0xFEE0_0258, 2) == MemTxResult.OK
    assert made.messages == [(0xFEE0_1000, 0x4031), (0xFEE0_1000, 0x4071)]


def test_without_subhandle_the_data_do_not_matter() -> None:
    made = rig()
    entry(made, 0x12, ENTRY)
    assert send(made, request(0x12), 0x1234_5678) == MemTxResult.OK
    assert made.messages == [(0xFEE0_1000, 0x4031)]


def test_everything_an_entry_says_is_in_the_message() -> None:
    made = rig()
    level_logical_hint = regs.IRTE_TM | regs.IRTE_DM | regs.IRTE_RH
    entry(made, 1, 0x200_00B9_0001 | level_logical_hint | regs.IRTE_DLM.put(7) | 0xF00, 0)
    assert send(made, request(1)) == MemTxResult.OK
    assert made.messages == [(0xFEE0_200C, 0xC7B9)]


def test_extended_mode_has_destinations_of_32_bits() -> None:
    made = rig(VtdOptions(eim=True), eime=True)
    entry(made, 1, 0x1234_5678_0031_0001, 0)
    assert send(made, request(1)) == MemTxResult.OK
    assert made.messages == [(0x1234_5600_FEE7_8000, 0x4031)]


def test_the_highest_handle_has_its_top_bit_in_bit_2() -> None:
    made = rig(bits=16)
    entry(made, 0x8001, ENTRY)
    assert request(0x8001) == 0xFEE0_0034
    assert send(made, request(0x8001)) == MemTxResult.OK


def test_handle_and_subhandle_wrap_at_16_bits() -> None:
    made = rig()
    entry(made, 2, ENTRY)
    assert send(made, request(0xFFFF, shv=True), 3) == MemTxResult.OK


def test_while_remapping_is_off_messages_pass() -> None:
    made = rig()
    made.put(regs.GCMD, 0)
    assert send(made, request(0x12), 0x77) == MemTxResult.OK
    assert made.messages == [(request(0x12), 0x77)]


# -- compatibility format -----------------------------------------------------------------------------------------


def test_compatibility_format_is_blocked_unless_software_allows_it() -> None:
    blocked(rig(), REASON.IR_COMPATIBILITY_BLOCKED, 0, 0xFEE0_1000, 0x31)
    allowed = rig(commands=regs.GCMD_CFI)
    assert allowed.get(regs.GSTS) & regs.GCMD_CFI
    assert send(allowed, 0xFEE0_1000, 0x31) == MemTxResult.OK
    assert allowed.messages == [(0xFEE0_1000, 0x31)]


def test_compatibility_format_is_always_blocked_in_extended_mode() -> None:
    made = rig(VtdOptions(eim=True), commands=regs.GCMD_CFI, eime=True)
    blocked(made, REASON.IR_COMPATIBILITY_BLOCKED, 0, 0xFEE0_1000, 0x31)


def test_the_quirk_lets_compatibility_format_pass_and_has_no_cfi() -> None:
    made = rig(VtdOptions(quirks=frozenset({quirks.COMPATIBILITY_FORMAT})), commands=regs.GCMD_CFI)
    assert not made.get(regs.GSTS) & regs.GCMD_CFI
    assert send(made, 0xFEE0_1000, 0x31) == MemTxResult.OK


# -- faults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [0x1_FEE0_0250, 0xFEF0_0250])
def test_0x20_an_address_that_is_no_interrupt_request(address: int) -> None:
    blocked(rig(), REASON.IR_REQUEST_RESERVED, 0, address)


def test_0x20_a_subhandle_of_more_than_16_bits() -> None:
    made = rig()
    entry(made, 2, ENTRY)
    blocked(made, REASON.IR_REQUEST_RESERVED, 0, request(2, shv=True), 0x1_0000)


def test_0x21_an_index_outside_the_table() -> None:
    blocked(rig(bits=4), REASON.IR_INDEX_TOO_BIG, 16, request(16))


def test_0x22_an_entry_that_is_not_present() -> None:
    made = rig()
    entry(made, 3, ENTRY & ~regs.IRTE_P)
    blocked(made, REASON.IR_ENTRY_NOT_PRESENT, 3, request(3))


def test_0x23_a_table_that_is_not_in_memory() -> None:
    made = rig()
    made.put(regs.IRTA, 0xF000_0000, 8)
    made.put(regs.GCMD, regs.GCMD_SIRTP | regs.GCMD_IRE)
    blocked(made, REASON.IR_TABLE_UNREADABLE, 1, request(1))


@pytest.mark.parametrize("bit", [12, 14, 24, 31, 64 + 20, 64 + 63])
def test_0x24_reserved_bits_of_an_entry(bit: int) -> None:
    made = rig()
    both = FOR_SID << 64 | ENTRY | 1 << bit
    entry(made, 3, both & (1 << 64) - 1, both >> 64)
    blocked(made, REASON.IR_ENTRY_RESERVED, 3, request(3))


def test_0x26_an_entry_of_another_function() -> None:
    made = rig()
    entry(made, 3, ENTRY)
    blocked(made, REASON.IR_SID_MISMATCH, 3, request(3), sid=0x19)


@pytest.mark.parametrize("low", [0, ENTRY | 1 << 12, ENTRY])
def test_an_entry_can_disable_the_recording_of_its_faults(low: int) -> None:
    made = rig()
    entry(made, 3, low | regs.IRTE_FPD)
    assert send(made, request(3), sid=0x19) == MemTxResult.ERROR
    assert not made.messages
    assert made.status == 0


def verified(svt: int, sid: int, sq: int, requester: int, options: VtdOptions = VtdOptions()) -> bool:
    """Whether the entry (SVT, SID, SQ) serves ``requester``."""
    made = rig(options)
    entry(made, 1, ENTRY, regs.IRTE_SVT.put(svt) | regs.IRTE_SQ.put(sq) | sid)
    return send(made, request(1), sid=requester) == MemTxResult.OK


def test_svt_0_serves_everybody() -> None:
    assert verified(0, 0x1234, 3, 0x18)


@pytest.mark.parametrize(("sq", "ignored"), [(0, 0), (1, 4), (2, 6), (3, 7)])
def test_svt_1_serves_one_function_but_for_the_bits_that_sq_names(sq: int, ignored: int) -> None:
    for differs in range(8):
        assert verified(1, SID, sq, SID ^ differs) == (differs & ~ignored == 0)
    assert not verified(1, SID, sq, SID ^ 8)


def test_svt_2_serves_the_buses_from_the_high_byte_to_the_low() -> None:
    assert [verified(2, 0x0204, 0, bus << 8 | SID) for bus in range(1, 6)] == [False, True, True, True, False]


def test_svt_2_with_the_quirk_has_the_bytes_the_other_way_round() -> None:
    options = VtdOptions(quirks=frozenset({quirks.SVT_BUS_SWAPPED}))
    assert not verified(2, 0x0204, 0, 0x300, options)
    assert verified(2, 0x0402, 0, 0x300, options)


def test_svt_3_serves_nobody() -> None:
    assert not verified(3, SID, 0, SID)


# -- registers ----------------------------------------------------------------------------------------------------


def test_the_table_is_latched_and_not_what_is_written_later() -> None:
    made = rig()
    entry(made, 1, ENTRY)
    made.put(regs.IRTA, 0, 8)
    assert send(made, request(1)) == MemTxResult.OK
    assert made.unit.remapping.size == 256


def test_without_interrupt_remapping_its_commands_do_nothing() -> None:
    made = Rig(VtdOptions(intremap=False))
    made.put(regs.GCMD, regs.GCMD_IRE | regs.GCMD_CFI)
    assert made.get(regs.GSTS) == 0
