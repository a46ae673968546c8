"""A process of a guest that has ``/dev/svm`` open: what a user program can do, as system calls, loads and stores."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from vfio_model.devices.svm import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import CHUNK, Frames
from vfio_model.guest_drivers.mm import Mm
from vfio_model.guest_drivers.svm import Ioctl, SvmDriver, SvmFile
from vfio_model.guest_drivers.vtd_tables import PAGE
from vfio_model.ranges import align_up

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
STACK_TOP, STACK_SIZE = 0x7FFD_1000_0000, 64 * KIB
LARGE: Final = 32 * MIB
"""Bytes that are looked at one by one; of more, a part."""


class Failed(Exception):
    """What the program expected did not happen."""


def expect(holds: bool, what: str) -> None:
    """:raise Failed: ``what`` happened."""
    if not holds:
        raise Failed(what)


class Process:
    """A process with a stack, which opens ``/dev/svm`` when it wants."""

    def __init__(self, cpu: Cpu, frames: Frames, driver: SvmDriver, mm: Mm | None = None) -> None:
        self._cpu, self.frames, self.driver = cpu, frames, driver
        if mm is None:
            mm = Mm(cpu, frames, driver.kernel)
            mm.mmap(STACK_SIZE, STACK_TOP - STACK_SIZE)
        self.mm = mm
        self._arguments = STACK_TOP - PAGE
        self._file: SvmFile | None = None

    @property
    def file(self) -> SvmFile:
        """The open device."""
        assert self._file is not None, "open() comes first"
        return self._file

    def open(self) -> None:
        """:raise OSError: EBUSY."""
        self._file = self.driver.open(self.mm)

    def close(self) -> None:
        """The device, if it is open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def exit(self) -> None:
        """The end."""
        self.close()
        self.mm.exit()

    def fork(self) -> Process:
        """A child with a copy of everything but the device."""
        return Process(self._cpu, self.frames, self.driver, self.mm.fork())

    @contextmanager
    def mapped(self, size: int, addr: int | None = None, *, level: int = 1) -> Iterator[int]:
        """An anonymous area for the length of a ``with``."""
        start = self.mm.mmap(size, addr, level=level)
        try:
            yield start
        finally:
            self.mm.munmap(start, align_up(size, (PAGE, 2 * MIB, GIB)[level - 1]))

    # -- the device

    def _set(self, request: Ioctl, *words: int) -> None:
        self.mm.write(self._arguments, b"".join(word.to_bytes(8, "little") for word in words))
        self.file.ioctl(request, self._arguments)

    def device_write(self, addr: int, size: int) -> bool:
        """Have the device write its pattern; whether it says that it did."""
        self._set(Ioctl.SET_ADDRESS, addr)
        self._set(Ioctl.SET_SIZE, size)
        return self.file.ioctl(Ioctl.START_WRITE) == regs.STATUS_OK

    def device_read(self, addr: int, size: int, crc: int) -> bool:
        """Have the device read; whether it found ``crc``."""
        self._set(Ioctl.SET_ADDRESS, addr)
        self._set(Ioctl.SET_SIZE, size)
        self._set(Ioctl.SET_CRC, crc)
        return self.file.ioctl(Ioctl.START_READ) == regs.STATUS_OK

    def privileged(self, on: bool) -> None:
        """Whether the device's requests are."""
        self._set(Ioctl.SET_OPTIONS, regs.OPTION_PRIVILEGED if on else 0)

    def kernel_buffer(self, source: int, size: int) -> int:
        """The address of memory of the kernel's with what is at ``source``."""
        self._set(Ioctl.KERNEL_ALLOC, source, size, 0)
        return int.from_bytes(self.mm.read(self._arguments + 16, 8), "little")

    def write_and_check(self, addr: int, size: int) -> None:
        """:raise Failed: the device's pattern is not there."""
        expect(self.device_write(addr, size), f"a write of {size} bytes at {addr:#x} failed")
        self.check_pattern(addr, size)

    def check_pattern(self, addr: int, size: int) -> None:
        """Of what is large, one page of each MiB between the first and the last.

        :raise Failed: the device's pattern is not there.
        """
        for offset in range(0, size, CHUNK):
            piece = min(CHUNK, size - offset)
            if size > LARGE and MIB <= offset < size - MIB:
                if offset % MIB:
                    continue
                piece = PAGE
            found = self.mm.read(addr + offset, piece)
            expect(found == regs.pattern(piece, offset), f"another pattern at {addr + offset:#x}, {piece} bytes")

    def fill(self, addr: int, size: int, source: random.Random) -> int:
        """Random bytes; their CRC."""
        data = source.randbytes(size)
        self.mm.write(addr, data)
        return regs.crc8(data)
