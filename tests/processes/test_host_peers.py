"""A peer that breaks the rules loses its connection, and nobody else anything."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import zmq

from protocols.control import messages as control
from protocols.port import files, messages
from protocols.transport.shm import create_memory
from tests.processes.conftest import HostProcess
from tests.processes.port_client import Opened, RawFile, RawPort, control_call
from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import DmaMap, Ioctl

SEED = 20240611
ROUNDS = 150


@pytest.fixture
def witness(host: HostProcess, client: Callable[..., RawPort]) -> Opened:
    """Somebody who does nothing wrong."""
    return Opened(client(name="witness"), group=27)


def check(witness: Opened, host: HostProcess) -> None:
    """The witness is served as before."""
    witness.container.map_dma(0x1000, witness.hva, 4096)
    witness.container.unmap_dma(0x1000, 4096)
    assert host.popen.poll() is None


def expect_eof(sock: socket.socket) -> None:
    sock.settimeout(20)
    while sock.recv(1 << 16):
        pass


def test_random_bytes_on_the_file_socket_cost_the_sender_its_connection(
    host: HostProcess, witness: Opened, runtime_dir: Path
) -> None:
    rng = random.Random(SEED)
    for _ in range(ROUNDS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(runtime_dir / "hostd.sock"))
            sock.send(rng.randbytes(rng.randrange(1, 300)))
            expect_eof(sock)
    check(witness, host)


def test_well_formed_requests_out_of_place(host: HostProcess, witness: Opened, runtime_dir: Path) -> None:
    """Every request that decodes, in any order, with any values: an error or the end of that connection."""
    rng = random.Random(SEED)
    with create_memory("ram", 65536) as memory:
        for _ in range(ROUNDS):
            file = RawFile(runtime_dir)
            try:
                for _ in range(rng.randrange(1, 5)):
                    message = random_request(rng)
                    file.send(message, (memory.fd,) * files.fd_count(message))
                    file.receive()
            except PeerLost:
                pass
            file.close()
    check(witness, host)


def random_request(rng: random.Random) -> files.Request:
    number = rng.choice([0, 1, 4096, 65536, 1 << 40, (1 << 64) - 1, rng.getrandbits(64)])
    other = rng.choice([0, 1, 65536, 1 << 63, rng.getrandbits(64)])
    return rng.choice(
        [
            files.OpenMm(number, "fuzz"),
            files.OpenFile(rng.choice(["/dev/vfio/vfio", "/dev/vfio/26", "/dev/vfio/x", "/"]), number),
            files.DeclareMemory(number, other, "ram", rng.choice([0, number]), rng.choice([0, 3, 4096, 65536, other])),
            files.UndeclareMemory(number, other),
            files.AttachDevice(rng.choice(["0000:01:00.0", "nobody"])),
        ]
    )


def test_random_ioctls_of_an_honest_client(host: HostProcess, client: Callable[..., RawPort], witness: Opened) -> None:
    """Any command, any argument: an answer with an errno."""
    rng = random.Random(SEED)
    opened = Opened(client(name="fuzz"))
    port = opened.port
    commands = [int(command) for command in Ioctl] + [0, 0xFFFFFFFF]
    for _ in range(ROUNDS * 2):
        size = rng.choice([0, 4, 8, 24, 32, 40, rng.randrange(100)])
        arg = struct.pack("=I", rng.choice([0, 16, 24, 32, 40, size])) + rng.randbytes(size)
        handle = rng.choice([opened.container_handle, opened.group_handle, 0, rng.getrandbits(64)])
        seq = port.send_ioctl(handle, rng.choice(commands), arg, rng.choice([1, 1, 1, 2, 16384]))
        answer = port.wait_return()
        assert answer.seq == seq
    port.close()
    host.until(lambda status: len(status["mms"]) == 1)  # type: ignore[arg-type]
    check(witness, host)


@pytest.mark.parametrize("name", ["hostd.zmq", "hostd.ctl"])
def test_a_malformed_zeromq_peer_is_refused_once_and_then_ignored(
    host: HostProcess, witness: Opened, runtime_dir: Path, name: str
) -> None:
    rng = random.Random(SEED)
    for _ in range(10):
        sock = zmq.Context.instance().socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"ipc://{runtime_dir / name}")
        sock.send(rng.randbytes(40))
        assert sock.poll(20000)
        assert b"refused" in sock.recv()
        sock.send_multipart([b"a", b"b", b"c"])
        sock.send(messages.REQUESTS.encode(messages.Ping(1)))
        sock.close()
    check(witness, host)


def test_what_no_command_of_this_role_is_answered_as_failed(host: HostProcess) -> None:
    answer = control_call(host.directory, "hostd", control.Reset())
    assert isinstance(answer, control.Failed)
    batch = control_call(host.directory, "hostd", control.Batch([control.Ping(), control.Reset(), control.Ping()]))
    assert isinstance(batch, control.BatchDone) and len(batch.answers) == 2


def test_memory_that_could_shrink_is_not_taken(host: HostProcess, witness: Opened, runtime_dir: Path) -> None:
    port = RawPort(runtime_dir)
    fd = os.memfd_create("open", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 65536)
    with pytest.raises(PeerLost):
        port.mm.ask(files.DeclareMemory(0x10000, 65536, "open", 0, 65536), (fd,))
    os.close(fd)
    port.close()
    check(witness, host)


@pytest.mark.parametrize("what", ["file", "own", "socket"])
def test_an_offered_server_must_be_one(host: HostProcess, witness: Opened, runtime_dir: Path, what: str) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stream, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    pidfd, host_pidfd = os.pidfd_open(os.getpid()), os.pidfd_open(host.pid)
    null = os.open("/dev/null", os.O_RDONLY)
    fds = {"file": (theirs.fileno(), null), "own": (theirs.fileno(), host_pidfd), "socket": (stream.fileno(), pidfd)}
    offer = RawFile(runtime_dir)
    with pytest.raises(PeerLost):
        offer.ask(files.AttachDevice("0000:03:00.0"), fds[what])
    offer.close()
    for fd in (pidfd, host_pidfd, null):
        os.close(fd)
    for sock in (ours, theirs, stream, other):
        sock.close()
    check(witness, host)


def test_handles_of_others_are_bad_file_descriptors(
    host: HostProcess, client: Callable[..., RawPort], witness: Opened, runtime_dir: Path
) -> None:
    """Another mm of the same process may not use the container; a handle that was closed, or never was, is EBADF."""
    port = client(name="second")
    for handle, mm, expected in (
        (witness.container_handle, witness.port.mm.handle + 1, errno.EBADF),
        (witness.container_handle + 1, witness.port.mm.handle, errno.EBADF),
        (witness.container_handle, port.mm.handle, errno.EPERM),
    ):
        arg = DmaMap(flags=3, vaddr=witness.hva, iova=0, size=4096).pack()
        port.send_ioctl(handle, Ioctl.VFIO_IOMMU_MAP_DMA, arg, mm=mm)
        assert port.wait_return().errno == expected
    closed = port.open("/dev/vfio/vfio")
    port.close_file(closed)
    host.until(lambda status: status["connections"] == 4)
    port.send_ioctl(closed, Ioctl.VFIO_GET_API_VERSION, b"")
    assert port.wait_return().errno == errno.EBADF


def test_the_memlock_limit_is_the_clients_own(host: HostProcess, client: Callable[..., RawPort]) -> None:
    port = client(memlock=1 << 20)
    with pytest.raises(OSError) as refused:
        Opened(port, ram=4 << 20)
    assert refused.value.errno == errno.ENOMEM
    assert host.status()["locked_vm"] == 0


def test_explain_reads_the_live_tables(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, 4096, flags=1)
    opened.device()
    found = ask_explain(host, 0x1234)
    assert found["perm"] == "r-" and isinstance(found["result"], int) and found["result"] & 0xFFF == 0x234
    assert all(step["ok"] for step in found["steps"])  # type: ignore[attr-defined]
    opened.container.unmap_dma(0x1000, 4096)
    failing = [step for step in ask_explain(host, 0x1234)["steps"] if not step["ok"]]  # type: ignore[attr-defined]
    assert [step["what"] for step in failing] == ["TCE 0x1"]
    outside = [step for step in ask_explain(host, 1 << 62)["steps"] if not step["ok"]]  # type: ignore[attr-defined]
    assert [step["what"] for step in outside] == ["windows"]


def ask_explain(host: HostProcess, iova: int) -> dict[str, object]:
    answer = control_call(host.directory, "hostd", control.Explain("0000:01:00.0", iova))
    assert isinstance(answer, control.Document)

    document: dict[str, object] = msgspec.json.decode(answer.json)
    return document
