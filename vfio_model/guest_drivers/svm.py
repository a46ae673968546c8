"""A driver for svm, the demonstration device for shared virtual memory: ``/dev/svm``.

One process at a time has it open; its address space is the device's until then. Commands block until the device's
message comes; meanwhile the kernel serves page requests. The message is written to a word of memory of the driver's.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Final

from vfio_model.devices.svm import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.mm import Mm
from vfio_model.guest_drivers.pci import ConfigAccess, DriverError, enable_msi, set_command
from vfio_model.guest_drivers.process_tables import KernelSpace
from vfio_model.guest_drivers.translation_services import disable, enable_ats, enable_pasid, enable_pri
from vfio_model.guest_drivers.vtd_sva import Sva

_WRITE, _READ = 1, 2
_WORD: Final = 8
TRIES: Final = 200_000
"""How often the message is looked for before the device counts as dead."""
LOOK: Final = 100
"""After so many times the driver looks whether there is a device at all."""
STEP_NS: Final = 1000
MESSAGE: Final = 0x5356


def _ioctl(direction: int, number: int, size: int) -> int:
    """A request number as of Linux's ``_IOC``, of type ``I``."""
    return direction << 30 | size << 16 | ord("I") << 8 | number


class Ioctl(IntEnum):
    """Requests. SET: a pointer to 64 bits. KERNEL_ALLOC: a pointer to {source, size, result}, 64 bits each."""

    SET_ADDRESS = _ioctl(_WRITE, 0x40, _WORD)
    SET_CRC = _ioctl(_WRITE, 0x41, _WORD)
    SET_SIZE = _ioctl(_WRITE, 0x42, _WORD)
    START_WRITE = _ioctl(0, 0x43, 0)
    START_READ = _ioctl(0, 0x44, 0)
    KERNEL_ALLOC = _ioctl(_WRITE | _READ, 0x45, 3 * _WORD)
    SET_OPTIONS = _ioctl(_WRITE, 0x46, _WORD)


_REGISTERS: Final = {
    Ioctl.SET_ADDRESS: regs.ADDRESS,
    Ioctl.SET_CRC: regs.EXPECTED_CRC,
    Ioctl.SET_SIZE: regs.SIZE,
    Ioctl.SET_OPTIONS: regs.OPTIONS,
}


class SvmDriver:
    """The driver of function ``devfn`` of bus 0, whose BAR is at ``bar``. ``mailbox``: a word of memory, by the
    address that the function's requests without PASID reach it at.

    :raise DriverError: it is another device, or lacks what it takes.
    """

    def __init__(
        self,
        cpu: Cpu,
        config: ConfigAccess,
        devfn: int,
        bar: int,
        sva: Sva,
        kernel: KernelSpace,
        mailbox: int,
    ) -> None:
        self._cpu, self._bar, self._mailbox = cpu, bar, mailbox
        self.devfn, self.sva, self.kernel = devfn, sva, kernel
        self._config = config
        if cpu.mmio_read(bar + regs.COMMAND, 8) != regs.IDENTIFICATION_VALUE:
            raise DriverError(f"no svm device at {bar:#x}")
        set_command(config, devfn)
        enable_msi(config, devfn, mailbox, MESSAGE)
        enable_pasid(config, devfn)
        enable_pri(config, devfn)
        enable_ats(config, devfn)
        self._owner: SvmFile | None = None

    def open(self, mm: Mm) -> SvmFile:
        """The device works on ``mm`` from now on.

        :raise OSError: EBUSY: it is open; ENOSPC: no PASID is free.
        """
        if self._owner is not None:
            raise OSError(errno.EBUSY, "/dev/svm is open")
        self._owner = SvmFile(self, mm)
        return self._owner

    def remove(self) -> None:
        """The driver leaves the function as it found it; the device is not open."""
        disable(self._config, self.devfn)

    # -- for its files

    def released(self) -> None:
        """It is not open any more."""
        self._owner = None

    def put(self, register: int, value: int) -> None:
        """Write a register."""
        self._cpu.mmio_write(self._bar + register, 4 if register >= regs.PASID else 8, value)

    def start(self, command: int) -> None:
        """Start ``command``; :attr:`done` says when it is over."""
        self._cpu.write_memory(self._mailbox, bytes(4))
        self.put(regs.COMMAND, command)

    @property
    def done(self) -> bool:
        """Whether the device's message has come since :meth:`start`."""
        return int.from_bytes(self._cpu.read_memory(self._mailbox, 4), "little") == MESSAGE

    @property
    def status(self) -> int:
        """How the last command ended."""
        return self._cpu.mmio_read(self._bar + regs.ADDRESS, 8)

    def run(self, command: int) -> int:
        """Carry out ``command``; the status.

        :raise DriverError: the device's message does not come.
        """
        self.start(command)
        for tries in range(TRIES):
            if self.done:
                return self.status
            if not self.sva.queue.handle():
                self._cpu.clock_step(STEP_NS)
            if tries % LOOK == LOOK - 1 and self._cpu.mmio_read(self._bar, 8) != regs.IDENTIFICATION_VALUE:
                raise DriverError("svm: the device is gone")
        raise DriverError("svm: the device's message does not come")


class SvmFile:
    """``/dev/svm`` as a process has it open."""

    def __init__(self, driver: SvmDriver, mm: Mm) -> None:
        self._driver, self._mm = driver, mm
        self._bond = driver.sva.bind(driver.devfn, mm)
        self._kernel: list[tuple[int, int]] = []
        driver.put(regs.PASID, self._bond.pasid)

    @property
    def pasid(self) -> int:
        """The one that the device uses."""
        return self._bond.pasid

    def ioctl(self, request: int, argument: int = 0) -> int:
        """What the call returns: the status of a command, else 0. ``argument`` is an address of the process.

        :raise OSError: EINVAL: no such request; EFAULT: a pointer to nothing.
        """
        if request in _REGISTERS:
            self._driver.put(_REGISTERS[Ioctl(request)], self._word(argument))
            return 0
        if request == Ioctl.START_WRITE:
            return self._driver.run(regs.COMMAND_WRITE)
        if request == Ioctl.START_READ:
            return self._driver.run(regs.COMMAND_READ)
        if request == Ioctl.KERNEL_ALLOC:
            source, size = self._word(argument), self._word(argument + _WORD)
            address = self._driver.kernel.vmalloc(self._mm.read(source, size))
            self._kernel.append((address, size))
            self._mm.write(argument + 2 * _WORD, address.to_bytes(_WORD, "little"))
            return 0
        raise OSError(errno.EINVAL, f"ioctl {request:#x}")

    def _word(self, address: int) -> int:
        return int.from_bytes(self._mm.read(address, _WORD), "little")

    def close(self) -> None:
        """The process is the device's no more; the next may open it."""
        self._driver.sva.unbind(self._bond)
        self._driver.put(regs.PASID, regs.PASID_DISABLE)
        for address, size in self._kernel:
            self._driver.kernel.vfree(address, size)
        self._driver.released()
