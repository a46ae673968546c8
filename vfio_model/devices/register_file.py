"""A device's 32-bit registers as data: a table says where each is and what reading and writing do to its bits.

What a table cannot say is a handler: :meth:`RegisterFile.on_read` replaces the value that is read,
:meth:`RegisterFile.on_write` is told after the bits were stored. Accesses of one, two and eight bytes work on the bytes
they name; where there is no register, reads are zero and writes are lost. Nothing a guest can do raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vfio_model.errors import VMStateError
from vfio_model.ranges import U32_MAX
from vfio_model.vmstate.fields import Field, State

OnRead = Callable[[int], int]
"""Given the stored value, from before the bits that reading clears: what is read."""
OnWrite = Callable[[int, int], None]
"""Told (offset, value): the register that was written and the 32 bits that came, before any mask."""


@dataclass(frozen=True, slots=True)
class Register:
    """One register, or ``count`` of them, ``stride`` bytes apart.

    ``writable`` are the bits that keep what is written, ``clear_on_write`` those that a written one clears;
    ``clear_on_read`` go to zero when the register is read. Bits in none of them are the device's. ``keep``: it
    survives a reset of the register file. ``section`` says where the device's manual describes it.
    """

    name: str
    offset: int
    section: str
    reset: int = 0
    writable: int = 0
    clear_on_write: int = 0
    clear_on_read: int = 0
    count: int = 1
    stride: int = 4
    keep: bool = False

    def offsets(self) -> range:
        """Where its elements are."""
        return range(self.offset, self.offset + self.count * self.stride, self.stride)


class RegisterFile:
    """The registers of ``table`` by offset in bytes: ``file[offset]`` is a register's value as the device sees it."""

    def __init__(self, table: Iterable[Register]) -> None:
        self.table = tuple(table)
        self._at: dict[int, Register] = {}
        for register in self.table:
            for offset in register.offsets():
                assert offset not in self._at and offset % 4 == 0, f"{register.name} has its own 32 bits"
                self._at[offset] = register
        self._values = {offset: register.reset for offset, register in self._at.items()}
        self._readers: dict[int, OnRead] = {}
        self._writers: dict[int, OnWrite] = {}

    def __getitem__(self, offset: int) -> int:
        return self._values[offset]

    def __setitem__(self, offset: int, value: int) -> None:
        self._values[offset] = value & U32_MAX

    def on_read(self, offset: int, reader: OnRead) -> None:
        """Reading the register at ``offset`` gives ``reader(value)``, called when bits that reading clears are gone."""
        self._readers[offset] = reader

    def on_write(self, offset: int, writer: OnWrite) -> None:
        """Call ``writer(offset, value)`` after a write to the register at ``offset`` (to any element of an array)."""
        for element in self._at[offset].offsets():
            self._writers[element] = writer

    def read(self, offset: int, size: int) -> int:
        """What ``size`` bytes at ``offset`` show."""
        if size == 4 and not offset & 3:
            return self._read(offset)
        first = offset & ~3
        words = (self._read(at) << (at - first) * 8 for at in range(first, offset + size, 4))
        return sum(words) >> (offset - first) * 8 & (1 << size * 8) - 1

    def _read(self, offset: int) -> int:
        register = self._at.get(offset)
        if register is None:
            return 0
        value = self._values[offset]
        if register.clear_on_read:
            self._values[offset] = value & ~register.clear_on_read
        reader = self._readers.get(offset)
        return value if reader is None else reader(value)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write ``size`` bytes at ``offset``; bytes of a register that are not named keep their value."""
        if size == 4 and not offset & 3:
            self._write(offset, value & U32_MAX)
            return
        value &= (1 << size * 8) - 1
        for at in range(offset & ~3, offset + size, 4):
            low = (offset - at) * 8
            named = ((1 << size * 8) - 1 << low if low >= 0 else (1 << size * 8) - 1 >> -low) & U32_MAX
            part = (value << low if low >= 0 else value >> -low) & named
            register = self._at.get(at)
            if register is not None:
                self._write(at, part | self._values[at] & register.writable & ~named)

    def _write(self, offset: int, value: int) -> None:
        register = self._at.get(offset)
        if register is None:
            return
        old = self._values[offset]
        kept = old & ~register.writable & ~(value & register.clear_on_write)
        self._values[offset] = kept | value & register.writable
        writer = self._writers.get(offset)
        if writer is not None:
            writer(offset, value)

    def reset(self) -> None:
        """Every register that is not kept to its reset value."""
        self._values.update((offset, each.reset) for offset, each in self._at.items() if not each.keep)

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """The values of :func:`fields_of` the table."""
        return {
            each.name.lower(): self._values[each.offset] if each.count == 1 else [self[at] for at in each.offsets()]
            for each in self.table
        }

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """Whether the registers can have these values.

        :raise VMStateError: bits that cannot be written are neither as after a reset nor the device's.
        """
        for each in self.table:
            fixed = ~(each.writable | each.reset | each.clear_on_read | each.clear_on_write)
            if each.writable and any(value & fixed for value in _elements(each, state)):
                raise VMStateError(f"{each.name} with bits that it has not got", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The values of a checked state; no handler is called."""
        for each in self.table:
            self._values.update(zip(each.offsets(), _elements(each, state), strict=True))


def _elements(register: Register, state: Mapping[str, Any]) -> list[int]:
    value = state[register.name.lower()]
    return value if isinstance(value, list) else [value]


def fields_of(table: Iterable[Register]) -> tuple[Field, ...]:
    """A field of a VMSTATE description for each line of ``table``, named as the register in lower case."""
    return tuple(Field(each.name.lower(), array=each.count if each.count > 1 else None) for each in table)
