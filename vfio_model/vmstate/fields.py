"""Descriptions of migrated state, and their bytes.

A description is data: the fields in their order on the wire, each with the version of the section that brought it, and
subsections, which follow the fields and are sent only when needed. State is a plain dict by field name, so that a
whole stream can be read and judged before any object changes.

On the wire numbers are big-endian, a subsection is a mark, its name, its version and its fields. An array's count is a
field of its own that comes before it; the reader makes room for that many elements only once it has seen that they are
there.

Names, versions and the order of fields follow QEMU's ``VMStateDescription`` of the same object; frames are this
project's own.
"""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from vfio_model.errors import VMStateError

State = dict[str, Any]
"""Values by field name: int, bool, bytes (arrays of U8), a ``Q`` memoryview (of U64), a list, or a nested state."""

SUBSECTION = 0x05
_U32 = struct.Struct(">I")


class Type(Enum):
    """What one element is: its width in bytes."""

    U8 = 1
    U16 = 2
    U32 = 4
    U64 = 8
    BOOL = -1

    @property
    def width(self) -> int:
        """Bytes on the wire."""
        return abs(self.value)


@dataclass(frozen=True, slots=True)
class Field:
    """One field. ``array`` is a fixed number of elements or the name of the earlier field that counts them.

    ``equal``: both sides must have the same value; it is not loaded. ``struct``: elements are described by that.
    ``since``: the section version that brought it. A field without a name is room that is no longer used.
    """

    name: str
    type: Type = Type.U32
    array: int | str | None = None
    struct: VMStateDescription | None = None
    since: int = 1
    equal: bool = False


@dataclass(frozen=True, slots=True)
class VMStateDescription:
    """A section or a subsection. Streams from ``minimum_version`` to ``version`` can be read.

    ``needed``: for a subsection, whether this state is worth sending it.
    """

    name: str
    version: int
    fields: tuple[Field, ...]
    minimum_version: int = 1
    subsections: tuple[VMStateDescription, ...] = ()
    needed: Callable[[Mapping[str, Any]], bool] = lambda _state: True


def unused(size: int) -> Field:
    """``size`` bytes that once were a field: sent as zero, skipped when read."""
    return Field("", Type.U8, array=size)


# -- writing ---------------------------------------------------------------------------------------------------------


def encode(description: VMStateDescription, state: Mapping[str, Any], *, version: int | None = None) -> bytes:
    """The bytes of a section with ``state``, as of ``version`` (the present one when None).

    :raise VMStateError: ``state`` lacks a field, or has a value that the field cannot hold.
    """
    out = bytearray()
    _encode(description, state, version or description.version, out)
    return bytes(out)


def _encode(description: VMStateDescription, state: Mapping[str, Any], version: int, out: bytearray) -> None:
    for field in description.fields:
        if field.since <= version:
            _put(field, state, out, description.name)
    for subsection in description.subsections:
        if subsection.needed(state):
            name = subsection.name.encode()
            out += bytes((SUBSECTION, len(name))) + name + _U32.pack(subsection.version)
            _encode(subsection, state, subsection.version, out)


def _put(field: Field, state: Mapping[str, Any], out: bytearray, where: str) -> None:
    if not field.name:
        assert isinstance(field.array, int), "unused room has a size"
        out += bytes(field.array)
        return
    if field.name not in state:
        raise VMStateError(f"the state has no {field.name!r}", where=where)
    value = state[field.name]
    if field.array is None:
        _put_one(field, value, out, where)
        return
    count = field.array if isinstance(field.array, int) else state[field.array]
    if not hasattr(value, "__len__") or len(value) != count:
        raise VMStateError(f"{field.name!r} is {value!r:.60}, not {count} elements", where=where)
    if field.struct is None and field.type is Type.U8:
        out += value
    elif field.struct is None and field.type is Type.U64:
        out += _swapped(array("Q", bytes(value) if isinstance(value, memoryview) else value)).tobytes()
    else:
        for element in value:
            _put_one(field, element, out, where)


def _put_one(field: Field, value: Any, out: bytearray, where: str) -> None:
    if field.struct is not None:
        _encode(field.struct, value, field.struct.version, out)
        return
    try:
        out += int(value).to_bytes(field.type.width, "big")
    except (TypeError, ValueError, OverflowError) as error:
        raise VMStateError(f"{field.name!r} is {value!r:.60}, not a {field.type.name}", where=where) from error


