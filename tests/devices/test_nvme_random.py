"""NVMe: random work against a disk in a bytearray, and a guest that does not know what it does."""

from __future__ import annotations

import random
import struct

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.devices.nvme_host import DATA, PAGE, NvmeHost
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.regs import AdminOpcode, NvmOpcode, Status
from vfio_model.testing.bench import RAM_SIZE

DISK = 1 << 20
Step = tuple[NvmOpcode, int, int, int, int, int]
"""Opcode, first block, 512 bytes each, dwords into the first page, entries into the list's page, seed."""
STEPS = st.lists(
    st.tuples(
        st.sampled_from([NvmOpcode.READ, NvmOpcode.WRITE, NvmOpcode.COMPARE, NvmOpcode.WRITE_ZEROES]),
        st.integers(0, DISK // 512 - 1),
        st.integers(1, 128),
        st.integers(0, PAGE // 4 - 1),
        st.integers(0, PAGE // 8 - 1),
        st.integers(0, 1 << 32),
    ),
    max_size=12,
)


def scatter(host: NvmeHost, length: int, inside: int, listed: int, rng: random.Random) -> tuple[int, int, list[int]]:
    """Random pages for ``length`` bytes that begin ``inside`` a page, listed from byte ``listed`` of a page on:
    PRP 1, PRP 2, and every page."""
    count = -(-(inside + length) // PAGE)
    pages = rng.sample(range(DATA, RAM_SIZE - 2 * PAGE, PAGE), count)
    first, rest = pages[0] + inside, pages[1:]
    if len(rest) <= 1:
        return first, rest[0] if rest else rng.getrandbits(64), pages
    at = DATA - 2 * PAGE + listed
    room = (PAGE - listed % PAGE) // 8
    if len(rest) > room:
        head = [*rest[: room - 1], DATA - PAGE]
        tail = rest[room - 1 :]
        host.ram[DATA - PAGE : DATA - PAGE + 8 * len(tail)] = struct.pack(f"<{len(tail)}Q", *tail)
    else:
        head = rest
    host.ram[at : at + 8 * len(head)] = struct.pack(f"<{len(head)}Q", *head)
    return first, at, pages


@settings(max_examples=60, deadline=None)
@given(block=st.sampled_from([512, 4096]), steps=STEPS)
def test_random_work_does_what_a_bytearray_does(block: int, steps: list[Step]) -> None:
    host = NvmeHost(drive="mem:1M", logical_block_size=block)
    host.start()
    shadow = bytearray(DISK)
    for opcode, first, count, inside, listed, seed in steps:
        rng = random.Random(seed)
        count = min(count * 512 // block or 1, 64)
        length, offset = count * block, first * block
        prp1, prp2, pages = scatter(host, length, inside * 4, listed * 8, rng)
        data = bytearray(rng.randbytes(length))
        if opcode is NvmOpcode.COMPARE and offset + length <= DISK and rng.random() < 0.7:
            data[:] = shadow[offset : offset + length]
        memory = bytearray(inside * 4) + data
        for at, page in enumerate(pages):
            part = memory[at * PAGE : (at + 1) * PAGE]
            host.ram[page : page + len(part)] = part
        done = host.submit(1, opcode, nsid=1, prp1=prp1, prp2=prp2, cdw=(first, 0, count - 1))
        if offset + length > DISK:
            assert done.status == Status.LBA_OUT_OF_RANGE
            continue
        if opcode is NvmOpcode.COMPARE:
            same = data == shadow[offset : offset + length]
            assert done.status == (Status.SUCCESS if same else Status.COMPARE_FAILURE)
            continue
        assert done.status == Status.SUCCESS
        if opcode is NvmOpcode.READ:
            found = b"".join(bytes(host.ram[page : page + PAGE]) for page in pages)
            assert found[inside * 4 : inside * 4 + length] == shadow[offset : offset + length]
        else:
            shadow[offset : offset + length] = data if opcode is NvmOpcode.WRITE else bytes(length)
    stored = bytearray(DISK)
    host.nvme.controller.namespaces[1].disk.read(0, stored)
    assert stored == shadow


ADDRESSES = st.one_of(
    st.integers(0, RAM_SIZE + PAGE),
    st.sampled_from([0, PAGE, DATA, DATA + 8, RAM_SIZE - 4, 1 << 40, (1 << 64) - 8, (1 << 64) - PAGE]),
)
DWORDS = st.one_of(st.integers(0, 70), st.integers(0, 0xFFFFFFFF), st.sampled_from([0xFFFF, 0xFFFFFFFF, 1 << 16, 3]))
COMMANDS = st.tuples(
    st.one_of(st.sampled_from([*AdminOpcode, *NvmOpcode]), st.integers(0, 255)),
    st.sampled_from([0, 0, 0, 0, 0x40, 1]),
    st.sampled_from([0, 1, 1, 2, 0xFFFFFFFF]),
    ADDRESSES,
    ADDRESSES,
    st.tuples(DWORDS, DWORDS, DWORDS, DWORDS),
)
OFFSETS = st.one_of(
    st.sampled_from([each.offset for each in regs.REGISTERS]),
    st.integers(regs.DOORBELLS // 4, regs.DOORBELLS // 4 + 12).map(lambda at: at * 4),
    st.integers(0, regs.BAR_SIZE - 8),
)
ACTIONS = st.one_of(
    st.tuples(st.just("command"), st.sampled_from([0, 0, 1, 2]), COMMANDS),
    st.tuples(st.just("write"), OFFSETS, st.tuples(st.sampled_from([1, 2, 4, 8]), st.integers(0, (1 << 64) - 1))),
    st.tuples(st.just("write"), OFFSETS, st.tuples(st.just(4), DWORDS)),
    st.tuples(st.just("read"), OFFSETS, st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("garbage"), st.integers(0, RAM_SIZE - 64), st.binary(min_size=64, max_size=64)),
    st.tuples(st.just("restart"), st.just(0), st.just(0)),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
    st.tuples(st.just("master"), st.sampled_from([0, 4]), st.just(0)),
    st.tuples(st.just("time"), st.integers(0, 100_000), st.just(0)),
)


def act(host: NvmeHost, kind: str, where: int, what: object) -> None:
    device = host.device
    if kind == "command" and where in host.rings:
        assert isinstance(what, tuple)
        opcode, flags, nsid, prp1, prp2, cdw = what
        host.push(where, opcode, flags=flags, nsid=nsid, prp1=prp1, prp2=prp2, cdw=cdw)
        host.ring(where)
        host.reap(where)
    elif kind == "write":
        assert isinstance(what, tuple)
        size, value = what
        low, high, end = device.region_access(0, where)
        if low <= size <= high and where % size == 0 and where + size <= end:
            device.region_write(0, where, size, value & (1 << size * 8) - 1)
    elif kind == "read":
        assert isinstance(what, int)
        low, high, end = device.region_access(0, where)
        if low <= what <= high and where % what == 0 and where + what <= end:
            assert device.region_read(0, where, what) in range(1 << what * 8)
    elif kind == "garbage":
        assert isinstance(what, bytes)
        host.ram[where : where + 64] = what
    elif kind == "restart":
        host.disable()
        host.enable()
    elif kind == "reset":
        device.reset()
    elif kind == "master":
        device.config_write(4, 2, where)
    else:
        host.host.clock.advance(where)


@settings(max_examples=200, deadline=None)
@given(st.lists(ACTIONS, max_size=60))
def test_nothing_that_a_guest_does_raises_or_hangs(actions: list[tuple[str, int, object]]) -> None:
    host = NvmeHost(drive="mem:1M", max_ioqpairs=8)
    host.enable_msix()
    host.start()
    for action in actions:
        act(host, *action)
    host.device.check_state(host.device.export_state(), where="nvme")
    host.device.reset()
    host.device.config_write(4, 2, 4)
    host.start()
    assert host.write_blocks(0, b"fine" * (host.block // 4)).status == Status.SUCCESS
    assert host.read_blocks(0, 1) == b"fine" * (host.block // 4)
