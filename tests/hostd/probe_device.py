"""A device that does what its driver says, for tests of what is around a device: one DMA, mapping, interrupt a time."""

from __future__ import annotations

from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.types import DMADirection, MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, PCIDevice, Prop
from vfio_model.pci.doorbell import Doorbell
from vfio_model.pci.msix import STATE as MSIX_STATE
from vfio_model.pci.msix import MsixSpec
from vfio_model.pci.parts import STATE as BAR_MEMORY_STATE
from vfio_model.vmstate.fields import Field, Type, VMStateDescription

IDENTIFICATION = 0x50524F42
ID, IOVA, LENGTH, COMMAND, RESULT, DATA, RUNG, SCRATCH = 0x00, 0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x38
BELL = 0x80
READ, WRITE, MAP, STORE, KEEP, IRQ, READ_MANY, WRITE_MANY, IDLE_GIVE_BACK = range(1, 10)
"""Commands: DMA; a mapping, written through in place, kept past its invalidation; vector DATA; LENGTH pages at once;
give a mapping back when there is nothing else to do."""
PAGE = 4096
AREA = (PAGE, 2 * PAGE)
"""Of BAR 2: what the client may map."""


class ProbeDevice(PCIDevice):
    """1b36:00fe."""

    VENDOR_ID, DEVICE_ID = 0x1B36, 0x00FE
    INTERRUPT_PIN = 1
    BARS = (
        BarSpec(0, PAGE, access=(4, 8)),
        BarSpec(2, 4 * PAGE, access=(1, 8), mmap=(AREA,)),
        BarSpec(4, PAGE, access=(4, 8)),
    )
    MSI_VECTORS = 2
    MSIX = MsixSpec(4, 4, 0, 2048)
    DOORBELLS = (Doorbell(0, BELL), Doorbell(0, BELL + 8, 8, 0x77))
    PROPS = {"scratch": Prop(int, 7, "what the scratch register holds at first")}
    VMSTATE = VMStateDescription(
        "probe", 1, (PARENT, MSIX_STATE, BAR_MEMORY_STATE, Field("scratch", Type.U64), Field("data", Type.U64))
    )

    def realize(self) -> None:
        self.regs = {IOVA: 0, LENGTH: 0, RESULT: 0, DATA: 0, RUNG: 0, SCRATCH: self.props["scratch"]}
        self.mapping: DMAMapping | None = None
        self.keep = self.lazy = False

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        if bar != 0:
            return 0x5A
        return IDENTIFICATION if offset == ID else self.regs.get(offset, 0) & ((1 << 8 * size) - 1)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        if bar == 0 and offset == COMMAND:
            self.regs[RESULT] = self._do(value)
        elif bar == 0 and offset in (BELL, BELL + 8):
            self.regs[RUNG] += 1
        elif bar == 0 and offset in self.regs:
            self.regs[offset] = value
        return MemTxResult.OK

    def _do(self, command: int) -> int:
        iova, length = self.regs[IOVA], self.regs[LENGTH]
        if command == READ:
            data = bytearray(length)
            result = self.dma.read(iova, data)
            self.regs[DATA] = int.from_bytes(data[:8], "little")
            return int(result)
        if command == WRITE:
            return int(self.dma.write(iova, (self.regs[DATA].to_bytes(8, "little") * (length // 8 + 1))[:length]))
        if command in (READ_MANY, WRITE_MANY):
            return self._many(command, [iova + PAGE * number for number in range(length)])
        if command == MAP:
            mapping = self.dma.map(iova, length, DMADirection.FROM_DEVICE, self._invalidated)
            self.mapping = mapping
            return 0 if mapping is None else mapping.length | int(mapping.bounce) << 32
        if command == STORE:
            assert self.mapping is not None
            self.mapping.view[:8] = self.regs[DATA].to_bytes(8, "little")
        elif command == KEEP:
            self.keep = True
        elif command == IDLE_GIVE_BACK:
            self.lazy = True
        elif command == IRQ:
            self.raise_irq(self.regs[DATA])
        return 0

    def _many(self, command: int, iovas: list[int]) -> int:
        if command == WRITE_MANY:
            return int(self.dma.write_many(iovas, 8, self.regs[DATA].to_bytes(8, "little") * len(iovas)))
        data = bytearray(8 * len(iovas))
        result = self.dma.read_many(iovas, 8, data)
        self.regs[DATA] = sum(data)
        return int(result)

    def _invalidated(self, mapping: DMAMapping) -> None:
        if self.lazy:
            self.run_when_idle(self._give_back)
        elif not self.keep:
            self._give_back()

    def _give_back(self) -> bool:
        assert self.mapping is not None
        self.dma.unmap(self.mapping, self.mapping.length)
        self.mapping = None
        return False

    def reset_hold(self) -> None:
        super().reset_hold()
        self.regs[SCRATCH] = self.props["scratch"]

    def export_state(self) -> dict[str, object]:
        return {**super().export_state(), "scratch": self.regs[SCRATCH], "data": self.regs[DATA]}

    def import_state(self, state: dict[str, object]) -> None:  # type: ignore[override]
        self.regs[SCRATCH], self.regs[DATA] = state["scratch"], state["data"]
        super().import_state(state)
