"""A host for the NVMe model in unit tests: queues in the bench's RAM, one command at a time or many, phases checked."""

from __future__ import annotations

import struct
from collections import deque
from typing import NamedTuple

from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode, Status
from vfio_model.testing.bench import Bench

PAGE = 0x1000
ADMIN_SQ, ADMIN_CQ = 0x1000, 0x2000
QUEUE_AREA = 0x4000
DATA = 0x80000
"""From here on RAM is the test's own."""
ENABLE = regs.CC_EN.at(1) | regs.CC_IOSQES.at(regs.SQES) | regs.CC_IOCQES.at(regs.CQES)


class Completion(NamedTuple):
    """A completion queue entry, its status without the bits for "more" and "do not retry"."""

    result: int
    sq_head: int
    sqid: int
    cid: int
    status: int
    dnr: bool


class Ring:
    """The host's side of a queue pair."""

    def __init__(self, qid: int, cqid: int, sq: int, sq_size: int, cq: int, cq_size: int) -> None:
        self.qid, self.cqid, self.sq, self.sq_size, self.cq, self.cq_size = qid, cqid, sq, sq_size, cq, cq_size
        self.tail = self.head = 0
        self.phase = 1


class NvmeHost(Bench):
    """An NVMe controller on a bench, and what its driver does."""

    def __init__(self, **props: object) -> None:
        super().__init__(NvmeDevice, **{"drive": "mem:4M", **props})
        assert isinstance(self.device, NvmeDevice)
        self.nvme = self.device
        self.rings: dict[int, Ring] = {}
        self.stash: deque[Completion] = deque()
        """Completions that nobody asked for yet."""
        self._cid = 0
        self._next_queue = QUEUE_AREA

    # -- life

    def enable(self, *, sq_size: int = 64, cq_size: int = 256, cc: int = ENABLE) -> None:
        self.write(regs.AQA, sq_size - 1 | cq_size - 1 << 16)
        self.write(regs.ASQ, ADMIN_SQ, 8)
        self.write(regs.ACQ, ADMIN_CQ, 8)
        self.ram[ADMIN_CQ : ADMIN_CQ + cq_size * 16] = bytes(cq_size * 16)
        self.rings = {0: Ring(0, 0, ADMIN_SQ, sq_size, ADMIN_CQ, cq_size)}
        self._next_queue = QUEUE_AREA
        self.stash.clear()
        self.write(regs.CC, cc)

    def disable(self) -> None:
        self.write(regs.CC, 0)

    @property
    def status(self) -> int:
        return self.read(regs.CSTS)

    def enable_msix(self) -> None:
        msix = self.device.msix
        assert msix is not None
        for vector in range(msix.vectors):
            self.device.region_write(0, regs.MSIX_TABLE + vector * 16 + 12, 4, 0)
        self.device.config_write(msix.offset + 2, 2, 0x8000)

    # -- queues

    def doorbell(self, qid: int, value: int, *, completion: bool = False) -> None:
        self.write(regs.DOORBELLS + 8 * qid + 4 * completion, value)

    def push(self, qid: int, opcode: int, *, nsid: int = 0, prp1: int = 0, prp2: int = 0, flags: int = 0,
             cid: int | None = None, cdw: tuple[int, ...] = ()) -> int:  # fmt: skip
        """Put a command into the queue without ringing; its identifier."""
        ring = self.rings[qid]
        if cid is None:
            self._cid = cid = (self._cid + 1) & 0x7FFF
        dwords = (*cdw, 0, 0, 0, 0, 0, 0)[:6]
        entry = regs.SQE.pack(opcode, flags, cid, nsid, 0, 0, prp1, prp2, *dwords)
        at = ring.sq + ring.tail * 64
        self.ram[at : at + 64] = entry
        ring.tail = (ring.tail + 1) % ring.sq_size
        return cid

    def ring(self, qid: int) -> None:
        self.doorbell(qid, self.rings[qid].tail)

    def reap(self, qid: int, *, most: int = 1 << 16, ring: bool = True) -> list[Completion]:
        """The completions that are there, in order; the doorbell is rung for them unless told otherwise."""
        queue, found = self.rings[qid], []
        while len(found) < most:
            at = queue.cq + queue.head * 16
            result, _, sq_head, sqid, cid, status = regs.CQE.unpack(self.ram[at : at + 16])
            if status & 1 != queue.phase:
                break
            found.append(Completion(result, sq_head, sqid, cid, status >> 1 & 0x7FF, bool(status >> 15)))
            queue.head += 1
            if queue.head == queue.cq_size:
                queue.head, queue.phase = 0, queue.phase ^ 1
        if found and ring:
            self.doorbell(queue.cqid, queue.head, completion=True)
        return found

    def submit(self, qid: int, opcode: int, **fields: object) -> Completion:
        """One command, its completion. Others that came are kept in :attr:`stash`."""
        cid = self.push(qid, opcode, **fields)  # type: ignore[arg-type]
        self.ring(qid)
        mine = None
        for completion in self.reap(qid):
            if completion.cid == cid and mine is None:
                mine = completion
            else:
                self.stash.append(completion)
        assert mine is not None, "the command was completed"
        return mine

    def admin(self, opcode: int, **fields: object) -> Completion:
        return self.submit(0, opcode, **fields)

    def take(self, size: int) -> int:
        """Whole pages for a queue of ``size`` bytes."""
        at, self._next_queue = self._next_queue, self._next_queue + -(-size // PAGE) * PAGE
        assert self._next_queue <= DATA, "queues end where data begins"
        self.ram[at : self._next_queue] = bytes(self._next_queue - at)
        return at

    def create_cq(self, qid: int, size: int, *, vector: int = 0, irq: bool = True) -> tuple[Completion, int]:
        base = self.take(size * 16)
        cdw = (qid | size - 1 << 16, 1 | irq << 1 | vector << 16)
        return self.admin(AdminOpcode.CREATE_CQ, prp1=base, cdw=cdw), base

    def create_sq(self, qid: int, size: int, cqid: int) -> tuple[Completion, int]:
        base = self.take(size * 64)
        return self.admin(AdminOpcode.CREATE_SQ, prp1=base, cdw=(qid | size - 1 << 16, 1 | cqid << 16)), base

    def create_pair(self, qid: int = 1, size: int = 16, *, cq_size: int | None = None, vector: int = 0) -> Ring:
        cq_size = cq_size or size
        done, cq = self.create_cq(qid, cq_size, vector=vector)
        assert done.status == 0
        done, sq = self.create_sq(qid, size, qid)
        assert done.status == 0
        self.rings[qid] = Ring(qid, qid, sq, size, cq, cq_size)
        return self.rings[qid]

    def start(self, *, size: int = 16, vector: int = 0) -> None:
        """Enabled, with I/O queue pair 1."""
        self.enable()
        self.create_pair(1, size, vector=vector)

    # -- data

    def prps(self, address: int, length: int, *, lists: int = DATA - PAGE) -> tuple[int, int]:
        """PRP 1 and 2 for ``length`` contiguous bytes; a list, if one is needed, is put to ``lists``."""
        pages = range((address & ~(PAGE - 1)) + PAGE, address + length, PAGE)
        if len(pages) < 2:
            return address, pages[0] if pages else 0
        self.ram[lists : lists + 8 * len(pages)] = struct.pack(f"<{len(pages)}Q", *pages)
        return address, lists

    def rw(self, opcode: int, first: int, blocks: int, address: int = DATA, *, qid: int = 1, control: int = 0,
           nsid: int = 1) -> Completion:  # fmt: skip
        prp1, prp2 = self.prps(address, blocks * self.block)
        cdw = (first & 0xFFFFFFFF, first >> 32, blocks - 1 | control)
        return self.submit(qid, opcode, nsid=nsid, prp1=prp1, prp2=prp2, cdw=cdw)

    @property
    def block(self) -> int:
        return 1 << self.nvme.controller.namespaces[1].shift

    def write_blocks(self, first: int, data: bytes) -> Completion:
        self.ram[DATA : DATA + len(data)] = data
        return self.rw(NvmOpcode.WRITE, first, len(data) // self.block)

    def read_blocks(self, first: int, blocks: int) -> bytes:
        done = self.rw(NvmOpcode.READ, first, blocks)
        assert done.status == Status.SUCCESS
        return bytes(self.ram[DATA : DATA + blocks * self.block])

    def identify(self, cns: int, nsid: int = 0) -> bytes:
        done = self.admin(AdminOpcode.IDENTIFY, nsid=nsid, prp1=DATA, cdw=(cns,))
        assert done.status == Status.SUCCESS
        return bytes(self.ram[DATA : DATA + 4096])
