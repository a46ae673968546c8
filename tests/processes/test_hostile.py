"""Clients that mean harm, each within the letter of the protocol: nobody else waits for them, and nothing stays."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostd.ioctls import MAX_BEHIND
from protocols.port import files, messages
from protocols.port.device import MAX_SEGMENTS
from protocols.transport.shm import create_memory
from tests.processes.conftest import HostProcess
from tests.processes.port_client import Opened, RawPort
from vfio_model.errors import PeerLost
from vfio_model.uapi.vfio import DmaMap, Ioctl

MIB, GIB, HVA = 1 << 20, 1 << 30, 0x5000_0000_0000
ROUND_TRIPS = 20
"""Of a witness while long work is under way; each is a few slices, and there are thousands."""
MANY, MANY_FILES = messages.MAX_COUNT, 500
MAP = int(Ioctl.VFIO_IOMMU_MAP_DMA)
SLACK = 2
"""Descriptors of the connections that ask how many there are."""


@pytest.fixture
def witness(host: HostProcess, client: Callable[..., RawPort]) -> Iterator[Opened]:
    """Somebody who does nothing wrong; at the end it is all that the host has, and the host is as it was."""
    opened = Opened(client(name="witness"), group=27)
    check(opened)
    status, fds = host.status(), host.fds()
    locked, areas = status["locked_vm"], status["areas"]
    yield opened
    check(opened)
    status = host.until(lambda status: mms(status) == ["witness"] and not status["pending"])
    assert host.popen.poll() is None
    assert (status["locked_vm"], status["areas"]) == (locked, areas)
    host.until(lambda _: host.fds() <= fds + SLACK)


def mms(status: dict[str, object]) -> list[str]:
    """Names of the clients that the host has."""
    found = status["mms"]
    assert isinstance(found, list)
    return [mm["name"] for mm in found]


def check(witness: Opened) -> None:
    witness.container.map_dma(0x1000, witness.hva, 4096)
    witness.container.unmap_dma(0x1000, 4096)


def large(port: RawPort) -> Opened:
    """A client with 2 GiB of memory."""
    opened = Opened(port)
    port.declare("big", HVA, 2 * GIB)
    opened.container.register_memory(HVA, 2 * GIB)
    return opened


def long_work(opened: Opened) -> bytes:
    """As many mappings as one message takes, each of all its memory: half a billion entries."""
    start = opened.container.tce_create(16, 64 * GIB, 1)
    return b"".join(DmaMap(0, 3, HVA, start + n % 32 * 2 * GIB, 2 * GIB).pack() for n in range(MANY))


def test_a_witness_is_served_while_one_message_maps_terabytes(witness: Opened, client: Callable[..., RawPort]) -> None:
    port = client(name="hostile")
    bad = large(port)
    port.send_ioctl(bad.container_handle, MAP, long_work(bad), MANY)
    for _ in range(ROUND_TRIPS):
        check(witness)
    assert port.poll_return(0.0) is None, "the host answered nobody before it was done"
    port.close()
    check(witness)


@pytest.mark.parametrize("size", [0, 1, 3, 8, 23, 24])
def test_structs_that_are_shorter_than_they_say(witness: Opened, client: Callable[..., RawPort], size: int) -> None:
    port = client(name="hostile")
    bad = Opened(port)
    for cmd in (*Ioctl, 0, 0xFFFF_FFFF):
        for argsz in (0, 1, size, 0xFFFF_FFFF):
            arg = struct.pack("=I", argsz).ljust(size, b"\xff")[:size]
            port.send_ioctl(bad.container_handle, int(cmd), arg)
            port.wait_return()
            port.send_ioctl(bad.container_handle, int(cmd), arg, count=MANY)
            answer = port.wait_return()
            assert answer.errno == errno.EINVAL, "so many structs do not fit"
    port.close()


def test_memory_that_overlaps_wraps_or_is_a_file(
    witness: Opened, client: Callable[..., RawPort], tmp_path: Path
) -> None:
    port = client(name="hostile")
    port.declare("one", HVA, MIB)
    memory = create_memory("two", MIB)
    port.memory.append(memory)
    for hva in (HVA, HVA + 65536, HVA - 65536, (1 << 64) - 65536):
        with pytest.raises(OSError, match=r"."):
            port.mm.ask(files.DeclareMemory(hva, MIB, f"at {hva:#x}", 0, 65536), (memory.fd,))
    for offset, length in ((1, MIB), (MIB, 1), (65536, MIB), (4096, 65536)):
        with pytest.raises(OSError, match=r"."):
            port.mm.ask(files.DeclareMemory(2 * HVA, length, "part", offset, 65536), (memory.fd,))
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.truncate(file, MIB)
    with pytest.raises(PeerLost):
        port.mm.ask(files.DeclareMemory(2 * HVA, MIB, "file", 0, 65536), (file,))
    os.close(file)
    port.close()


def test_a_flood_of_files_and_descriptors(host: HostProcess, witness: Opened, client: Callable[..., RawPort]) -> None:
    port = client(name="hostile")
    for _ in range(MANY_FILES):
        port.open("/dev/vfio/vfio")
    memory = create_memory("ram", MIB)
    port.memory.append(memory)
    declared = 0
    with pytest.raises(OSError, match="segments"):
        for declared in range(MAX_SEGMENTS + 1):
            name = f"ram{declared}"
            port.mm.ask(files.DeclareMemory(HVA + declared * MIB, MIB, name, 0, 65536), (memory.fd,))
    assert declared == MAX_SEGMENTS
    check(witness)
    port.close()


def test_a_flood_of_requests_behind_long_work_is_refused_beyond_a_number(
    witness: Opened, client: Callable[..., RawPort]
) -> None:
    port, seqs = client(name="hostile"), []
    bad = large(port)
    port.send_ioctl(bad.container_handle, MAP, long_work(bad), MANY)
    seqs = [port.send_ioctl(bad.container_handle, Ioctl.VFIO_GET_API_VERSION, b"") for _ in range(2 * MAX_BEHIND)]
    refused = [port.wait_return() for _ in range(MAX_BEHIND)]
    assert [answer.seq for answer in refused] == seqs[MAX_BEHIND:]
    assert {answer.errno for answer in refused} == {errno.ENOMEM}
    check(witness)
    port.close()
