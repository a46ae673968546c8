"""The NVMe model alone: in this process, over a RAM address space, its disk in memory; and the bare copies of as much.

Random reads are of 4 KiB; queue depth says how many commands one doorbell brings. Sequential transfers are of 128 KiB
by PRP lists, eight commands at a time. Source of the numbers that drive it: NVM Express Base Specification 1.4.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deploy.bench.measure import Row, against
from vfio_model.clock import VirtualClock
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode
from vfio_model.errors import VfioModelError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.topology import transaction
from vfio_model.pci.config_space import COMMAND_MASTER, COMMAND_MEMORY
from vfio_model.pci.msix import CONTROL_ENABLE as MSIX_ENABLE
from vfio_model.pci.msix import VECTOR_CONTROL
from vfio_model.ranges import Hva
from vfio_model.trace import NULL_TRACE

PAGE = 4096
BLOCK = 512
DISK = 64 << 20
RAM = 80 << 20
ENTRIES = 256
SEQUENTIAL = 128 << 10
_ADMIN_SQ, _ADMIN_CQ, _SQ, _CQ = 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000
_LISTS = 0x10_0000
_DATA = 0x100_0000
_TURNS = 10_000
_QUEUED = 8


@dataclass(frozen=True, slots=True)
class Transfer:
    """``length`` bytes between ``at`` on the disk and address ``to``."""

    opcode: NvmOpcode
    at: int
    to: int
    length: int


class _Host:
    """A ``DeviceHost`` that takes interrupts without doing anything."""

    def __init__(self) -> None:
        self.clock, self.trace, self.iommu = VirtualClock(), NULL_TRACE, None

    def set_intx(self, level: bool) -> None:
        """See ``DeviceHost``."""

    def msi(self, vector: int) -> None:
        """See ``DeviceHost``."""


class Controller:
    """The model, enabled, with one pair of I/O queues whose ``ENTRIES`` hold commands that are given again and
    again."""

    def __init__(self) -> None:
        self.host, ram = _Host(), memoryview(bytearray(RAM))
        self.ram = ram
        root = MemoryRegion("system", 1 << 64)
        with transaction():
            root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", ram, page_size=PAGE, hva=Hva(0x7F00_0000_0000))))
        self.device = NvmeDevice(self.host, drive=f"mem:{DISK}")
        self.device.attach_dma(AddressSpace("system", root))
        self.device.realize()
        self.device.config_write(4, 2, COMMAND_MEMORY | COMMAND_MASTER)
        msix = self.device.msix
        assert msix is not None, "the model has the capability"
        self.device.config_write(msix.offset + 2, 2, MSIX_ENABLE)
        self._write(regs.MSIX_TABLE + VECTOR_CONTROL, 0)
        self._tail = self._head = 0
        self._phase = 1
        self._enable()

    def _write(self, offset: int, value: int, size: int = 4) -> None:
        self.device.region_write(0, offset, size, value)

    def _enable(self) -> None:
        self._write(regs.AQA, regs.AQA_ASQS.at(3) | regs.AQA_ACQS.at(3))
        self._write(regs.ASQ, _ADMIN_SQ, 8)
        self._write(regs.ACQ, _ADMIN_CQ, 8)
        self._write(regs.CC, regs.CC_EN.at(1) | regs.CC_IOSQES.at(regs.SQES) | regs.CC_IOCQES.at(regs.CQES))
        size = 1 | ENTRIES - 1 << 16
        creates = ((AdminOpcode.CREATE_CQ, _CQ, regs.QUEUE_CONTIGUOUS | regs.QUEUE_IRQ_ENABLED),
                   (AdminOpcode.CREATE_SQ, _SQ, regs.QUEUE_CONTIGUOUS | 1 << 16))  # fmt: skip
        for number, (opcode, base, cdw11) in enumerate(creates):
            entry = regs.SQE.pack(opcode, 0, number, 0, 0, 0, base, 0, size, cdw11, 0, 0, 0, 0)
            self.ram[_ADMIN_SQ + number * regs.SQE_SIZE :][: regs.SQE_SIZE] = entry
        self._write(regs.DOORBELLS, len(creates))
        self._await(_ADMIN_CQ, len(creates) - 1, 1)

    def fill(self, transfers: Sequence[Transfer]) -> None:
        """Let the queue hold ``transfers``, ``ENTRIES`` of them."""
        assert len(transfers) == ENTRIES, "one for each entry"
        for number, each in enumerate(transfers):
            pages = range(each.to + PAGE, each.to + each.length, PAGE)
            prp2 = pages[0] if pages else 0
            if len(pages) > 1:
                prp2 = _LISTS + number * PAGE
                self.ram[prp2 : prp2 + 8 * len(pages)] = struct.pack(f"<{len(pages)}Q", *pages)
            blocks = each.length // BLOCK - 1
            entry = regs.SQE.pack(each.opcode, 0, number, 1, 0, 0, each.to, prp2, each.at // BLOCK, 0, blocks, 0, 0, 0)
            self.ram[_SQ + number * regs.SQE_SIZE :][: regs.SQE_SIZE] = entry

    def carry_out(self, count: int) -> None:
        """The next ``count`` commands of the queue, by one doorbell.

        :raise VfioModelError: they do not complete, or fail.
        """
        self._tail = (self._tail + count) % ENTRIES
        self._write(regs.DOORBELLS + 8, self._tail)
        last = (self._head + count - 1) % ENTRIES
        self._await(_CQ, last, self._phase if last >= self._head else self._phase ^ 1)
        if last < self._head or last == ENTRIES - 1:
            self._phase ^= 1
        self._head = (last + 1) % ENTRIES
        self._write(regs.DOORBELLS + 12, self._head)

    def _await(self, queue: int, entry: int, phase: int) -> None:
        at, advance = queue + entry * regs.CQE_SIZE + 14, self.host.clock.advance
        for _ in range(_TURNS):
            status = self.ram[at] | self.ram[at + 1] << 8
            if status & 1 == phase:
                if status >> 1:
                    raise VfioModelError(f"an NVMe command ended with status {status >> 1:#x}")
                return
            advance(1000)
        raise VfioModelError("an NVMe command does not complete")


def rows() -> Iterator[Row]:
    """Every figure of the model alone."""
    controller, disk = Controller(), memoryview(bytearray(DISK))
    controller.fill([_sequential(NvmOpcode.WRITE, number) for number in range(ENTRIES)])
    for _ in range(2 * ENTRIES // _QUEUED):  # all of the disk is there, 32 MiB of data for it go round
        controller.carry_out(_QUEUED)
    numbers = random.Random(4)
    pages = [
        Transfer(NvmOpcode.READ, numbers.randrange(DISK // PAGE) * PAGE, _DATA + number * PAGE, PAGE)
        for number in range(ENTRIES)
    ]
    controller.fill(pages)
    for depth in (1, 32):
        row = _row(f"nvme model: 4 KiB random read, queue depth {depth}", controller, disk, pages, depth, 256)
        iops = round(1 / row.seconds)
        yield _with(row, f"{iops:,} IOPS", iops=iops)
    for name, opcode in (("read", NvmOpcode.READ), ("write", NvmOpcode.WRITE)):
        runs = [_sequential(opcode, number) for number in range(ENTRIES)]
        controller.fill(runs)
        row = _row(f"nvme model: 128 KiB sequential {name}", controller, disk, runs, _QUEUED, 64)
        rate = round(SEQUENTIAL / row.seconds / 1e9, 2)
        yield _with(row, f"{rate} GB/s", gb_per_second=rate)
    controller.device.unrealize()


def _sequential(opcode: NvmOpcode, number: int) -> Transfer:
    at = number * SEQUENTIAL
    return Transfer(opcode, at % DISK, _DATA + at % (32 << 20), SEQUENTIAL)


def _row(
    name: str, controller: Controller, disk: memoryview, transfers: Sequence[Transfer], depth: int, count: int
) -> Row:
    """``count`` commands a go, ``depth`` at a time, against a slice copy of each one's bytes."""
    ram, carry_out = controller.ram, controller.carry_out
    copies = [(each.at, each.to, each.length) for each in transfers[:count]]
    reads = transfers[0].opcode == NvmOpcode.READ

    def commands() -> None:
        for _ in range(count // depth):
            carry_out(depth)

    def bare_read() -> None:
        for at, to, length in copies:
            ram[to : to + length] = disk[at : at + length]

    def bare_write() -> None:
        for at, to, length in copies:
            disk[at : at + length] = ram[to : to + length]

    bare = bare_read if reads else bare_write
    return against(name, commands, "bare slice copies", bare, number=1, rounds=31, per=count)


def _with(row: Row, note: str, **extra: float) -> Row:
    return Row(row.name, row.seconds, row.limit, row.limit_seconds, note=note, extra=extra, given_ratio=row.given_ratio)
