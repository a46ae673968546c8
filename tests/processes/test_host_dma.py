"""DMA of an assigned device in its own process, through the host's tables, without a message."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.processes.conftest import HostProcess
from tests.processes.port_client import Clock, Opened, RawDevice, RawPort, wait_readable
from vfio_model.devices.dma_burst import regs
from vfio_model.devices.edu import regs as edu
from vfio_model.uapi.vfio import PciRegion

PAGE = 4096
CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)


def program(device: RawDevice, iova: int, length: int, count: int, *, stride: int = 0, pattern: int = 0) -> None:
    """Everything of a burst but its start."""
    values = (
        (regs.IOVA, iova),
        (regs.LENGTH, length),
        (regs.COUNT, count),
        (regs.STRIDE, stride),
        (regs.PATTERN, pattern),
    )
    for register, value in values:
        device.write(0, register, 8, value)


def burst(
    device: RawDevice, iova: int, length: int, count: int, command: int, *, stride: int = 0, pattern: int = 0
) -> int:
    """Run a burst to its end; the number of accesses that succeeded."""
    program(device, iova, length, count, stride=stride, pattern=pattern)
    device.write(0, regs.COMMAND, 8, regs.COMMAND_START | command)
    return device.read(0, regs.COMPLETED, 8)


def test_a_mapped_page_is_reached_and_an_unmapped_one_is_not(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    device.bus_master()
    assert burst(device, 0x1000, 64, 1, regs.COMMAND_WRITE, pattern=0x1122334455667788) == 1
    assert opened.ram.words[0] == 0x1122334455667788
    assert burst(device, 0x2000, 64, 1, regs.COMMAND_WRITE) == 0
    opened.container.unmap_dma(0x1000, PAGE)
    assert burst(device, 0x1000, 64, 1, regs.COMMAND_WRITE) == 0


def test_without_bus_mastering_nothing_is_reached(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    assert burst(device, 0x1000, 64, 1, regs.COMMAND_WRITE, pattern=1) == 0
    assert opened.ram.words[0] == 0


def test_permissions_of_the_table_hold(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE, flags=1)
    device = opened.device()
    device.bus_master()
    assert burst(device, 0x1000, 8, 1, regs.COMMAND_WRITE) == 0
    assert burst(device, 0x1000, 8, 1, 0) == 1


@pytest.mark.parametrize("levels", [1, 2])
def test_scattered_memory_and_table_levels(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], levels: int
) -> None:
    start_host("--hpa", "scatter")
    opened = Opened(client(), ram=4 << 20)
    opened.container.tce_remove(0)
    start = opened.container.tce_create(16, 1 << 30, levels)
    for page in range(64):
        opened.container.map_dma(start + page * 65536, opened.hva + (63 - page) * 65536, 65536)
    device = opened.device()
    device.bus_master()
    assert burst(device, start + 8, 8, 64, regs.COMMAND_WRITE, stride=65536, pattern=5) == 64
    assert [opened.ram.words[page * 8192 + 1] for page in range(64)] == [5] * 64
    assert burst(device, start + 65536 - 4096, 8192, 1, regs.COMMAND_WRITE, pattern=6) == 1


def test_memory_that_is_declared_later_is_reached(host: HostProcess, client: Callable[..., RawPort]) -> None:
    port = client()
    opened = Opened(port)
    device = opened.device()
    device.bus_master()
    later = port.declare("later", 0x6000_0000_0000, 1 << 20)
    opened.container.register_memory(0x6000_0000_0000, 1 << 20)
    opened.container.map_dma(0x3000, 0x6000_0000_0000, PAGE)
    assert burst(device, 0x3000, 8, 1, regs.COMMAND_WRITE, pattern=9) == 1
    assert later.words[0] == 9


def test_the_tables_are_mapped_read_only(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client())
    device = opened.device()
    maps = Path(f"/proc/{device.pid}/maps").read_text().splitlines()
    tables = [line for line in maps if "memfd:domain" in line or "memfd:pe." in line]
    assert len(tables) == 2
    assert all(line.split()[1] == "r--s" for line in tables)


def test_dma_goes_on_while_the_host_and_the_client_are_silent(
    host: HostProcess, client: Callable[..., RawPort]
) -> None:
    """Nobody could answer a question: hostd is stopped and the client reads nothing."""
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    device.bus_master()
    done = device.intx()
    program(device, 0x1000, 64, 5000, pattern=0xABCD)
    os.kill(host.pid, signal.SIGSTOP)
    try:
        device.post(0, regs.COMMAND, 8, regs.COMMAND_START | regs.COMMAND_WRITE | regs.COMMAND_IRQ)
        wait_readable(done)
        assert opened.ram.words[0] == 0xABCD
    finally:
        os.kill(host.pid, signal.SIGCONT)
    assert device.read(0, regs.COMPLETED, 8) == 5000


def test_a_burst_makes_no_system_call_for_its_accesses(
    host: HostProcess, client: Callable[..., RawPort], runtime_dir: Path
) -> None:
    """20000 accesses, a handful of reads and writes of files and sockets. Where strace is, it counts every kind."""
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    device.bus_master()
    done = device.intx()
    program(device, 0x1000, 64, 20000, pattern=3)
    before = _calls(device.pid)
    with _Strace(device.pid, runtime_dir / "strace.txt") as strace:
        device.post(0, regs.COMMAND, 8, regs.COMMAND_START | regs.COMMAND_WRITE | regs.COMMAND_IRQ)
        wait_readable(done)
    assert _calls(device.pid) - before < 20
    assert strace.count("sendmsg", "recvmsg", "sendto", "recvfrom", "futex", "write", "read") < 50
    assert device.read(0, regs.COMPLETED, 8) == 20000


def _calls(pid: int) -> int:
    """read(2) and write(2) calls of a process so far."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(fields["syscr"]) + int(fields["syscw"])


