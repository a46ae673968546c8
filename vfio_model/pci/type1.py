"""The type 1 header: what a PCI-to-PCI bridge has instead of BARs 2 to 5 (PCI-to-PCI Bridge Architecture
Specification, chapter 3.2; for PCI Express, Base Specification 7.5.1.3, "Type 1 Configuration Space Header").

Reset values and write masks are QEMU's: a *conventional* bridge (its secondary bus is one) has a secondary latency
timer, 66 MHz and fast back-to-back in its status and more bits of bridge control than a PCI Express port.
"""

from __future__ import annotations

from collections.abc import Mapping

from vfio_model.pci.config_space import (
    COMMAND,
    COMMAND_WRITABLE,
    INTERRUPT_LINE,
    INTERRUPT_PIN,
    STATUS,
    STATUS_ERRORS,
    STATUS_INTERRUPT,
    Field,
)
from vfio_model.ranges import Range

HEADER_TYPE_BRIDGE = 0x01
STATUS_66MHZ_FAST_BACK = 0x00A0
IO_WINDOW_BITS, IO_GRANULE = 0xF0, 0x1000
MEMORY_WINDOW_BITS, MEMORY_GRANULE = 0xFFF0, 0x10_0000
PREFETCH_64BIT = 0x0001

CONTROL_BUS_RESET = 0x0040
CONTROL_PORT = 0x005F
"""Parity, SERR, ISA, VGA, VGA 16 bit, secondary bus reset."""
CONTROL_CONVENTIONAL = 0x0BFF
"""Also master abort mode, fast back-to-back and the discard timers."""
CONTROL_DISCARD_STATUS = 0x0400


def type1_header(identity: Mapping[str, int], *, conventional: bool, windows_off: bool) -> tuple[Field, ...]:
    """The fields of a type 1 header. ``identity``: as of :func:`~vfio_model.pci.config_space.type0_header`; a bridge
    has no subsystem there. ``windows_off``: windows decode nothing at reset (base above limit), not address 0."""
    speeds = STATUS_66MHZ_FAST_BACK if conventional else 0
    base_io, base_memory = (IO_WINDOW_BITS, MEMORY_WINDOW_BITS) if windows_off else (0, 0)
    prefetch = base_memory | PREFETCH_64BIT
    named = ("vendor_id", 0x00, 2), ("device_id", 0x02, 2), ("revision", 0x08, 1), ("class_prog", 0x09, 1)
    return (
        *(Field(name, offset, width, identity[name]) for name, offset, width in named),
        Field("class_device", 0x0A, 2, identity["class_device"]),
        Field("header_type", 0x0E, 1, HEADER_TYPE_BRIDGE),
        Field("command", COMMAND, 2, writable=COMMAND_WRITABLE),
        Field("status", STATUS, 2, speeds, w1c=STATUS_ERRORS, volatile=STATUS_INTERRUPT),
        Field("cache_line_size", 0x0C, 1, writable=0xFF),
        Field("primary_bus", 0x18, 1, writable=0xFF),
        Field("secondary_bus", 0x19, 1, writable=0xFF),
        Field("subordinate_bus", 0x1A, 1, writable=0xFF),
        Field("secondary_latency", 0x1B, 1, writable=0xFF if conventional else 0),
        Field("io_base", 0x1C, 1, base_io, IO_WINDOW_BITS),
        Field("io_limit", 0x1D, 1, writable=IO_WINDOW_BITS),
        Field("secondary_status", 0x1E, 2, speeds, w1c=STATUS_ERRORS),
        Field("memory_base", 0x20, 2, base_memory, MEMORY_WINDOW_BITS),
        Field("memory_limit", 0x22, 2, writable=MEMORY_WINDOW_BITS),
        Field("prefetch_base", 0x24, 2, prefetch, MEMORY_WINDOW_BITS),
        Field("prefetch_limit", 0x26, 2, PREFETCH_64BIT, MEMORY_WINDOW_BITS),
        Field("prefetch_base_upper", 0x28, 4, writable=0xFFFF_FFFF),
        Field("prefetch_limit_upper", 0x2C, 4, writable=0xFFFF_FFFF),
        Field("io_base_upper", 0x30, 2),
        Field("io_limit_upper", 0x32, 2),
        Field("interrupt_line", INTERRUPT_LINE, 1, writable=0xFF),
        Field("interrupt_pin", INTERRUPT_PIN, 1, identity["interrupt_pin"]),
        Field(
            "bridge_control",
            0x3E,
            2,
            writable=CONTROL_CONVENTIONAL if conventional else CONTROL_PORT,
            w1c=CONTROL_DISCARD_STATUS if conventional else 0,
        ),
    )


def io_window(base: int, limit: int) -> Range | None:
    """The I/O addresses between two registers, both included; None when the base is above the limit."""
    return _between((base & IO_WINDOW_BITS) << 8, ((limit & IO_WINDOW_BITS) << 8) + IO_GRANULE - 1)


def memory_window(base: int, limit: int, base_upper: int = 0, limit_upper: int = 0) -> Range | None:
    """The memory addresses between two registers, both included; None when the base is above the limit."""
    first = base_upper << 32 | (base & MEMORY_WINDOW_BITS) << 16
    return _between(first, limit_upper << 32 | (limit & MEMORY_WINDOW_BITS) << 16 | MEMORY_GRANULE - 1)


def _between(first: int, last: int) -> Range | None:
    return Range(first, last) if first <= last else None
