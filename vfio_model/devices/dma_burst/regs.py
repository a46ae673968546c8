"""dma_burst: what its registers are. This device is this project's own; there is no hardware and no other model of it.

It issues DMA as fast as its process can: one register write runs any number of equal accesses, at addresses that step
by a stride or come from a list in memory, one by one or in batches, to the end or in slices while other work goes on.
It is there to measure the DMA paths and to be in the middle of a DMA when a mapping goes away.

BAR 0 is 4 KiB of 8-byte little-endian registers; accesses are 8 bytes, or 4 bytes to the low or the high half.
"""

from __future__ import annotations

from typing import NamedTuple

VENDOR_ID = 0x1234
DEVICE_ID = 0x0B57
BAR_SIZE = 0x1000


class Register(NamedTuple):
    """One 8-byte register: where, how it may be accessed, what it does."""

    name: str
    offset: int
    access: str
    doc: str


IDENTIFICATION = 0x00
IOVA = 0x08
LENGTH = 0x10
COUNT = 0x18
STRIDE = 0x20
SPAN = 0x28
LIST = 0x30
PATTERN = 0x38
COMMAND = 0x40
STATUS = 0x48
COMPLETED = 0x50
FAILED = 0x58
FIRST_FAILED = 0x60
LAST_RESULT = 0x68
DATA = 0x70

REGISTERS: tuple[Register, ...] = (
    Register("identification", IDENTIFICATION, "RO", "0x0b570001: device id, version"),
    Register("iova", IOVA, "RW", "address of the first access"),
    Register("length", LENGTH, "RW", "bytes of each access, 1 to 1 MiB"),
    Register("count", COUNT, "RW", "number of accesses"),
    Register("stride", STRIDE, "RW", "added to the address after each access, modulo 2**64"),
    Register("span", SPAN, "RW", "the address starts over after so many accesses; 0: never"),
    Register("list", LIST, "RW", "address of a table of `count` 64-bit little-endian addresses, for command LIST"),
    Register("pattern", PATTERN, "RW", "what is written, repeated; may change during a background run"),
    Register("command", COMMAND, "WO", "starts or stops a run"),
    Register("status", STATUS, "W1C", "how the run stands; writing DONE acknowledges the interrupt"),
    Register("completed", COMPLETED, "RO", "accesses of this run that succeeded"),
    Register("failed", FAILED, "RO", "accesses (batches, for command BATCH) that did not"),
    Register("first_failed", FIRST_FAILED, "RO", "address of the first that did not; all ones when none"),
    Register("last_result", LAST_RESULT, "RO", "MemTxResult of the last access"),
    Register("data", DATA, "RO", "first 8 bytes of the last read, little-endian"),
)
BY_OFFSET = {register.offset: register for register in REGISTERS}

IDENTIFICATION_VALUE = 0x0B570001

COMMAND_START = 0x01
COMMAND_WRITE = 0x02
"""To memory; clear, from memory."""
COMMAND_LIST = 0x04
"""Addresses come from the table at LIST, read by DMA at the start; IOVA, STRIDE and SPAN do not count."""
COMMAND_BATCH = 0x08
"""Accesses are handed over many at a time (``read_many``, ``write_many``)."""
COMMAND_BACKGROUND = 0x10
"""Run in slices when the process has nothing else to do; without it the run ends before the register write does."""
COMMAND_FOREVER = 0x20
"""Begin again at the end, until stopped; only with BACKGROUND."""
COMMAND_STOP_ON_FAILURE = 0x40
COMMAND_IRQ = 0x80
"""Interrupt when the run is over."""
COMMAND_STOP = 0x100
"""Stop the run in progress; it ends as one that is over."""

STATUS_RUNNING = 0x1
STATUS_DONE = 0x2
STATUS_FAILURES = 0x4
STATUS_REFUSED = 0x8
"""The command did not fit the registers, or a run was in progress; nothing was started."""

MAX_LENGTH = 1 << 20
MAX_COUNT = 1 << 22
"""Accesses of one foreground run: the guest must not be able to stall the device's process for long."""
MAX_LIST = 1 << 20
NO_FAILURE = (1 << 64) - 1
