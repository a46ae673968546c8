"""A vfio-user client by the letter of the specification (QEMU ``docs/interop/vfio-user.rst``): a socket and ``struct``.

It shares no code with the project's own wire, so that a mistake there is not made twice.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

HEADER = struct.Struct("=HHIII")
(
    VERSION, DMA_MAP, DMA_UNMAP, DEVICE_GET_INFO, DEVICE_GET_REGION_INFO, DEVICE_GET_REGION_IO_FDS, DEVICE_GET_IRQ_INFO,
    DEVICE_SET_IRQS, REGION_READ, REGION_WRITE,
) = range(1, 11)  # fmt: skip
DEVICE_RESET, DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE = 13, 16, 17, 18
REPLY, ERROR = 1, 0x20
GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
FEATURE_MIGRATION, FEATURE_STATE, LOGGING_START, LOGGING_STOP, LOGGING_REPORT = 1, 2, 6, 7, 8
STATE_ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)
CONFIG_REGION = 7
INTX, MSI, MSIX = range(3)
READABLE, WRITEABLE = 1, 2
CAP_SPARSE_MMAP = 1
SECONDS = 20.0


class RawClient:
    """Connected to the server at ``path``, version agreed; DMA messages of the server are not expected."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        self._socket.connect(str(path))
        self._id = 0
        self._fds: list[int] = []
        wanted = {"capabilities": {"max_msg_fds": 16, "migration": {"pgsize": 4096}}}
        answer = self.call(VERSION, struct.pack("=HH", 0, 0) + json.dumps(wanted).encode() + b"\0")
        assert struct.unpack_from("=HH", answer) == (0, 0)
        self.capabilities = json.loads(answer[4:].rstrip(b"\0"))["capabilities"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    # -- messages ----------------------------------------------------------------------------------------------------

    def call(self, command: int, body: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        """:raise OSError: with the errno of an error reply."""
        self._id = (self._id + 1) & 0xFFFF
        message = HEADER.pack(self._id, command, HEADER.size + len(body), 0, 0) + body
        sent = socket.send_fds(self._socket, [message], list(fds)) if fds else self._socket.send(message)
        self._socket.sendall(message[sent:])
        head, self._fds, _, _ = socket.recv_fds(self._socket, HEADER.size, 16)
        head += self._exactly(HEADER.size - len(head))
        number, answered, size, flags, errno = HEADER.unpack(head)
        assert (number, answered, flags & 0xF) == (self._id, command, REPLY), "the reply to what was asked"
        answer = self._exactly(size - HEADER.size)
        if flags & ERROR:
            raise OSError(errno, os.strerror(errno))
        return answer

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            assert part, "the server hung up"
            data += part
        return data

    def wait(self, condition: Callable[[], bool]) -> None:
        """Until ``condition()`` holds."""
        until = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < until, "it never came"

    # -- the device --------------------------------------------------------------------------------------------------

    def read(self, region: int, offset: int, size: int) -> int:
        """REGION_READ."""
        answer = self.call(REGION_READ, struct.pack("=QII", offset, region, size))
        assert struct.unpack_from("=QII", answer) == (offset, region, size)
        return int.from_bytes(answer[16:], "little")

    def write(self, region: int, offset: int, size: int, value: int) -> None:
        """REGION_WRITE, awaited."""
        self.call(REGION_WRITE, struct.pack("=QII", offset, region, size) + value.to_bytes(size, "little"))

    def bus_master(self) -> None:
        """Memory decoding and bus mastering on."""
        self.write(CONFIG_REGION, 4, 2, 6)

    def region(self, index: int) -> tuple[int, int, list[tuple[int, int]], list[int]]:
        """(size, offset in the descriptor, mmap areas, descriptors) of a region."""
        argsz = 32
        while True:
            answer = self.call(DEVICE_GET_REGION_INFO, struct.pack("=IIIIQQ", argsz, 0, index, 0, 0, 0))
            needed, flags, _, at, size, offset = struct.unpack_from("=IIIIQQ", answer)
            if needed <= argsz:
                break
            argsz = needed
        areas: list[tuple[int, int]] = []
        while flags & 8 and at:
            kind, _, following = struct.unpack_from("=HHI", answer, at)
            if kind == CAP_SPARSE_MMAP:
                (count,) = struct.unpack_from("=I", answer, at + 8)
                areas = [struct.unpack_from("=QQ", answer, at + 16 + 16 * number) for number in range(count)]
            at = following
        return size, offset, areas, self._fds

    def irqs(self, index: int, events: Sequence[int]) -> None:
        """SET_IRQS: eventfds that are to be rung."""
        self.call(DEVICE_SET_IRQS, struct.pack("=IIIII", 20, 0x24, index, 0, len(events)), events)

    def map(self, iova: int, size: int, fd: int, offset: int = 0, flags: int = READABLE | WRITEABLE) -> None:
        """DMA_MAP."""
        self.call(DMA_MAP, struct.pack("=IIQQQ", 32, flags, offset, iova, size), [fd])

    def unmap(self, iova: int, size: int) -> None:
        """DMA_UNMAP."""
        self.call(DMA_UNMAP, struct.pack("=IIQQ", 24, 0, iova, size))

    # -- features ----------------------------------------------------------------------------------------------------

    def feature(self, flags: int, data: bytes = b"", room: int = 0) -> bytes:
        """DEVICE_FEATURE; what lies behind argsz and flags in the answer, which may have ``room`` bytes."""
        argsz = 8 + max(len(data), room)
        answer = self.call(DEVICE_FEATURE, struct.pack("=II", argsz, flags) + data)
        assert struct.unpack_from("=II", answer)[1] == flags
        return answer[8:]

    @property
    def migration(self) -> int:
        """What VFIO_DEVICE_FEATURE_MIGRATION says: 1 STOP_COPY, 2 P2P, 4 PRE_COPY."""
        return int.from_bytes(self.feature(GET | FEATURE_MIGRATION, bytes(8)), "little")

    @property
    def state(self) -> int:
        """The migration state."""
        return int(struct.unpack("=Ii", self.feature(GET | FEATURE_STATE, bytes(8)))[0])

    def go(self, *states: int) -> None:
        """From state to state."""
        for state in states:
            self.feature(SET | FEATURE_STATE, struct.pack("=Ii", state, -1))

    def save(self, chunk: int = 1000) -> bytes:
        """MIG_DATA_READ to the end."""
        data = b""
        while True:
            answer = self.call(MIG_DATA_READ, struct.pack("=II", 8 + chunk, chunk))
            _, size = struct.unpack_from("=II", answer)
            assert size <= len(answer) - 8 <= chunk, "padded at most to what was asked for"
            if not size:
                return data
            data += answer[8 : 8 + size]

    def load(self, data: bytes, chunk: int = 1000) -> None:
        """MIG_DATA_WRITE."""
        for at in range(0, len(data), chunk):
            part = data[at : at + chunk]
            self.call(MIG_DATA_WRITE, struct.pack("=II", 8 + len(part), len(part)) + part)

    def log_writes(self, *ranges: tuple[int, int], page: int = 4096) -> None:
        """DMA_LOGGING_START for (iova, length)."""
        packed = b"".join(struct.pack("=QQ", *each) for each in ranges)
        self.feature(SET | LOGGING_START, struct.pack("=QII", page, len(ranges), 0) + packed)

    def written(self, iova: int, length: int, page: int = 4096) -> list[int]:
        """DMA_LOGGING_REPORT: addresses of the pages that were written since the last one."""
        words = -(-length // page // 64)
        answer = self.feature(GET | LOGGING_REPORT, struct.pack("=QQQ", iova, length, page), 24 + 8 * words)
        bits = int.from_bytes(answer[24:], "little")
        return [iova + number * page for number in range(length // page) if bits >> number & 1]

    def stop_log(self) -> None:
        """DMA_LOGGING_STOP."""
        self.feature(SET | LOGGING_STOP)


@contextlib.contextmanager
def served(device: str, path: Path) -> Iterator[None]:
    """``vfio-model serve DEVICE --socket PATH``, from when it listens; it ends well."""
    command = [sys.executable, "-m", "deploy.cli", "serve", device, "--socket", str(path), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert json.loads(server.stdout.readline())["socket"] == str(path)
            yield
        finally:
            server.terminate()
        assert server.wait(SECONDS) == 0


class Ram:
    """Memory of the client's own, to be mapped by the device; pages of 4096 bytes."""

    def __init__(self, pages: int) -> None:
        self.size = pages * mmap.PAGESIZE
        self.fd = os.memfd_create("ram")
        os.ftruncate(self.fd, self.size)
        self.view = mmap.mmap(self.fd, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.view.close()
        os.close(self.fd)
