"""Shared memory and kernel objects: nothing unsealed is mapped, everything is given back."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from protocols.transport import kernel, shm
from protocols.transport.kernel import EventFd, PeerLanes, Pidfd, TimerFd
from vfio_model.errors import PeerLost, RemoteProtocolError

pytestmark = pytest.mark.usefixtures("no_leak")


def test_two_maps_are_one_memory() -> None:
    with shm.create_memory("ram", 8192) as ram, shm.map_memory(os.dup(ram.fd), writable=True, size=8192) as other:
        ram.words[1023] = 0x1122334455667788
        assert other.words[1023] == 0x1122334455667788
        other.view[0] = 7
        assert ram.view[0] == 7 and ram.size == other.size == 8192


def test_a_table_can_be_mapped_read_only_by_others_and_never_writable() -> None:
    with shm.create_memory("table", 4096, exclusive=True) as table:
        with shm.map_memory(os.dup(table.fd), required_seals=shm.TABLE_SEALS) as reader:
            table.words[5] = 42
            assert reader.words[5] == 42 and reader.view.readonly
        with pytest.raises(RemoteProtocolError, match="cannot be mapped"):
            shm.map_memory(os.dup(table.fd), writable=True)
        with pytest.raises(OSError):
            os.ftruncate(table.fd, 0)


def test_what_is_not_sealed_is_never_mapped(tmp_path: Path) -> None:
    unsealed = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with pytest.raises(RemoteProtocolError, match="seals 0x0"):
        shm.map_memory(unsealed)
    file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(file, 4096)
    with pytest.raises(RemoteProtocolError):
        shm.map_memory(file)
    with pytest.raises(RemoteProtocolError, match="not a memfd"):
        shm.map_memory(os.open("/dev/null", os.O_RDWR))
    with pytest.raises(RemoteProtocolError, match="not a memfd"):
        shm.map_memory(os.eventfd(0))


def test_memory_that_is_too_small_or_lacks_a_seal_is_refused() -> None:
    with shm.create_memory("ram", 4096) as ram:
        with pytest.raises(RemoteProtocolError, match="4096 bytes, 8192 are needed"):
            shm.map_memory(os.dup(ram.fd), size=8192)
        with pytest.raises(RemoteProtocolError, match="are needed"):
            shm.map_memory(os.dup(ram.fd), required_seals=shm.TABLE_SEALS)
    with pytest.raises(ValueError, match="multiple of 8"):
        shm.create_memory("odd", 12)


def test_memory_says_where_it_holds_something_and_can_forget_it() -> None:
    page = mmap.PAGESIZE
    with shm.create_memory("sparse", 64 * page) as memory:
        assert list(memory.extents()) == []
        memory.view[3 * page] = memory.view[4 * page] = memory.view[63 * page + 1] = 7
        assert list(memory.extents()) == [(3 * page, 2 * page), (63 * page, page)]
        memory.discard()
        assert list(memory.extents()) == [] and not any(memory.view[3 * page : 5 * page])


def test_closing_while_somebody_looks_is_an_error() -> None:
    memory = shm.create_memory("ram", mmap.PAGESIZE)
    view = memory.view[:16]
    with pytest.raises(BufferError):
        memory.close()
    view.release()
    memory.close()
    del memory


def test_the_fence_works_where_the_kernel_has_it() -> None:
    fence = kernel.probe()
    if fence is None:
        pytest.skip("no membarrier here")
    fence.register()
    fence.barrier()


def test_an_eventfd_counts_rings() -> None:
    bell = EventFd()
    assert bell.drain() == 0
    bell.ring()
    bell.ring()
    assert bell.drain() == 2
    assert bell.drain() == 0
    bell.close()
    bell.close()


def test_a_timerfd_is_readable_when_it_has_expired_and_not_when_disarmed() -> None:
    timer = TimerFd()
    timer.arm_ns(1)
    os.set_blocking(timer.fd, True)
    assert timer.drain() == 1
    os.set_blocking(timer.fd, False)
    timer.arm_ns(3_600_000_000_000)
    assert timer.drain() == 0
    timer.disarm()
    timer.close()


def test_a_pidfd_knows_death() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pidfd = Pidfd.open(process.pid)
    lanes_memory = shm.create_memory("lanes", 64 + 16 * 64)
    lanes_memory.words[8], lanes_memory.words[16] = 3, 4
    lanes = PeerLanes("edu0", lanes_memory.words, pidfd)
    assert lanes.snapshot() == [3, 4, *[0] * 14]
    assert pidfd.alive() and lanes.alive()
    pidfd.send_signal(signal.SIGKILL)
    process.communicate()
    assert not pidfd.alive() and not lanes.alive()
    pidfd.send_signal(signal.SIGKILL)
    lanes.close()
    lanes_memory.close()
    pidfd.close()
    with pytest.raises(PeerLost):
        Pidfd.open(process.pid)


def test_a_child_whose_parent_is_gone_already_notices() -> None:
    code = "from protocols.transport.kernel import die_with_parent; die_with_parent(1 << 22)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "PeerLost: parent is gone" in done.stderr


def test_a_child_dies_with_its_parent() -> None:
    child = (
        "from protocols.transport.kernel import die_with_parent; import os\n"
        "die_with_parent(); print(os.getpid(), flush=True); input()"
    )
    parent = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}], stdin=subprocess.PIPE); input()"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pidfd = Pidfd.open(int(process.stdout.readline()))
    process.kill()
    process.communicate()
    pidfd._poll.poll(10_000)
    assert not pidfd.alive()
    pidfd.close()
