"""iommu-testdev: behaviour.

Arm with the doorbell, then read the trigger: the device writes a pattern to an I/O virtual address and, having seen
that it worked, reads it back *by guest-physical address*, behind the IOMMU. The result says whether translation led
where the test expected. Everything happens inside the trigger's read; no virtual time passes. Address, length and
attributes are those of that moment.

As QEMU's device, it takes the IOMMU's address space itself: bus mastering need not be on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vfio_model.devices.iommu_testdev import regs
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PARENT, DeviceHost, PCIDevice
from vfio_model.ranges import U32_MAX, wrap64
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

CHUNK = 64 * 1024
"""Bytes moved at a time: the guest chooses the length, not how much memory it costs."""


class IOMMUTestDevice(PCIDevice):
    """QEMU's ``iommu-testdev`` (1b36:0005)."""

    VENDOR_ID = regs.VENDOR_ID
    DEVICE_ID = regs.DEVICE_ID
    BARS = (BarSpec(0, regs.BAR_SIZE, access=(4, 4)),)
    BUS_MASTER_GATED = False
    VMSTATE = VMStateDescription(
        "iommu-testdev",
        1,
        (PARENT, *(Field(each.name) for each in regs.REGISTERS if each.access == "RW"), Field("armed", Type.BOOL)),
    )

    def __init__(self, host: DeviceHost, **props: object) -> None:
        super().__init__(host, **props)
        self._registers: dict[int, int] = {}
        self._armed = False
        self._clear()

    def _clear(self) -> None:
        self._registers = {register.offset: 0 for register in regs.REGISTERS if register.access == "RW"}
        self._registers[regs.RESULT] = regs.RESULT_IDLE
        self._registers[regs.ATTRIBUTES] = regs.ATTRIBUTES_RESET
        self._armed = False

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """A register; 0 where there is none. Reading the trigger runs the DMA."""
        if offset == regs.TRIGGER:
            self._trigger()
        return self._registers.get(offset, 0)

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """A register; ignored where there is none."""
        if offset == regs.DOORBELL:
            self._armed = bool(value & regs.DOORBELL_ARM)
            self._registers[regs.RESULT] = regs.RESULT_ARMED if self._armed else regs.RESULT_IDLE
        elif offset in self._registers:
            self._registers[offset] = value & U32_MAX
        return MemTxResult.OK

    def _pair(self, low: int, high: int) -> int:
        return self._registers[high] << 32 | self._registers[low]

    def _trigger(self) -> None:
        if self._armed:
            self._armed = False
            result = self._run()
        else:
            result = regs.RESULT_NOT_ARMED
        self._registers[regs.RESULT] = result
        self.host.trace("iommu_testdev_dma_result", result=result)

    def _run(self) -> int:
        length = self._registers[regs.LENGTH]
        if length == 0:
            return regs.RESULT_BAD_LENGTH
        if _inconsistent(self._registers[regs.ATTRIBUTES]):
            return regs.RESULT_BAD_ATTRIBUTES
        iova, gpa = self._pair(regs.IOVA_LO, regs.IOVA_HI), self._pair(regs.GPA_LO, regs.GPA_HI)
        if self._write_pattern(iova, length):
            return regs.RESULT_DMA_FAILED
        return self._verify(gpa, length)

    def _write_pattern(self, iova: int, length: int) -> MemTxResult:
        pattern = memoryview(regs.PATTERN.to_bytes(4, "little") * (CHUNK // 4))
        for done in range(0, length, CHUNK):
            result = self.dma.write(wrap64(iova + done), pattern[: min(CHUNK, length - done)])
            if result:
                return result
        return MemTxResult.OK

    def _verify(self, gpa: int, length: int) -> int:
        pattern = regs.PATTERN.to_bytes(4, "little") * (CHUNK // 4)
        buffer = bytearray(CHUNK)
        mismatch = False
        for done in range(0, length, CHUNK):
            size = min(CHUNK, length - done)
            part = memoryview(buffer)[:size]
            if self.system.read(wrap64(gpa + done), part):
                return regs.RESULT_READ_FAILED
            mismatch |= part != pattern[:size]
        return regs.RESULT_MISMATCH if mismatch else regs.RESULT_OK

    def reset_hold(self) -> None:
        """Registers go to their reset values, the device is disarmed."""
        super().reset_hold()
        self._clear()

    # -- migration -----------------------------------------------------------------------------------------------

    def export_state(self) -> State:
        """Registers, and whether it is armed."""
        registers = {regs.BY_OFFSET[offset].name: value for offset, value in self._registers.items()}
        return {**super().export_state(), **registers, "armed": self._armed}

    def import_state(self, state: Mapping[str, Any]) -> None:
        """The same."""
        self._registers = {offset: state[regs.BY_OFFSET[offset].name] for offset in self._registers}
        self._armed = state["armed"]
        super().import_state(state)


def _inconsistent(attributes: int) -> bool:
    """Whether ``secure`` contradicts a valid Arm security space of Secure or NonSecure."""
    if not attributes & regs.ATTRIBUTES_SPACE_VALID:
        return False
    space = attributes >> regs.ATTRIBUTES_SPACE_SHIFT & regs.ATTRIBUTES_SPACE_MASK
    secure = bool(attributes & regs.ATTRIBUTES_SECURE)
    return space in (regs.SPACE_SECURE, regs.SPACE_NONSECURE) and secure != (space == regs.SPACE_SECURE)
