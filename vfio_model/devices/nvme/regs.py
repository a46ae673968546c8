"""nvme: registers, queue entries, opcodes and status values (NVM Express Base Specification 1.4).

BAR 0 is 16 KiB of little-endian memory: controller registers in the first page, doorbells in the second, the MSI-X
table in the third and its pending bits in the fourth. Identity is that of QEMU's ``nvme``.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from vfio_model.devices.register_file import Register
from vfio_model.ranges import U32_MAX

# -- PCI (chapter 2, "System Bus (PCI Express) Registers")

VENDOR_ID = 0x1B36
DEVICE_ID = 0x0010
REVISION = 0x02
CLASS_ID = 0x0108
"""Mass storage, non-volatile memory."""
CLASS_PROG = 0x02
"""NVM Express I/O controller."""
POWER_CAPABILITY, EXPRESS_CAPABILITY = 0x60, 0x80
"""Where they lie in configuration space, as QEMU has them."""
BAR_SIZE = 0x4000
DOORBELLS = 0x1000
MSIX_TABLE = 0x2000
MSIX_PBA = 0x3000
MAX_QUEUES = (MSIX_TABLE - DOORBELLS) // 8
"""Pairs of doorbells that fit: the admin pair and 511 more."""
MAX_VECTORS = (MSIX_PBA - MSIX_TABLE) // 16

# -- controller registers (section 3.1, "Register Definition")


class Bits(NamedTuple):
    """A field of a register or dword: its lowest bit and its width."""

    low: int
    width: int

    def of(self, value: int) -> int:
        """The field's value in ``value``."""
        return value >> self.low & (1 << self.width) - 1

    def at(self, value: int) -> int:
        """``value`` moved to the field's place."""
        return (value & (1 << self.width) - 1) << self.low


CAP_MQES = Bits(0, 16)
CAP_CQR = Bits(16, 1)
CAP_TO = Bits(24, 8)
CAP_DSTRD = Bits(32, 4)
CAP_CSS = Bits(37, 8)
CAP_MPSMIN = Bits(48, 4)
CAP_MPSMAX = Bits(52, 4)

CC_EN = Bits(0, 1)
CC_CSS = Bits(4, 3)
CC_MPS = Bits(7, 4)
CC_AMS = Bits(11, 3)
CC_SHN = Bits(14, 2)
CC_IOSQES = Bits(16, 4)
CC_IOCQES = Bits(20, 4)
CC_WHILE_DISABLED = CC_CSS.at(0x7) | CC_MPS.at(0xF) | CC_AMS.at(0x7)
"""What may only change while EN is clear."""

CSTS_RDY = 0x01
CSTS_CFS = 0x02
CSTS_SHST = Bits(2, 2)
SHST_NORMAL, SHST_COMPLETE = 0, 2

AQA_ASQS = Bits(0, 12)
AQA_ACQS = Bits(16, 12)
ADMIN_QUEUE_LOW = U32_MAX & ~0xFFF
"""Low half of ASQ and ACQ: the address of an admin queue is a multiple of 4 KiB."""

CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x1C, 0x24, 0x28, 0x30

VERSION = 0x00010400
MAX_QUEUE_ENTRIES = 2048
MAX_PAGE_SHIFT = 16
"""64 KiB: CAP.MPSMAX counts from 4 KiB."""
MIN_PAGE_SHIFT = 12
CAP_VALUE = (
    CAP_MQES.at(MAX_QUEUE_ENTRIES - 1)
    | CAP_CQR.at(1)
    | CAP_TO.at(15)  # 7.5 s until ready, at most; in fact at once
    | CAP_DSTRD.at(0)
    | CAP_CSS.at(1)  # the NVM command set
    | CAP_MPSMIN.at(0)
    | CAP_MPSMAX.at(MAX_PAGE_SHIFT - MIN_PAGE_SHIFT)
)

REGISTERS: tuple[Register, ...] = (
    Register("CAP_LO", CAP, "3.1.1, Controller Capabilities", reset=CAP_VALUE & U32_MAX),
    Register("CAP_HI", CAP + 4, "3.1.1, Controller Capabilities", reset=CAP_VALUE >> 32),
    Register("VS", VS, "3.1.2, Version", reset=VERSION),
    Register("INTMS", INTMS, "3.1.3, Interrupt Mask Set"),
    Register("INTMC", INTMC, "3.1.4, Interrupt Mask Clear"),
    Register("CC", CC, "3.1.5, Controller Configuration", writable=0x00FFFFF1),
    Register("CSTS", CSTS, "3.1.6, Controller Status"),
    Register("AQA", AQA, "3.1.8, Admin Queue Attributes", writable=AQA_ASQS.at(U32_MAX) | AQA_ACQS.at(U32_MAX)),
    Register("ASQ_LO", ASQ, "3.1.9, Admin Submission Queue Base Address", writable=ADMIN_QUEUE_LOW),
    Register("ASQ_HI", ASQ + 4, "3.1.9, Admin Submission Queue Base Address", writable=U32_MAX),
    Register("ACQ_LO", ACQ, "3.1.10, Admin Completion Queue Base Address", writable=ADMIN_QUEUE_LOW),
    Register("ACQ_HI", ACQ + 4, "3.1.10, Admin Completion Queue Base Address", writable=U32_MAX),
)
"""What writing INTMS and INTMC does is the device's to say; both read as the mask."""

