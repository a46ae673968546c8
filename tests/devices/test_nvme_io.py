"""NVMe: the NVM command set and PRPs (NVM Express Base Specification 1.4, chapter 6 and section 4.3)."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from tests.devices.nvme_host import DATA, PAGE, NvmeHost
from vfio_model.backends.block import MemoryDisk
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.regs import NvmOpcode, Status
from vfio_model.testing.bench import RAM_SIZE

BLOCKS = (4 << 20) // 512
NOWHERE = 1 << 40


@pytest.fixture
def host() -> NvmeHost:
    host = NvmeHost()
    host.start()
    return host


class BrokenDisk(MemoryDisk):
    """Fails every operation with ``error``."""

    error = errno.EIO

    def _fail(self, *_args: object) -> None:
        raise OSError(self.error, "broken")

    read = write = flush = discard = write_zeroes = _fail  # type: ignore[assignment]


class LoggingDisk(MemoryDisk):
    """Notes what is asked for besides reads and writes."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.log: list[tuple[str, int, int]] = []

    def flush(self) -> None:
        self.log.append(("flush", 0, 0))

    def discard(self, offset: int, length: int) -> None:
        self.log.append(("discard", offset, length))
        super().discard(offset, length)


def use(host: NvmeHost, disk: MemoryDisk) -> None:
    host.nvme.controller.namespaces[1].disk = disk


