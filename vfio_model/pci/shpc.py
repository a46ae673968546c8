"""The registers of a standard hot-plug controller (PCI Standard Hot-Plug Controller and Subsystem Specification 1.0,
chapter 4.8, "SHPC Working Register Set"), as far as a conventional bridge shows them: in its BAR, and dword by dword
through its configuration space.

Here devices come and go by the monitor: no slot carries out a command, and the registers keep their reset values.
"""

from __future__ import annotations

from vfio_model.memory.types import MemTxResult
from vfio_model.pci.config_space import ConfigSpace, Field

CAP_ID_SHPC = 0x0C
SHPC_BAR_SIZE = 0x100
SLOTS = 31
_SLOTS_AT_33MHZ, _SLOT_CONFIGURATION, _INTERFACE, _SERR_INTERRUPT, _FIRST_SLOT = 0x04, 0x0C, 0x10, 0x20, 0x24
_UP_FROM_1 = 0xE001_0100
"""Device 1 is physical slot 1, numbers go up, buttons and sensors are there."""
_INTERFACE_VERSION_1 = 0x0100_0000
_ALL_MASKED = 0xF
_SLOT_EMPTY = 0x7F00_0D3F
"""Disabled, indicators off, no card, its interrupts masked."""


def _reset_values() -> bytes:
    registers = bytearray(SHPC_BAR_SIZE)
    for at, value in (
        (_SLOTS_AT_33MHZ, SLOTS),
        (_SLOT_CONFIGURATION, _UP_FROM_1 | SLOTS),
        (_INTERFACE, _INTERFACE_VERSION_1),
        (_SERR_INTERRUPT, _ALL_MASKED),
        *((_FIRST_SLOT + 4 * slot, _SLOT_EMPTY) for slot in range(SLOTS)),
    ):
        registers[at : at + 4] = value.to_bytes(4, "little")
    return bytes(registers)


REGISTERS = _reset_values()


def shpc_read(offset: int, size: int) -> int:
    """``size`` bytes at ``offset`` of the register set."""
    return int.from_bytes(REGISTERS[offset : offset + size], "little")


def shpc_write(offset: int, size: int, value: int) -> MemTxResult:
    """Ignored: no slot takes commands."""
    return MemTxResult.OK


def add_shpc(config: ConfigSpace, place: tuple[int, int]) -> None:
    """The capability: a selector of dwords and the dword selected."""

    def selected() -> None:
        at = 4 * config.get("shpc.select")
        config.set("shpc.data", shpc_read(at, 4) if at < SHPC_BAR_SIZE else 0)

    fields = Field("select", 2, 1, writable=0xFF), Field("pending", 3, 1), Field("data", 4, 4, volatile=0xFFFF_FFFF)
    config.add_capability(CAP_ID_SHPC, 8, fields, prefix="shpc", place=place)
    config.on_write("shpc.select", selected)
