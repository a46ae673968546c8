"""A vfio-user server by the letter of QEMU's ``docs/interop/vfio-user.rst``; it imports nothing of this project.

One device: registers in BAR 0, a sparse mmappable BAR 2, MSI-X in BAR 4, INTx, DMA through mapped descriptors or by
message. It is strict: what the document does not let a client do goes to the log as a *violation* and is refused. And
it can be told to misbehave at the Nth command after VERSION.

``python -m tests.peers.spec_server SOCKET LOG OPTIONS`` (a JSON object, see :data:`DEFAULTS`); it prints ``ready``.
"""

from __future__ import annotations

import array
import errno
import json
import mmap
import os
import select
import socket
import struct
import sys
import time
from typing import Any

DEFAULTS: dict[str, Any] = {
    "config_size": 256,
    "capabilities": {},  # of the answer to VERSION
    "twin": False,
    "version": "good",  # error, major, minor, json, silent, unasked-twin
    "mmap": "sparse",  # whole, none, no-fd, short-file, overlap, circle, beyond, two-fds, read-only, sealed, pipe
    "device_id": 0x5EC5,
    "reset": True,
    "at": 0,  # at which command after VERSION (from 1)
    "act": "",  # what happens instead of its answer, see Server.misbehave
    "delay": {},  # seconds, by command
    "refuse": {},  # errno, by command
    "migration": 0,  # flags of VFIO_DEVICE_FEATURE_MIGRATION; 0: there is none
    "bells": [],  # (offset in BAR 0, bytes, value or None, what is wrong with it: type, beyond, index, pipe, full)
    "first_client_only": False,  # misbehave to the first client, be good to the next
}
ID, SCRATCH, IOVA, LENGTH, COMMAND, RESULT, DONE, IRQ, RESETS, PATTERN, DATA, CUT = (
    0x00, 0x04, 0x08, 0x10, 0x14, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x800, 0x2C
)  # fmt: skip
IDENTITY = 0x52454550
WRITE, READ, UNSOLICITED = 1, 2, 3
BAR2, FILE_OFFSET = 64 << 10, 0x10000
AREAS = [(0x1000, 0x1000), (0x4000, 0x8000)]
VECTORS = 16
HEADER = struct.Struct("=HHIII")
(
    VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO, SET_IRQS, REGION_READ,
    REGION_WRITE, DMA_READ, DMA_WRITE, RESET,
) = range(1, 14)  # fmt: skip
WRITE_MULTI, FEATURE, MIG_READ, MIG_WRITE = 15, 16, 17, 18


STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(1, 8)
STEPS = {
    (RUNNING, STOP): (), (STOP_COPY, STOP): (), (RESUMING, STOP): (), (PRE_COPY, RUNNING): (), (STOP, RUNNING): (),
    (RUNNING, PRE_COPY): (), (STOP, STOP_COPY): (), (PRE_COPY, STOP_COPY): (), (STOP, RESUMING): (),
    (RUNNING, STOP_COPY): (STOP,), (RUNNING, RESUMING): (STOP,), (STOP_COPY, RUNNING): (STOP,),
    (STOP_COPY, RESUMING): (STOP,), (RESUMING, RUNNING): (STOP,), (RESUMING, STOP_COPY): (STOP,),
    (PRE_COPY, STOP): (RUNNING,), (STOP, PRE_COPY): (RUNNING,),
}  # fmt: skip
PRE_COPY_FLAG = 4
RUN = struct.Struct("=HB")
KEPT = slice(SCRATCH, DATA)
"""The registers that migrate, as runs of bytes that changed since the last."""


class Gone(Exception):
    """The client closed."""


class Refused(Exception):
    """An errno for the answer."""


class Map:
    def __init__(self, address: int, size: int, flags: int, view: mmap.mmap | None, delta: int) -> None:
        self.address, self.size, self.flags, self.view, self.delta = address, size, flags, view, delta


