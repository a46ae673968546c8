"""Quantities that people write in scenario files: sizes, addresses and seconds.

A size or an address is an integer, or a string with a binary suffix (``64K``, ``16MiB``, ``1G``); 0x is allowed. The
YAML loader gives strings for everything that is not plainly an integer, so that a PCI address such as ``02.0`` stays
what was written.
"""

from __future__ import annotations

import re

_SUFFIXES = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}
_SIZE = re.compile(r"(0[xX][0-9a-fA-F]+|[0-9]+)\s*([KMGTPE]?)(?:i?B)?")


class Size(int):
    """Bytes, or an address in bytes: 0 to 2**64 - 1."""


class Limit(int):
    """Bytes, or ``unlimited``: 2**64 - 1, which is RLIM_INFINITY."""


UNLIMITED = Limit((1 << 64) - 1)


class Seconds(float):
    """A time in seconds, at least 0."""


def parse_size(value: object) -> Size:
    """:raise ValueError: when ``value`` is neither an integer nor a size such as ``64K``, or does not fit 64 bits."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"Expected int or a size such as 64K, got {type(value).__name__}")
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError(f"Expected int or a size such as 64K, got str {value!r}")
        number, suffix = match.groups()
        value = int(number, 0 if number[:2] in ("0x", "0X") else 10) << _SUFFIXES[suffix]
    if not 0 <= value < 1 << 64:
        raise ValueError(f"Expected a size of 0 to 2**64 - 1, got {value}")
    return Size(value)


def parse_seconds(value: object) -> Seconds:
    """:raise ValueError: when ``value`` is not a number of seconds, at least 0."""
    try:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        seconds = float(value)
    except ValueError:
        raise ValueError(f"Expected a number of seconds, got {value!r}") from None
    if not 0 <= seconds < 1e9:
        raise ValueError(f"Expected seconds of 0 or more, got {value!r}")
    return Seconds(seconds)


def show_size(size: int) -> str:
    """``size`` bytes as a person reads them: ``16 MiB``, ``1025.1 MiB``, ``12 B``."""
    for suffix in "EPTGMK":
        shift = _SUFFIXES[suffix]
        if 0 < size >> shift < 10_000 and size % (1 << shift) == 0:
            return f"{size >> shift} {suffix}iB"
    for suffix in "TGMK":
        if size >> _SUFFIXES[suffix] >= 10:
            return f"{size / (1 << _SUFFIXES[suffix]):.1f} {suffix}iB"
    return f"{size} B"


def dec_hook(kind: type, value: object) -> object:
    """msgspec's decoder hook for the types above."""
    if kind is Size:
        return parse_size(value)
    if kind is Limit:
        return UNLIMITED if value == "unlimited" else Limit(parse_size(value))
    if kind is Seconds:
        return parse_seconds(value)
    raise NotImplementedError(kind)


def enc_hook(value: object) -> object:
    """msgspec's encoder hook for the types above."""
    if isinstance(value, Size | Limit):
        return int(value)
    if isinstance(value, Seconds):
        return float(value)
    raise NotImplementedError(type(value))
