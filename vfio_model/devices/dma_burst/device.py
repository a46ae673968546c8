"""dma_burst: behaviour.

::

            START            last access, STOP, failure with STOP_ON_FAILURE
    idle ──────────► running ─────────────────────────────────────────────► done ──(write DONE)──► idle
                     │     ▲
                     └─────┘ a slice: SLICE accesses in the background, FOREGROUND_SLICE otherwise

Within a slice the methods of the DMA space are bound to locals, because they are what is measured. They are bound
anew for each slice: bus mastering, an IOMMU or the topology may have changed in between.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vfio_model.devices.dma_burst import regs
from vfio_model.errors import VMStateError
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.ranges import U32_MAX, U64_MAX
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

SLICE = 64
"""Accesses between two looks at the rest of the process, in the background."""
FOREGROUND_SLICE = 4096
BATCH_BYTES = 4 << 20
"""The most that one batch moves."""


class DMABurstDevice(PCIDevice):
    """This project's DMA load generator (1234:0b57)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    REVISION = 1
    INTERRUPT_PIN = 1
    MSI_VECTORS = 1
    BARS = (BarSpec(0, regs.BAR_SIZE, access=(4, 8)),)
    VMSTATE = VMStateDescription(
        "dma-burst",
        1,
        (
            PARENT,
            *(Field(each.name, Type.U64) for each in regs.REGISTERS if each.offset != regs.COMMAND),
            Field("running_command", Type.U64),
            Field("next", Type.U64),
            Field("list_length"),
            Field("list_entries", Type.U64, array="list_length"),
        ),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self._registers: dict[int, int] = {}
        self._scheduled = False
        self._iovas: Sequence[int] = ()
        self._buffer = bytearray()
        self._filled: tuple[int, int] | None = None
        self._command = 0
        self._next = 0
        self._clear()

    def _clear(self) -> None:
        self._registers = {register.offset: 0 for register in regs.REGISTERS}
        self._registers[regs.IDENTIFICATION] = regs.IDENTIFICATION_VALUE
        self._registers[regs.FIRST_FAILED] = regs.NO_FAILURE

    # -- registers -----------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register or half of one; 0 where there is none."""
        value = 0 if offset & ~7 == regs.COMMAND else self._registers.get(offset & ~7, 0)
        return value >> 32 if offset & 4 else value & (U64_MAX if size == 8 else U32_MAX)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A register or half of one; ignored where there is none or it cannot be written."""
        register = regs.BY_OFFSET.get(offset & ~7)
        if register is None or register.access == "RO":
            return MemTxResult.OK
        old = self._registers[register.offset]
        if offset & 4:
            value = (value & U32_MAX) << 32 | old & U32_MAX
        elif size == 4 and register.access == "RW":
            value = old & ~U32_MAX | value
        if register.offset == regs.COMMAND:
            self._write_command(value)
        elif register.offset == regs.STATUS:
            self._acknowledge(value)
        else:
            self._registers[register.offset] = value
        return MemTxResult.OK

    def _acknowledge(self, value: int) -> None:
        clear = value & (regs.STATUS_DONE | regs.STATUS_FAILURES | regs.STATUS_REFUSED)
        self._registers[regs.STATUS] &= ~clear
        if clear & regs.STATUS_DONE:
            self.lower_irq()

    # -- a run ---------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return bool(self._registers[regs.STATUS] & regs.STATUS_RUNNING)

    def _write_command(self, command: int) -> None:
        if command & regs.COMMAND_STOP:
            if self.running:
                self._finish()
        elif command & regs.COMMAND_START:
            if self.running or not self._fits(command):
                self._registers[regs.STATUS] |= regs.STATUS_REFUSED
            else:
                self._start(command)

    def _fits(self, command: int) -> bool:
        count = self._registers[regs.COUNT]
        limit = regs.MAX_LIST if command & regs.COMMAND_LIST else regs.MAX_COUNT
        background = bool(command & regs.COMMAND_BACKGROUND)
        if not 1 <= self._registers[regs.LENGTH] <= regs.MAX_LENGTH:
            return False
        if command & regs.COMMAND_FOREVER and not background:
            return False
        return count >= 1 and (count <= limit or (background and not command & regs.COMMAND_LIST))

    def _start(self, command: int) -> None:
        registers = self._registers
        registers[regs.STATUS] = regs.STATUS_RUNNING
        registers[regs.COMPLETED] = registers[regs.FAILED] = registers[regs.LAST_RESULT] = 0
        registers[regs.FIRST_FAILED] = regs.NO_FAILURE
        self._command, self._next = command, 0
        if command & regs.COMMAND_LIST and not self._load_list():
            self._finish()
        elif not command & regs.COMMAND_BACKGROUND:
            while self._advance(FOREGROUND_SLICE):
                pass
        elif not self._scheduled:
            self._scheduled = True
            self.run_when_idle(self._background_slice)

    def _background_slice(self) -> bool:
        self._scheduled = self.running and self._advance(SLICE)
        return self._scheduled

    def _advance(self, most: int) -> bool:
        """Run one slice of at most ``most`` accesses; whether the run goes on."""
        count = self._registers[regs.COUNT]
        size = min(most, count - self._next)
        if self._command & regs.COMMAND_BATCH:
            size = min(size, max(1, BATCH_BYTES // self._registers[regs.LENGTH]))
            failed = self._batch(self._addresses(self._next, size))
        else:
            failed = self._one_by_one(self._addresses(self._next, size))
        self._next += size
        if self._next >= count and self._command & regs.COMMAND_FOREVER:
            self._next = 0
        over = self._next >= count or (failed and self._command & regs.COMMAND_STOP_ON_FAILURE)
        if over:
            self._finish()
        return not over

    def _finish(self) -> None:
        status = self._registers[regs.STATUS] & ~regs.STATUS_RUNNING | regs.STATUS_DONE
        self._registers[regs.STATUS] = status
        self._iovas = ()
        if self._command & regs.COMMAND_IRQ:
            self.raise_irq()

    # -- addresses and data --------------------------------------------------------------------------------------

    def _load_list(self) -> bool:
        count = self._registers[regs.COUNT]
        table = bytearray(count * 8)
        result = self.dma.read(self._registers[regs.LIST], table)
        if result:
            self._note_failure(self._registers[regs.LIST], result)
            return False
        words = memoryview(table).cast("Q")
        if sys.byteorder == "big":
            words = memoryview(bytearray(b"".join(word.to_bytes(8, "little") for word in words))).cast("Q")
        self._iovas = words
        return True

    def _addresses(self, first: int, size: int) -> Sequence[int]:
        """Addresses of the accesses ``first`` … ``first + size - 1`` of the run."""
        if self._command & regs.COMMAND_LIST:
            return self._iovas[first : first + size]
        base, stride, span = (self._registers[name] for name in (regs.IOVA, regs.STRIDE, regs.SPAN))
        if stride and not span and base + (first + size) * stride <= U64_MAX:
            return range(base + first * stride, base + (first + size) * stride, stride)
        turn = span or U64_MAX
        return [base + (index % turn) * stride & U64_MAX for index in range(first, first + size)]

    def _data(self, accesses: int) -> memoryview:
        """A buffer for so many accesses; for a write run it holds the pattern."""
        size = accesses * self._registers[regs.LENGTH]
        if len(self._buffer) < size:
            self._buffer = bytearray(size)
            self._filled = None
        if self._command & regs.COMMAND_WRITE:
            wanted = (self._registers[regs.PATTERN], len(self._buffer))
            if self._filled != wanted:
                self._buffer[:] = (wanted[0].to_bytes(8, "little") * (wanted[1] // 8 + 1))[: wanted[1]]
                self._filled = wanted
        else:
            self._filled = None
        return memoryview(self._buffer)[:size]

    # -- moving --------------------------------------------------------------------------------------------------

    def _one_by_one(self, iovas: Iterable[int]) -> bool:
        data = self._data(1)
        access: Callable[[int, memoryview], MemTxResult]
        access = self.dma.write if self._command & regs.COMMAND_WRITE else self.dma.read
        result = MemTxResult.OK
        failures = 0
        stop = self._command & regs.COMMAND_STOP_ON_FAILURE
        done = 0
        for iova in iovas:
            result = access(iova, data)
            if result:
                failures += 1
                self._note_failure(iova, result)
                if stop:
                    break
            else:
                done += 1
        self._note_slice(done, result, data)
        return failures > 0

    def _batch(self, iovas: Sequence[int]) -> bool:
        data = self._data(len(iovas))
        move = self.dma.write_many if self._command & regs.COMMAND_WRITE else self.dma.read_many
        result = move(iovas, self._registers[regs.LENGTH], data)
        if result:
            self._note_failure(iovas[0], result)
        self._note_slice(0 if result else len(iovas), result, data)
        return bool(result)

    def _note_slice(self, done: int, result: MemTxResult, data: memoryview) -> None:
        self._registers[regs.COMPLETED] += done
        self._registers[regs.LAST_RESULT] = int(result)
        if not self._command & regs.COMMAND_WRITE:
            self._registers[regs.DATA] = int.from_bytes(data[:8], "little")

    def _note_failure(self, iova: int, result: MemTxResult) -> None:
        registers = self._registers
        if not registers[regs.FAILED]:
            registers[regs.FIRST_FAILED] = iova
        registers[regs.FAILED] += 1
        registers[regs.LAST_RESULT] = int(result)
        registers[regs.STATUS] |= regs.STATUS_FAILURES

    # -- life ----------------------------------------------------------------------------------------------------

    def _abandon(self) -> None:
        self._registers[regs.STATUS] &= ~regs.STATUS_RUNNING
        self._iovas = ()

    def reset_enter(self) -> None:
        """A run in progress ends without a trace."""
        self._abandon()
        super().reset_enter()

    def reset_hold(self) -> None:
        """Registers go to their reset values."""
        super().reset_hold()
        self._clear()

    def unrealize(self) -> None:
        """The same when the device is taken out."""
        self._abandon()

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, and the run in progress: its command, its list, where it is."""
        registers = {each.name: self._registers[each.offset] for each in regs.REGISTERS if each.offset != regs.COMMAND}
        return {
            **super().export_state(),
            **registers,
            "running_command": self._command,
            "next": self._next,
            "list_length": len(self._iovas),
            "list_entries": list(self._iovas),
        }

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """A list has as many entries as a guest could have given."""
        super().check_state(state, where=where)
        if state["list_length"] > regs.MAX_LIST:
            raise VMStateError(f"a list of {state['list_length']} addresses", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; a run that was in progress goes on."""
        for register in regs.REGISTERS:
            if register.offset != regs.COMMAND:
                self._registers[register.offset] = state[register.name]
        self._command, self._next, self._iovas = state["running_command"], state["next"], state["list_entries"]
        super().import_state(state)
        if self.running and not self._scheduled:
            self._scheduled = True
            self.run_when_idle(self._background_slice)
