"""A vfio-user client by the letter of QEMU's ``docs/interop/vfio-user.rst``; it imports nothing of this project.

It waits for each answer with blocking calls, and serves DMA_READ and DMA_WRITE meanwhile from :attr:`Client.memory`.
"""

from __future__ import annotations

import array
import json
import socket
import struct
from typing import Any

HEADER = struct.Struct("=HHIII")
DMA_READ, DMA_WRITE = 11, 12


class Failed(Exception):
    """The answer was an error; its errno."""


class Client:
    """Connected to ``path``; :meth:`version` comes first."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(path)
        self.back: socket.socket | None = None
        self.memory: dict[int, bytearray] = {}
        """What is served by message: bytes by their DMA address."""
        self.served: list[tuple[int, int, int]] = []
        """(command, address, count) of DMA messages."""
        self.next_id = 1

    def close(self) -> None:
        self.sock.close()
        if self.back is not None:
            self.back.close()

    def receive(self, sock: socket.socket) -> tuple[tuple[int, ...], bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < HEADER.size:
            part, control, _, _ = sock.recvmsg(HEADER.size - len(data), socket.CMSG_SPACE(64 * 4))
            if not part:
                raise EOFError
            for level, kind, content in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content)
            data += part
        header, body = HEADER.unpack(data), b""
        while len(body) < header[2] - HEADER.size:
            part = sock.recv(header[2] - HEADER.size - len(body))
            if not part:
                raise EOFError
            body += part
        return header, body, fds.tolist()

    def send(self, command: int, body: bytes = b"", fds: tuple[int, ...] = (), *, no_reply: bool = False) -> int:
        number, self.next_id = self.next_id, self.next_id + 1 & 0xFFFF
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        data = HEADER.pack(number, command, HEADER.size + len(body), 0x10 if no_reply else 0, 0) + body
        sent = self.sock.sendmsg([data], rights)
        self.sock.sendall(data[sent:])
        return number

    def call(self, command: int, body: bytes = b"", fds: tuple[int, ...] = ()) -> tuple[bytes, list[int]]:
        """Send and wait: the payload of the answer and its descriptors. :raise Failed: an error."""
        number = self.send(command, body, fds)
        while True:
            header, answer, got = self.receive(self.sock)
            if not header[3] & 1:
                assert self.back is None, "the second socket is for this"
                self.serve(self.sock, header, answer)
                continue
            assert (header[0], header[1], header[3] & ~0x20) == (number, command, 1)
            if header[3] & 0x20:
                assert not answer and not got, "an error is the header alone"
                raise Failed(header[4])
            return answer, got

    def serve(self, sock: socket.socket, header: tuple[int, ...], body: bytes) -> None:
        """Answer a DMA message."""
        number, command, _, flags, _ = header
        assert command in (DMA_READ, DMA_WRITE) and not flags & ~0x10
        address, count = struct.unpack_from("=QQ", body)
        self.served.append((command, address, count))
        found = next(
            ((start, data) for start, data in self.memory.items() if start <= address <= start + len(data) - count),
            None,
        )
        if found is None:
            sock.sendall(HEADER.pack(number, command, HEADER.size, 0x21, 14))
            return
        at, answer = address - found[0], struct.pack("=QQ", address, count)
        if command == DMA_WRITE:
            assert len(body) == 16 + count
            found[1][at : at + count] = body[16:]
        else:
            assert len(body) == 16
            answer += bytes(found[1][at : at + count])
        sock.sendall(HEADER.pack(number, command, HEADER.size + len(answer), 1, 0) + answer)

    # -- commands ----------------------------------------------------------------------------------------------------

    def version(self, **capabilities: Any) -> dict[str, Any]:
        """VERSION 0.0; the server's capabilities, which are no others than were asked for."""
        text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        answer, fds = self.call(1, struct.pack("=HH", 0, 0) + text)
        major, minor = struct.unpack_from("=HH", answer)
        assert (major, minor) == (0, 0) and answer[-1:] == b"\0"
        said: dict[str, Any] = json.loads(answer[4:-1]).get("capabilities", {})
        assert set(said) <= set(capabilities)
        twin = said.get("twin_socket", {})
        if twin.get("supported"):
            self.back = socket.socket(fileno=fds.pop(twin["fd_index"]))
            self.back.settimeout(10)
        assert not fds
        return said

    def region_read(self, region: int, offset: int, count: int) -> bytes:
        answer, _ = self.call(9, struct.pack("=QII", offset, region, count))
        assert struct.unpack_from("=QII", answer) == (offset, region, count) and len(answer) == 16 + count
        return answer[16:]

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        body = struct.pack("=QII", offset, region, len(data))
        answer, _ = self.call(10, body + data)
        assert answer == body, "no data comes back"

    def dma_map(self, address: int, size: int, flags: int, fd: int = -1, offset: int = 0) -> None:
        body = struct.pack("=IIQQQ", 32, flags, offset, address, size)
        assert self.call(2, body, () if fd < 0 else (fd,)) == (b"", [])

    def dma_unmap(self, address: int, size: int) -> None:
        body = struct.pack("=IIQQ", 24, 0, address, size)
        assert self.call(3, body) == (body, []), "the original entry comes back"
