"""A user program for ``/dev/svm``: ten tests of a device that shares a process's address space, with what is expected.

Everything goes through system calls of the process (:class:`Process`): maps, the device's ioctls, loads and stores.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from vfio_model.devices.svm import regs
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import CHUNK, Frames
from vfio_model.guest_drivers.mm import MemFile, Mm
from vfio_model.guest_drivers.svm import Ioctl, SvmDriver, SvmFile
from vfio_model.guest_drivers.vtd_tables import PAGE
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST
from vfio_model.ranges import align_up

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
FIXED: Final = 0xC0_FFEE_000
"""Where the program maps again and again."""
STACK_TOP, STACK_SIZE = 0x7FFD_1000_0000, 64 * KIB
PRI_STRESS_WRITES = 500
LARGE: Final = 32 * MIB
_TWO_MIB, _ONE_GIB = 2, 3
"""Levels of large pages."""


class Failed(Exception):
    """What the program expected did not happen."""


def _expect(holds: bool, what: str) -> None:
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
        _expect(self.device_write(addr, size), f"a write of {size} bytes at {addr:#x} failed")
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
            _expect(found == regs.pattern(piece, offset), f"another pattern at {addr + offset:#x}, {piece} bytes")

    def fill(self, addr: int, size: int, source: random.Random) -> int:
        """Random bytes; their CRC."""
        data = source.randbytes(size)
        self.mm.write(addr, data)
        return regs.crc8(data)


# -- the tests ---------------------------------------------------------------------------------------------------------


def svm_write(process: Process) -> None:
    """Nothing is mapped; one page; five times another buffer at one address; the page once more."""
    _expect(not process.device_write(FIXED, 1), "a write to nothing succeeded")
    with process.mapped(4 * KIB) as page:
        process.write_and_check(page, 4 * KIB)
        for _ in range(5):
            with process.mapped(20 * KIB, FIXED):
                process.write_and_check(FIXED, 20 * KIB)
        process.mm.write(page, bytes(4 * KIB))
        process.write_and_check(page, 4 * KIB)


def svm_read(process: Process) -> None:
    """The same with reads, of two sequences of random data."""
    for seed in (0xB001EA00, 0xB001EA0F):
        _read_all(process, random.Random(seed))


def _read_all(process: Process, source: random.Random) -> None:
    _expect(not process.device_read(FIXED, 1, 0), "a read of nothing succeeded")
    with process.mapped(4 * KIB) as page:
        first = process.fill(page, 4 * KIB, source)
        _expect(process.device_read(page, 4 * KIB, first), "the page has another CRC")
        for _ in range(5):
            with process.mapped(20 * KIB, FIXED):
                crc = process.fill(FIXED, 20 * KIB, source)
                _expect(process.device_read(FIXED, 20 * KIB, crc), "the buffer has another CRC")
                _expect(not process.device_read(FIXED, 20 * KIB, crc ^ 1), "a wrong CRC was found")
        _expect(process.device_read(page, 4 * KIB, first), "the page has another CRC now")


def svm_write_2(process: Process) -> None:
    """Pages of a buffer come in by and by."""
    with process.mapped(20 * KIB, FIXED):
        for page, pages in ((2, 1), (1, 2), (1, 3), (0, 4), (0, 5)):
            process.write_and_check(FIXED + page * PAGE, pages * PAGE)


def huge_pages(process: Process) -> None:
    """Pages of 2 MiB and of 1 GiB."""
    with process.mapped(2 * MIB, level=_TWO_MIB) as start:
        for size in (4096, 4097, 2 * MIB):
            process.write_and_check(start, size)
    with process.mapped(20 * MIB, level=_TWO_MIB) as start:
        process.write_and_check(start, 14 * MIB + 4096)
    with process.mapped(GIB, level=_ONE_GIB) as start:
        for size in (4096, GIB):
            process.write_and_check(start, size)


def permission_error(process: Process) -> None:
    """A file that is mapped twice, to be written and to be read alone."""
    file, size = MemFile(process.frames), 8 * KIB
    mm = process.mm
    writable, readable = mm.mmap(size, file=file), mm.mmap(size, file=file, writable=False)
    try:
        crc = process.fill(writable, size, random.Random(0x9E))
        _expect(process.device_read(writable, size, crc), "the writable view has another CRC")
        _expect(process.device_read(readable, size, crc), "the readable view has another CRC")
        before = mm.read(readable, size)
        _expect(not process.device_write(readable, size), "the readable view was written")
        _expect(mm.read(readable, size) == before, "a write that failed changed the file")
        process.write_and_check(writable, size)
        process.check_pattern(readable, size)
    finally:
        mm.munmap(writable, size)
        mm.munmap(readable, size)
        file.close()


def stack_operations(process: Process) -> None:
    """Variables beside each other."""
    mm, base = process.mm, STACK_TOP - 2 * PAGE
    for size in (1, 2, 4, 8):
        at = base + 8 * size
        mm.write(at - size, b"\xee" * (3 * size))
        process.write_and_check(at, size)
        around = mm.read(at - size, size) + mm.read(at + size, size)
        _expect(around == b"\xee" * (2 * size), f"neighbours of {size} bytes were written")
    mm.write(base, (0xCAFE_CAFE_DEAD_C0DE).to_bytes(8, "little"))
    _expect(process.device_read(base, 8, 0x16), "8 bytes have another CRC")
    mm.write(base, b"\xee" * 258)
    process.write_and_check(base + 1, 256)
    _expect(mm.read(base, 1) + mm.read(base + 257, 1) == b"\xee\xee", "neighbours of 256 bytes were written")


def interrupt_range(process: Process) -> None:
    """No page where interrupt requests go is a buffer."""
    for page in range(INTERRUPT_FIRST, INTERRUPT_LAST, PAGE):
        _expect(not process.device_write(page, 1), f"a write at {page:#x} succeeded")


def kernel_mem_access(process: Process) -> None:
    """The kernel's memory is no process's, and no process is privileged."""
    size = 4 * KIB
    with process.mapped(size) as own:
        crc = process.fill(own, size, random.Random(0x4E))
        kernel = process.kernel_buffer(own, size)
        process.privileged(True)
        try:
            _expect(not process.device_read(kernel, size, crc), "a privileged read of the kernel succeeded")
            _expect(not process.device_read(own, size, crc), "a privileged read of the process succeeded")
        finally:
            process.privileged(False)
        _expect(not process.device_read(kernel, size, crc), "a read of the kernel succeeded")
        _expect(process.device_read(own, size, crc), "a read of the process failed")


def pri_stress(process: Process) -> None:
    """A buffer that is paged out again and again."""
    size = 40 * KIB
    with process.mapped(size) as start:
        for number in range(PRI_STRESS_WRITES):
            length = number * PAGE % (size + PAGE)
            if length:
                _expect(process.device_write(start, length), f"write {number} of {length} bytes failed")
                process.mm.pageout(start, size)
                process.check_pattern(start, length)
                process.mm.pageout(start, size)


def fork(process: Process) -> None:
    """A child has the device write to its copy."""
    size, offset, part = 20 * KIB, 4 * KIB, 16 * KIB
    with process.mapped(size, FIXED):
        process.write_and_check(FIXED, size)
        process.close()
        process.fill(FIXED, size, random.Random(0xBEE))
        before = process.mm.read(FIXED, size)
        child = process.fork()
        child.open()
        try:
            _expect(_busy(process), "the device was opened twice")
            child.write_and_check(FIXED + offset, part)
            _expect(child.mm.read(FIXED, offset) == before[:offset], "the child's first page has changed")
        finally:
            child.exit()
            process.open()
        _expect(process.mm.read(FIXED, size) == before, "the parent's data has changed")


def _busy(process: Process) -> bool:
    try:
        process.driver.open(process.mm)
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


TESTS: Final[dict[str, Callable[[Process], None]]] = {
    "svm_write": svm_write,
    "svm_read": svm_read,
    "svm_write_2": svm_write_2,
    "huge_pages": huge_pages,
    "permission_error": permission_error,
    "stack_operations": stack_operations,
    "interrupt_range": interrupt_range,
    "kernel_mem_access": kernel_mem_access,
    "pri_stress": pri_stress,
    "fork": fork,
}
"""By name, in the program's order."""


class Result(NamedTuple):
    """What became of a test: ``reason`` why it failed, empty when it did not."""

    name: str
    reason: str
    page_requests: int
    page_faults: int
    invalidations: int

    @property
    def ok(self) -> bool:
        """Whether everything was as expected."""
        return not self.reason


def run(name: str, cpu: Cpu, frames: Frames, driver: SvmDriver) -> Result:
    """Test ``name`` in a process of its own; no frame of it stays behind.

    :raise KeyError: there is no such test.
    """
    test, queue, sva = TESTS[name], driver.sva.queue, driver.sva
    taken, requests, invalidations = frames.taken, queue.requests, sva.invalidations
    process = Process(cpu, frames, driver)
    reason = ""
    try:
        process.open()
        test(process)
    except Failed as failure:
        reason = str(failure)
    except OSError as error:
        reason = f"{type(error).__name__}: {error}"
    faults = process.mm.faults
    process.exit()
    frames.check()
    if not reason and frames.taken != taken:
        reason = f"{frames.taken - taken} pages stayed behind"
    return Result(name, reason, queue.requests - requests, faults, sva.invalidations - invalidations)
