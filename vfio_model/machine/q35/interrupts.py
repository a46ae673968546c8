"""From a PCI pin to a GSI, and the window where messages arrive.

::

    INTx ─► root bus pin ─► DnnIR, or rotation ─► PIRQA..H ─┬─► GSI 16..23 ──────► I/O APIC pin ─► message
                                                           └─► PIRQn_ROUT ─► GSI of an ISA line ─┘

ICH9 datasheet, "PIRQ[n]_ROUT" and "DnnIR: Device nn Interrupt Route Register". Every GSI is a line of the machine's
interrupt lines, and a pin of the I/O APIC. A line that an ISA route leaves changes when a PIRQ on it does next, not
when the route is written: so QEMU has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from vfio_model.machine.irqs import IrqLines
from vfio_model.machine.q35 import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

REMEMBERED = 256
PIRQS = len(regs.PIRQ_ROUTE)

CHIPSET_VMSTATE = VMStateDescription("ich9_chipset_config", 1, (Field("size"), Field("bytes", Type.U8, array="size")))


class Message(NamedTuple):
    """An interrupt message as it arrived."""

    address: int
    data: int

    @property
    def vector(self) -> int:
        """The interrupt's number."""
        return self.data & 0xFF


class MessageWindow:
    """The ops of 0xfee00000–0xfeefffff: where a local APIC would be. Each message pulses line ``MESSAGE_LINES`` +
    vector; the last :data:`REMEMBERED` are kept whole."""

    min_access_size, max_access_size = 1, 4

    def __init__(self, irqs: IrqLines) -> None:
        self._irqs = irqs
        self.arrived: deque[Message] = deque(maxlen=REMEMBERED)

    def read(self, addr: int, size: int) -> int | None:
        """All ones for a dword: there is no CPU whose APIC it would be."""
        return (1 << 32) - 1 if size == 4 else 0

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """A dword is a message."""
        if size == 4:
            self.deliver(regs.MESSAGES.start + addr, value)
        return MemTxResult.OK

    def deliver(self, address: int, data: int) -> None:
        """A message that needs no translation."""
        message = Message(address, data)
        self.arrived.append(message)
        self._irqs.pulse(regs.MESSAGE_LINES + message.vector)


class ChipsetConfig:
    """The ops of the chipset configuration registers (RCRB): bytes that keep what is written; DnnIR are the ones that
    do something."""

    min_access_size, max_access_size = 1, 4

    def __init__(self) -> None:
        self._bytes = bytearray(regs.CHIPSET_CONFIG_SIZE)
        self.reset()

    def reset(self) -> None:
        """The routes' reset values, else zero."""
        self._bytes[:] = bytes(len(self._bytes))
        for route in regs.PIN_ROUTES:
            self._bytes[route.offset : route.offset + 2] = route.reset.to_bytes(2, "little")

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return int.from_bytes(self._bytes[addr : addr + size], "little")

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        self._bytes[addr : addr + size] = value.to_bytes(size, "little")
        return MemTxResult.OK

    def pirq(self, slot: int, pin: int) -> int:
        """Where ``pin`` (0..3) of ``slot`` on the root bus is wired: 0 for PIRQA … 7 for PIRQH."""
        for route in regs.PIN_ROUTES:
            if route.slot == slot:
                return int.from_bytes(self._bytes[route.offset : route.offset + 2], "little") >> 4 * pin & 7
        if slot == regs.PCI_BRIDGE_SLOT:
            return regs.FIRST_FREE_PIRQ + pin
        return regs.FIRST_FREE_PIRQ + (slot + pin) % 4

    def export_state(self) -> State:
        """What :data:`CHIPSET_VMSTATE` describes."""
        return {"size": len(self._bytes), "bytes": bytes(self._bytes)}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take ``state``, of as many bytes."""
        self._bytes[:] = state["bytes"]


class PinRouter:
    """Who holds which PIRQ up. ``route(pirq)`` is the PIRQn_ROUT register, ``set_gsi`` drives a GSI."""

    def __init__(
        self, chipset: ChipsetConfig, route: Callable[[int], int], set_gsi: Callable[[int, bool], None]
    ) -> None:
        self._chipset, self._route, self._set_gsi = chipset, route, set_gsi
        self._holders: list[set[tuple[int, int]]] = [set() for _ in range(PIRQS)]
        self._wired: dict[tuple[int, int], int] = {}

    def set_pin(self, devfn: int, pin: int, level: bool) -> None:
        """``pin`` (1..4) of ``devfn`` on the root bus changed. It goes down on the PIRQ on which it went up."""
        holder = devfn, pin
        pirq = self._wired.pop(holder, None)
        if pirq is not None:
            self._holders[pirq].discard(holder)
        if level:
            if pirq is None:
                pirq = self._chipset.pirq(devfn >> 3, pin - 1)
            self._wired[holder] = pirq
            self._holders[pirq].add(holder)
        if pirq is not None:
            self._update(pirq)

    def _update(self, pirq: int) -> None:
        """A route that is switched off has a line, too, which is driven without that PIRQ: so QEMU has it."""
        self._set_gsi(regs.PIRQ_GSI + pirq, bool(self._holders[pirq]))
        line = self._route(pirq) & regs.PIRQ_LINE
        self._set_gsi(line, any(self._holders[other] and self._drives(other, line) for other in range(PIRQS)))

    def _drives(self, pirq: int, line: int) -> bool:
        route = self._route(pirq)
        return not route & regs.PIRQ_UNROUTED and route & regs.PIRQ_LINE == line

    def reset(self) -> None:
        """Nobody holds anything up."""
        self._wired.clear()
        for holders in self._holders:
            holders.clear()
