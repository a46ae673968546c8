"""What a vfio-user message carries after its header: a fixed structure and, for some, a tail of bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar, Self, TypeVar

import msgspec
from msgspec import Struct

from vfio_model.errors import LocalProtocolError, RemoteProtocolError


class Payload(Struct, frozen=True):
    """Base of payloads; see :func:`layout`."""

    FORMAT: ClassVar[struct.Struct] = struct.Struct("=")
    SIZE: ClassVar[int] = 0
    TAIL: ClassVar[bool] = False
    """Whether the last field is a tail of bytes after the fixed structure."""

    def pack(self) -> bytes:
        """As on the wire.

        :raise LocalProtocolError: when a value does not fit its field.
        """
        values = msgspec.structs.astuple(self)
        try:
            if self.TAIL:
                return self.FORMAT.pack(*values[:-1]) + bytes(values[-1])
            return self.FORMAT.pack(*values)
        except struct.error as error:
            raise LocalProtocolError(f"{type(self).__name__}: {error}") from error

    @classmethod
    def unpack(cls, body: bytes) -> Self:
        """From a whole body.

        :raise RemoteProtocolError: when the body has not the size of this payload.
        """
        if len(body) < cls.SIZE or (len(body) > cls.SIZE and not cls.TAIL):
            raise RemoteProtocolError(f"{cls.__name__} of {len(body)} bytes, not {cls.SIZE}")
        values = cls.FORMAT.unpack_from(body)
        return cls(*values, body[cls.SIZE :]) if cls.TAIL else cls(*values)


P = TypeVar("P", bound=Payload)


def layout(fields: str, size: int, *, tail: bool = False) -> Callable[[type[P]], type[P]]:
    """Declare a payload's fixed structure by :mod:`struct` codes; it must have ``size`` bytes and fit the class's
    fields."""

    def declare(cls: type[P]) -> type[P]:
        form = struct.Struct("=" + fields)
        named = len(cls.__struct_fields__) - (1 if tail else 0)
        assert form.size == size, f"{cls.__name__} has {form.size} bytes, not {size}"
        assert len(form.unpack(bytes(size))) == named, f"{cls.__name__} has {named} fields"
        cls.FORMAT, cls.SIZE, cls.TAIL = form, size, tail
        return cls

    return declare
