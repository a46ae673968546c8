"""The I/O APIC: 24 pins, a redirection table entry for each, messages to the window at 0xfee00000.

82093AA I/O Advanced Programmable Interrupt Controller datasheet, "Registers" and "Interrupt redirection"; Intel
Virtualization Technology for Directed I/O, 5.1.5.1, "I/OxAPIC Programming" (remappable entries: what their bits make of
a message is the same). Version 0x20, with an EOI register; there is no CPU to write it by itself, so a driver does.
ExtINT entries send their vector, as there is no 8259A behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vfio_model.machine.q35 import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U32_MAX
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

SELECT, WINDOW, EOI = 0x00, 0x10, 0x40
ID, VERSION, ARBITRATION, TABLE = 0x00, 0x01, 0x02, 0x10
ID_MASK = 0x0F00_0000
VERSION_VALUE = regs.IOAPIC_PINS - 1 << 16 | 0x20
VECTOR = 0xFF
DELIVERY_MODE = 0x700
DEST_MODE_SHIFT = 11
REMOTE_IRR = 1 << 14
LEVEL = 1 << 15
MASKED = 1 << 16
TIMER_PIN = 2
"""Where a PC has ISA interrupt 0."""
READ_ONLY = 1 << 12 | REMOTE_IRR
"""Delivery status, which is always idle, and remote IRR."""

VMSTATE = VMStateDescription(
    "ioapic",
    3,
    (
        Field("id", Type.U8),
        Field("ioregsel", Type.U8),
        Field("irr"),
        Field("level"),
        Field("ioredtbl_count"),
        Field("ioredtbl", Type.U64, array="ioredtbl_count"),
    ),
    minimum_version=3,
)


class IoApic:
    """``send(address, data)`` carries a message out. The object is its own ops."""

    min_access_size, max_access_size = 1, 4

    def __init__(self, send: Callable[[int, int], object]) -> None:
        self._send = send
        self._id = self._select = self._irr = self._level = 0
        self.table = [MASKED] * regs.IOAPIC_PINS
        """Redirection table entries, 64 bits each."""

    def reset(self) -> None:
        """Every entry masked, nothing requested."""
        self._id = self._select = self._irr = self._level = 0
        self.table = [MASKED] * regs.IOAPIC_PINS

    # -- pins

    def set_pin(self, pin: int, level: bool) -> None:
        """Input ``pin`` is driven. As on QEMU a level-triggered entry takes the level then, not when it is written."""
        pin = pin or TIMER_PIN
        bit, entry = 1 << pin, self.table[pin]
        rises = level and not self._level & bit
        self._level = self._level & ~bit | (bit if level else 0)
        if entry & LEVEL:
            self._irr = self._irr & ~bit | (bit if level else 0)
        elif rises and not entry & MASKED:
            self._irr |= bit
        self._service()

    def _service(self) -> None:
        for pin, entry in enumerate(self.table):
            if not self._irr >> pin & 1 or entry & MASKED:
                continue
            if not entry & LEVEL:
                self._irr &= ~(1 << pin)
            elif entry & REMOTE_IRR:
                continue
            else:
                self.table[pin] = entry | REMOTE_IRR
            self._send(*message(entry))

    def end_of_interrupt(self, vector: int) -> None:
        """The CPU is done with ``vector``: level-triggered pins that are still up send again."""
        for pin, entry in enumerate(self.table):
            if entry & VECTOR == vector and entry & LEVEL and entry & REMOTE_IRR:
                self.table[pin] = entry & ~REMOTE_IRR
        self._service()

    # -- registers

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``. The window answers dwords alone."""
        if addr == SELECT:
            return self._select
        return self._register() if addr == WINDOW and size == 4 else 0

    def _register(self) -> int:
        if self._select in (ID, ARBITRATION):
            return self._id << 24
        if self._select == VERSION:
            return VERSION_VALUE
        pin, high = divmod(self._select - TABLE, 2)
        return self.table[pin] >> 32 * high & U32_MAX if 0 <= pin < regs.IOAPIC_PINS else 0

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        if addr == SELECT:
            self._select = value & 0xFF
        elif addr == WINDOW and size == 4:
            self._write_register(value)
        elif addr == EOI and size == 4:
            self.end_of_interrupt(value & VECTOR)
        return MemTxResult.OK

    def _write_register(self, value: int) -> None:
        pin, high = divmod(self._select - TABLE, 2)
        if self._select == ID:
            self._id = (value & ID_MASK) >> 24
        elif 0 <= pin < regs.IOAPIC_PINS:
            old = self.table[pin]
            if high:
                self.table[pin] = old & U32_MAX | value << 32
            else:
                kept = READ_ONLY if value & LEVEL else READ_ONLY & ~REMOTE_IRR
                self.table[pin] = old & ~U32_MAX | value & ~READ_ONLY | old & kept
            self._service()

    # -- migration

    def export_state(self) -> State:
        """What :data:`VMSTATE` describes."""
        return {
            "id": self._id,
            "ioregsel": self._select,
            "irr": self._irr,
            "level": self._level,
            "ioredtbl_count": len(self.table),
            "ioredtbl": list(self.table),
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take ``state``, of a table as large; nothing is sent."""
        self._id, self._select = state["id"], state["ioregsel"]
        self._irr, self._level = state["irr"], state["level"]
        self.table = list(state["ioredtbl"])


def message(entry: int) -> tuple[int, int]:
    """(address, data) that redirection table entry ``entry`` sends."""
    address = regs.MESSAGES.start | (entry >> 48 & 0xFFFF) << 4 | (entry >> DEST_MODE_SHIFT & 1) << 2
    return address, entry & (VECTOR | DELIVERY_MODE) | entry & LEVEL
