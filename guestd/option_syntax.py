"""The syntax of QEMU's command line: ``key=value,key=value`` with doubled commas, numbers, sizes and switches.

Messages are QEMU's, without the option that they are about.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Final

from vfio_model.errors import ConfigError
from vfio_model.ranges import U64_MAX

_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9\-._]*")
_SIZE: Final = re.compile(r"(0x[0-9a-f]+|[0-9]+(?:\.[0-9]+)?)([bkmgtpe]?)", re.IGNORECASE)
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|[0-9]+", re.IGNORECASE)
_SHIFTS: Final = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SWITCH: Final = {"on": True, "yes": True, "true": True, "y": True, "off": False, "no": False, "false": False}
_SWITCH["n"] = False


def split(text: str, implied: str = "") -> dict[str, str]:
    """``text`` as an ordered mapping; ``,,`` stands for a comma. The first piece may be a value alone, of the key
    ``implied``; any other piece without a value is a switch that is on. The last of equal keys holds.
    """
    found: dict[str, str] = {}
    for place, piece in enumerate(_pieces(text)):
        key, equals, value = piece.partition("=")
        if equals:
            found[key] = value
        elif place == 0 and implied:
            found[implied] = piece
        elif piece:
            found[key] = "on"
    return found


def _pieces(text: str) -> list[str]:
    return [piece.replace("\0", ",") for piece in text.replace("\0", "").replace(",,", "\0").split(",")]


def options(text: str, implied: str) -> dict[str, object]:
    """:func:`split`, or a JSON object where ``text`` begins like one.

    :raise ConfigError: when it is none.
    """
    if not text.startswith("{"):
        return dict(split(text, implied))
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"JSON parse error, {error}") from error
    assert isinstance(value, dict), "it begins with a brace"
    return value


def size(name: str, value: object, *, shift: int = 0) -> int:
    """Bytes: a number with a suffix; ``shift`` is what no suffix means (20 for mebibytes).

    :raise ConfigError: for anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= U64_MAX:
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        suffix = match[2].lower()
        factor = 1 << (_SHIFTS[suffix] if suffix else shift)
        found = int(match[1], 16) * factor if match[1][:2].lower() == "0x" else _decimal(match[1], factor)
        if found <= U64_MAX:
            return found
    what = f"Parameter '{name}' expects a non-negative number below 2^64"
    raise ConfigError(f"{what}\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta- and exa-")


def _decimal(text: str, factor: int) -> int:
    whole, _, fraction = text.partition(".")
    return int(whole) * factor + (int(fraction) * factor // 10 ** len(fraction) if fraction else 0)


def number(name: str, value: object, *, kind: str = "integer") -> int:
    """An unsigned number of 64 bits, decimal or hexadecimal.

    :raise ConfigError: for anything else.
    """
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        value = int(value, 16) if value[:2].lower() == "0x" else int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= U64_MAX:
        return value
    raise ConfigError(f"Parameter '{name}' expects {kind}")


def switch(name: str, value: object) -> bool:
    """``on`` or ``off``.

    :raise ConfigError: for anything else.
    """
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value in _SWITCH:
        return _SWITCH[value]
    raise ConfigError(f"Parameter '{name}' expects 'on' or 'off'")


def is_identifier(value: str) -> bool:
    """Whether ``value`` can be an ``id``."""
    return _ID.fullmatch(value) is not None


def identifier(value: object) -> str:
    """An ``id``.

    :raise ConfigError: when it cannot be one.
    """
    if isinstance(value, str) and is_identifier(value):
        return value
    what = "Parameter 'id' expects an identifier"
    raise ConfigError(f"{what}\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter.")


def only(given: Mapping[str, object], known: Collection[str]) -> None:
    """:raise ConfigError: when something is ``given`` that is not ``known``."""
    for name in given:
        if name not in known:
            raise ConfigError(f"Invalid parameter '{name}'")
