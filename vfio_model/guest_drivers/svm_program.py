"""A user program for ``/dev/svm``: ten tests of a device that shares a process's address space, with what is expected.

A process (:mod:`vfio_model.guest_drivers.svm_process`) does everything: maps, the device's ioctls, loads and stores.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.frames import Frames
from vfio_model.guest_drivers.mm import MemFile
from vfio_model.guest_drivers.svm import SvmDriver
from vfio_model.guest_drivers.svm_process import GIB, KIB, MIB, STACK_TOP, Failed, Process, expect
from vfio_model.guest_drivers.vtd_tables import PAGE
from vfio_model.iommu.vtd.regs import INTERRUPT_FIRST, INTERRUPT_LAST

FIXED: Final = 0xC0_FFEE_000
"""Where the program maps again and again."""
PRI_STRESS_WRITES = 500
_TWO_MIB, _ONE_GIB = 2, 3
"""Levels of large pages."""


# -- the tests ---------------------------------------------------------------------------------------------------------


def svm_write(process: Process) -> None:
    """Nothing is mapped; one page; five times another buffer at one address; the page once more."""
    expect(not process.device_write(FIXED, 1), "a write to nothing succeeded")
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
    expect(not process.device_read(FIXED, 1, 0), "a read of nothing succeeded")
    with process.mapped(4 * KIB) as page:
        first = process.fill(page, 4 * KIB, source)
        expect(process.device_read(page, 4 * KIB, first), "the page has another CRC")
        for _ in range(5):
            with process.mapped(20 * KIB, FIXED):
                crc = process.fill(FIXED, 20 * KIB, source)
                expect(process.device_read(FIXED, 20 * KIB, crc), "the buffer has another CRC")
                expect(not process.device_read(FIXED, 20 * KIB, crc ^ 1), "a wrong CRC was found")
        expect(process.device_read(page, 4 * KIB, first), "the page has another CRC now")


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
        expect(process.device_read(writable, size, crc), "the writable view has another CRC")
        expect(process.device_read(readable, size, crc), "the readable view has another CRC")
        before = mm.read(readable, size)
        expect(not process.device_write(readable, size), "the readable view was written")
        expect(mm.read(readable, size) == before, "a write that failed changed the file")
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
        expect(around == b"\xee" * (2 * size), f"neighbours of {size} bytes were written")
    mm.write(base, (0xCAFE_CAFE_DEAD_C0DE).to_bytes(8, "little"))
    expect(process.device_read(base, 8, 0x16), "8 bytes have another CRC")
    mm.write(base, b"\xee" * 258)
    process.write_and_check(base + 1, 256)
    expect(mm.read(base, 1) + mm.read(base + 257, 1) == b"\xee\xee", "neighbours of 256 bytes were written")


def interrupt_range(process: Process) -> None:
    """No page where interrupt requests go is a buffer."""
    for page in range(INTERRUPT_FIRST, INTERRUPT_LAST, PAGE):
        expect(not process.device_write(page, 1), f"a write at {page:#x} succeeded")


def kernel_mem_access(process: Process) -> None:
    """The kernel's memory is no process's, and no process is privileged."""
    size = 4 * KIB
    with process.mapped(size) as own:
        crc = process.fill(own, size, random.Random(0x4E))
        kernel = process.kernel_buffer(own, size)
        process.privileged(True)
        try:
            expect(not process.device_read(kernel, size, crc), "a privileged read of the kernel succeeded")
            expect(not process.device_read(own, size, crc), "a privileged read of the process succeeded")
        finally:
            process.privileged(False)
        expect(not process.device_read(kernel, size, crc), "a read of the kernel succeeded")
        expect(process.device_read(own, size, crc), "a read of the process failed")


def pri_stress(process: Process) -> None:
    """A buffer that is paged out again and again."""
    size = 40 * KIB
    with process.mapped(size) as start:
        for number in range(PRI_STRESS_WRITES):
            length = number * PAGE % (size + PAGE)
            if length:
                expect(process.device_write(start, length), f"write {number} of {length} bytes failed")
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
            expect(_busy(process), "the device was opened twice")
            child.write_and_check(FIXED + offset, part)
            expect(child.mm.read(FIXED, offset) == before[:offset], "the child's first page has changed")
        finally:
            child.exit()
            process.open()
        expect(process.mm.read(FIXED, size) == before, "the parent's data has changed")


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
