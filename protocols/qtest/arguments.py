"""How the words of a qtest command are read: as C's ``strtoull`` reads numbers, and as QEMU reads hexadecimal and
base64 data, which is as far as they go.
"""

from __future__ import annotations

import base64
import re

from vfio_model.errors import VfioModelError

U64: int = (1 << 64) - 1
MAX_WRITE = 64 << 20
"""Bytes that one command may bring along."""
MAX_READ = 1 << 30
"""Bytes that one may ask for."""
MAX_SET = 1 << 36
"""Bytes that one may set to a value."""
_NUMBER = re.compile(r"[ \t\r\f\v]*([+-]?)(0[xX][0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)")
_NOT_BASE64 = re.compile(r"[^A-Za-z0-9+/]")
_HEX = re.compile(r"[0-9a-fA-F]*")
_SHORTEST_DATA = 3


class CommandFailed(VfioModelError):
    """A command could not be carried out; ``reply`` is the whole answer, ``FAIL`` or ``ERR`` in front."""

    def __init__(self, reply: str) -> None:
        self.reply = reply
        super().__init__(reply)


def unsigned(word: str) -> int:
    """A number below 2**64; a minus sign negates modulo 2**64.

    :raise CommandFailed: for anything else.
    """
    match = _NUMBER.fullmatch(word)
    if match is None:
        raise CommandFailed(f"FAIL not a number: '{word[:40]}'")
    digits = match[2]
    base = 16 if digits[1:2] in ("x", "X") else 8 if digits[0] == "0" else 10
    value = int(digits, base) if len(digits) < 32 else U64 + 1
    if value > U64:
        raise CommandFailed(f"FAIL out of range: '{word[:40]}'")
    return -value & U64 if match[1] == "-" else value


def signed(word: str) -> int:
    """A number of 64 bits with its sign.

    :raise CommandFailed: see :func:`unsigned`; also below -2**63 or above 2**63 - 1.
    """
    value = unsigned(word)
    if word.lstrip().startswith("-"):
        value = value - (1 << 64) if value else 0
    if not -(1 << 63) <= value < 1 << 63:
        raise CommandFailed(f"FAIL out of range: '{word[:40]}'")
    return value


def length(word: str, most: int, *, least: int = 0) -> int:
    """A number of bytes.

    :raise CommandFailed: when it is less than ``least`` or more than ``most``.
    """
    size = unsigned(word)
    if not least <= size <= most:
        raise CommandFailed(f"FAIL length {size}: {least} to {most} bytes can be transferred")
    return size


def hex_data(word: str, size: int) -> bytes:
    """``0x…`` as ``size`` bytes: zeros where it is too short. What is no digit counts as -1, the first two characters
    as nothing.

    :raise CommandFailed: when there is no data at all.
    """
    _check_data(word)
    digits = word[2 : 2 + size * 2]
    digits = digits[: len(digits) & ~1]
    if _HEX.fullmatch(digits):
        return bytes.fromhex(digits).ljust(size, b"\0")
    pairs = zip(digits[::2], digits[1::2], strict=True)
    return bytes((_nibble(high) << 4 | _nibble(low)) & 0xFF for high, low in pairs).ljust(size, b"\0")


def _nibble(digit: str) -> int:
    return int(digit, 16) if _HEX.fullmatch(digit) else -1


def base64_data(word: str, size: int) -> bytes:
    """At most ``size`` bytes of base64; characters that are not of its alphabet are skipped.

    :raise CommandFailed: when there is no data at all.
    """
    _check_data(word)
    symbols = _NOT_BASE64.sub("", word)
    symbols = symbols[: len(symbols) - (len(symbols) % 4 == 1)]
    return base64.b64decode(symbols + "=" * (-len(symbols) % 4))[:size]


def _check_data(word: str) -> None:
    if len(word) < _SHORTEST_DATA:
        raise CommandFailed("ERR invalid argument size")
