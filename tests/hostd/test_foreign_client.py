"""A served device and a client that is not ours: bytes as SPDK's host library (lib/vfio_user/host) sends them."""

from __future__ import annotations

import array
import errno
import json
import os
import select
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostd.serve import ServedDevice, device_server
from protocols.transport.shm import create_memory
from tests.hostd.probe_device import PAGE, SCRATCH, ProbeDevice

VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, REGION_READ, REGION_WRITE = 1, 2, 3, 4, 5, 9, 10
DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE = 16, 17, 18
NO_REPLY = 0x10
SET_STATE = 2 | 1 << 17
STOP, RUNNING, STOP_COPY, RESUMING = 1, 2, 3, 4
HEADER = struct.Struct("=HHIII")
FDS = 8


class Foreign:
    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.connect(path)
        self.fds: list[int] = []

    def request(self, command: int, body: bytes, fds: tuple[int, ...] = (), *, refused: int = 0) -> bytes:
        """A request with id 0, as each of theirs; the payload of its answer, which says errno ``refused``."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        self.socket.sendmsg([HEADER.pack(0, command, HEADER.size + len(body), 0, 0) + body], rights)
        head, self.fds, _, _ = socket.recv_fds(self.socket, HEADER.size, FDS)
        number, answered, size, flags, error = HEADER.unpack(head)
        assert (number, answered, flags, error) == (0, command, 0x21 if refused else 1, refused)
        data = b""
        while len(data) < size - HEADER.size:
            data += self.socket.recv(size - HEADER.size - len(data))
        return data


@pytest.fixture
def server(runtime_dir: Path) -> Iterator[ServedDevice]:
    with device_server(ProbeDevice, socket=runtime_dir / "probe") as served:
        yield served


@pytest.fixture
def foreign(server: ServedDevice) -> Iterator[Foreign]:
    client = Foreign(server.path)
    yield client
    client.socket.close()


def test_it_sets_a_device_up(foreign: Foreign) -> None:
    assert foreign.request(VERSION, struct.pack("=HH", 0, 1))[:4] == bytes(4)
    _, flags, regions, _ = struct.unpack("=4I", foreign.request(GET_INFO, struct.pack("=4I", 16, 0, 0, 0)))
    assert flags & 2
    areas = []
    for index in range(regions):
        buffer = struct.pack("=IIII", 4064, 0, index, 0).ljust(4064, b"\0")
        answer = foreign.request(GET_REGION_INFO, buffer)
        areas.append((struct.unpack_from("=IIII", answer)[1] >> 2 & 1, len(foreign.fds)))
        for fd in foreign.fds:
            os.close(fd)
    assert areas[2] == (1, 1) and sum(mmap for mmap, _ in areas) == 1
    with create_memory("heap", 4 * PAGE) as heap:
        for _ in range(3):
            request = struct.pack("=IIQQQ", 32, 3, PAGE, 0x7F0000000000, PAGE)
            assert foreign.request(DMA_MAP, request, (heap.fd,)) == b""
            request = struct.pack("=IIQQ", 24, 0, 0x7F0000000000, PAGE)
            assert foreign.request(DMA_UNMAP, request, (heap.fd,)) == request
    access = struct.pack("=QII", 0, 7, 4)
    assert foreign.request(REGION_READ, access) == access + struct.pack("=HH", 0x1B36, 0x00FE)


def test_the_trace_says_why_a_map_and_an_unmap_are_refused(runtime_dir: Path) -> None:
    with device_server(ProbeDevice, socket=runtime_dir / "probe", directory=runtime_dir) as server:
        client = Foreign(server.path)
        client.request(VERSION, struct.pack("=HH", 0, 0))
        client.request(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0x4000, 2 * PAGE))
        client.request(DMA_MAP, struct.pack("=IIQQQ", 32, 3, 0, 0x5000, PAGE), refused=errno.EEXIST)
        client.request(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, 0x5000, PAGE), refused=errno.EINVAL)
        client.socket.close()
    events = [json.loads(line) for line in (runtime_dir / "probe.events").read_text().splitlines()]
    refused = {event["event"]: event["fields"]["reason"] for event in events if "refused" in event["event"]}
    assert refused.keys() == {"remote_dma_map_refused", "remote_dma_unmap_refused"}
    assert all("0x4000..0x5fff" in reason for reason in refused.values())


def test_many_requests_at_once_wait_until_their_answers_are_taken(foreign: Foreign) -> None:
    """A client may send one request after the other, and read answers when it has time."""
    foreign.request(VERSION, struct.pack("=HH", 0, 0))
    access = struct.pack("=QII", 0, 7, 4)
    request = HEADER.pack(0, REGION_READ, HEADER.size + len(access), 0, 0) + access
    data = access + struct.pack("=HH", 0x1B36, 0x00FE)
    answer = HEADER.pack(0, REGION_READ, HEADER.size + len(data), 1, 0) + data
    sent, room = 0, select.poll()
    room.register(foreign.socket, select.POLLOUT)
    while room.poll(300) and sent < 20000:
        foreign.socket.sendall(request)
        sent += 1
    assert 500 < sent < 20000
    foreign.socket.settimeout(10)
    for _ in range(sent):
        assert foreign.socket.recv(len(answer), socket.MSG_WAITALL) == answer
    assert foreign.request(REGION_READ, access) == answer[HEADER.size :]


def test_the_state_comes_padded_and_goes_unanswered(foreign: Foreign) -> None:
    """As libvfio-user's servers answer: as many bytes as were asked for, and no payload for a write."""

    def enter(*states: int) -> None:
        for state in states:
            request = struct.pack("=IIIi", 16, SET_STATE, state, -1)
            assert foreign.request(DEVICE_FEATURE, request) == request

    foreign.request(VERSION, struct.pack("=HH", 0, 0))
    enter(STOP, STOP_COPY)
    state, size, asked = b"", 1000, 1000
    while size == asked:
        answer = foreign.request(MIG_DATA_READ, struct.pack("=II", 8 + asked, asked))
        argsz, size = struct.unpack_from("=II", answer)
        assert argsz == 8 + size and len(answer) == 8 + asked and not any(answer[argsz:])
        state += answer[8:argsz]
    enter(STOP, RESUMING)
    assert foreign.request(MIG_DATA_WRITE, struct.pack("=II", 8 + len(state), len(state)) + state) == b""
    enter(STOP, RUNNING)


def test_who_hangs_up_in_the_middle_of_its_requests_keeps_nobody_out(server: ServedDevice) -> None:
    """What it posted is carried out, and the next client has the device at once."""
    access = struct.pack("=QII", SCRATCH, 0, 8)
    for value in range(1, 20):
        client = Foreign(server.path)
        client.request(VERSION, struct.pack("=HH", 0, 0))
        for number in (*range(30), value):
            body = access + struct.pack("=Q", number)
            client.socket.send(HEADER.pack(0, REGION_WRITE, HEADER.size + len(body), NO_REPLY, 0) + body)
        client.socket.close()
        client = Foreign(server.path)
        client.request(VERSION, struct.pack("=HH", 0, 0))
        assert client.request(REGION_READ, access) == access + struct.pack("=Q", value)
        client.socket.close()
