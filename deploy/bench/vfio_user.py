"""vfio-user between two processes: a device as ``vfio-model serve`` serves it, and a client by our framing.

The limits are bare echoes over the same kind of socket, with as many bytes and descriptors each way
(:mod:`deploy.bench.stream_echo`). The device and the echoes run on one processor, this process on another
(:mod:`deploy.bench.placement`).
"""

from __future__ import annotations

import fcntl
import os
import select
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from deploy.bench.measure import Action, Row, against, in_turn
from deploy.bench.placement import opposite
from deploy.bench.stream_echo import echo
from protocols.transport.vfio_user import VfioUserEndpoint, connect
from protocols.vfio_user import messages as wire
from protocols.vfio_user.messages import HEADER_SIZE, Capabilities, Command
from protocols.vfio_user.state import ReplyReceived
from vfio_model.errors import VfioModelError
from vfio_model.uapi.vfio import PciRegion

PAGE = 4096
RAM = 64 << 20
_CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_EDU_ID = 0
_RW = 3
_ANSWER_MS = 10_000
_NUMBER = 256
_ROUNDS = 31
_KEPT = 1 << 40
"""Where one map stays: a client that maps page by page has more of the same file mapped."""
ECHO = "bare AF_UNIX echo of as many bytes"
ECHO_FD = "bare AF_UNIX echo that carries a descriptor"


class Client:
    """Asks one thing at a time and waits, for the socket alone."""

    def __init__(self, endpoint: VfioUserEndpoint) -> None:
        self._endpoint = endpoint
        self._poll = select.poll()
        self._poll.register(endpoint, select.POLLIN)
        self._answer(endpoint.version())

    def ask(self, command: Command, payload: wire.Payload, fds: Sequence[int] = ()) -> wire.Payload | None:
        """The answer. :raise VfioModelError: it is an error, or there is none."""
        return self._answer(self._endpoint.command(command, payload, tuple(fds)))

    def _answer(self, number: int) -> wire.Payload | None:
        poll, receive = self._poll.poll, self._endpoint.receive
        while True:
            if not poll(_ANSWER_MS):
                raise VfioModelError("the device does not answer")
            event = receive()
            if isinstance(event, ReplyReceived) and event.id == number:
                if event.errno:
                    raise VfioModelError(f"the device refuses: {os.strerror(event.errno)}")
                return event.payload


def guest_memory() -> int:
    """A new memfd as QEMU's ``memory-backend-memfd`` makes it: its size is sealed."""
    fd = os.memfd_create("bench-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, RAM)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    return fd


@contextmanager
def served(device: str) -> Iterator[tuple[Client, int]]:
    """A client of ``device``, served by a process of this pid."""
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
                endpoint = connect(str(path), device, Capabilities(max_msg_fds=16))
                try:
                    yield Client(endpoint), process.pid
                finally:
                    endpoint.close()
            finally:
                process.terminate()


def rows() -> Iterator[Row]:
    """Every figure of the two processes."""
    with ExitStack() as stack:
        client, pid = stack.enter_context(served("edu"))
        memory = guest_memory()
        stack.callback(os.close, memory)
        head = HEADER_SIZE + wire.RegionAccess.SIZE
        read = stack.enter_context(echo(head, head + 4))
        mapping = stack.enter_context(echo(HEADER_SIZE + wire.DmaMap.SIZE, HEADER_SIZE, memory))
        unmap = HEADER_SIZE + wire.DmaUnmap.SIZE
        unmapping = stack.enter_context(echo(unmap, unmap))
        answering = (pid, read.pid, mapping.pid, unmapping.pid)
        stack.enter_context(opposite(asking=(os.getpid(),), answering=answering))
        yield from _region_reads(client, read.once)
        yield from _maps(client, memory, mapping.once, unmapping.once)


def _region_reads(client: Client, bare: Action) -> Iterator[Row]:
    for name, region, offset in (("configuration space", _CONFIG, 0), ("a register of edu", 0, _EDU_ID)):
        request = wire.RegionAccess(offset, region, 4)

        def read(request: wire.RegionAccess = request) -> None:
            client.ask(Command.REGION_READ, request)

        yield against(f"vfio-user: 4 bytes of {name} read", read, ECHO, bare, number=_NUMBER, aim=1.5)


def _maps(client: Client, memory: int, bare_fd: Action, bare: Action) -> Iterator[Row]:
    """Pages of one file mapped and unmapped, one message each."""
    client.ask(Command.DMA_MAP, wire.DmaMap(flags=_RW, address=_KEPT, size=PAGE), [memory])
    at = {"map": 0, "unmap": 0}

    def page(what: str) -> int:
        offset = at[what]
        at[what] = (offset + PAGE) % RAM
        return offset

    def dma_map() -> None:
        offset = page("map")
        client.ask(Command.DMA_MAP, wire.DmaMap(flags=_RW, offset=offset, address=offset, size=PAGE), [memory])

    def dma_unmap() -> None:
        client.ask(Command.DMA_UNMAP, wire.DmaUnmap(address=page("unmap"), size=PAGE))

    mapped, unmapped, echo_fd, plain = in_turn([dma_map, dma_unmap, bare_fd, bare], number=_NUMBER, rounds=_ROUNDS)
    yield _row("vfio-user: DMA_MAP with its descriptor", mapped, ECHO_FD, echo_fd)
    yield _row("vfio-user: DMA_UNMAP", unmapped, ECHO, plain)


def _row(name: str, mine: list[float], limit: str, theirs: list[float]) -> Row:
    ratio = statistics.median(m / t for m, t in zip(mine, theirs, strict=True))
    return Row(name, statistics.median(mine), limit, statistics.median(theirs), 1.5, given_ratio=ratio)
