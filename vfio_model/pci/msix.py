"""MSI-X: a table of messages in a BAR, each with a mask of its own, and an array of pending bits.

PCI Local Bus Specification 3.0, 6.8.2, "MSI-X Capability and Table Structure". A vector that is raised while it is
masked becomes pending, and is sent when it is unmasked. Who performs the write is not decided here, as with MSI
(:mod:`vfio_model.pci.msi`).

Table and pending bits are :class:`~vfio_model.pci.parts.BarPart` objects: the device class never sees accesses to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.config_space import ConfigSpace, Field
from vfio_model.vmstate.fields import Field as StateField
from vfio_model.vmstate.fields import State, Type, VMStateDescription

CAP_ID_MSIX = 0x11
MSIX_SIZE = 12
CONTROL_SIZE_MASK = 0x07FF
"""Message control: vectors less one."""
CONTROL_FUNCTION_MASK = 0x4000
CONTROL_ENABLE = 0x8000
BIR_MASK = 0x7
"""Table and PBA offset registers: which BAR."""
ENTRY_SIZE = 16
ADDRESS_LO, ADDRESS_HI, DATA, VECTOR_CONTROL = 0x0, 0x4, 0x8, 0xC
VECTOR_MASKED = 1
MAX_VECTORS = 2048

STATE = StateField(
    "msix",
    struct=VMStateDescription(
        "PCIMSIX",
        1,
        (
            StateField("table_size"),
            StateField("table", Type.U8, array="table_size"),
            StateField("pending_size"),
            StateField("pending", Type.U8, array="pending_size"),
        ),
    ),
)
"""A field for the description of a device with MSI-X."""


@dataclass(frozen=True, slots=True)
class MsixSpec:
    """``vectors`` (1 to 2048) messages; table and pending bits lie in BAR ``bar``, each at a multiple of 8 bytes; the
    pending bits in ``pba_bar``, if that is another one.

    :raise ConfigError: when there is no such table.
    """

    vectors: int
    bar: int
    table_offset: int
    pba_offset: int
    pba_bar: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.vectors <= MAX_VECTORS:
            raise ConfigError(f"{self.vectors} vectors; MSI-X has 1 to {MAX_VECTORS}", where="MsixSpec")
        if (self.table_offset | self.pba_offset) & BIR_MASK or min(self.table_offset, self.pba_offset) < 0:
            raise ConfigError("table and pending bits each lie at a multiple of 8 bytes", where="MsixSpec")

    @property
    def pending_bar(self) -> int:
        """Which BAR has the pending bits."""
        return self.bar if self.pba_bar is None else self.pba_bar

    @property
    def table_size(self) -> int:
        """Bytes."""
        return self.vectors * ENTRY_SIZE

    @property
    def pba_size(self) -> int:
        """Bytes: a bit for each vector, in words of 64."""
        return (self.vectors + 63) // 64 * 8


class MsixCapability:
    """The capability with its table, added to ``config``. ``send(vector)`` carries a message out."""

    def __init__(
        self,
        config: ConfigSpace,
        spec: MsixSpec,
        send: Callable[[int], None],
        *,
        place: tuple[int, int] | None = None,
    ) -> None:
        """``place``: as of :meth:`ConfigSpace.add_capability`."""
        self.spec = spec
        self.on_unmask: Callable[[int], None] | None = None
        """Told of a vector whose own mask the guest has taken away, before anything pending is sent."""
        self._config, self._send = config, send
        self.offset = config.add_capability(
            CAP_ID_MSIX,
            MSIX_SIZE,
            (
                Field("control", 2, 2, spec.vectors - 1, CONTROL_ENABLE | CONTROL_FUNCTION_MASK),
                Field("table", 4, 4, spec.table_offset | spec.bar),
                Field("pba", 8, 4, spec.pba_offset | spec.pending_bar),
            ),
            prefix="msix",
            place=place,
        )
        config.on_write("msix.control", self.unmasked)
        self.table = bytearray()
        self.pending = bytearray()
        self.reset()

    @property
    def vectors(self) -> int:
        """How many there are."""
        return self.spec.vectors

    @property
    def enabled(self) -> bool:
        """Whether the guest has switched MSI-X on (and INTx thereby off)."""
        return bool(self._config.get("msix.control") & CONTROL_ENABLE)

    def reset(self) -> None:
        """Every vector masked, nothing pending; the control register is configuration space's."""
        self.table = bytearray(self.spec.table_size)
        self.table[VECTOR_CONTROL::ENTRY_SIZE] = bytes((VECTOR_MASKED,)) * self.vectors
        self.pending = bytearray(self.spec.pba_size)

    def masked(self, vector: int) -> bool:
        """Whether ``vector`` must wait, by its own mask or the function's."""
        own = self.table[vector * ENTRY_SIZE + VECTOR_CONTROL] & VECTOR_MASKED
        return bool(own or self._config.get("msix.control") & CONTROL_FUNCTION_MASK)

    def message(self, vector: int) -> tuple[int, int]:
        """(address, 32-bit data) of ``vector``."""
        at = vector * ENTRY_SIZE
        word = self.table[at : at + DATA + 4]
        return int.from_bytes(word[:DATA], "little"), int.from_bytes(word[DATA:], "little")

    def set_message(self, vector: int, address: int, data: int) -> None:
        """Write an entry's address and data as the platform does, without the guest; its mask stays."""
        at = vector * ENTRY_SIZE
        self.table[at : at + DATA + 4] = address.to_bytes(8, "little") + data.to_bytes(4, "little")

    def raise_(self, vector: int) -> None:
        """Send ``vector``, or keep it pending while it is masked. A vector that does not exist is lost."""
        if vector >= self.vectors:
            return
        if self.masked(vector):
            self.pending[vector >> 3] |= 1 << (vector & 7)
        else:
            self._send(vector)

    def unmasked(self) -> None:
        """Send what is pending and need not wait any more; called when a mask may have gone."""
        if not self.enabled or not any(self.pending):
            return
        for vector in range(self.vectors):
            if self.pending[vector >> 3] >> (vector & 7) & 1 and not self.masked(vector):
                self.pending[vector >> 3] &= ~(1 << (vector & 7))
                self._send(vector)

    def export_state(self) -> State:
        """What :data:`STATE` describes."""
        table, pending = bytes(self.table), bytes(self.pending)
        return {"table_size": len(table), "table": table, "pending_size": len(pending), "pending": pending}

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """:raise VMStateError: when ``state`` is of another number of vectors."""
        if (state["table_size"], state["pending_size"]) != (len(self.table), len(self.pending)):
            raise VMStateError(f"an MSI-X table of {state['table_size']} bytes, not {len(self.table)}", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take a checked ``state``. Nothing is sent."""
        self.table[:], self.pending[:] = state["table"], state["pending"]


class MsixTable:
    """The table as part of a BAR: accesses of 4 or 8 bytes."""

    min_access_size, max_access_size = 4, 8

    def __init__(self, capability: MsixCapability) -> None:
        self._capability = capability
        self.offset, self.size = capability.spec.table_offset, capability.spec.table_size

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return int.from_bytes(self._capability.table[addr : addr + size], "little")

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``. Reserved bits of the vector control word stay zero."""
        table = self._capability.table
        table[addr : addr + size] = value.to_bytes(size, "little")
        control = addr - addr % ENTRY_SIZE + VECTOR_CONTROL
        if addr + size > control:
            masked = table[control] & VECTOR_MASKED
            table[control : control + 4] = bytes((masked, 0, 0, 0))
            if not masked and self._capability.on_unmask is not None:
                self._capability.on_unmask(addr // ENTRY_SIZE)
            self._capability.unmasked()
        return MemTxResult.OK


class MsixPendingBits:
    """The pending bit array as part of a BAR: read only."""

    min_access_size, max_access_size = 4, 8

    def __init__(self, capability: MsixCapability) -> None:
        self._capability = capability
        self.offset, self.size = capability.spec.pba_offset, capability.spec.pba_size

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return int.from_bytes(self._capability.pending[addr : addr + size], "little")

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """Ignored."""
        return MemTxResult.OK
