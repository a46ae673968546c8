"""iommu-testdev, QEMU's device for testing IOMMUs without a guest: what its registers are
(QEMU ``docs/specs/iommu-testdev.rst``, "iommu-testdev — IOMMU test device for bare-metal testing").

BAR 0 is 4 KiB of 4-byte little-endian registers; addresses are two registers each, the low half first.
"""

from __future__ import annotations

from typing import NamedTuple

VENDOR_ID = 0x1B36
DEVICE_ID = 0x0005
BAR_SIZE = 0x1000


class Register(NamedTuple):
    """One 4-byte register: where, how it may be accessed, what it does."""

    name: str
    offset: int
    access: str
    doc: str


TRIGGER = 0x00
IOVA_LO = 0x04
IOVA_HI = 0x08
LENGTH = 0x0C
RESULT = 0x10
DOORBELL = 0x14
ATTRIBUTES = 0x18
GPA_LO = 0x1C
GPA_HI = 0x20

REGISTERS: tuple[Register, ...] = (
    Register("trigger", TRIGGER, "RO", "reading runs the armed DMA; reads 0"),
    Register("iova_lo", IOVA_LO, "RW", "where to write through the IOMMU"),
    Register("iova_hi", IOVA_HI, "RW", ""),
    Register("length", LENGTH, "RW", "bytes"),
    Register("result", RESULT, "RW", "how it went"),
    Register("doorbell", DOORBELL, "WO", "bit 0 arms, else disarms"),
    Register("attributes", ATTRIBUTES, "RW", "bit 0 secure, bits 2:1 Arm security space, bit 3 space valid"),
    Register("gpa_lo", GPA_LO, "RW", "where to read it back, behind the IOMMU"),
    Register("gpa_hi", GPA_HI, "RW", ""),
)
BY_OFFSET = {register.offset: register for register in REGISTERS}

PATTERN = 0x12345678
"""What is written, as little-endian words."""

RESULT_OK = 0
RESULT_IDLE = 0xFFFFFFFF
RESULT_ARMED = 0xFFFFFFFE
RESULT_BAD_LENGTH = 0xDEAD0001
RESULT_DMA_FAILED = 0xDEAD0002
RESULT_READ_FAILED = 0xDEAD0003
RESULT_MISMATCH = 0xDEAD0004
RESULT_NOT_ARMED = 0xDEAD0005
RESULT_BAD_ATTRIBUTES = 0xDEAD0006

DOORBELL_ARM = 1

ATTRIBUTES_SECURE = 0x1
ATTRIBUTES_SPACE_SHIFT = 1
ATTRIBUTES_SPACE_MASK = 0x3
ATTRIBUTES_SPACE_VALID = 0x8
SPACE_SECURE = 0
SPACE_NONSECURE = 1
ATTRIBUTES_RESET = SPACE_NONSECURE << ATTRIBUTES_SPACE_SHIFT
