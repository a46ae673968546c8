"""svm, a demonstration device for shared virtual memory: what its registers are, and what it computes.

BAR 0 is 1 MiB. A register below :data:`PASID` takes writes of 8 bytes, from there on of 4; others are ignored. Reads
have 8 bytes; what cannot be read, and any other size, is all ones.
"""

from __future__ import annotations

from typing import Final, NamedTuple

VENDOR_ID = 0x1234
DEVICE_ID = 0x0B11
REVISION = 0x10
BAR_SIZE = 1 << 20
IDENTIFICATION_VALUE = 0x0B1C_5111

EXPRESS_CAPABILITY = 0x80
"""Where it lies."""
MAX_PAGE_REQUESTS = 2048
"""Of the page request capability: outstanding at a time."""
PASID_WIDTH = 20


class Register(NamedTuple):
    """One register: where, the bytes of a write, what it does."""

    name: str
    offset: int
    size: int
    doc: str


COMMAND = 0x00
ADDRESS = 0x08
EXPECTED_CRC = 0x10
SIZE = 0x18
OPTIONS = 0x20
PASID = 0x50

REGISTERS: Final = (
    Register("command", COMMAND, 8, "W: 1 starts a write to memory, 2 a read from it; R: the identification"),
    Register("address", ADDRESS, 8, "W: virtual address of the buffer; R: status of the last command"),
    Register("expected_crc", EXPECTED_CRC, 8, "W: the CRC that a read is to find"),
    Register("size", SIZE, 8, "W: bytes of the buffer"),
    Register("options", OPTIONS, 8, "W: OPTION_PRIVILEGED"),
    Register("pasid", PASID, 4, "W: the address space; PASID_DISABLE for none"),
)
PARAMETERS: Final = (ADDRESS, EXPECTED_CRC, SIZE, OPTIONS)
"""Registers that keep what is written."""

COMMAND_WRITE, COMMAND_READ = 1, 2
OPTION_PRIVILEGED = 1
PASID_DISABLE = 1 << PASID_WIDTH
STATUS_OK, STATUS_ERROR = 0, 1

PATTERN_PERIOD: Final = 251
"""What is written counts from 0 and starts again here."""
CRC_START: Final = 0xFF
_CRC_POLYNOMIAL: Final = 0xAB
"""Least significant bit first."""


_PERIODS: Final = bytes(range(PATTERN_PERIOD)) * 2048


def pattern(size: int, first: int = 0) -> bytes:
    """``size`` bytes of what the device writes, from its byte ``first`` on."""
    phase = first % PATTERN_PERIOD
    periods = _PERIODS
    if phase + size > len(periods):
        periods = bytes(range(PATTERN_PERIOD)) * (size // PATTERN_PERIOD + 2)
    return periods[phase : phase + size]


def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CRC_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return tuple(table)


_CRC_TABLE: Final = _crc_table()


def crc8(data: bytes | memoryview, crc: int = CRC_START) -> int:
    """The CRC of ``data``; ``crc`` is that of what came before it."""
    for byte in data:
        crc = _CRC_TABLE[crc ^ byte]
    return crc
