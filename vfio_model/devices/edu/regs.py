"""edu, QEMU's teaching device: what its registers are (QEMU ``docs/specs/edu.rst``, "EDU device").

BAR 0 is 1 MiB of registers of the machine's own byte order; 4-byte accesses below 0x80, 4 or 8 bytes above. The
device owns a buffer of 4096 bytes at device address 0x40000 that DMA moves to and from.
"""

from __future__ import annotations

from typing import NamedTuple

VENDOR_ID = 0x1234
DEVICE_ID = 0x11E8
REVISION = 0x10
CLASS_ID = 0x00FF
BAR_SIZE = 1 << 20

IDENTIFICATION_VALUE = 0x010000ED
"""Major version, minor version, 0x00ed."""


class Register(NamedTuple):
    """One register: where, the sizes in bytes that are allowed, how it may be accessed, what it does."""

    name: str
    offset: int
    sizes: tuple[int, ...]
    access: str
    doc: str


IDENTIFICATION = 0x00
INVERSION = 0x04
FACTORIAL = 0x08
STATUS = 0x20
IRQ_STATUS = 0x24
IRQ_RAISE = 0x60
IRQ_ACK = 0x64
DMA_SRC = 0x80
DMA_DST = 0x88
DMA_COUNT = 0x90
DMA_COMMAND = 0x98
WIDE_FROM = 0x80
"""From here on 8-byte accesses are allowed too; a 4-byte write sets the whole register, zero-extended."""

_NARROW, _WIDE = (4,), (4, 8)
REGISTERS: tuple[Register, ...] = (
    Register("identification", IDENTIFICATION, _NARROW, "RO", "0x010000ed"),
    Register("inversion", INVERSION, _NARROW, "RW", "liveness check: reads back inverted"),
    Register("factorial", FACTORIAL, _NARROW, "RW", "write n, read n! modulo 2**32 when not computing"),
    Register("status", STATUS, _NARROW, "RW", "bit 0 computing (RO), bit 7 interrupt after the factorial"),
    Register("irq_status", IRQ_STATUS, _NARROW, "RO", "causes that are pending"),
    Register("irq_raise", IRQ_RAISE, _NARROW, "WO", "add causes and interrupt"),
    Register("irq_ack", IRQ_ACK, _NARROW, "WO", "clear causes"),
    Register("dma_src", DMA_SRC, _WIDE, "RW", "where to copy from"),
    Register("dma_dst", DMA_DST, _WIDE, "RW", "where to copy to"),
    Register("dma_count", DMA_COUNT, _WIDE, "RW", "bytes"),
    Register("dma_command", DMA_COMMAND, _WIDE, "RW", "bit 0 start, bit 1 direction, bit 2 interrupt when done"),
)
BY_OFFSET = {register.offset: register for register in REGISTERS}

STATUS_COMPUTING = 0x01
STATUS_IRQ_FACTORIAL = 0x80

IRQ_CAUSE_FACTORIAL = 0x001
IRQ_CAUSE_DMA = 0x100

DMA_RUN = 0x1
DMA_TO_RAM = 0x2
"""Direction: set, the buffer goes to RAM; clear, RAM goes to the buffer."""
DMA_IRQ = 0x4

BUFFER_ADDRESS = 0x40000
BUFFER_SIZE = 4096
DMA_DELAY_MS = 100
"""A transfer moves its data this long after the start, counted from the millisecond that was running then."""

DMA_MASK_DEFAULT = (1 << 28) - 1
