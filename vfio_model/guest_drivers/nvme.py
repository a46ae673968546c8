"""A driver for NVMe (NVM Express Base Specification 1.4, section 7.6.1, "Initialization"): one pair of I/O queues, one
command at a time, completions polled.

Registers and structures are little-endian; registers are swapped on a big-endian machine, as ``readl`` and ``writel``
do in Linux.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode
from vfio_model.guest_drivers.cpu import Cpu
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.ranges import U32_MAX

PAGE = 4096
MEMORY_PAGES = 6
"""What the driver needs: four queues of a page, a PRP list and a page for structures."""
ENTRIES = PAGE // regs.SQE_SIZE
MAX_TRANSFER = (PAGE // 8) * PAGE
"""Bytes that one page of PRPs describes."""
TRIES = 1000
_ADMIN_SQ, _ADMIN_CQ, _IO_SQ, _IO_CQ, _LIST, _DATA = range(MEMORY_PAGES)
_NSZE, _FLBAS, _LBAF = 0, 26, 128
"""Offsets in Identify Namespace: number of blocks, format in use, formats (block size in byte 2 of each)."""


class Completion(NamedTuple):
    """How a command ended: its status (type << 8 | code) and dword 0."""

    status: int
    result: int


class _Pair:
    """The host's ends of a submission and a completion queue, ``ENTRIES`` each."""

    def __init__(self, qid: int, sq: int, cq: int) -> None:
        self.qid, self.sq, self.cq = qid, sq, cq
        self.tail = self.head = 0
        self.phase = 1


