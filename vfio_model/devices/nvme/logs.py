"""nvme: what the controller keeps for its log pages (NVM Express Base Specification 1.4, section 5.14, "Get Log Page
command")."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from vfio_model.devices.nvme.regs import AdminOpcode, Command, NvmOpcode
from vfio_model.devices.nvme.structures import (
    EFFECT_BLOCK_CONTENT,
    EFFECT_NAMESPACE,
    EFFECT_SUPPORTED,
    EFFECTS_NVM,
    EFFECTS_SIZE,
    ERROR_ENTRY,
    FIRMWARE_SLOT,
    HEALTH,
)

ERROR_ENTRIES = 64
TEMPERATURE_KELVIN = 323
"""What the controller measures, always."""
WARNING_TEMPERATURE = 0x02
"""Critical warning: a temperature is beyond a threshold."""
UNIT_BYTES = 512_000
"""A data unit of the health log is 1000 times 512 bytes."""
NO_QUEUE = NO_COMMAND = NO_LOCATION = 0xFFFF
_CONTENT = EFFECT_SUPPORTED | EFFECT_BLOCK_CONTENT

ADMIN_EFFECTS: Mapping[int, int] = {
    **dict.fromkeys(AdminOpcode, EFFECT_SUPPORTED),
    AdminOpcode.FORMAT_NVM: _CONTENT | EFFECT_NAMESPACE,
}
NVM_EFFECTS: Mapping[int, int] = {
    **dict.fromkeys(NvmOpcode, EFFECT_SUPPORTED),
    NvmOpcode.WRITE: _CONTENT,
    NvmOpcode.WRITE_ZEROES: _CONTENT,
    NvmOpcode.DATASET_MANAGEMENT: _CONTENT,
}
"""What the commands of a set may change, by opcode."""

WITH_BLOCKS = frozenset((NvmOpcode.READ, NvmOpcode.WRITE, NvmOpcode.COMPARE, NvmOpcode.WRITE_ZEROES, NvmOpcode.VERIFY))
"""Commands whose dwords 10 and 11 are the first block."""


class ErrorLog:
    """The newest failures, newest first."""

    def __init__(self) -> None:
        self.count = 0
        """How many there were, ever."""
        self.entries: deque[bytes] = deque(maxlen=ERROR_ENTRIES)

    def add(self, sqid: int, command: Command, status: int) -> None:
        """``command`` of queue ``sqid`` ended with ``status`` (all bits of the status field)."""
        lba = command.cdw10 | command.cdw11 << 32 if sqid and command.opcode in WITH_BLOCKS else 0
        self._add(sqid=sqid, cid=command.cid, status=status << 1, nsid=command.nsid, lba=lba)

    def add_doorbell(self, sqid: int) -> None:
        """A doorbell was written that does not exist, or with a value that it cannot have."""
        self._add(sqid=sqid, cid=NO_COMMAND, status=0)

    def _add(self, **fields: int) -> None:
        self.count += 1
        entry = ERROR_ENTRY.build(error_count=self.count, location=NO_LOCATION, **fields)
        self.entries.appendleft(bytes(entry))

    def log(self) -> bytes:
        """The page."""
        return b"".join(self.entries).ljust(ERROR_ENTRIES * ERROR_ENTRY.size, b"\0")


class Health:
    """Counters of the health log. They live as long as the device does."""

    def __init__(self) -> None:
        self.bytes_read = self.bytes_written = 0
        self.reads = self.writes = 0
        self.media_errors = 0
        self.critical_warning = 0

    def log(self, errors: int, uptime_ns: int) -> bytearray:
        """The page; ``errors`` is how many entries the error log ever had."""
        return HEALTH.build(
            critical_warning=self.critical_warning,
            temperature=TEMPERATURE_KELVIN,
            available_spare=100,
            available_spare_threshold=10,
            data_units_read=-(-self.bytes_read // UNIT_BYTES),
            data_units_written=-(-self.bytes_written // UNIT_BYTES),
            host_read_commands=self.reads,
            host_write_commands=self.writes,
            power_cycles=1,
            power_on_hours=uptime_ns // 3_600_000_000_000,
            media_errors=self.media_errors,
            error_log_entries=errors,
        )


def firmware_log(revision: str) -> bytearray:
    """One slot, which runs ``revision``."""
    return FIRMWARE_SLOT.build(afi=1, frs1=revision)


def effects_log() -> bytearray:
    """Commands Supported and Effects."""
    out = bytearray(EFFECTS_SIZE)
    for base, table in ((0, ADMIN_EFFECTS), (EFFECTS_NVM, NVM_EFFECTS)):
        for opcode, effects in table.items():
            out[base + 4 * opcode] = effects
    return out
