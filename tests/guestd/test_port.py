"""The VFIO port over the wire: what an ioctl and an open file become, and how the loss of the host is noticed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestd.port import WirePort
from protocols.port import files, messages
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop
from protocols.transport.shm import create_memory
from tests.guestd.fake_host import MM, FakeHost
from vfio_model.errors import PeerLost
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.uapi.vfio import Ioctl
from vfio_model.vfio.ioctl import BatchError
from vfio_model.vfio.region import DeviceConnection

CMD = int(Ioctl.VFIO_IOMMU_MAP_DMA)


@pytest.fixture
def host(runtime_dir: Path, loop: Loop) -> Iterator[FakeHost]:
    host = FakeHost(runtime_dir, loop)
    yield host
    host.close()


def no_devices(message: files.DeviceFd, stream: int, process: Pidfd) -> DeviceConnection:
    raise AssertionError("no device is opened here")


@pytest.fixture
def port(runtime_dir: Path, loop: Loop, host: FakeHost) -> Iterator[WirePort]:
    port = WirePort(runtime_dir, loop, no_devices, memlock=1 << 30, seconds=0.05)
    yield port
    port.close_all()


def test_an_mm_and_its_files(port: WirePort, host: FakeHost) -> None:
    handle = port.open("/dev/vfio/vfio")
    assert host.requests == [files.OpenMm(1 << 30, "guestd"), files.OpenFile("/dev/vfio/vfio", MM)]
    assert len(host.channels) == 2, "a file is a connection"
    assert port.ioctl(handle, CMD, b"abc") == b"abc"
    assert (host.ioctls[0].mm, host.ioctls[0].handle, host.ioctls[0].cmd) == (MM, handle, CMD)


def test_closing_a_file_ends_its_connection(port: WirePort, host: FakeHost) -> None:
    port.close(port.open("/dev/vfio/vfio"))
    assert len(host.channels) == 1, "the host knows it when close returns"
    with pytest.raises(OSError, match="not open") as caught:
        port.close(12345)
    assert caught.value.errno == errno.EBADF


def test_an_open_that_is_refused(port: WirePort, host: FakeHost) -> None:
    host.on_file = lambda _request: files.OpenError(errno.ENOENT, "no such group")
    with pytest.raises(OSError, match="no such group") as caught:
        port.open("/dev/vfio/1")
    assert caught.value.errno == errno.ENOENT
    assert port.lost is None


def test_memory_goes_with_its_descriptor(port: WirePort, host: FakeHost) -> None:
    with create_memory("ram", 65536) as memory:
        block = RAMBlock("ram", memory.view, page_size=65536, hva=Hva(0x7000_0000), fd=memory.fd)
        port.declare_memory(block)
        port.undeclare_memory(block)
        del block
    assert host.requests[1:] == [
        files.DeclareMemory(0x7000_0000, 65536, "ram", 0, 65536),
        files.UndeclareMemory(0x7000_0000, 65536),
    ]


def test_an_errno_of_the_host(port: WirePort, host: FakeHost) -> None:
    host.on_ioctl = lambda message: messages.Return(message.seq, errno.EINVAL, 0, b"")
    with pytest.raises(OSError, match="MAP_DMA") as caught:
        port.ioctl(1, CMD, b"")
    assert caught.value.errno == errno.EINVAL


def test_a_batch_says_how_far_it_came(port: WirePort, host: FakeHost) -> None:
    assert port.ioctl_many(1, CMD, bytes(32 * 4), 4) == 4
    assert (host.ioctls[0].count, len(host.ioctls[0].arg)) == (4, 128)
    host.on_ioctl = lambda message: messages.Return(message.seq, errno.ENOMEM, 3, b"")
    with pytest.raises(BatchError) as caught:
        port.ioctl_many(1, CMD, bytes(32 * 4), 4)
    assert (caught.value.errno, caught.value.done) == (errno.ENOMEM, 3)


def test_a_batch_too_large_for_one_message_is_cut(port: WirePort, host: FakeHost) -> None:
    count = messages.MAX_COUNT + 10
    seen: list[int] = []

    def answer(message: messages.Ioctl) -> messages.Return:
        seen.append(message.count)
        done = message.count if len(seen) == 1 else 5
        return messages.Return(message.seq, 0 if len(seen) == 1 else errno.EIO, done, b"")

    host.on_ioctl = answer
    with pytest.raises(BatchError) as caught:
        port.ioctl_many(1, CMD, bytes(32 * count), count)
    assert seen == [messages.MAX_COUNT, 10] and caught.value.done == messages.MAX_COUNT + 5


def test_an_answer_to_an_earlier_request_is_not_taken(port: WirePort, host: FakeHost) -> None:
    host.on_ioctl = lambda message: messages.Return(message.seq - 1, errno.EIO, 0, b"")
    host.pongs = False
    with pytest.raises(PeerLost, match="MAP_DMA"):
        port.ioctl(1, CMD, b"")


def test_a_silent_host_is_lost_and_named_with_the_request(port: WirePort, host: FakeHost) -> None:
    host.on_ioctl = lambda _message: None
    host.pongs = False
    told: list[PeerLost] = []
    port.on_lost = told.append
    with pytest.raises(PeerLost, match=r"hostd .*VFIO_IOMMU_MAP_DMA within"):
        port.ioctl(1, CMD, b"")
    with pytest.raises(PeerLost):
        port.ioctl(1, CMD, b"")
    assert len(told) == 1 and len(host.ioctls) == 1


def test_a_host_that_lives_gets_more_time(port: WirePort, host: FakeHost, loop: Loop) -> None:
    held: list[messages.Ioctl] = []
    answered = messages.Return(1, 0, 1, b"late")
    host.on_ioctl = lambda message: held.append(message)

    def release() -> None:
        host._router.send(peers[0], answered)

    peers: list[bytes] = []
    receive = host._router.receive

    def watch() -> tuple[bytes, messages.Request] | None:
        received = receive()
        if received is not None:
            peers.append(received[0])
            if isinstance(received[1], messages.Ping):
                loop.call_later(0, release, served=True)
        return received

    host._router.receive = watch  # type: ignore[method-assign]
    assert port.ioctl(1, CMD, b"") == b"late"


def test_the_end_of_any_connection_is_the_end_of_the_host(port: WirePort, host: FakeHost) -> None:
    port.open("/dev/vfio/vfio")

    def end(_message: messages.Ioctl) -> None:
        host.hang_up(host.channels[-1])

    host.on_ioctl = end
    with pytest.raises(PeerLost):
        port.ioctl(1, CMD, b"")
    assert port.lost is not None


def test_an_end_while_nobody_waits_is_noticed_at_the_top_level(port: WirePort, host: FakeHost, loop: Loop) -> None:
    told: list[PeerLost] = []
    port.on_lost = told.append
    host.hang_up(host.channels[0])
    while not told:
        loop.run_once(1.0)
    with pytest.raises(PeerLost):
        port.open("/dev/vfio/vfio")


def test_nothing_is_lost_before_the_devices_are_dead(port: WirePort, host: FakeHost, runtime_dir: Path) -> None:
    """A device process that was handed out is killed when its host hangs; only then does the request return."""
    device = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    port._pidfds.append(Pidfd(os.pidfd_open(device.pid), device.pid))
    host.on_ioctl = lambda _message: None
    host.pongs = False
    with pytest.raises(PeerLost):
        port.ioctl(1, CMD, b"")
    assert device.poll() is not None, "dead when the ioctl came back"
    device.communicate()


def test_a_refusal_of_the_protocol_loses_the_host(port: WirePort, host: FakeHost) -> None:
    peers: list[bytes] = []
    receive = host._router.receive

    def refuse() -> None:
        received = receive()
        if received is not None:
            peers.append(received[0])
            host._router.refuse(received[0], "not like this")

    host._router.receive = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(PeerLost, match="not like this"):
        port.ioctl(1, CMD, b"")


def test_without_a_host_there_is_no_port(runtime_dir: Path, loop: Loop) -> None:
    with pytest.raises(PeerLost, match="hostd"):
        WirePort(runtime_dir, loop, no_devices)