class Server:
    def __init__(self, path: str, log: str, options: dict[str, Any]) -> None:
        self.options = {**DEFAULTS, **options}
        self.log = open(log, "a", buffering=1)  # noqa: SIM115
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.regs = bytearray(4096)
        self.regs[ID : ID + 4] = struct.pack("<I", IDENTITY)
        self.msix = bytearray(4096)
        self.state, self.sent, self.stream = RUNNING, b"", b""
        self.memory_fd = self.make_memory()
        self.memory: Any = mmap.mmap(self.memory_fd, FILE_OFFSET + BAR2)
        self.config = self.make_config()
        self.clients = 0

    def note(self, what: str, **fields: Any) -> None:
        self.log.write(json.dumps({"what": what, **fields}) + "\n")

    def violation(self, why: str) -> None:
        self.note("violation", why=why)

    # -- the device ----------------------------------------------------------------------------------------------

    def make_memory(self) -> int:
        how = self.options["mmap"]
        fd = os.memfd_create("bar2", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, FILE_OFFSET + BAR2)
        if how == "sealed":
            import fcntl  # noqa: PLC0415

            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return fd

    def make_config(self) -> bytearray:
        config = bytearray(self.options["config_size"])
        struct.pack_into("<HHHH", config, 0, 0x1AF4, self.options["device_id"], 0, 0x0010)
        struct.pack_into("<I", config, 0x08, 0xFF000001)
        struct.pack_into("<I", config, 0x10, 0)
        struct.pack_into("<II", config, 0x18, 0x4, 0)  # 64 bits
        struct.pack_into("<HH", config, 0x2C, 0x1AF4, 0x1100)
        config[0x34], config[0x3D] = 0x40, 1
        struct.pack_into("<BBHII", config, 0x40, 0x11, 0, VECTORS - 1, 0x4, 0x804)
        return config

    # -- sockets -------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        while True:
            self.sock, _ = self.listener.accept()
            self.clients += 1
            self.back: socket.socket | None = None
            self.maps: list[Map] = []
            self.irqs: dict[tuple[int, int], int] = {}
            self.masked = False
            self.bells: dict[int, int] = {}
            self.queue: list[tuple[tuple[int, ...], bytes, list[int]]] = []
            self.peer: dict[str, Any] = {}
            self.served = 0
            self.next_id = 0x4000
            self.note("client", number=self.clients)
            try:
                self.handshake()
                while True:
                    self.wait()
                    message = self.queue.pop(0) if self.queue else self.receive(self.sock)
                    self.handle(*message)
            except (Gone, ConnectionError, BrokenPipeError):
                self.note("gone", maps=len(self.maps))
            self.forget()

    def wait(self) -> None:
        """Until there is a message; doorbells that ring before it are noted."""
        while not self.queue:
            ready = select.select([self.sock, *self.bells], [], [])[0]
            for fd in ready:
                if fd in self.bells:
                    os.eventfd_read(fd)
                    self.note("rung", offset=self.bells[fd])
            if self.sock in ready:
                return

    def io_fds(self, body: bytes) -> tuple[bytes, tuple[int, ...]]:
        argsz, flags, index, count = self.expect(body, "=IIII", 16)
        if flags or count or index >= 9:
            self.violation("region io fds: fields that must be zero, or no such region")
        bells = self.options["bells"] if index == 0 else []
        full = 16 + 40 * len(bells)
        if not bells or argsz < full:
            return struct.pack("=IIII", full, 0, index, 0), ()
        areas, fds = b"", []
        for number, (offset, size, value, wrong) in enumerate(bells):
            fd = os.pipe()[1] if wrong == "pipe" else os.eventfd(0)
            if wrong == "full":
                os.eventfd_write(fd, 2**64 - 2)
            if wrong not in ("pipe", "full"):
                self.bells[fd] = offset
            fds.append(fd)
            index_of = 99 if wrong == "index" else number
            at = offset + (1 << 20 if wrong == "beyond" else 0)
            match = (int(value is not None), value or 0)
            areas += struct.pack("=QQIII4xQ", at, size, index_of, int(wrong == "type"), *match)
        return struct.pack("=IIII", full, 0, index, len(bells)) + areas, tuple(fds)

    def forget(self) -> None:
        for fd in self.bells:
            os.close(fd)
        for fd in self.irqs.values():
            os.close(fd)
        for known in self.maps:
            if known.view is not None:
                known.view.close()
        self.sock.close()
        if self.back is not None:
            self.back.close()

    def receive(self, sock: socket.socket) -> tuple[tuple[int, ...], bytes, list[int]]:
        data, fds = b"", array.array("i")
        while len(data) < HEADER.size:
            part, control, _, _ = sock.recvmsg(HEADER.size - len(data), socket.CMSG_SPACE(253 * 4))
            if not part:
                raise Gone
            for level, kind, content in control:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(content)
            data += part
        header = HEADER.unpack(data)
        body = b""
        while len(body) < header[2] - HEADER.size:
            part = sock.recv(header[2] - HEADER.size - len(body))
            if not part:
                raise Gone
            body += part
        return header, body, fds.tolist()

    def send(self, data: bytes, fds: tuple[int, ...] = (), sock: socket.socket | None = None) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sock = sock or self.sock
        sent = sock.sendmsg([data], rights)
        sock.sendall(data[sent:])

    def reply(self, header: tuple[int, ...], body: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        if not header[3] & 0x10:
            self.send(HEADER.pack(header[0], header[1], HEADER.size + len(body), 1, 0) + body, fds)

    def refuse(self, header: tuple[int, ...], number: int) -> None:
        if not header[3] & 0x10:
            self.send(HEADER.pack(header[0], header[1], HEADER.size, 0x21, number))

    # -- VERSION -------------------------------------------------------------------------------------------------

    def handshake(self) -> None:
        header, body, fds = self.receive(self.sock)
        if header[1] != VERSION or fds or header[3]:
            self.violation("the first message is not VERSION")
        major, minor = struct.unpack_from("=HH", body)
        if body[-1:] != b"\0":
            self.violation("VERSION without NUL")
        self.peer = json.loads(body[4:-1])["capabilities"]
        self.note("version", major=major, minor=minor, capabilities=self.peer)
        how = self.options["version"]
        said = {key: value for key, value in self.options["capabilities"].items() if key in self.peer}
        sent: tuple[int, ...] = ()
        theirs = None
        if self.options["twin"] and self.peer.get("twin_socket", {}).get("supported"):
            self.back, theirs = socket.socketpair()
            said["twin_socket"] = {"supported": True, "fd_index": 0}
            sent = (theirs.fileno(),)
        if how == "unasked-fd":
            said["twin_socket"] = {"supported": True, "fd_index": 3}
        if how == "silent":
            self.receive(self.sock)
        if how == "error":
            self.refuse(header, errno.EINVAL)
            raise Gone
        major, minor = (major + 1 if how == "major" else major), (minor + 1 if how == "minor" else minor)
        text = b"{nonsense" if how == "json" else json.dumps({"capabilities": said}).encode()
        self.reply(header, struct.pack("=HH", major, minor) + text + b"\0", sent)
        if theirs is not None:
            theirs.close()

    # -- commands ------------------------------------------------------------------------------------------------

    def handle(self, header: tuple[int, ...], body: bytes, fds: list[int]) -> None:
        _, command, _, flags, error = header
        if flags & 1:
            self.note("reply", command=command, errno=error)
            return
        self.served += 1
        if flags & ~0x10:
            self.violation(f"command {command} with flags {flags:#x}")
        if len(fds) > self.options["capabilities"].get("max_msg_fds", 1):
            self.violation(f"{len(fds)} descriptors")
        delay = self.options["delay"].get(str(command), 0)
        if delay:
            time.sleep(delay)
        good = self.options["first_client_only"] and self.clients > 1
        if self.options["at"] == self.served and not good:
            self.misbehave(self.options["act"], header)
        number = self.options["refuse"].get(str(command))
        try:
            if number:
                raise Refused(number)
            answer, sent = self.carry_out(command, body, fds, bool(flags & 0x10))
        except Refused as refused:
            self.refuse(header, refused.args[0])
        else:
            self.reply(header, answer, sent)
        finally:
            for fd in fds:
                if fd not in self.irqs.values():
                    os.close(fd)

    def misbehave(self, act: str, header: tuple[int, ...]) -> None:
        number, command = header[0], header[1]
        self.note("misbehaves", act=act, command=command)
        if act == "die":
            os._exit(1)
        elif act == "half":
            self.send(HEADER.pack(number, command, 64, 1, 0)[:9])
            os._exit(1)
        elif act == "half-body":
            self.send(HEADER.pack(number, command, 64, 1, 0) + bytes(7))
            os._exit(1)
        elif act == "stall":
            self.send(HEADER.pack(number, command, 64, 1, 0) + bytes(7))
            self.receive(self.sock)
            while True:
                self.receive(self.sock)
        elif act == "hang":
            while True:
                self.receive(self.sock)
        elif act == "garbage":
            self.send(bytes(range(7, 199)))
        elif act == "wrong-id":
            self.send(HEADER.pack(number ^ 0x5555, command, 16, 1, 0))
        elif act == "wrong-command":
            self.send(HEADER.pack(number, command ^ 1, 16, 1, 0))
        elif act == "reply-to-nothing":
            self.send(HEADER.pack(0xBEEF, RESET, 16, 1, 0))
        elif act == "huge":
            self.send(HEADER.pack(number, command, 0x7FFFFFFF, 1, 0))
        elif act == "tiny":
            self.send(HEADER.pack(number, command, 3, 1, 0))
        elif act == "type":
            self.send(HEADER.pack(number, command, 16, 7, 0))
        elif act == "long-body":
            self.send(HEADER.pack(number, command, 16 + 4000, 1, 0) + bytes(4000))
        elif act == "fds":
            null = os.open("/dev/null", os.O_RDONLY)
            self.send(HEADER.pack(number, command, 16, 1, 0), (null, null, null))
            os.close(null)
        elif act == "client-command":
            self.send(HEADER.pack(1, RESET, 16, 0, 0))
        elif act == "unknown-command":
            self.send(HEADER.pack(1, 0x7777, 16, 0, 0))
        elif act == "flood":
            self.sock.settimeout(0.5)
            try:
                for serial in range(100_000):
                    self.send(HEADER.pack(serial & 0xFFFF, DMA_READ, 32, 0, 0) + struct.pack("=QQ", 1 << 40, 64))
            except TimeoutError:
                raise Gone from None
        else:
            raise AssertionError(act)

    def carry_out(self, command: int, body: bytes, fds: list[int], posted: bool) -> tuple[bytes, tuple[int, ...]]:
        if command == DMA_MAP:
            self.dma_map(body, fds)
            return b"", ()
        if command == DMA_UNMAP:
            return self.dma_unmap(body), ()
        if command == GET_INFO:
            self.expect(body, "=IIII", 16)
            return struct.pack("=IIII", 16, 2 | int(self.options["reset"]), 9, 5), ()
        if command == GET_REGION_INFO:
            return self.region_info(body)
        if command == GET_REGION_IO_FDS and self.options["bells"]:
            return self.io_fds(body)
        if command == GET_IRQ_INFO:
            _, _, index, _ = self.expect(body, "=IIII", 16)
            count = {0: 1, 2: VECTORS}.get(index, 0)
            return struct.pack("=IIII", 16, 1 | (2 | 4 if index == 0 else 8), index, count), ()
        if command == SET_IRQS:
            self.set_irqs(body, fds)
            return b"", ()
        if command == REGION_READ:
            offset, region, count = self.expect(body, "=QII", None)
            data = self.region(region, offset, count)[offset : offset + count]
            return struct.pack("=QII", offset, region, count) + bytes(data), ()
        if command == REGION_WRITE:
            self.region_write(body)
            return body[:16], ()
        if command == WRITE_MULTI:
            return self.write_multi(body), ()
        if command == RESET:
            self.reset()
            return b"", ()
        if command == FEATURE and self.options["migration"]:
            return self.feature(body), ()
        if command == FEATURE:
            raise Refused(errno.ENOTTY)
        if command in (MIG_READ, MIG_WRITE) and self.options["migration"]:
            return self.migration_data(command, body), ()
        raise Refused(errno.ENOTSUP)

    def expect(self, body: bytes, form: str, argsz: int | None) -> tuple[int, ...]:
        layout = struct.Struct(form)
        if len(body) != layout.size:
            self.violation(f"{len(body)} bytes, not {layout.size}")
            raise Refused(errno.EINVAL)
        values = layout.unpack(body)
        if argsz is not None and values[0] < argsz:
            self.violation(f"argsz {values[0]}")
        return values

    # -- regions -------------------------------------------------------------------------------------------------

    def region_info(self, body: bytes) -> tuple[bytes, tuple[int, ...]]:
        argsz, flags, index, at, size, offset = self.expect(body, "=IIIIQQ", 32)
        if flags or at or size or offset or index >= 9:
            self.violation("region info: fields that must be zero, or no such region")
        sizes = {0: 4096, 2: BAR2, 4: 4096, 7: len(self.config)}
        how = self.options["mmap"]
        size = sizes.get(index, 0)
        if index != 2 or how == "none":
            return struct.pack("=IIIIQQ", 32, 3 if size else 0, index, 0, size, 0), ()
        chain = self.chain(how)
        if argsz < 32 + len(chain):
            return struct.pack("=IIIIQQ", 32 + len(chain), 3 | 4, index, 0, size, 0), ()
        offset = FILE_OFFSET + (BAR2 if how == "short-file" else 0)
        caps = 8 if chain else 0
        head = struct.pack("=IIIIQQ", 32 + len(chain), 3 | 4 | caps, index, 32 if chain else 0, size, offset)
        fds: tuple[int, ...] = (self.memory_fd,)
        if how == "no-fd":
            fds = ()
        elif how == "two-fds":
            fds = (self.memory_fd, self.memory_fd)
        elif how == "read-only":
            fds = (os.open(f"/proc/self/fd/{self.memory_fd}", os.O_RDONLY),)
        elif how == "pipe":
            fds = (os.pipe()[0],)
        return head + chain, fds

    def chain(self, how: str) -> bytes:
        if how in ("whole", "short-file"):
            return b""
        other = struct.pack("=HHI", 99, 1, 32 + 16) + bytes(8)
        areas = {"overlap": [(0, 0x2000), (0x1000, 0x1000)], "beyond": [(0x8000, BAR2)]}.get(how, AREAS)
        following = 32 if how == "circle" else 0
        kind = 98 if how == "circle" else 1
        sparse = struct.pack("=HHIII", kind, 1, following, len(areas) + (1000 if how == "count" else 0), 0)
        return other + sparse + b"".join(struct.pack("=QQ", *area) for area in areas)

    def region(self, region: int, offset: int, count: int) -> bytearray | memoryview:
        limit = self.options["capabilities"].get("max_data_xfer_size", 1 << 20)
        found: Any = {0: self.regs, 4: self.msix, 7: self.config}.get(region)
        if region == 2:
            found = memoryview(self.memory)[FILE_OFFSET:]
        if found is None or offset + count > len(found) or not 0 < count <= limit:
            self.violation(f"{count} bytes at {offset:#x} of region {region}")
            raise Refused(errno.EINVAL)
        return found  # type: ignore[no-any-return]

    def region_write(self, body: bytes) -> None:
        offset, region, count = struct.unpack_from("=QII", body)
        if len(body) != 16 + count:
            self.violation(f"REGION_WRITE of {count} with {len(body) - 16} bytes")
            raise Refused(errno.EINVAL)
        self.region(region, offset, count)[offset : offset + count] = body[16:]
        self.note("write", region=region, offset=offset, size=count)
        if region == 7:
            self.note("config", offset=offset, value=int.from_bytes(body[16:], "little"))
        if region == 0 and offset == COMMAND:
            self.command(struct.unpack_from("<I", self.regs, COMMAND)[0])
        if region == 0 and offset == IRQ:
            self.interrupt(struct.unpack_from("<I", self.regs, IRQ)[0])
        if region == 0 and offset == CUT:
            self.memory = bytearray(self.memory)
            os.ftruncate(self.memory_fd, FILE_OFFSET)

    def write_multi(self, body: bytes) -> bytes:
        (count,) = struct.unpack_from("=Q", body)
        if not self.options["capabilities"].get("write_multiple") or len(body) != 8 + 24 * count or not count:
            self.violation(f"REGION_WRITE_MULTI of {count} writes in {len(body)} bytes")
        self.note("multi", count=count)
        for at in range(8, len(body), 24):
            size = struct.unpack_from("=QII", body, at)[2]
            if not 0 < size <= 8:
                self.violation(f"a write of {size} bytes among many")
            self.region_write(body[at : at + 16 + size])
        return struct.pack("=Q", count)

    def reset(self) -> None:
        if not self.options["reset"]:
            self.violation("DEVICE_RESET of a device without")
            raise Refused(errno.ENOTSUP)
        resets = struct.unpack_from("<I", self.regs, RESETS)[0] + 1
        self.regs[4:RESETS] = bytes(RESETS - 4)
        struct.pack_into("<I", self.regs, RESETS, resets)
        struct.pack_into("<H", self.config, 4, 0)
        self.state, self.sent, self.stream = RUNNING, b"", b""
        self.note("reset")

    # -- interrupts ----------------------------------------------------------------------------------------------

    def set_irqs(self, body: bytes, fds: list[int]) -> None:
        argsz, flags, index, start, count = struct.unpack_from("=IIIII", body)
        self.note("set_irqs", flags=flags, index=index, start=start, count=count, fds=len(fds))
        if argsz != len(body) or len(body) != 20:
            self.violation(f"SET_IRQS argsz {argsz} of {len(body)} bytes")
        data, action = flags & 7, flags & 0x38
        if data == 4 and len(fds) != count:
            self.violation(f"{len(fds)} eventfds for {count}")
        limit = {0: 1, 2: VECTORS}.get(index, 0)
        if start + count > limit:
            self.violation(f"interrupts {start}+{count} of index {index}")
            raise Refused(errno.EINVAL)
        if action == 0x10:
            if index:
                self.violation("unmask of an index that is not maskable")
            self.masked = False
            return
        if action != 0x20:
            raise Refused(errno.EINVAL)
        gone = range(start, start + count) if count else range(limit)
        if data == 4 or not count:
            for number in gone:
                old = self.irqs.pop((index, number), None)
                if old is not None:
                    os.close(old)
        for number, fd in enumerate(fds):
            self.irqs[index, start + number] = fd

    def interrupt(self, vector: int) -> None:
        if (2, vector) in self.irqs:
            os.eventfd_write(self.irqs[2, vector], 1)
        elif (0, 0) in self.irqs and not self.masked:
            self.masked = True
            os.eventfd_write(self.irqs[0, 0], 1)

    # -- migration -----------------------------------------------------------------------------------------------

    def feature(self, body: bytes) -> bytes:
        argsz, flags = struct.unpack_from("=II", body)
        number, data = flags & 0xFFFF, body[8:]
        get, put, probe = (bool(flags & 1 << bit) for bit in (16, 17, 18))
        if flags >> 19 or (get and put and not probe) or not (get or put or probe) or argsz < 8:
            self.violation(f"feature flags {flags:#x}, argsz {argsz}")
            raise Refused(errno.EINVAL)
        if number not in (1, 2) or (number == 1 and put):
            raise Refused(errno.ENOTTY)
        if probe:
            return body
        if number == 1:
            return struct.pack("=IIQ", 16, flags, self.options["migration"])
        if put:
            if len(data) != 8:
                self.violation(f"{len(data)} bytes of device state")
            self.go(struct.unpack_from("=I", data)[0])
            return body
        return struct.pack("=IIIi", 16, flags, self.state, -1)

    def go(self, wanted: int) -> None:
        self.note("state", before=self.state, after=wanted)
        saves = self.options["migration"] & PRE_COPY_FLAG
        if wanted in (RUNNING_P2P, PRE_COPY_P2P) or (wanted == PRE_COPY and not saves):
            self.violation(f"state {wanted}, which there is not")
            raise Refused(errno.EINVAL)
        if wanted == self.state:
            return
        if (self.state, wanted) not in STEPS:
            self.violation(f"from state {self.state} to {wanted}")
            raise Refused(errno.EINVAL)
        for state in (*STEPS[self.state, wanted], wanted):
            if self.state == RESUMING:
                self.take()
            if not (self.state == PRE_COPY and state == STOP_COPY):
                self.sent = b""
            self.state, self.stream = state, b""

    def take(self) -> None:
        at = 0
        while at < len(self.stream):
            offset, length = RUN.unpack_from(self.stream, at)
            at += RUN.size + length
            if at > len(self.stream):
                self.violation("a state that is cut")
                raise Refused(errno.EINVAL)
            self.regs[offset : offset + length] = self.stream[at - length : at]

    def migration_data(self, command: int, body: bytes) -> bytes:
        argsz, size = struct.unpack_from("=II", body)
        if command == MIG_WRITE:
            if self.state != RESUMING or len(body) != 8 + size:
                self.violation(f"MIG_DATA_WRITE of {size} with {len(body)} bytes in state {self.state}")
                raise Refused(errno.EINVAL)
            self.stream += body[8:]
            return b""
        if argsz < 8 + size or len(body) != 8 or size > self.options["capabilities"].get("max_data_xfer_size", 1 << 20):
            self.violation(f"MIG_DATA_READ of {size}, argsz {argsz}")
        if self.state not in (PRE_COPY, STOP_COPY):
            self.note("early read", state=self.state)
            raise Refused(errno.EINVAL)
        if not self.stream:
            self.say()
        part, self.stream = self.stream[:size], self.stream[size:]
        self.note("read", state=self.state, size=len(part))
        return struct.pack("=II", 8 + len(part), len(part)) + part

    def say(self) -> None:
        """What was not said yet."""
        now = bytes(self.regs[:DATA])
        for offset in range(KEPT.start, KEPT.stop, 4):
            if now[offset : offset + 4] != self.sent[offset : offset + 4]:
                self.stream += RUN.pack(offset, 4) + now[offset : offset + 4]
        self.sent = now

    # -- DMA -----------------------------------------------------------------------------------------------------

    def dma_map(self, body: bytes, fds: list[int]) -> None:
        _, flags, offset, address, size = self.expect(body, "=IIQQQ", 32)
        self.note("map", address=address, size=size, flags=flags, offset=offset, fd=bool(fds))
        if not size or flags & ~3 or not flags or len(fds) > 1 or (offset and not fds):
            self.violation(f"DMA_MAP of {size:#x} bytes, flags {flags}, {len(fds)} descriptors, offset {offset:#x}")
        if any(known.address < address + size and address < known.address + known.size for known in self.maps):
            self.violation(f"DMA_MAP over a region at {address:#x}")
            raise Refused(errno.EEXIST)
        if len(self.maps) >= self.options["capabilities"].get("max_dma_maps", 65535):
            self.violation("too many maps")
            raise Refused(errno.ENOSPC)
        smallest = self.options["capabilities"].get("pgsizes", 4096)
        smallest &= -smallest
        if (address | size | offset) % smallest:
            self.violation(f"DMA_MAP of {size:#x} bytes at {address:#x} is not of pages of {smallest:#x}")
        view, delta = None, 0
        if fds:
            first = offset & -mmap.ALLOCATIONGRANULARITY
            delta = offset - first
            view = mmap.mmap(fds[0], size + delta, offset=first)
        self.maps.append(Map(address, size, flags, view, delta))

    def dma_unmap(self, body: bytes) -> bytes:
        _, flags, address, size = self.expect(body, "=IIQQ", 24)
        self.note("unmap", address=address, size=size)
        if flags:
            self.violation(f"DMA_UNMAP with flags {flags:#x}")
        known = next((each for each in self.maps if (each.address, each.size) == (address, size)), None)
        if known is None:
            self.violation(f"DMA_UNMAP of {size:#x} bytes at {address:#x}, which is no map")
            raise Refused(errno.EINVAL)
        self.maps.remove(known)
        if known.view is not None:
            known.view.close()
        return body

    def command(self, command: int) -> None:
        iova, length = struct.unpack_from("<QI", self.regs, IOVA)
        pattern = self.regs[PATTERN : PATTERN + 1] * length
        master = struct.unpack_from("<H", self.config, 4)[0] & 4
        struct.pack_into("<I", self.regs, RESULT, 0xFFFFFFFF)
        try:
            if command == UNSOLICITED:
                self.message(DMA_WRITE, iova, pattern)
            elif not master:
                raise Refused(errno.EPERM)
            elif command == WRITE:
                self.dma(iova, pattern, is_write=True)
            else:
                data = self.dma(iova, bytes(length), is_write=False)
                self.regs[DATA : DATA + min(length, 0x800)] = data[:0x800]
            result = 0
        except Refused as refused:
            result = refused.args[0]
        struct.pack_into("<I", self.regs, RESULT, result)
        struct.pack_into("<I", self.regs, DONE, struct.unpack_from("<I", self.regs, DONE)[0] + 1)

    def dma(self, iova: int, data: bytes, *, is_write: bool) -> bytes:
        found = b""
        while len(found) < len(data):
            at = iova + len(found)
            known = next((each for each in self.maps if each.address <= at < each.address + each.size), None)
            if known is None or not known.flags & (2 if is_write else 1):
                raise Refused(errno.EFAULT)
            inside = at - known.address
            count = min(len(data) - len(found), known.size - inside, self.peer.get("max_data_xfer_size", 1 << 20))
            part = data[len(found) : len(found) + count]
            if known.view is None:
                part = self.message(DMA_WRITE, at, part) if is_write else self.message(DMA_READ, at, part)
            elif is_write:
                known.view[inside + known.delta : inside + known.delta + count] = part
            else:
                part = known.view[inside + known.delta : inside + known.delta + count]
            found += part
        return found

    def message(self, command: int, address: int, data: bytes) -> bytes:
        """DMA_READ or DMA_WRITE; commands that come meanwhile wait. The data of the answer, or what was given."""
        self.next_id = self.next_id + 1 & 0xFFFF
        sock = self.back or self.sock
        body = struct.pack("=QQ", address, len(data)) + (data if command == DMA_WRITE else b"")
        self.note("message", command=command, address=address, size=len(data))
        self.send(HEADER.pack(self.next_id, command, 16 + len(body), 0, 0) + body, sock=sock)
        while True:
            ready = select.select([self.sock, sock], [], [])[0]
            came = sock if sock in ready else self.sock
            header, answer, fds = self.receive(came)
            if not header[3] & 1:
                self.queue.append((header, answer, fds))
                continue
            if came is not sock or header[0] != self.next_id or header[1] != command or fds:
                self.violation(f"a wrong answer to {command}: {header}")
            if header[3] & 0x20:
                raise Refused(header[4] or errno.EIO)
            got_address, count = struct.unpack_from("=QQ", answer)
            if (got_address, count) != (address, len(data)):
                self.violation(f"{count} bytes at {got_address:#x} answer {len(data)} at {address:#x}")
            return answer[16:] if command == DMA_READ else data


def main() -> None:
    path, log, options = sys.argv[1:]
    server = Server(path, log, json.loads(options))
    print("ready", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
