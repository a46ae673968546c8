"""After UNMAP returns, no DMA lands on that page: the promise, and that these tests would notice if it were broken.

A gate parks the device inside a DMA section, between translation and copy. With it the race is not left to chance: the
unmap comes while the copy is still to be made. ``--fault skip-revoke-wait`` leaves the wait of the revoke out, and the
violation is then there every time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostd.device_server import SpawnedDevice, SpawnOptions, spawn_device
from protocols.port import files, messages
from protocols.transport.kernel import EventFd
from tests.processes.conftest import HostProcess, wait_dead
from tests.processes.port_client import Opened, RawDevice, RawFile, RawPort, wait_readable
from tests.processes.test_host_dma import burst, program
from vfio_model.devices.dma_burst import regs
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl

PAGE = 4096
IOVA = 0x1000
NAME = "0000:03:00.0"
ROUNDS = 5
SHORT = "0.3"


class Gated:
    """A dma-burst in a process of ours, with a gate, offered to hostd as a host device."""

    def __init__(self, directory: Path) -> None:
        self.reached, self.go = EventFd(), EventFd(os.eventfd(0, os.EFD_CLOEXEC))
        self.server: SpawnedDevice = spawn_device(
            "dma-burst", SpawnOptions(NAME, directory, (self.reached.fd, self.go.fd))
        )
        self.pid = self.server.pidfd.pid
        self._offer = RawFile(directory)
        self._offer.ask(files.AttachDevice(NAME), (self.server.control.fileno(), self.server.pidfd.fd))
        self.server.control.close()

    def wait_inside(self) -> None:
        """Until the device stands at the gate."""
        wait_readable(self.reached)
        self.reached.drain()

    def let_go(self) -> None:
        """One section may go on."""
        self.go.ring()

    def close(self) -> None:
        self._offer.close()
        self.server.close()
        self.reached.close()
        self.go.close()


@pytest.fixture
def gated(runtime_dir: Path) -> Iterator[Callable[[], Gated]]:
    """Start gated devices; ended after the test."""
    started: list[Gated] = []

    def start() -> Gated:
        started.append(Gated(runtime_dir))
        return started[-1]

    yield start
    for device in started:
        device.close()


def begin_write(opened: Opened, device: RawDevice, gate: Gated, pattern: int) -> None:
    """Map the page and let the device come to the gate with its write."""
    opened.container.map_dma(IOVA, opened.hva, PAGE)
    program(device, IOVA, 8, 1, pattern=pattern)
    device.post(0, regs.COMMAND, 8, regs.COMMAND_START | regs.COMMAND_WRITE)
    gate.wait_inside()


def open_gated(host: HostProcess, port: RawPort, gate: Gated) -> tuple[Opened, RawDevice]:
    opened = Opened(port, group=28)
    device = opened.device(NAME)
    assert device.pid == gate.pid
    device.bus_master()
    return opened, device


def send_unmap(opened: Opened) -> int:
    arg = DmaUnmap(iova=IOVA, size=PAGE).pack()
    return opened.port.send_ioctl(opened.container_handle, Ioctl.VFIO_IOMMU_UNMAP_DMA, arg)


def test_an_unmap_waits_for_the_section_that_is_under_way(
    host: HostProcess, client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    for number in range(1, ROUNDS + 1):
        begin_write(opened, device, gate, number)
        seq = send_unmap(opened)
        host.until(lambda status: bool(status["pending"]))
        assert opened.port.poll_return(0.05) is None
        gate.let_go()
        assert opened.port.wait_return() == messages.Return(seq, 0, 1, DmaUnmap(iova=IOVA, size=PAGE).pack())
        assert opened.ram.words[0] == number, "the section was over, with its bytes, before the unmap returned"
        opened.ram.words[0] = 0


def test_with_the_wait_left_out_the_violation_is_seen_every_time(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    host = start_host("--fault", "skip-revoke-wait")
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    for number in range(1, ROUNDS + 1):
        begin_write(opened, device, gate, number)
        send_unmap(opened)
        assert opened.port.wait_return().errno == 0
        opened.ram.words[0] = 0
        gate.let_go()
        device.read(0, regs.STATUS, 8)
        assert opened.ram.words[0] == number, "DMA landed on a page after its unmap had returned"


def test_a_pending_unmap_says_why_and_keeps_only_its_own_container_waiting(
    host: HostProcess, client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    other = Opened(client(name="other"))
    begin_write(opened, device, gate, 1)
    seq = send_unmap(opened)
    behind = opened.port.send_ioctl(
        opened.container_handle,
        Ioctl.VFIO_IOMMU_MAP_DMA,
        DmaMap(flags=3, vaddr=opened.hva, iova=IOVA, size=PAGE).pack(),
    )
    status = host.until(lambda status: status["queued"] == 1)
    pending = status["pending"]
    assert isinstance(pending, list)
    assert pending[0]["request"] == "VFIO_IOMMU_UNMAP_DMA"
    assert pending[0]["waits_for"] == f"DMA sections of {NAME}"
    other.container.map_dma(IOVA, other.hva, PAGE)
    gate.let_go()
    assert [opened.port.wait_return().seq, opened.port.wait_return().seq] == [seq, behind]


def test_a_device_stopped_inside_a_section_is_waited_for_and_not_killed(
    start_host: Callable[..., HostProcess],
    client: Callable[..., RawPort],
    gated: Callable[[], Gated],
    runtime_dir: Path,
) -> None:
    host = start_host("--deadline", SHORT)
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    os.kill(gate.pid, signal.SIGSTOP)
    seq = send_unmap(opened)
    host.until(lambda status: status["counters"]["late"] == 1)  # type: ignore[index]
    assert opened.port.poll_return(0.05) is None
    assert "in one DMA section: warn" in host.text()
    gate.let_go()
    os.kill(gate.pid, signal.SIGCONT)
    assert opened.port.wait_return().seq == seq
    assert opened.ram.words[0] == 7


def test_a_device_that_stays_in_a_section_is_killed_and_the_unmap_ends(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    host = start_host("--deadline", SHORT, "--on-stuck", "kill")
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    seq = send_unmap(opened)
    answer = opened.port.wait_return()
    assert (answer.seq, answer.errno) == (seq, 0)
    wait_dead(gate.server.pidfd.fd)
    assert opened.ram.words[0] == 0
    assert f"VFIO_IOMMU_UNMAP_DMA waits for device {NAME}" in host.text()


def test_with_warn_the_unmap_stays_pending(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    host = start_host("--deadline", SHORT, "--on-stuck", "warn")
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    send_unmap(opened)
    status = host.until(lambda status: status["counters"]["late"] == 1)  # type: ignore[index]
    assert status["pending"][0]["late"] == [NAME]  # type: ignore[index]
    assert gate.server.pidfd.alive()
    gate.let_go()
    assert opened.port.wait_return().errno == 0


def test_the_death_of_the_device_ends_the_wait(
    host: HostProcess, client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    seq = send_unmap(opened)
    host.until(lambda status: bool(status["pending"]))
    os.kill(gate.pid, signal.SIGKILL)
    answer = opened.port.wait_return()
    assert (answer.seq, answer.errno) == (seq, 0)


def test_the_death_of_the_client_during_a_revoke_gives_everything_back(
    host: HostProcess, client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    gate = gated()
    port = client()
    opened, device = open_gated(host, port, gate)
    begin_write(opened, device, gate, 7)
    send_unmap(opened)
    host.until(lambda status: bool(status["pending"]))
    port.close()
    status = host.until(lambda status: not status["mms"] and not status["pending"])
    assert status["locked_vm"] == 0
    wait_dead(gate.server.pidfd.fd)


@pytest.mark.parametrize("fault", [(), ("--fault", "no-membarrier")], ids=["membarrier", "without"])
def test_random_stress_moves_no_byte_after_an_unmap(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], fault: tuple[str, ...]
) -> None:
    """A saturating device, and as many maps and unmaps as come in a while: after each unmap the page stays as it is."""
    start_host(*fault)
    opened = Opened(client())
    device = opened.device()
    device.bus_master()
    program(device, IOVA, 64, 1 << 20, pattern=0x5A5A5A5A5A5A5A5A)
    background = regs.COMMAND_WRITE | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER
    device.write(0, regs.COMMAND, 8, regs.COMMAND_START | background)
    seen = 0
    for _ in range(300):
        opened.container.map_dma(IOVA, opened.hva, PAGE)
        for _ in range(20):
            seen += opened.ram.words[0] != 0
        opened.container.unmap_dma(IOVA, PAGE)
        opened.ram.view[:64] = bytes(64)
        assert bytes(opened.ram.view[:64]) == bytes(64)
        assert bytes(opened.ram.view[:64]) == bytes(64)
    assert seen, "the device was never seen to write: the test proves nothing"
    device.write(0, regs.COMMAND, 8, regs.COMMAND_STOP)
    assert opened.ram.words[0] == 0


def test_traces_name_who_was_late(
    start_host: Callable[..., HostProcess],
    client: Callable[..., RawPort],
    gated: Callable[[], Gated],
    runtime_dir: Path,
) -> None:
    host = start_host("--deadline", SHORT)
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    send_unmap(opened)
    assert opened.port.wait_return().errno == 0
    assert host.end() == 0
    records = [json.loads(line) for line in (runtime_dir / "hostd.events").read_text().splitlines()]
    late = [record["fields"] for record in records if record["event"] == "vfio_revoke_late"]
    assert [fields["name"] for fields in late] == [NAME]
    assert late[0]["request"] == "VFIO_IOMMU_UNMAP_DMA"


def test_without_membarrier_the_device_is_asked_and_what_is_unmapped_is_refused(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort]
) -> None:
    host = start_host("--fault", "no-membarrier")
    opened = Opened(client())
    device = opened.device()
    device.bus_master()
    for number in range(1, ROUNDS + 1):
        opened.container.map_dma(IOVA, opened.hva, PAGE)
        assert burst(device, IOVA, 8, 1, regs.COMMAND_WRITE, pattern=number) == 1
        opened.container.unmap_dma(IOVA, PAGE)
        assert opened.ram.words[0] == number
        assert burst(device, IOVA, 8, 1, regs.COMMAND_WRITE, pattern=99) == 0
        assert opened.ram.words[0] == number
    assert host.text().count("no membarrier(2)") == 1


def test_without_membarrier_an_unmap_waits_for_a_device_that_is_inside_a_section(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    host = start_host("--fault", "no-membarrier")
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    for number in range(1, ROUNDS + 1):
        begin_write(opened, device, gate, number)
        seq = send_unmap(opened)
        status = host.until(lambda status: bool(status["pending"]))
        assert status["pending"][0]["waits_for"] == f"an answer of {NAME}"  # type: ignore[index]
        assert opened.port.poll_return(0.05) is None
        assert opened.ram.words[0] == 0
        gate.let_go()
        answer = opened.port.wait_return()
        assert (answer.seq, answer.errno) == (seq, 0)
        assert opened.ram.words[0] == number, "the section was over, with its bytes, before the unmap returned"
        opened.ram.words[0] = 0


def test_without_membarrier_a_device_that_does_not_answer_is_killed_and_the_unmap_ends(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], gated: Callable[[], Gated]
) -> None:
    host = start_host("--fault", "no-membarrier", "--deadline", SHORT)
    gate = gated()
    opened, device = open_gated(host, client(), gate)
    begin_write(opened, device, gate, 7)
    seq = send_unmap(opened)
    answer = opened.port.wait_return()
    assert (answer.seq, answer.errno) == (seq, 0)
    wait_dead(gate.server.pidfd.fd)
    assert opened.ram.words[0] == 0
    assert f"waits for device {NAME}" in host.text() and "without an answer: kill" in host.text()


GUEST = """
import sys
from pathlib import Path
from protocols.transport.loop import deadline_scale
from tests.processes.port_client import Opened, RawPort
from tests.processes.test_host_dma import program
from vfio_model.devices.dma_burst import regs
opened = Opened(RawPort(Path(sys.argv[1])), group=28)
opened.container.map_dma(0x1000, opened.hva, 4096)
device = opened.device(sys.argv[2])
device.bus_master()
program(device, 0x1000, 8, 1, pattern=7)
device.post(0, regs.COMMAND, 8, regs.COMMAND_START | regs.COMMAND_WRITE)
sys.stdin.readline()
opened.container.unmap_dma(0x1000, 4096)
print(opened.ram.words[0], flush=True)
"""


def test_with_stop_guest_the_client_is_stopped_and_goes_on_when_it_is_continued(
    start_host: Callable[..., HostProcess], gated: Callable[[], Gated], runtime_dir: Path
) -> None:
    host = start_host("--deadline", SHORT, "--on-stuck", "stop-guest")
    gate = gated()
    guest = subprocess.Popen(
        [sys.executable, "-c", GUEST, str(runtime_dir), NAME], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    gate.wait_inside()
    assert guest.stdin is not None
    guest.stdin.write("unmap\n")
    guest.stdin.flush()
    assert os.waitid(os.P_PID, guest.pid, os.WSTOPPED | os.WNOWAIT) is not None
    assert "stop-guest" in host.text()
    gate.let_go()
    os.kill(guest.pid, signal.SIGCONT)
    output, _ = guest.communicate(timeout=60)
    assert output == "7\n"
