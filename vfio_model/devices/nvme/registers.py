"""nvme: the controller's registers as bytes, which any aligned access may read and dwords may write."""

from __future__ import annotations

from vfio_model.devices.nvme import regs
from vfio_model.ranges import U32_MAX


class RegisterFile:
    """The registers of :data:`regs.REGISTERS` with the values of a reset."""

    def __init__(self) -> None:
        self._bytes = bytearray(regs.REGISTERS_END)
        self._writable = bytearray(regs.REGISTERS_END)
        self._by_offset = {register.offset: register for register in regs.REGISTERS}
        for register in regs.REGISTERS:
            end = register.offset + register.width
            self._writable[register.offset : end] = register.writable.to_bytes(register.width, "little")
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self._bytes[:] = bytes(len(self._bytes))
        self[regs.CAP] = regs.CAP_VALUE
        self[regs.VS] = regs.VERSION

    def __getitem__(self, offset: int) -> int:
        width = self._by_offset[offset].width
        return int.from_bytes(self._bytes[offset : offset + width], "little")

    def __setitem__(self, offset: int, value: int) -> None:
        width = self._by_offset[offset].width
        self._bytes[offset : offset + width] = value.to_bytes(width, "little")

    def read(self, offset: int, size: int) -> int:
        """What a host reads; zero where there is no register."""
        return int.from_bytes(self._bytes[offset : offset + size], "little")

    def replace(self, offset: int, value: int) -> None:
        """A host's write of the dword at ``offset``, a multiple of 4: its writable bits are replaced."""
        if offset >= len(self._bytes):
            return
        end = offset + 4
        writable = int.from_bytes(self._writable[offset:end], "little")
        old = int.from_bytes(self._bytes[offset:end], "little")
        self._bytes[offset:end] = (old & ~writable & U32_MAX | value & writable).to_bytes(4, "little")

    def export(self) -> bytes:
        """All of them."""
        return bytes(self._bytes)

    def load(self, data: bytes) -> None:
        """Take what :meth:`export` gave."""
        self._bytes[:] = data
