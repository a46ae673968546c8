"""vfio-user between two processes: a device as ``vfio-model serve`` serves it, and guestd's client or a bare one.

The limits are bare echoes over the same kind of socket, with as many bytes and descriptors each way
(:mod:`deploy.bench.stream_echo`). The device and the echoes run on one processor, this process on another
(:mod:`deploy.bench.placement`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.bench.measure import Action, Row, in_turn
from deploy.bench.placement import opposite
from deploy.bench.stream_echo import echo
from deploy.inline.vfio_user import Client, attached
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import HEADER, HEADER_SIZE, Command, Header, HeaderFlags
from vfio_model.errors import VfioModelError
from vfio_model.uapi.vfio import PciRegion

PAGE = 4096
RAM = 64 << 20
_CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_EDU_ID = 0
_RW = 3
_NUMBER = 256
_ROUNDS = 31
_KEPT = 1 << 40
"""Where one map stays: a client that maps page by page has more of the same file mapped."""
_READ = HEADER_SIZE + wire.RegionAccess.SIZE
_UNMAP = HEADER_SIZE + wire.DmaUnmap.SIZE
MAX_ANSWER = 4096
AskBare = Callable[[Command, wire.Payload, int, int | None], None]
ECHO = "bare AF_UNIX echo of as many bytes"
ECHO_FD = "bare AF_UNIX echo that carries a descriptor"


class BareClient:
    """Sends frames and takes answers of a size that is known: what a client costs at the least."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        version = wire.Version().pack()
        sock.sendall(Header(0, Command.VERSION, HEADER_SIZE + len(version), 0, 0).pack() + version)
        header = Header.unpack(sock.recv(HEADER_SIZE, socket.MSG_WAITALL))
        sock.recv(header.size - HEADER_SIZE, socket.MSG_WAITALL)
        if header.flags != HeaderFlags.REPLY:
            raise VfioModelError(f"the device refuses VERSION: {os.strerror(header.errno)}")

    def ask(self, command: Command, payload: wire.Payload, reply: int, fd: int | None = None) -> None:
        """One round trip; the whole answer has ``reply`` bytes. :raise VfioModelError: another answer came."""
        body = payload.pack()
        frame = HEADER.pack(1, command, HEADER_SIZE + len(body), 0, 0) + body
        if fd is None:
            self._sock.send(frame)
        else:
            socket.send_fds(self._sock, [frame], [fd])
        answer = self._sock.recv(MAX_ANSWER)
        if len(answer) != reply or Header.unpack(answer[:HEADER_SIZE]).flags != HeaderFlags.REPLY:
            raise VfioModelError(f"not an answer of {reply} bytes: {answer.hex()}")


def guest_memory() -> int:
    """A new memfd as QEMU's ``memory-backend-memfd`` makes it: its size is sealed."""
    fd = os.memfd_create("bench-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


@contextmanager
def served(device: str) -> Iterator[tuple[str, int]]:
    """The socket of ``device``, and the pid of the process that serves it."""
    with tempfile.TemporaryDirectory(prefix="vm-", dir="/tmp") as directory:
        path = Path(directory) / "device.sock"
        command = [sys.executable, "-m", "deploy.cli", "serve", device, "--socket", str(path), "--json"]
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            try:
                assert process.stdout is not None, "a pipe"
                if not process.stdout.readline():
                    raise VfioModelError(f"{device} is not served")
                yield str(path), process.pid
            finally:
                process.terminate()


def rows() -> Iterator[Row]:
    """Every figure of the two processes."""
    with ExitStack() as stack:
        path, pid = stack.enter_context(served("edu"))
        other, other_pid = stack.enter_context(served("edu"))
        ours = stack.enter_context(attached(path, "edu"))
        sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        sock.connect(other)
        bare = BareClient(sock).ask
        memory = guest_memory()
        stack.callback(os.close, memory)
        limits = [
            stack.enter_context(echo(_READ, _READ + 4)),
            stack.enter_context(echo(HEADER_SIZE + wire.DmaMap.SIZE, HEADER_SIZE, memory)),
            stack.enter_context(echo(_UNMAP, _UNMAP)),
        ]
        answering = (pid, other_pid, *(limit.pid for limit in limits))
        stack.enter_context(opposite(asking=(os.getpid(),), answering=answering))
        for name, region, offset in (("configuration space", _CONFIG, 0), ("a register of edu", 0, _EDU_ID)):
            yield from _reads(name, wire.RegionAccess(offset, region, 4), ours, bare, limits[0].once)
        yield from _maps(memory, ours, bare, limits[1].once, limits[2].once)


def _reads(name: str, request: wire.RegionAccess, ours: Client, bare: AskBare, limit: Action) -> Iterator[Row]:
    def asked_by_ours() -> None:
        ours.region_read(request.region, request.offset, request.count)

    def asked_by_bare() -> None:
        bare(Command.REGION_READ, request, _READ + 4, None)

    name = f"vfio-user: 4 bytes of {name} read"
    times = in_turn([asked_by_bare, asked_by_ours, limit], number=_NUMBER, rounds=_ROUNDS)
    yield from _two(name, ECHO, times[0], times[1], times[2])


def _maps(memory: int, ours: Client, bare: AskBare, limit_fd: Action, limit: Action) -> Iterator[Row]:
    """Pages of one file mapped and unmapped, one message each."""
    places: dict[str, int] = {}

    def page(what: str) -> int:
        offset = places.get(what, 0)
        places[what] = (offset + PAGE) % RAM
        return offset

    def mapping(what: str) -> wire.DmaMap:
        offset = page(what)
        return wire.DmaMap(flags=_RW, offset=offset, address=offset, size=PAGE)

    def map_by_bare() -> None:
        bare(Command.DMA_MAP, mapping("map by bare"), HEADER_SIZE, memory)

    def map_by_ours() -> None:
        ours.dma_map(mapping("map by ours"), memory)

    def unmap_by_bare() -> None:
        bare(Command.DMA_UNMAP, wire.DmaUnmap(address=page("unmap by bare"), size=PAGE), _UNMAP, None)

    def unmap_by_ours() -> None:
        ours.dma_unmap(wire.DmaUnmap(address=page("unmap by ours"), size=PAGE))

    kept = wire.DmaMap(flags=_RW, address=_KEPT, size=PAGE)
    ours.dma_map(kept, memory)
    bare(Command.DMA_MAP, kept, HEADER_SIZE, memory)
    actions = [map_by_bare, map_by_ours, limit_fd, unmap_by_bare, unmap_by_ours, limit]
    times = in_turn(actions, number=_NUMBER, rounds=_ROUNDS)
    yield from _two("vfio-user: DMA_MAP with its descriptor", ECHO_FD, *times[:3])
    yield from _two("vfio-user: DMA_UNMAP", ECHO, *times[3:])


def _two(name: str, limit: str, bare: list[float], ours: list[float], theirs: list[float]) -> Iterator[Row]:
    """What the server costs, seen by a client as bare as the echo's; and by guestd's."""
    yield _row(name, bare, limit, theirs, "the server's part: the client is as bare as the echo's")
    note = "server and client look for a moment before they sleep (protocols.transport.halt_polling)"
    yield _row(f"{name}, our client", ours, limit, theirs, note)


def _row(name: str, mine: list[float], limit: str, theirs: list[float], note: str) -> Row:
    ratio = statistics.median(m / t for m, t in zip(mine, theirs, strict=True))
    return Row(name, statistics.median(mine), limit, statistics.median(theirs), 1.5, note=note, given_ratio=ratio)