def _swapped(words: array[int]) -> array[int]:
    if sys.byteorder == "little":
        words.byteswap()
    return words


# -- reading ---------------------------------------------------------------------------------------------------------


class _Reader:
    """The bytes of one section; errors name it and where in it."""

    def __init__(self, data: bytes | memoryview, where: str) -> None:
        self._data, self.where, self.at = memoryview(data), where, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.at

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise self.error(f"{what} needs {size} bytes, {self.left} are left")
        self.at += size
        return self._data[self.at - size : self.at]

    def number(self, width: int, what: str) -> int:
        return int.from_bytes(self.take(width, what), "big")

    def error(self, what: str) -> VMStateError:
        return VMStateError(what, where=f"{self.where}, byte {self.at}")


def decode(
    description: VMStateDescription, version: int, data: bytes | memoryview, expected: Mapping[str, Any], *, where: str
) -> State:
    """The state in a section's bytes. ``expected`` is the receiver's own state, for fields that must be equal.

    A field newer than ``version``, and those of a subsection that was not sent, are missing from the result.

    :raise VMStateError: a version that cannot be read, too few or too many bytes, a subsection that is not known, a
        field that must be equal and is not. ``where`` names the section in it.
    """
    reader = _Reader(data, where)
    _check_version(description, version, reader)
    state: State = {}
    _decode(description, version, reader, state, expected)
    if reader.left:
        raise reader.error(f"{reader.left} bytes behind the last field")
    return state


def _check_version(description: VMStateDescription, version: int, reader: _Reader) -> None:
    if not description.minimum_version <= version <= description.version:
        known = f"{description.minimum_version} to {description.version}"
        raise reader.error(f"{description.name} has version {version}; {known} can be read")


def _decode(
    description: VMStateDescription, version: int, reader: _Reader, state: State, expected: Mapping[str, Any]
) -> None:
    for field in description.fields:
        if field.since <= version:
            _get(field, reader, state, expected)
    seen: set[str] = set()
    while description.subsections and reader.left:
        subsection = _subsection(description, reader)
        if subsection.name in seen:
            raise reader.error(f"subsection {subsection.name} comes twice")
        seen.add(subsection.name)
        number = reader.number(4, "a version")
        _check_version(subsection, number, reader)
        _decode(subsection, number, reader, state, expected)


def _subsection(description: VMStateDescription, reader: _Reader) -> VMStateDescription:
    mark = reader.number(1, "a subsection")
    if mark != SUBSECTION:
        raise reader.error(f"{mark:#x} where a subsection of {description.name} could begin")
    name = bytes(reader.take(reader.number(1, "a name's length"), "a name")).decode("ascii", "backslashreplace")
    for subsection in description.subsections:
        if subsection.name == name:
            return subsection
    raise reader.error(f"{description.name} has no subsection {name!r}")


def _get(field: Field, reader: _Reader, state: State, expected: Mapping[str, Any]) -> None:
    if not field.name:
        assert isinstance(field.array, int), "unused room has a size"
        reader.take(field.array, "unused room")
        return
    mine = expected.get(field.name)
    if field.array is None:
        value = _get_one(field, reader, mine)
    else:
        count = field.array if isinstance(field.array, int) else state[field.array]
        value = _get_array(field, reader, count, mine)
    if field.equal and value != mine:
        raise reader.error(f"{field.name} is {_shown(value)} in the stream and {_shown(mine)} here")
    state[field.name] = value


def _get_array(field: Field, reader: _Reader, count: int, mine: Any) -> Any:
    if field.struct is None and field.type is Type.U8:
        return bytes(reader.take(count, field.name))
    if field.struct is None and field.type is Type.U64:
        words = array("Q", bytes(reader.take(count * 8, field.name)))
        return memoryview(_swapped(words))
    return [_get_one(field, reader, None) for _ in range(count)]


def _get_one(field: Field, reader: _Reader, mine: Any) -> Any:
    if field.struct is not None:
        nested: State = {}
        _decode(field.struct, field.struct.version, reader, nested, mine or {})
        return nested
    value = reader.number(field.type.width, field.name)
    if field.type is Type.BOOL:
        if value > 1:
            raise reader.error(f"{field.name} is {value:#x}, which is no truth value")
        return bool(value)
    return value


def _shown(value: object) -> str:
    return f"{value:#x}" if isinstance(value, int) and not isinstance(value, bool) else repr(value)
