"""nvme: data structures that commands return, as tables of fields (NVM Express Base Specification 1.4).

A :class:`Layout` makes the bytes of a structure out of values by field name, and reads a field back; what is not
given is zero. Offsets are bytes, numbers little-endian, text is padded with spaces.
"""

from __future__ import annotations

from typing import NamedTuple

Value = int | bytes | str


class Item(NamedTuple):
    """``width`` bytes at ``offset``."""

    name: str
    offset: int
    width: int


class Layout:
    """A structure of ``size`` bytes."""

    def __init__(self, size: int, *rows: tuple[str, int, int]) -> None:
        self.size = size
        self.items = {name: Item(name, offset, width) for name, offset, width in rows}
        end = 0
        for item in self.items.values():
            assert end <= item.offset, f"{item.name} overlaps the field before it"
            end = item.offset + item.width
        assert end <= size, "every field lies inside the structure"

    def build(self, **values: Value) -> bytearray:
        """The structure with ``values``.

        A number is stored little-endian; bytes and text must fit.
        """
        out = bytearray(self.size)
        for name, value in values.items():
            item = self.items[name]
            if isinstance(value, int):
                data = value.to_bytes(item.width, "little")
            else:
                data = value.encode("ascii").ljust(item.width) if isinstance(value, str) else value
            assert len(data) <= item.width, f"{name} has {item.width} bytes"
            out[item.offset : item.offset + len(data)] = data
        return out

    def number(self, data: bytes | bytearray | memoryview, name: str) -> int:
        """The little-endian number of field ``name`` in ``data``."""
        item = self.items[name]
        return int.from_bytes(data[item.offset : item.offset + item.width], "little")


IDENTIFY_SIZE = 4096

IDENTIFY_CONTROLLER = Layout(  # section 5.15.2.2, "Identify Controller data structure"
    IDENTIFY_SIZE,
    ("vid", 0, 2),
    ("ssvid", 2, 2),
    ("sn", 4, 20),
    ("mn", 24, 40),
    ("fr", 64, 8),
    ("rab", 72, 1),
    ("ieee", 73, 3),
    ("cmic", 76, 1),
    ("mdts", 77, 1),
    ("cntlid", 78, 2),
    ("ver", 80, 4),
    ("rtd3r", 84, 4),
    ("rtd3e", 88, 4),
    ("oaes", 92, 4),
    ("ctratt", 96, 4),
    ("cntrltype", 111, 1),
    ("oacs", 256, 2),
    ("acl", 258, 1),
    ("aerl", 259, 1),
    ("frmw", 260, 1),
    ("lpa", 261, 1),
    ("elpe", 262, 1),
    ("npss", 263, 1),
    ("wctemp", 266, 2),
    ("cctemp", 268, 2),
    ("sqes", 512, 1),
    ("cqes", 513, 1),
    ("maxcmd", 514, 2),
    ("nn", 516, 4),
    ("oncs", 520, 2),
    ("fuses", 522, 2),
    ("fna", 524, 1),
    ("vwc", 525, 1),
    ("awun", 526, 2),
    ("awupf", 528, 2),
    ("sgls", 536, 4),
    ("subnqn", 768, 256),
    ("psd0_mp", 2048, 2),
    ("psd0_enlat", 2052, 4),
    ("psd0_exlat", 2056, 4),
)

IDENTIFY_NAMESPACE = Layout(  # section 5.15.2.1, "Identify Namespace data structure"
    IDENTIFY_SIZE,
    ("nsze", 0, 8),
    ("ncap", 8, 8),
    ("nuse", 16, 8),
    ("nsfeat", 24, 1),
    ("nlbaf", 25, 1),
    ("flbas", 26, 1),
    ("mc", 27, 1),
    ("dpc", 28, 1),
    ("dps", 29, 1),
    ("nmic", 30, 1),
    ("rescap", 31, 1),
    ("fpi", 32, 1),
    ("dlfeat", 33, 1),
    ("nsattr", 99, 1),
    ("nguid", 104, 16),
    ("eui64", 120, 8),
    ("lbaf", 128, 64),
)

ERROR_ENTRY = Layout(  # section 5.14.1.1, "Error Information"
    64,
    ("error_count", 0, 8),
    ("sqid", 8, 2),
    ("cid", 10, 2),
    ("status", 12, 2),
    ("location", 14, 2),
    ("lba", 16, 8),
    ("nsid", 24, 4),
)

HEALTH = Layout(  # section 5.14.1.2, "SMART / Health Information"
    512,
    ("critical_warning", 0, 1),
    ("temperature", 1, 2),
    ("available_spare", 3, 1),
    ("available_spare_threshold", 4, 1),
    ("percentage_used", 5, 1),
    ("data_units_read", 32, 16),
    ("data_units_written", 48, 16),
    ("host_read_commands", 64, 16),
    ("host_write_commands", 80, 16),
    ("controller_busy_time", 96, 16),
    ("power_cycles", 112, 16),
    ("power_on_hours", 128, 16),
    ("unsafe_shutdowns", 144, 16),
    ("media_errors", 160, 16),
    ("error_log_entries", 176, 16),
)

FIRMWARE_SLOT = Layout(  # section 5.14.1.3, "Firmware Slot Information"
    512,
    ("afi", 0, 1),
    ("frs1", 8, 8),
)

CHANGED_NAMESPACES_SIZE = 4096
EFFECTS_SIZE = 4096
EFFECTS_NVM = 1024
"""Section 5.14.1.5, "Commands Supported and Effects": a dword per admin opcode, then one per I/O opcode from here."""
EFFECT_SUPPORTED, EFFECT_BLOCK_CONTENT, EFFECT_NAMESPACE = 0x1, 0x2, 0x4
"""CSUPP, LBCC, NCC."""

NIDT_UUID = 3
"""Section 5.15.2.3, "Namespace Identification Descriptor list": a UUID of 16 bytes."""
