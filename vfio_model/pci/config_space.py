"""Configuration space as a declared set of masked fields.

A function's 256 bytes, or the 4096 of a PCI Express function, are built from :class:`Field` records: offset, width,
reset value, the bits that a guest may write and those that it clears by writing 1. Reading, writing, reset and the
register's name in a message all come from the record. The type 0 header is PCI Local Bus Specification 3.0, chapter
6.1, "Configuration Space Organization"; extended capabilities are PCI Express Base Specification, 7.6, "PCI Express
Extended Capabilities".

Accesses are 1, 2 or 4 bytes inside one dword, little-endian. What is not implemented reads zero and ignores writes. An
access that leaves the space or crosses a dword reads all ones and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

CONFIG_SIZE = 256
EXTENDED_CONFIG_SIZE = 4096
"""Of a PCI Express function."""
CAPABILITY_POINTER = 0x34
FIRST_CAPABILITY = 0x40
FIRST_EXTENDED = 0x100
EXTENDED_HEADER = 4
"""Bytes of an extended capability's header: id 15:0, version 19:16, next 31:20."""
EXTENDED_NEXT_SHIFT = 20

VENDOR_ID = 0x00
DEVICE_ID = 0x02
COMMAND = 0x04
STATUS = 0x06
REVISION_ID = 0x08
CLASS_PROG = 0x09
CLASS_DEVICE = 0x0A
HEADER_TYPE = 0x0E
SUBSYSTEM_VENDOR_ID = 0x2C
SUBSYSTEM_ID = 0x2E
INTERRUPT_LINE = 0x3C
INTERRUPT_PIN = 0x3D

COMMAND_IO = 0x001
COMMAND_MEMORY = 0x002
COMMAND_MASTER = 0x004
COMMAND_SERR = 0x100
COMMAND_INTX_DISABLE = 0x400
COMMAND_WRITABLE = COMMAND_IO | COMMAND_MEMORY | COMMAND_MASTER | COMMAND_SERR | COMMAND_INTX_DISABLE
"""As QEMU's functions have it: parity error response is not among them."""

MULTIFUNCTION = 0x80
"""In the header type."""
STATUS_INTERRUPT = 0x0008
STATUS_CAP_LIST = 0x0010
STATUS_ERRORS = 0xF900
"""Master data parity error and the abort and error bits: a guest clears them by writing 1."""


@dataclass(frozen=True, slots=True)
class Field:
    """One register: ``width`` bytes at ``offset``, ``reset`` value, ``writable`` and write-one-to-clear (``w1c``)
    masks; ``volatile`` bits change by themselves."""

    name: str
    offset: int
    width: int
    reset: int = 0
    writable: int = 0
    w1c: int = 0
    doc: str = ""
    volatile: int = 0

    def __post_init__(self) -> None:
        top = 1 << self.width * 8
        assert max(self.reset, self.writable, self.w1c, self.volatile) < top, (
            f"{self.name} does not fit {self.width} bytes"
        )
        assert not self.writable & self.w1c, f"{self.name}: a bit is writable or write-one-to-clear"


def type0_header(identity: Mapping[str, int]) -> tuple[Field, ...]:
    """The fields of a type 0 header. ``identity`` gives the reset values of the read-only ones by name."""
    rows = (
        ("vendor_id", VENDOR_ID, 2),
        ("device_id", DEVICE_ID, 2),
        ("revision", REVISION_ID, 1),
        ("class_prog", CLASS_PROG, 1),
        ("class_device", CLASS_DEVICE, 2),
        ("header_type", HEADER_TYPE, 1),
        ("subsystem_vendor_id", SUBSYSTEM_VENDOR_ID, 2),
        ("subsystem_id", SUBSYSTEM_ID, 2),
        ("interrupt_pin", INTERRUPT_PIN, 1),
    )
    return (
        *(Field(name, offset, width, reset=identity.get(name, 0)) for name, offset, width in rows),
        Field("command", COMMAND, 2, writable=COMMAND_WRITABLE),
        Field("status", STATUS, 2, w1c=STATUS_ERRORS, volatile=STATUS_INTERRUPT),
        Field("cache_line_size", 0x0C, 1, writable=0xFF),
        Field("interrupt_line", INTERRUPT_LINE, 1, writable=0xFF),
    )


