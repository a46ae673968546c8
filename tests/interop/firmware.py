"""A firmware of some two dozen instructions that makes hypercalls for a program outside of the machine.

It polls a *mailbox* in RAM. Byte layout, all of it big-endian u64s::

    MAILBOX + 0                  how many calls are wanted; the firmware stores 0 when all are done
    MAILBOX + ENTRY * (1 + n)    call n: r3 (opcode), r4 ... r9; overwritten with r3 (return code), r4 ... r9

So that who drives it pays for one poll per batch, and not for one per hypercall. No interrupt is ever enabled and no
translation switched on: the machine runs in real mode, big-endian, from the entry point on.

Instruction formats: Power ISA 3.1, Book I, section 1.6 "Instruction Formats".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

ENTRY_POINT = 0x100
"""Where a pseries machine begins to execute the image that it loads at address 0 (the system reset vector)."""
MAILBOX = 0x8000
ENTRY = 64
"""Bytes of a mailbox entry."""
REGISTERS = 7
"""r3 to r9."""
MAX_CALLS = 400
"""Entries that the mailbox holds; it ends below :data:`MAILBOX_END`."""
MAILBOX_END = 0x10000

_CR0 = 0
_BO_TRUE, _BO_FALSE = 12, 4
_EQ = 2


def _d_form(opcode: int, rt: int, ra: int, immediate: int) -> int:
    return opcode << 26 | rt << 21 | ra << 16 | immediate & 0xFFFF


def ld(rt: int, offset: int, ra: int) -> int:
    """Load Doubleword: rt = the u64 at ra + offset."""
    return _d_form(58, rt, ra, offset)


def std(rs: int, offset: int, ra: int) -> int:
    """Store Doubleword: the u64 at ra + offset = rs."""
    return _d_form(62, rs, ra, offset)


def addi(rt: int, ra: int, value: int) -> int:
    """Add Immediate; with ra = 0 a plain load of ``value``."""
    return _d_form(14, rt, ra, value)


def ori(ra: int, rs: int, value: int) -> int:
    """OR Immediate (unsigned)."""
    return _d_form(24, rs, ra, value)


def addic_(rt: int, ra: int, value: int) -> int:
    """Add Immediate Carrying and Record: as addi, and compares the result with 0."""
    return _d_form(13, rt, ra, value)


def cmpdi(ra: int, value: int) -> int:
    """Compare Immediate, doublewords."""
    return _d_form(11, _CR0 << 2 | 1, ra, value)


def branch(distance: int) -> int:
    """Branch, relative, in bytes."""
    return 18 << 26 | distance & 0x03FF_FFFC


def _branch_conditional(bo: int, distance: int) -> int:
    return 16 << 26 | bo << 21 | (_CR0 * 4 + _EQ) << 16 | distance & 0xFFFC


def beq(distance: int) -> int:
    """Branch if the comparison found equality."""
    return _branch_conditional(_BO_TRUE, distance)


def bne(distance: int) -> int:
    """Branch if it did not."""
    return _branch_conditional(_BO_FALSE, distance)


SC_1 = 17 << 26 | 1 << 5 | 2
"""System Call to the hypervisor (LEV = 1)."""
SYNC = 31 << 26 | 598 << 1


def program() -> list[int]:
    """The instructions from :data:`ENTRY_POINT` on. r14: mailbox, r15: calls left, r16: entry of the next call."""
    mailbox, left, entry = 14, 15, 16
    code = [addi(mailbox, 0, 0), ori(mailbox, mailbox, MAILBOX)]
    poll = len(code)
    code += [ld(left, 0, mailbox), cmpdi(left, 0)]
    code += [beq(4 * (poll - len(code)))]
    code += [addi(entry, mailbox, ENTRY)]
    call = len(code)
    code += [ld(3 + i, 8 * i, entry) for i in range(REGISTERS)]
    code += [SC_1]
    code += [std(3 + i, 8 * i, entry) for i in range(REGISTERS)]
    code += [addi(entry, entry, ENTRY), addic_(left, left, -1)]
    code += [bne(4 * (call - len(code)))]
    code += [SYNC, std(left, 0, mailbox)]
    code += [branch(4 * (poll - len(code)))]
    return code


def image() -> bytes:
    """The file for ``-bios``."""
    return bytes(ENTRY_POINT) + b"".join(struct.pack(">I", word) for word in program())


def entries(calls: Sequence[Sequence[int]]) -> bytes:
    """The mailbox entries of ``calls``, each an opcode and up to six arguments."""
    assert len(calls) <= MAX_CALLS, "the mailbox holds MAX_CALLS"
    return b"".join(struct.pack(">8Q", *call, *[0] * (8 - len(call))) for call in calls)


def results(data: bytes) -> list[tuple[int, ...]]:
    """r3 to r9 of each entry in ``data``."""
    return [words[:REGISTERS] for words in struct.iter_unpack(">8Q", data)]