class _Strace:
    """Counts the system calls of a process, if there is a strace that may look at it; else it counts none."""

    def __init__(self, pid: int, output: Path) -> None:
        self._output, self._pid = output, pid
        self._tracer: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Strace:
        program = shutil.which("strace")
        if program is not None:
            self._tracer = subprocess.Popen(
                [program, "-f", "-o", str(self._output), "-p", str(self._pid)], stderr=subprocess.PIPE
            )
            assert self._tracer.stderr is not None
            self._tracer.stderr.readline()  # "attached", or why not
        return self

    def __exit__(self, *exc: object) -> None:
        if self._tracer is not None:
            self._tracer.send_signal(signal.SIGINT)
            self._tracer.wait(20)
            assert self._tracer.stderr is not None
            self._tracer.stderr.close()

    def count(self, *names: str) -> int:
        """Lines of calls with these names."""
        if not self._output.exists():
            return 0
        text = self._output.read_text()
        return sum(text.count(f" {name}(") for name in names)


def test_an_edu_moves_data_when_the_clock_has_passed_its_delay(
    host: HostProcess, client: Callable[..., RawPort]
) -> None:
    opened = Opened(client(), group=27)
    opened.container.map_dma(0x10000, opened.hva, PAGE)
    opened.ram.view[:4] = b"abcd"
    device = opened.device("0000:02:00.0")
    assert device.read(CONFIG, 0, 4) == edu.DEVICE_ID << 16 | edu.VENDOR_ID
    device.bus_master()
    interrupt = device.intx()
    with Clock(device) as clock:
        _edu_dma(device, clock, 0x10000, edu.BUFFER_ADDRESS, 4, 0x5)
        wait_readable(interrupt)
        device.write(0, edu.IRQ_ACK, 4, device.read(0, edu.IRQ_STATUS, 4))
        _edu_dma(device, clock, edu.BUFFER_ADDRESS, 0x10800, 4, 0x3)
        assert bytes(opened.ram.view[0x800:0x804]) == b"abcd"


def _edu_dma(device: RawDevice, clock: Clock, source: int, target: int, count: int, command: int) -> None:
    for register, value in ((edu.DMA_SRC, source), (edu.DMA_DST, target), (edu.DMA_COUNT, count)):
        device.write(0, register, 8, value)
    device.write(0, edu.DMA_COMMAND, 8, command)
    assert device.read(0, edu.DMA_COMMAND, 8) & 1
    clock.step(1_000_000_000)
    assert not device.read(0, edu.DMA_COMMAND, 8) & 1


def test_an_interrupt_line_masks_itself_until_unmasked(host: HostProcess, client: Callable[..., RawPort]) -> None:
    opened = Opened(client(), group=27)
    device = opened.device("0000:02:00.0")
    interrupt = device.intx()
    device.write(0, edu.IRQ_RAISE, 4, 1)
    assert interrupt.drain() == 1
    device.unmask()
    assert interrupt.drain() == 1, "the pin is still up"
    device.write(0, edu.IRQ_ACK, 4, 1)
    device.unmask()
    assert interrupt.drain() == 0
