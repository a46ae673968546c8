"""A server of this project, as a client by the letter of the document meets it: every command."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from errno import EEXIST, EINVAL, ENOTSUP
from pathlib import Path

import pytest

from hostd.serve import device_server
from tests.hostd import probe_device as probe
from tests.peers.spec_client import DMA_READ, DMA_WRITE, Client, Failed

PAGE = 4096
LIMITS = {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "max_dma_maps": 65535, "pgsizes": 4096}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    base = Path(os.environ["VFIO_MODEL_RUNTIME_BASE"]) / "letter.sock"
    with device_server(probe.ProbeDevice, socket=base) as served:
        yield served.path


@pytest.fixture
def client(path: str) -> Iterator[Client]:
    found = Client(path)
    yield found
    found.close()


@pytest.fixture
def memory() -> Iterator[tuple[int, mmap.mmap]]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * PAGE)
    view = mmap.mmap(fd, 16 * PAGE)
    yield fd, view
    view.close()
    os.close(fd)


def refused(number: int, *args: object, by: object) -> None:
    assert callable(by)
    with pytest.raises(Failed) as caught:
        by(*args)
    assert caught.value.args == (number,)


def dma(client: Client, command: int, iova: int, length: int, data: int = 0) -> int:
    client.region_write(0, probe.IOVA, struct.pack("<Q", iova))
    client.region_write(0, probe.LENGTH, struct.pack("<Q", length))
    client.region_write(0, probe.DATA, struct.pack("<Q", data))
    client.region_write(0, probe.RESULT, struct.pack("<Q", 0x7777))
    client.region_write(0, probe.COMMAND, struct.pack("<Q", command))
    while (result := struct.unpack("<Q", client.region_read(0, probe.RESULT, 8))[0]) == 0x7777:
        pass
    return int(result)


def master(client: Client) -> None:
    client.region_write(7, 4, struct.pack("<H", 6))


def test_version_says_what_was_asked_and_no_more(client: Client) -> None:
    said = client.version(max_msg_fds=8, write_multiple=True)
    assert said["write_multiple"] is True and said["max_msg_fds"] >= 1


def test_version_without_any_data(path: str) -> None:
    client = Client(path)
    answer, _ = client.call(1, struct.pack("=HH", 0, 0))
    assert struct.unpack_from("=HH", answer) == (0, 0)
    client.close()


def test_information(client: Client) -> None:
    client.version(**LIMITS)
    info, _ = client.call(4, struct.pack("=IIII", 16, 0, 0, 0))
    assert struct.unpack("=IIII", info) == (16, 3, 9, 5)
    sizes = []
    for index in range(9):
        answer, fds = client.call(5, struct.pack("=IIIIQQ", 32, 0, index, 0, 0, 0))
        argsz, flags, same, at, size, _ = struct.unpack("=IIIIQQ", answer)
        assert same == index and not fds and not at and not flags & 8, "no room for capabilities: none, no descriptor"
        sizes.append((size, argsz > 32))
    assert sizes[0] == (PAGE, False) and sizes[2] == (4 * PAGE, True) and sizes[7][0] in (256, 4096)
    irqs = [struct.unpack("=IIII", client.call(7, struct.pack("=IIII", 16, 0, n, 0))[0])[3] for n in range(3)]
    assert irqs == [1, 2, 4]
    refused(EINVAL, 5, struct.pack("=IIIIQQ", 32, 0, 99, 0, 0, 0), by=client.call)


def test_a_sparse_region_and_its_memory(client: Client) -> None:
    client.version(**LIMITS)
    answer, fds = client.call(5, struct.pack("=IIIIQQ", 4096, 0, 2, 0, 0, 0))
    argsz, flags, _, at, _, offset = struct.unpack_from("=IIIIQQ", answer)
    assert argsz == len(answer) and flags & 0xF == 0xF and len(fds) == 1
    kind, version, _, count, _ = struct.unpack_from("=HHIII", answer, at)
    area = struct.unpack_from("=QQ", answer, at + 16)
    assert (kind, version, count, area) == (1, 1, 1, probe.AREA)
    with mmap.mmap(fds[0], area[1], offset=offset + area[0]) as view:
        view[:4] = b"both"
        assert client.region_read(2, area[0], 4) == b"both"
        client.region_write(2, area[0] + 8, b"ways")
        assert view[8:12] == b"ways"
    os.close(fds[0])


def test_descriptors_that_are_rung_instead_of_a_write(client: Client) -> None:
    client.version(**LIMITS)
    answer, fds = client.call(6, struct.pack("=IIII", 16, 0, 0, 0))
    assert struct.unpack_from("=I", answer) == (16 + 2 * 40,) and len(answer) == 16 and not fds, (
        "there was no room for them"
    )
    answer, fds = client.call(6, struct.pack("=IIII", 16 + 2 * 40, 0, 0, 0))
    bells = list(struct.iter_unpack("=QQIII4xQ", answer[16:]))
    assert [(offset, kind) for offset, _, _, kind, _, _ in bells] == [(probe.BELL, 0), (probe.BELL + 8, 0)]
    before = struct.unpack("<Q", client.region_read(0, probe.RUNG, 8))[0]
    os.eventfd_write(fds[bells[0][2]], 1)
    while struct.unpack("<Q", client.region_read(0, probe.RUNG, 8))[0] == before:
        pass
    for fd in fds:
        os.close(fd)


def test_a_posted_write_has_no_answer(client: Client) -> None:
    client.version(**LIMITS)
    body = struct.pack("=QII", probe.SCRATCH, 0, 8) + struct.pack("<Q", 0xABC)
    client.send(10, body, no_reply=True)
    assert client.region_read(0, probe.SCRATCH, 8) == struct.pack("<Q", 0xABC)
    assert client.call(13) == (b"", []), "DEVICE_RESET"
    assert client.region_read(0, probe.SCRATCH, 8) == struct.pack("<Q", 7)


def test_many_writes_in_one_message(client: Client) -> None:
    client.version(**LIMITS, write_multiple=True)
    writes = [(probe.SCRATCH, 0x11), (probe.DATA, 0x22)]
    body = b"".join(struct.pack("=QIIQ", offset, 0, 8, value) for offset, value in writes)
    answer, _ = client.call(15, struct.pack("=Q", 2) + body)
    assert answer == struct.pack("=Q", 2)
    assert client.region_read(0, probe.DATA, 8) == struct.pack("<Q", 0x22)


def test_what_is_not_there_is_refused(client: Client) -> None:
    client.version(**LIMITS)
    refused(ENOTSUP, 0x4242, by=client.call)
    with pytest.raises(Failed):
        client.region_read(0, PAGE, 4)
    assert client.region_read(0, probe.ID, 4) == struct.pack("<I", probe.IDENTIFICATION), "and it goes on"


def test_maps_are_exact(client: Client, memory: tuple[int, mmap.mmap]) -> None:
    fd, view = memory
    client.version(**LIMITS)
    master(client)
    client.dma_map(0x10000, 2 * PAGE, 3, fd, 4 * PAGE)
    client.dma_map(0x20000, PAGE, 1, fd, 0)
    refused(EEXIST, 0x11000, PAGE, 3, fd, 0, by=client.dma_map)
    assert dma(client, probe.WRITE, 0x11000, 8, 0x55) == 0 and view[5 * PAGE] == 0x55
    view[:8] = b"read me!"
    assert dma(client, probe.READ, 0x20000, 8) == 0
    assert client.region_read(0, probe.DATA, 8) == b"read me!"
    assert dma(client, probe.WRITE, 0x20000, 8, 1) != 0, "it may be read only"
    client.dma_unmap(0x10000, 2 * PAGE)
    assert dma(client, probe.WRITE, 0x11000, 8, 0x66) != 0 and view[5 * PAGE] == 0x55
    assert not client.served


def test_memory_without_a_descriptor_is_asked_for(client: Client) -> None:
    client.version(**LIMITS)
    master(client)
    client.dma_map(0x30000, PAGE, 3)
    client.memory[0x30000] = bytearray(PAGE)
    assert dma(client, probe.WRITE, 0x30FF8, 8, 0x77) == 0
    assert client.memory[0x30000][-8] == 0x77
    assert dma(client, probe.READ, 0x30FF8, 8) == 0
    assert [(command, address) for command, address, _ in client.served] == [(DMA_WRITE, 0x30FF8), (DMA_READ, 0x30FF8)]
    client.dma_unmap(0x30000, PAGE)


def test_interrupts(client: Client) -> None:
    client.version(**LIMITS)
    events = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
    client.call(8, struct.pack("=IIIII", 20, 0x24, 2, 0, 3), tuple(events))
    client.region_write(0, probe.DATA, struct.pack("<Q", 1))
    client.region_write(0, probe.COMMAND, struct.pack("<Q", probe.IRQ))
    assert os.eventfd_read(events[1]) == 1
    client.call(8, struct.pack("=IIIII", 21, 0x22, 2, 2, 1) + b"\1")
    assert os.eventfd_read(events[2]) == 1, "triggered by a boolean"
    client.call(8, struct.pack("=IIIII", 20, 0x21, 2, 0, 1))
    assert os.eventfd_read(events[0]) == 1, "and by nothing"
    client.call(8, struct.pack("=IIIII", 20, 0x21, 2, 0, 0))
    client.region_write(0, probe.COMMAND, struct.pack("<Q", probe.IRQ))
    with pytest.raises(BlockingIOError):
        os.eventfd_read(events[1])
    for event in events:
        os.close(event)


def test_migration_states(client: Client) -> None:
    client.version(**LIMITS, migration={"pgsize": 4096})
    client.region_write(0, probe.SCRATCH, struct.pack("<Q", 0x99))
    probing, setting, state = 1 << 18, 1 << 17, 2
    client.call(16, struct.pack("=II", 8, probing | setting | state))
    for number in (1, 3):  # STOP, STOP_COPY
        client.call(16, struct.pack("=IIII", 16, setting | state, number, 0xFFFF_FFFF))
    data = b""
    while part := client.call(17, struct.pack("=II", 8 + 4096, 4096))[0]:
        size = struct.unpack_from("=II", part)[1]
        if not size:
            break
        data += part[8 : 8 + size]
    assert data
    for number in (1, 4):  # STOP, RESUMING
        client.call(16, struct.pack("=IIII", 16, setting | state, number, 0xFFFF_FFFF))
    client.call(18, struct.pack("=II", 8 + len(data), len(data)) + data)
    for number in (1, 2):  # STOP, RUNNING
        client.call(16, struct.pack("=IIII", 16, setting | state, number, 0xFFFF_FFFF))
    assert client.region_read(0, probe.SCRATCH, 8) == struct.pack("<Q", 0x99)


def test_the_second_socket_takes_what_the_device_asks(client: Client) -> None:
    client.version(**LIMITS, twin_socket={"supported": True})
    assert client.back is not None
    master(client)
    client.dma_map(0x30000, PAGE, 3)
    client.memory[0x30000] = bytearray(PAGE)
    for register, value in ((probe.IOVA, 0x30000), (probe.LENGTH, 8), (probe.DATA, 5)):
        client.region_write(0, register, struct.pack("<Q", value))
    body = struct.pack("=QII", probe.COMMAND, 0, 8) + struct.pack("<Q", probe.WRITE)
    client.send(10, body, no_reply=True)
    header, asked, _ = client.receive(client.back)
    client.serve(client.back, header, asked)
    assert client.memory[0x30000][0] == 5
    assert client.region_read(0, probe.ID, 4)
