"""The firmware's instructions, against encodings written down by hand from the Power ISA's instruction formats."""

from __future__ import annotations

import struct

from tests.interop import firmware


def test_instructions_are_encoded_as_the_isa_says() -> None:
    assert firmware.ld(3, 8, 16) == 0xE870_0008
    assert firmware.std(9, 48, 16) == 0xF930_0030
    assert firmware.addi(16, 14, 64) == 0x3A0E_0040
    assert firmware.addic_(15, 15, -1) == 0x35EF_FFFF
    assert firmware.ori(14, 14, 0x8000) == 0x61CE_8000
    assert firmware.cmpdi(15, 0) == 0x2C2F_0000
    assert firmware.beq(-8) == 0x4182_FFF8
    assert firmware.bne(-68) == 0x4082_FFBC
    assert firmware.branch(-104) == 0x4BFF_FF98
    assert (firmware.SC_1, firmware.SYNC) == (0x4400_0022, 0x7C00_04AC)


def test_the_image_begins_at_the_entry_point_and_ends_below_the_mailbox() -> None:
    image = firmware.image()
    assert not any(image[: firmware.ENTRY_POINT])
    assert struct.unpack_from(">I", image, firmware.ENTRY_POINT)[0] == firmware.program()[0]
    assert len(image) < firmware.MAILBOX
    assert firmware.MAILBOX + firmware.ENTRY * (1 + firmware.MAX_CALLS) <= firmware.MAILBOX_END


def test_branches_lead_to_the_poll_and_to_the_next_call() -> None:
    code = firmware.program()
    (end,) = (at for at, word in enumerate(code) if word == firmware.bne(-4 * 17))
    assert code[end - 17] == firmware.ld(3, 0, 16), "the first register of the next call"
    poll = code.index(firmware.ld(15, 0, 14))
    assert code[-1] == firmware.branch(4 * (poll - (len(code) - 1)))
    assert code[poll + 2] == firmware.beq(-8)