class NvmeDriver:
    """``bar`` is where the CPU sees the registers. ``MEMORY_PAGES`` pages of memory at ``gpa``, which the device sees
    at ``iova``, belong to the driver; both are multiples of 4096."""

    def __init__(self, cpu: Cpu, bar: int, gpa: int, iova: int) -> None:
        self._cpu, self._bar, self._gpa, self._iova = cpu, bar, gpa, iova
        self._pairs: list[_Pair] = []
        self._cid = 0
        self.blocks = self.block_size = 0
        """Of namespace 1, once started."""

    # -- registers

    def _order(self, value: int) -> int:
        return int.from_bytes(value.to_bytes(4, "little"), "big") if self._cpu.big_endian else value

    def _read(self, offset: int) -> int:
        return self._order(self._cpu.mmio_read(self._bar + offset, 4))

    def _write(self, offset: int, value: int) -> None:
        self._cpu.mmio_write(self._bar + offset, 4, self._order(value))

    def _write_address(self, offset: int, value: int) -> None:
        self._write(offset, value & U32_MAX)
        self._write(offset + 4, value >> 32)

    # -- life

    def start(self) -> None:
        """Reset and enable the controller, create the I/O queues, look at the namespace.

        :raise DriverError: when the controller does not become ready, or refuses.
        """
        self._write(regs.CC, 0)
        self._wait(0)
        self._cpu.write_memory(self._gpa, bytes(MEMORY_PAGES * PAGE))
        self._write(regs.AQA, regs.AQA_ASQS.at(ENTRIES - 1) | regs.AQA_ACQS.at(ENTRIES - 1))
        self._write_address(regs.ASQ, self._at(_ADMIN_SQ))
        self._write_address(regs.ACQ, self._at(_ADMIN_CQ))
        self._pairs = [_Pair(0, _ADMIN_SQ, _ADMIN_CQ), _Pair(1, _IO_SQ, _IO_CQ)]
        self._write(regs.CC, regs.CC_EN.at(1) | regs.CC_IOSQES.at(regs.SQES) | regs.CC_IOCQES.at(regs.CQES))
        self._wait(regs.CSTS_RDY)
        size = 1 | ENTRIES - 1 << 16
        self._must(AdminOpcode.CREATE_CQ, prp1=self._at(_IO_CQ), cdw10=size, cdw11=regs.QUEUE_CONTIGUOUS)
        self._must(AdminOpcode.CREATE_SQ, prp1=self._at(_IO_SQ), cdw10=size, cdw11=regs.QUEUE_CONTIGUOUS | 1 << 16)
        self._must(AdminOpcode.IDENTIFY, nsid=1, prp1=self._at(_DATA))
        data = self._cpu.read_memory(self._gpa + _DATA * PAGE, PAGE)
        self.blocks = int.from_bytes(data[_NSZE : _NSZE + 8], "little")
        self.block_size = 1 << data[_LBAF + 4 * (data[_FLBAS] & 0xF) + 2]

    def stop(self) -> None:
        """Shut the controller down and disable it."""
        self._write(regs.CC, self._read(regs.CC) | regs.CC_SHN.at(1))
        for _ in range(TRIES):
            if regs.CSTS_SHST.of(self._read(regs.CSTS)) == regs.SHST_COMPLETE:
                break
            self._cpu.clock_step()
        self._write(regs.CC, 0)
        self._wait(0)

    def _at(self, page: int) -> int:
        return self._iova + page * PAGE

    def _wait(self, ready: int) -> None:
        for _ in range(TRIES):
            status = self._read(regs.CSTS)
            if status & regs.CSTS_CFS:
                break
            if status & regs.CSTS_RDY == ready:
                return
            self._cpu.clock_step()
        raise DriverError(f"the controller does not become {'ready' if ready else 'idle'}: CSTS is {status:#x}")

    # -- commands

    def submit(self, qid: int, opcode: int, *, nsid: int = 0, prp1: int = 0, prp2: int = 0, cdw10: int = 0,
               cdw11: int = 0, cdw12: int = 0) -> Completion:  # fmt: skip
        """Carry out one command on queue pair ``qid`` (0 is the admin pair).

        :raise DriverError: when it does not complete.
        """
        pair = self._pairs[qid]
        self._cid = self._cid + 1 & 0x7FFF
        entry = regs.SQE.pack(opcode, 0, self._cid, nsid, 0, 0, prp1, prp2, cdw10, cdw11, cdw12, 0, 0, 0)
        self._cpu.write_memory(self._gpa + pair.sq * PAGE + pair.tail * regs.SQE_SIZE, entry)
        pair.tail = (pair.tail + 1) % ENTRIES
        self._write(regs.DOORBELLS + 8 * qid, pair.tail)
        for _ in range(TRIES):
            # A register read comes back after what was written before it has arrived.
            failed = self._read(regs.CSTS) & regs.CSTS_CFS
            found = self._cpu.read_memory(self._gpa + pair.cq * PAGE + pair.head * regs.CQE_SIZE, regs.CQE_SIZE)
            result, _, _, _, cid, status = regs.CQE.unpack(found)
            if status & 1 == pair.phase:
                self._take(pair)
                if cid != self._cid:
                    raise DriverError(f"completion of command {cid:#x}, not {self._cid:#x}")
                return Completion(status >> 1 & 0x7FF, result)
            if failed:
                break
            self._cpu.clock_step()
        raise DriverError(f"opcode {opcode:#x} does not complete: CSTS is {self._read(regs.CSTS):#x}")

    def _take(self, pair: _Pair) -> None:
        pair.head = (pair.head + 1) % ENTRIES
        if not pair.head:
            pair.phase ^= 1
        self._write(regs.DOORBELLS + 8 * pair.qid + 4, pair.head)

    def _must(self, opcode: AdminOpcode, *, nsid: int = 0, prp1: int = 0, cdw10: int = 0, cdw11: int = 0) -> None:
        done = self.submit(0, opcode, nsid=nsid, prp1=prp1, cdw10=cdw10, cdw11=cdw11)
        if done.status:
            raise DriverError(f"{opcode.name} ended with status {done.status:#x}")

    def read(self, first: int, count: int, iova: int) -> int:
        """Read ``count`` blocks from ``first`` on to bus address ``iova``; the status."""
        return self._move(NvmOpcode.READ, first, count, iova)

    def write(self, first: int, count: int, iova: int) -> int:
        """Write ``count`` blocks from ``first`` on with what is at bus address ``iova``; the status."""
        return self._move(NvmOpcode.WRITE, first, count, iova)

    def flush(self) -> int:
        """Make what was written stable; the status."""
        return self.submit(1, NvmOpcode.FLUSH, nsid=1).status

    def _move(self, opcode: NvmOpcode, first: int, count: int, iova: int) -> int:
        length = count * self.block_size
        assert 0 < length <= MAX_TRANSFER, "one page of PRPs describes the data"
        pages = range((iova & ~(PAGE - 1)) + PAGE, iova + length, PAGE)
        prp2 = pages[0] if pages else 0
        if len(pages) > 1:
            self._cpu.write_memory(self._gpa + _LIST * PAGE, struct.pack(f"<{len(pages)}Q", *pages))
            prp2 = self._at(_LIST)
        return self.submit(
            1, opcode, nsid=1, prp1=iova, prp2=prp2, cdw10=first & U32_MAX, cdw11=first >> 32, cdw12=count - 1
        ).status
