"""What arguments a command takes, as data, and the check of what was sent: QEMU's messages for what does not fit.

A type is a name of :data:`SCALARS`, or an :class:`Enum`, :class:`ListOf` or :class:`Struct`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocols.monitor.messages import CommandFailed

_UINT64_MAX: Final = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Enum:
    """One of some words."""

    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ListOf:
    """An array."""

    item: Type


@dataclass(frozen=True, slots=True)
class Arg:
    """A member; ``optional`` ones may be absent."""

    name: str
    type: Type
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with exactly these members; ``open`` ones take any other member too."""

    members: tuple[Arg, ...] = ()
    open: bool = False


Type = str | Enum | ListOf | Struct


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


SCALARS: Final[dict[str, Callable[[object], bool]]] = {
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "integer": _is_integer,
    "uint64": lambda value: isinstance(value, int) and _is_integer(value) and 0 <= value <= _UINT64_MAX,
    "any": lambda value: True,
}


def check(struct: Struct, arguments: dict[str, object]) -> dict[str, object]:
    """``arguments``, which fit ``struct``.

    :raise CommandFailed: when they do not: what is missing, of another type or unexpected.
    """
    _check_struct(struct, arguments, "")
    return arguments


def _check_struct(struct: Struct, value: dict[str, object], path: str) -> None:
    prefix = f"{path}." if path else ""
    for member in struct.members:
        if member.name in value:
            _check(member.type, value[member.name], prefix + member.name, member.name)
        elif not member.optional:
            raise CommandFailed(f"Parameter '{prefix}{member.name}' is missing")
    known = {member.name for member in struct.members}
    for name in value:
        if name not in known and not struct.open:
            raise CommandFailed(f"Parameter '{prefix}{name}' is unexpected")


def _check(kind: Type, value: object, path: str, name: str) -> None:
    if isinstance(kind, Struct):
        if not isinstance(value, dict):
            raise _mistyped(path, "object")
        _check_struct(kind, value, path)
    elif isinstance(kind, ListOf):
        if not isinstance(value, list):
            raise _mistyped(path, "array")
        for index, item in enumerate(value):
            _check(kind.item, item, f"{path}[{index}]", "null")
    elif isinstance(kind, Enum):
        if not isinstance(value, str):
            raise _mistyped(path, "string")
        if value not in kind.words:
            raise CommandFailed(f"Parameter '{name}' does not accept value '{value}'")
    elif not SCALARS[kind](value):
        raise CommandFailed(f"Parameter '{name}' expects uint64") if kind == "uint64" else _mistyped(path, kind)


def _mistyped(path: str, expected: str) -> CommandFailed:
    return CommandFailed(f"Invalid parameter type for '{path}', expected: {expected}")