# -- queue entries (sections 4.2, "Submission Queue Entry", and 4.6, "Completion Queue Entry")

SQES, CQES = 6, 4
"""Logarithms of the sizes of entries, as CC.IOSQES and CC.IOCQES have them."""
SQE_SIZE, CQE_SIZE = 1 << SQES, 1 << CQES
SQE = struct.Struct("<BBHIQQQQIIIIII")
CQE = struct.Struct("<IIHHHH")
"""Result, reserved, SQ head, SQ identifier, command identifier, status with the phase in bit 0."""
assert (SQE.size, CQE.size) == (SQE_SIZE, CQE_SIZE)


class Command(NamedTuple):
    """A submission queue entry."""

    opcode: int
    flags: int
    """Fused operation and PRP or SGL; 0 is a command of its own with PRPs."""
    cid: int
    nsid: int
    cdw2_3: int
    mptr: int
    prp1: int
    prp2: int
    cdw10: int
    cdw11: int
    cdw12: int
    cdw13: int
    cdw14: int
    cdw15: int


BROADCAST_NSID = 0xFFFFFFFF


class AdminOpcode(IntEnum):
    """Chapter 5, "Admin Command Set"."""

    DELETE_SQ = 0x00
    CREATE_SQ = 0x01
    GET_LOG_PAGE = 0x02
    DELETE_CQ = 0x04
    CREATE_CQ = 0x05
    IDENTIFY = 0x06
    ABORT = 0x08
    SET_FEATURES = 0x09
    GET_FEATURES = 0x0A
    ASYNC_EVENT_REQUEST = 0x0C
    FORMAT_NVM = 0x80


class NvmOpcode(IntEnum):
    """Chapter 6, "NVM Command Set"."""

    FLUSH = 0x00
    WRITE = 0x01
    READ = 0x02
    COMPARE = 0x05
    WRITE_ZEROES = 0x08
    DATASET_MANAGEMENT = 0x09
    VERIFY = 0x0C


QUEUE_CONTIGUOUS = 0x1
QUEUE_IRQ_ENABLED = 0x2
"""Create I/O queue commands, dword 11."""
RW_FUA = 1 << 30
"""Dword 12 of Write and Write Zeroes: force unit access."""
DSM_DEALLOCATE = 1 << 2
DSM_RANGE = struct.Struct("<IIQ")
"""Attributes, blocks, first block."""


class Status(IntEnum):
    """Section 4.6.1, "Status Field Definition": status code type << 8 | status code."""

    SUCCESS = 0x000
    INVALID_OPCODE = 0x001
    INVALID_FIELD = 0x002
    DATA_TRANSFER_ERROR = 0x004
    INTERNAL_ERROR = 0x006
    ABORT_REQUESTED = 0x007
    INVALID_NAMESPACE = 0x00B
    COMMAND_SEQUENCE_ERROR = 0x00C
    INVALID_PRP_OFFSET = 0x013
    NAMESPACE_WRITE_PROTECTED = 0x020
    LBA_OUT_OF_RANGE = 0x080
    CAPACITY_EXCEEDED = 0x081
    INVALID_CQ = 0x100
    INVALID_QUEUE_ID = 0x101
    INVALID_QUEUE_SIZE = 0x102
    ASYNC_EVENT_LIMIT = 0x105
    INVALID_INTERRUPT_VECTOR = 0x108
    INVALID_LOG_PAGE = 0x109
    INVALID_FORMAT = 0x10A
    INVALID_QUEUE_DELETION = 0x10C
    FEATURE_NOT_SAVEABLE = 0x10D
    FEATURE_NOT_CHANGEABLE = 0x10E
    FEATURE_NOT_NAMESPACE_SPECIFIC = 0x10F
    WRITE_FAULT = 0x280
    UNRECOVERED_READ_ERROR = 0x281
    COMPARE_FAILURE = 0x285


STATUS_MORE = 0x2000
"""The error information log tells more of this failure."""
STATUS_DNR = 0x4000
"""The same command would fail again."""
TRANSIENT = frozenset(
    (
        Status.DATA_TRANSFER_ERROR,
        Status.INTERNAL_ERROR,
        Status.ABORT_REQUESTED,
        Status.WRITE_FAULT,
        Status.UNRECOVERED_READ_ERROR,
    )
)
"""What does not set :data:`STATUS_DNR`."""