class ConfigSpace:
    """The configuration space of one function. ``on_write`` callbacks run after a guest's write has taken effect.

    As in QEMU, what lies behind the header keeps whatever a guest writes there, also over a reset, except where a
    register or a capability is declared. The first dword of the extended space is never free: zero there says that
    there are no extended capabilities.
    """

    def __init__(self, fields: Iterable[Field] = (), size: int = CONFIG_SIZE) -> None:
        self.size = size
        self._bytes = bytearray(size)
        self._scratch = bytearray(FIRST_CAPABILITY).ljust(size, b"\xff")
        """All ones where nothing is declared, behind the header."""
        if size > CONFIG_SIZE:
            self._scratch[FIRST_EXTENDED : FIRST_EXTENDED + EXTENDED_HEADER] = bytes(EXTENDED_HEADER)
        self._writable = bytearray(self._scratch)
        self._w1c = bytearray(size)
        self._volatile = bytearray(size)
        self._fields: dict[str, Field] = {}
        self._next_capability = FIRST_CAPABILITY
        self._last_pointer = CAPABILITY_POINTER
        self._next_extended = FIRST_EXTENDED
        self._last_header = 0
        self._watchers: list[tuple[int, int, Callable[[], None]]] = []
        for field in fields:
            self.add(field)

    def add(self, field: Field) -> None:
        """Declare one more register; its name is new and its bytes lie inside the space."""
        assert field.name not in self._fields, f"register {field.name} declared twice"
        assert field.offset + field.width <= self.size, f"register {field.name} lies outside configuration space"
        self._fields[field.name] = field
        end = field.offset + field.width
        self._scratch[field.offset : end] = bytes(field.width)
        self._writable[field.offset : end] = field.writable.to_bytes(field.width, "little")
        self._w1c[field.offset : end] = field.w1c.to_bytes(field.width, "little")
        self._volatile[field.offset : end] = field.volatile.to_bytes(field.width, "little")
        self._bytes[field.offset : end] = field.reset.to_bytes(field.width, "little")

    def add_capability(
        self,
        cap_id: int,
        size: int,
        fields: Iterable[Field],
        *,
        prefix: str,
        at: int | None = None,
        place: tuple[int, int] | None = None,
    ) -> int:
        """Append a capability of ``size`` bytes to the list; the offsets of ``fields`` are relative to it, their
        names get ``prefix`` and a dot. Capabilities follow each other from 0x40 in the order in which they are added,
        unless ``at`` gives its offset, behind those before; or ``place`` its offset and the next one's, in a list that
        is linked elsewhere.

        :return: the capability's offset.
        """
        offset, next_ = (self._next_capability if at is None else at, 0) if place is None else place
        self._next_capability = max(self._next_capability, offset + (size + 3) & ~3)
        self._scratch[offset : offset + size] = self._writable[offset : offset + size] = bytes(size)
        self.add(Field(f"{prefix}.id", offset, 1, reset=cap_id))
        self.add(Field(f"{prefix}.next", offset + 1, 1, reset=next_))
        for field in fields:
            self.add(replace(field, name=f"{prefix}.{field.name}", offset=offset + field.offset))
        if place is None:
            self._bytes[self._last_pointer] = offset
            self._last_pointer = offset + 1
        self._bytes[STATUS] |= STATUS_CAP_LIST
        return offset

    @property
    def free_capability(self) -> int:
        """Where the next capability goes that nobody gives a place."""
        return self._next_capability

    def add_extended_capability(
        self, cap_id: int, version: int, size: int, fields: Iterable[Field], *, prefix: str, offset: int | None = None
    ) -> int:
        """Append an extended capability of ``size`` bytes behind the last one, the first at 0x100; or put it at
        ``offset``, in a list that is linked elsewhere. Otherwise as :meth:`add_capability`.

        :return: its offset.
        """
        at = self._next_extended if offset is None else offset
        self._next_extended = max(self._next_extended, at + (size + 3) & ~3)
        self._scratch[at : at + size] = self._writable[at : at + size] = bytes(size)
        self.add(Field(f"{prefix}.header", at, EXTENDED_HEADER, reset=cap_id | version << 16))
        for field in fields:
            self.add(replace(field, name=f"{prefix}.{field.name}", offset=at + field.offset))
        if self._last_header and offset is None:
            self._bytes[self._last_header + 2] |= at << EXTENDED_NEXT_SHIFT - 16 & 0xF0
            self._bytes[self._last_header + 3] = at >> 4
        self._last_header = at
        return at

    @property
    def multifunction(self) -> bool:
        """Whether the header says that the slot has more functions than this one."""
        return bool(self.get("header_type") & MULTIFUNCTION)

    @multifunction.setter
    def multifunction(self, several: bool) -> None:
        self.set("header_type", self.get("header_type") & ~MULTIFUNCTION | (MULTIFUNCTION if several else 0))

    def field(self, name: str) -> Field:
        """The declaration of register ``name``."""
        return self._fields[name]

    def get(self, name: str) -> int:
        """The value of register ``name``, as hardware sees it."""
        field = self._fields[name]
        return int.from_bytes(self._bytes[field.offset : field.offset + field.width], "little")

    def set(self, name: str, value: int) -> None:
        """Set register ``name`` as hardware does: no mask, no callback."""
        field = self._fields[name]
        self._bytes[field.offset : field.offset + field.width] = value.to_bytes(field.width, "little")

    def on_write(self, name: str, callback: Callable[[], None]) -> None:
        """Call ``callback()`` after each guest write that touches register ``name``."""
        field = self._fields[name]
        self._watchers.append((field.offset, field.offset + field.width, callback))

    def reset(self) -> None:
        """What can change goes to its reset value; wiring stays. No callback runs."""
        for field in self._fields.values():
            changeable = field.writable | field.w1c | field.volatile
            self.set(field.name, self.get(field.name) & ~changeable | field.reset & changeable)

    def forget(self) -> None:
        """What was written where nothing is declared goes: another user must not find it."""
        self._bytes[:] = bytes(byte & ~free for byte, free in zip(self._bytes, self._scratch, strict=True))

    def read(self, offset: int, size: int) -> int:
        """What a guest reads: ``size`` (1, 2, 4) bytes at ``offset``; all ones for an access that is not possible."""
        if not self.possible(offset, size):
            return (1 << size * 8) - 1
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """A guest's write; excess bits of ``value`` are cut off, an access that is not possible is ignored."""
        if not self.possible(offset, size):
            return
        end = offset + size
        old = int.from_bytes(self._bytes[offset:end], "little")
        writable = int.from_bytes(self._writable[offset:end], "little")
        clear = int.from_bytes(self._w1c[offset:end], "little") & value
        new = (old & ~writable | value & writable) & ~clear
        self._bytes[offset:end] = new.to_bytes(size, "little")
        for first, past, callback in self._watchers:
            if offset < past and first < end:
                callback()

    def difference(self, data: bytes) -> int | None:
        """The first offset at which ``data`` differs in what cannot change; None when it could be this space's content.
        Another size differs at its end.
        """
        if len(data) != self.size:
            return min(len(data), self.size)
        for at, (mine, theirs) in enumerate(zip(self._bytes, data, strict=True)):
            changeable = self._writable[at] | self._w1c[at] | self._volatile[at]
            if (mine ^ theirs) & ~changeable:
                return at
        return None

    def load(self, data: bytes) -> None:
        """Take ``data``, the bytes of a space like this one. No callback runs."""
        assert self.difference(data) is None, "what is loaded was checked"
        self._bytes[:] = data

    def possible(self, offset: int, size: int) -> bool:
        """Whether there is such an access: inside the space and inside one dword."""
        return size in (1, 2, 4) and 0 <= offset <= self.size - size and (offset & 3) + size <= 4

    def __bytes__(self) -> bytes:
        return bytes(self._bytes)
