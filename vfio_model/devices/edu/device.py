"""edu: behaviour.

A DMA is started by a command and happens all at once, 100 ms of virtual time later; while it is pending the DMA
registers keep what they hold. Addresses on the RAM side are cut to ``dma_mask`` (28 bits unless given), as a card
with few address lines would. A transfer that leaves the device's buffer moves nothing and ends as if it had. A failed
DMA raises no error of its own: a read leaves zeros in the buffer. The factorial is done when the write returns.

A reset keeps registers and buffer (QEMU's edu has no reset), but cancels a pending transfer: no DMA survives a reset.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vfio_model.clock import Timer
from vfio_model.devices.edu import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice, Prop
from vfio_model.ranges import U32_MAX, U64_MAX
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

NS_PER_MS = 1_000_000


class EduDevice(PCIDevice):
    """QEMU's ``edu`` (1234:11e8)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    REVISION = regs.REVISION
    CLASS_ID = regs.CLASS_ID
    INTERRUPT_PIN = 1
    BARS = (BarSpec(0, regs.BAR_SIZE, access=(4, 8)),)
    MSI_VECTORS = 1
    ENDIANNESS = "native"
    PROPS = {"dma_mask": Prop(int, regs.DMA_MASK_DEFAULT, "which address bits the device drives on its bus")}
    VMSTATE = VMStateDescription(
        "edu",
        1,
        (
            PARENT,
            Field("dma_mask", Type.U64, equal=True),
            Field("inversion"),
            Field("factorial"),
            Field("status"),
            Field("irq_status"),
            *(Field(name, Type.U64) for name in ("dma_src", "dma_dst", "dma_count", "dma_command")),
            Field("buffer", Type.U8, array=regs.BUFFER_SIZE),
            Field("dma_remaining_ns", Type.U64),
        ),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self.dma_mask: int = self.props["dma_mask"] & U64_MAX
        self.buffer = bytearray(regs.BUFFER_SIZE)
        self.irq_status = 0
        self._inversion = 0
        self._factorial = 0
        self._status = 0
        self._dma = {regs.DMA_SRC: 0, regs.DMA_DST: 0, regs.DMA_COUNT: 0, regs.DMA_COMMAND: 0}
        self._timer: Timer = host.clock.timer(self._transfer)
        self._writers: dict[int, Callable[[int], None]] = {
            regs.INVERSION: self._write_inversion,
            regs.FACTORIAL: self._write_factorial,
            regs.STATUS: self._write_status,
            regs.IRQ_RAISE: self._raise,
            regs.IRQ_ACK: self._acknowledge,
            regs.DMA_COMMAND: self._write_command,
        }

    # -- registers -----------------------------------------------------------------------------------------------

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register; all ones where there is none, or it cannot be read or not in this size."""
        register = regs.BY_OFFSET.get(offset)
        ones = (1 << size * 8) - 1
        if register is None or size not in register.sizes or register.access == "WO":
            return ones
        if offset in self._dma:
            return self._dma[offset] & ones
        values = {
            regs.IDENTIFICATION: regs.IDENTIFICATION_VALUE,
            regs.INVERSION: self._inversion,
            regs.FACTORIAL: self._factorial,
            regs.STATUS: self._status,
            regs.IRQ_STATUS: self.irq_status,
        }
        return values[offset]

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A register; ignored where there is none, or it cannot be written or not in this size."""
        register = regs.BY_OFFSET.get(offset)
        if register is not None and size in register.sizes and register.access != "RO":
            writer = self._writers.get(offset)
            if writer is not None:
                writer(value)
            elif not self.dma_running:
                self._dma[offset] = value
        return MemTxResult.OK

    def _write_inversion(self, value: int) -> None:
        self._inversion = ~value & U32_MAX

    def _write_factorial(self, value: int) -> None:
        product = 1
        # 34! is a multiple of 2**32, and so is every later one: a guest cannot make this long.
        for factor in range(2, min(value, 34) + 1):
            product = product * factor & U32_MAX
        self._factorial = product
        if self._status & regs.STATUS_IRQ_FACTORIAL:
            self._raise(regs.IRQ_CAUSE_FACTORIAL)

    def _write_status(self, value: int) -> None:
        self._status = value & regs.STATUS_IRQ_FACTORIAL

    # -- interrupts ----------------------------------------------------------------------------------------------

    def _raise(self, causes: int) -> None:
        self.irq_status |= causes
        if self.irq_status:
            self.raise_irq()

    def _acknowledge(self, causes: int) -> None:
        self.irq_status &= ~causes
        if not self.irq_status:
            self.lower_irq()

    # -- DMA -----------------------------------------------------------------------------------------------------

    @property
    def dma_running(self) -> bool:
        """Whether a transfer is pending."""
        return bool(self._dma[regs.DMA_COMMAND] & regs.DMA_RUN)

    def _write_command(self, value: int) -> None:
        if value & regs.DMA_RUN and not self.dma_running:
            self._dma[regs.DMA_COMMAND] = value
            started_ms = self.host.clock.now_ns // NS_PER_MS
            self._timer.mod((started_ms + regs.DMA_DELAY_MS) * NS_PER_MS)

    def _transfer(self) -> None:
        command, count = self._dma[regs.DMA_COMMAND], self._dma[regs.DMA_COUNT]
        to_ram = bool(command & regs.DMA_TO_RAM)
        inside = self._dma[regs.DMA_SRC if to_ram else regs.DMA_DST] - regs.BUFFER_ADDRESS
        outside = self._dma[regs.DMA_DST if to_ram else regs.DMA_SRC]
        if 0 <= inside <= regs.BUFFER_SIZE and count <= regs.BUFFER_SIZE - inside:
            part = memoryview(self.buffer)[inside : inside + count]
            iova = self._on_the_bus(outside)
            result = self.dma.write(iova, part) if to_ram else self.dma.read(iova, part)
            self.host.trace("edu_dma", iova=iova, length=count, is_write=to_ram, result=int(result))
        else:
            self.host.trace("edu_dma_out_of_buffer", inside=inside, length=count, is_write=to_ram)
        self._dma[regs.DMA_COMMAND] &= ~regs.DMA_RUN
        if command & regs.DMA_IRQ:
            self._raise(regs.IRQ_CAUSE_DMA)

    def _on_the_bus(self, address: int) -> int:
        driven = address & self.dma_mask
        if driven != address:
            self.host.trace("edu_dma_clamped", address=address, iova=driven)
        return driven

    # -- life ----------------------------------------------------------------------------------------------------

    def _cancel(self) -> None:
        self._timer.cancel()
        self._dma[regs.DMA_COMMAND] &= ~regs.DMA_RUN

    def reset_enter(self) -> None:
        """A pending transfer never happens."""
        self._cancel()
        super().reset_enter()

    def unrealize(self) -> None:
        """The same when the device is taken out."""
        self._cancel()

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, buffer, and how long a pending transfer still waits."""
        return {
            **super().export_state(),
            "dma_mask": self.dma_mask,
            "inversion": self._inversion,
            "factorial": self._factorial,
            "status": self._status,
            "irq_status": self.irq_status,
            **{regs.BY_OFFSET[offset].name: value for offset, value in self._dma.items()},
            "buffer": bytes(self.buffer),
            "dma_remaining_ns": self._timer.remaining_ns or 0,
        }

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same; a transfer that was pending waits for the rest of its time here."""
        self._inversion, self._factorial = state["inversion"], state["factorial"]
        self._status, self.irq_status = state["status"], state["irq_status"]
        self._dma = {offset: state[regs.BY_OFFSET[offset].name] for offset in self._dma}
        self.buffer[:] = state["buffer"]
        super().import_state(state)
        if self.dma_running:
            self._timer.mod(self.host.clock.now_ns + state["dma_remaining_ns"])
