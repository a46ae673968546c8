"""I/O ports, as the instructions IN and OUT reach them.

One access goes to whoever answers its first byte, whole; it is not split where another device begins. An access that is
not naturally aligned in the device's own ports, or of a size that it does not take, reads zero and writes nothing;
where nobody answers, an aligned one reads all ones. So QEMU has it.
"""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.machine.q35 import regs
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import IORegion, MemoryRegion, RegionOps
from vfio_model.memory.types import MemTxResult


class PortSpace:
    """64 KiB of ports; devices are subregions of :attr:`region`."""

    def __init__(self) -> None:
        self.region = MemoryRegion("io", regs.IO_SIZE)
        self.space = AddressSpace("I/O", self.region)

    def read(self, port: int, size: int) -> int:
        """IN: ``size`` is 1, 2 or 4."""
        found = self._find(port)
        if found is None:
            return 0 if port % size else (1 << 8 * size) - 1
        ops, offset = found
        step = min(size, ops.max_access_size)
        if offset % size or step < ops.min_access_size:
            return 0
        value = 0
        for at in range(0, size, step):
            value |= ((ops.read(offset + at, step) or 0) & (1 << 8 * step) - 1) << 8 * at
        return value

    def write(self, port: int, size: int, value: int) -> None:
        """OUT: ``size`` is 1, 2 or 4."""
        found = self._find(port)
        if found is None:
            return
        ops, offset = found
        step = min(size, ops.max_access_size)
        if offset % size or step < ops.min_access_size:
            return
        for at in range(0, size, step):
            ops.write(offset + at, step, value >> 8 * at & (1 << 8 * step) - 1)

    def _find(self, port: int) -> tuple[RegionOps, int] | None:
        answers = self.space.view.lookup(port)
        if answers is None or not isinstance(answers.region, IORegion):
            return None
        return answers.region.ops, port - answers.start + answers.offset


class ResetControl:
    """The ops of the reset control register (ICH9 datasheet, "RST_CNT")."""

    min_access_size, max_access_size = 1, 4

    def __init__(self, request: Callable[[], None]) -> None:
        self._request, self.value = request, 0

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``."""
        return self.value

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """RST_CPU asks for a reset; it does not stay."""
        if value & regs.RESET_CPU:
            self._request()
        else:
            self.value = value & regs.RESET_CONTROL_KEPT
        return MemTxResult.OK