def pattern(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


# -- commands


@pytest.mark.parametrize("block", [512, 4096])
def test_what_is_written_is_read(block: int) -> None:
    host = NvmeHost(logical_block_size=block)
    host.start()
    data = pattern(16 * block)
    assert host.write_blocks(3, data).status == Status.SUCCESS
    assert host.read_blocks(2, 18) == bytes(block) + data + bytes(block)


def test_the_last_block_and_the_one_behind_it(host: NvmeHost) -> None:
    assert host.write_blocks(BLOCKS - 1, b"z" * 512).status == Status.SUCCESS
    assert host.rw(NvmOpcode.READ, BLOCKS - 1, 1).status == Status.SUCCESS
    for opcode in (NvmOpcode.READ, NvmOpcode.WRITE, NvmOpcode.COMPARE, NvmOpcode.WRITE_ZEROES, NvmOpcode.VERIFY):
        for first in (BLOCKS - 1, BLOCKS, (1 << 64) - 1):
            assert host.rw(opcode, first, 2).status == Status.LBA_OUT_OF_RANGE


@pytest.mark.parametrize("opcode", list(NvmOpcode))
@pytest.mark.parametrize("nsid", [0, 2, 0xFFFFFFFE])
def test_a_namespace_that_there_is_not(host: NvmeHost, opcode: NvmOpcode, nsid: int) -> None:
    assert host.rw(opcode, 0, 1, nsid=nsid).status == Status.INVALID_NAMESPACE


def test_opcodes_that_there_are_not(host: NvmeHost) -> None:
    assert host.rw(0x04, 0, 1).status == Status.INVALID_OPCODE


@pytest.mark.parametrize(("mdts", "most"), [(7, 1024), (0, 2048), (1, 16)])
def test_the_largest_transfer(mdts: int, most: int) -> None:
    host = NvmeHost(mdts=mdts)
    host.start()
    pages = [DATA + (at % 64) * PAGE for at in range(1, most // 8 + (not mdts))]
    host.ram[DATA - 4 * PAGE : DATA - 4 * PAGE + 8 * len(pages)] = struct.pack(f"<{len(pages)}Q", *pages)
    prp2 = pages[0] if len(pages) == 1 else DATA - 4 * PAGE
    assert transfer(host, NvmOpcode.READ, most, DATA, prp2) == Status.SUCCESS
    assert transfer(host, NvmOpcode.READ, most + 1, DATA, prp2) == (Status.INVALID_FIELD if mdts else Status.SUCCESS)


def test_flush_of_one_namespace_or_of_all(host: NvmeHost) -> None:
    disk = LoggingDisk(4 << 20)
    use(host, disk)
    for nsid in (1, regs.BROADCAST_NSID):
        assert host.submit(1, NvmOpcode.FLUSH, nsid=nsid).status == Status.SUCCESS
    assert disk.log == [("flush", 0, 0)] * 2


def test_forced_unit_access_and_a_write_cache_that_is_off_make_writes_stable(host: NvmeHost) -> None:
    disk = LoggingDisk(4 << 20)
    use(host, disk)
    host.rw(NvmOpcode.WRITE, 0, 1)
    assert disk.log == []
    host.rw(NvmOpcode.WRITE, 0, 1, control=regs.RW_FUA)
    host.rw(NvmOpcode.WRITE_ZEROES, 0, 1, control=regs.RW_FUA)
    assert len(disk.log) == 2
    assert host.admin(regs.AdminOpcode.SET_FEATURES, cdw=(6, 0)).status == Status.SUCCESS
    host.rw(NvmOpcode.WRITE, 0, 1)
    assert len(disk.log) == 4, "once for what the cache held, once for the write"


def test_compare(host: NvmeHost) -> None:
    data = pattern(8 * 512)
    host.write_blocks(9, data)
    assert host.rw(NvmOpcode.COMPARE, 9, 8).status == Status.SUCCESS
    host.ram[DATA + 4095] ^= 1
    done = host.rw(NvmOpcode.COMPARE, 9, 8)
    assert done.status == Status.COMPARE_FAILURE and done.dnr


def test_write_zeroes_takes_more_than_a_transfer(host: NvmeHost) -> None:
    host.write_blocks(0, pattern(512))
    host.write_blocks(4999, pattern(512, 2))
    host.write_blocks(5000, pattern(512, 3))
    assert host.rw(NvmOpcode.WRITE_ZEROES, 0, 5000, 0).status == Status.SUCCESS
    assert host.read_blocks(0, 1) == bytes(512) and host.read_blocks(4999, 2) == bytes(512) + pattern(512, 3)


def test_verify_reads_what_it_is_told(host: NvmeHost) -> None:
    assert host.rw(NvmOpcode.VERIFY, 0, BLOCKS - 1, 0).status == Status.SUCCESS


def deallocate(host: NvmeHost, *ranges: tuple[int, int], attributes: int = regs.DSM_DEALLOCATE) -> int:
    host.ram[DATA : DATA + 16 * len(ranges)] = b"".join(regs.DSM_RANGE.pack(0, n, first) for first, n in ranges)
    cdw = (len(ranges) - 1, attributes)
    return host.submit(1, NvmOpcode.DATASET_MANAGEMENT, nsid=1, prp1=DATA, prp2=DATA + PAGE, cdw=cdw).status


def test_deallocation_discards_each_range(host: NvmeHost) -> None:
    disk = LoggingDisk(4 << 20)
    use(host, disk)
    assert deallocate(host, (8, 8), (100, 1), (5, 0)) == Status.SUCCESS
    assert disk.log == [("discard", 8 * 512, 8 * 512), ("discard", 100 * 512, 512)]
    disk.log.clear()
    assert deallocate(host, (8, 8), attributes=1) == Status.SUCCESS and disk.log == []
    assert deallocate(host, (8, 8), (BLOCKS - 1, 2)) == Status.LBA_OUT_OF_RANGE and disk.log == []


def test_256_ranges_at_once(host: NvmeHost) -> None:
    assert deallocate(host, *((at * 2, 1) for at in range(256))) == Status.SUCCESS


# -- errors of the disk


@pytest.mark.parametrize(
    ("opcode", "status"),
    [
        (NvmOpcode.READ, Status.UNRECOVERED_READ_ERROR),
        (NvmOpcode.COMPARE, Status.UNRECOVERED_READ_ERROR),
        (NvmOpcode.VERIFY, Status.UNRECOVERED_READ_ERROR),
        (NvmOpcode.WRITE, Status.WRITE_FAULT),
        (NvmOpcode.WRITE_ZEROES, Status.WRITE_FAULT),
        (NvmOpcode.FLUSH, Status.WRITE_FAULT),
    ],
)
def test_an_io_error_is_a_status(host: NvmeHost, opcode: NvmOpcode, status: Status) -> None:
    use(host, BrokenDisk(4 << 20))
    done = host.rw(opcode, 0, 8)
    assert done.status == status and not done.dnr
    assert host.nvme.controller.health.media_errors == 1


def test_a_full_disk_has_a_status_of_its_own(host: NvmeHost) -> None:
    disk = BrokenDisk(4 << 20)
    disk.error = errno.ENOSPC
    use(host, disk)
    assert host.rw(NvmOpcode.WRITE, 0, 8).status == Status.CAPACITY_EXCEEDED
    assert deallocate(host, (0, 1)) == Status.CAPACITY_EXCEEDED


def test_a_disk_that_is_read_only(host: NvmeHost) -> None:
    use(host, MemoryDisk(4 << 20, read_only=True))
    assert host.identify(0, 1)[99] == 1
    for opcode in (NvmOpcode.WRITE, NvmOpcode.WRITE_ZEROES):
        assert host.rw(opcode, 0, 1).status == Status.NAMESPACE_WRITE_PROTECTED
    assert deallocate(host, (0, 1)) == Status.NAMESPACE_WRITE_PROTECTED
    assert host.rw(NvmOpcode.READ, 0, 1).status == Status.SUCCESS


# -- PRPs


def transfer(host: NvmeHost, opcode: int, blocks: int, prp1: int, prp2: int) -> int:
    return host.submit(1, opcode, nsid=1, prp1=prp1, prp2=prp2, cdw=(0, 0, blocks - 1)).status


def put_list(host: NvmeHost, at: int, *entries: int) -> None:
    host.ram[at : at + 8 * len(entries)] = struct.pack(f"<{len(entries)}Q", *entries)


@pytest.mark.parametrize(
    ("blocks", "prp1", "pieces"),
    [
        (1, DATA + 0x204, [(DATA + 0x204, 512)]),
        (8, DATA, [(DATA, 4096)]),
        (8, DATA + 0x800, [(DATA + 0x800, 2048), (DATA + 0x9000, 2048)]),
        (16, DATA, [(DATA, 4096), (DATA + 0x9000, 4096)]),
    ],
)
def test_one_or_two_pages(host: NvmeHost, blocks: int, prp1: int, pieces: list[tuple[int, int]]) -> None:
    data = pattern(blocks * 512)
    host.write_blocks(0, data)
    host.ram[DATA:RAM_SIZE] = bytes(RAM_SIZE - DATA)
    prp2 = DATA + 0x9000 if len(pieces) > 1 else NOWHERE + 5
    assert transfer(host, NvmOpcode.READ, blocks, prp1, prp2) == Status.SUCCESS
    assert b"".join(bytes(host.ram[at : at + size]) for at, size in pieces) == data
    assert host.ram[DATA:].count(0) >= RAM_SIZE - DATA - len(data)
    assert transfer(host, NvmOpcode.COMPARE, blocks, prp1, prp2) == Status.SUCCESS


@pytest.mark.parametrize("offset", [0, 8, 0xFF0, 0xFF8])
@pytest.mark.parametrize("inside", [0, 0x400])
def test_a_list_that_begins_inside_a_page_goes_on_in_the_next(host: NvmeHost, offset: int, inside: int) -> None:
    blocks, lists, more = 40, DATA + 0x20000, DATA + 0x21000
    data = pattern(blocks * 512)
    host.write_blocks(0, data)
    pages = [DATA + 0x40000 + at * 0x2000 for at in range(-(-(blocks * 512 + inside) // PAGE))]
    room = (PAGE - offset) // 8
    rest = pages[1:]
    if len(rest) > room:
        put_list(host, lists + offset, *rest[: room - 1], more)
        put_list(host, more, *rest[room - 1 :])
    else:
        put_list(host, lists + offset, *rest)
    assert transfer(host, NvmOpcode.READ, blocks, pages[0] + inside, lists + offset) == Status.SUCCESS
    found = bytes(host.ram[pages[0] + inside : pages[0] + PAGE])
    found += b"".join(bytes(host.ram[page : page + PAGE]) for page in rest)
    assert found[: len(data)] == data and not any(found[len(data) :])


@pytest.mark.parametrize("step", [PAGE, 2 * PAGE])
def test_a_hundred_pages_together_and_apart(step: int) -> None:
    host = NvmeHost()
    host.start()
    blocks, count = 800, 100
    pages = [DATA + 0x1000 + (at * step) % (0x70000) for at in range(60)]
    pages += [0x20000 + at * PAGE for at in range(count - len(pages))]
    data = pattern(blocks * 512)
    for page, at in zip(pages, range(0, len(data), PAGE), strict=True):
        host.ram[page : page + PAGE] = data[at : at + PAGE]
    put_list(host, DATA, *pages[1:])
    expected = b"".join(bytes(host.ram[page : page + PAGE]) for page in pages)
    assert transfer(host, NvmOpcode.WRITE, blocks, pages[0], DATA) == Status.SUCCESS
    for page in pages:
        host.ram[page : page + PAGE] = bytes(PAGE)
    assert transfer(host, NvmOpcode.READ, blocks, pages[0], DATA) == Status.SUCCESS
    assert b"".join(bytes(host.ram[page : page + PAGE]) for page in pages) == expected


@pytest.mark.parametrize(
    ("blocks", "prp1", "prp2", "entries"),
    [
        (1, DATA + 2, 0, ()),
        (16, DATA, DATA + 0x1004, ()),
        (16, DATA + 0x100, DATA + 0x20004, ()),
        (32, DATA, DATA + 0x20000, (DATA + 0x1000, DATA + 0x2008, DATA + 0x3000)),
        (32, DATA, DATA + 0x20000, (DATA + 0x1000, DATA + 0x2000, DATA + 0x3001)),
        (32, DATA, DATA + 0x20FF8, (DATA + 0x30008,)),
    ],
)
def test_entries_that_point_into_a_page_are_refused(
    host: NvmeHost, blocks: int, prp1: int, prp2: int, entries: tuple[int, ...]
) -> None:
    put_list(host, prp2 & ~7, *entries)
    before = bytes(host.ram[DATA : DATA + 0x10000])
    assert transfer(host, NvmOpcode.READ, blocks, prp1, prp2) == Status.INVALID_PRP_OFFSET
    assert host.ram[DATA : DATA + 0x10000] == before


@pytest.mark.parametrize("opcode", [NvmOpcode.READ, NvmOpcode.WRITE])
@pytest.mark.parametrize(
    ("blocks", "prp1", "prp2", "entries"),
    [
        (1, NOWHERE, 0, ()),
        (16, DATA, NOWHERE, ()),
        (32, DATA, NOWHERE, ()),
        (32, DATA, DATA + 0x20000, (DATA + 0x1000, NOWHERE, DATA + 0x3000)),
        (32, DATA, DATA + 0x20FF8, (NOWHERE,)),
        (1, (1 << 64) - 256, 0, ()),
    ],
)
def test_data_out_of_reach_is_a_transfer_error(
    host: NvmeHost, opcode: int, blocks: int, prp1: int, prp2: int, entries: tuple[int, ...]
) -> None:
    put_list(host, (prp2 & RAM_SIZE - 1) or DATA + 0x50000, *entries)
    assert transfer(host, opcode, blocks, prp1, prp2) == Status.DATA_TRANSFER_ERROR
    assert host.read_blocks(0, 1) == bytes(512), "a write whose data cannot be fetched changes nothing"


def test_larger_pages() -> None:
    host = NvmeHost()
    cc = regs.CC_EN.at(1) | regs.CC_MPS.at(2) | regs.CC_IOSQES.at(6) | regs.CC_IOCQES.at(4)
    host.enable(cc=cc)
    for qid_opcode, base in ((regs.AdminOpcode.CREATE_CQ, 0x10000), (regs.AdminOpcode.CREATE_SQ, 0x14000)):
        done = host.admin(qid_opcode, prp1=base, cdw=(1 | 15 << 16, 3 if base == 0x10000 else 1 | 1 << 16))
        assert done.status == Status.SUCCESS
    data = pattern(96 * 512)
    host.nvme.controller.namespaces[1].disk.write(0, data)
    put_list(host, 0x20000, 0x94000, 0x8C000)
    host.ram[0x14000:0x14040] = regs.SQE.pack(2, 0, 1, 1, 0, 0, 0x80000, 0x20000, 0, 0, 95, 0, 0, 0)
    host.doorbell(1, 1)
    found = bytes(host.ram[0x80000:0x84000] + host.ram[0x94000:0x98000] + host.ram[0x8C000:0x90000])
    assert found == data
