"""A type 1 container in a host process: devices in processes of their own walk its table and note what they write."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from errno import EEXIST

import pytest

from tests.processes.conftest import TOPOLOGY, HostProcess, wait_dead
from tests.processes.port_client import RawDevice, RawPort
from tests.processes.test_host_dma import burst, program
from vfio_model.devices.dma_burst import regs
from vfio_model.vfio.ioctl import ContainerFile, VfioGroup
from vfio_model.vfio.type1 import Type1

PAGE, MIB = 4096, 1 << 20
HVA = 0x7F00_0000_0000
BASE = 1 << 59
TYPE1 = {**TOPOLOGY, "host_page_size": PAGE, "containers": ["type1v2", "type1"]}


class Opened:
    """A type 1 container with one group and 4 MiB of RAM, backed by pages of ``page`` bytes."""

    def __init__(self, port: RawPort, page: int = 2 * MIB) -> None:
        self.port, self.ram = port, port.declare("ram", HVA, 4 * MIB, page)
        self.container = ContainerFile(port, port.open("/dev/vfio/vfio"))  # type: ignore[arg-type]
        self.group = VfioGroup(port, port.open("/dev/vfio/26"))  # type: ignore[arg-type]
        self.group.set_container(self.container.handle)
        self.type1 = Type1(self.container, host_page_size=PAGE)
        self.type1.set_type()
        self.type1.start()

    def device(self) -> RawDevice:
        device = self.port.take(self.group.get_device_fd("0000:01:00.0"), self.group.handle)
        device.bus_master()
        return device

    def written(self, iova: int, size: int) -> set[int]:
        number = int.from_bytes(self.type1.query_dirty_bitmap(iova, size), "little")
        return {at for at in range(number.bit_length()) if number >> at & 1}


@pytest.fixture(params=["", "no-membarrier"])
def opened(
    request: pytest.FixtureRequest, start_host: Callable[..., HostProcess], client: Callable[..., RawPort]
) -> Opened:
    start_host(*(["--fault", request.param] if request.param else []), topology=TYPE1)
    return Opened(client())


@pytest.mark.parametrize("page", [PAGE, 2 * MIB])
def test_a_device_walks_the_table_as_far_down_as_it_goes(
    start_host: Callable[..., HostProcess], client: Callable[..., RawPort], page: int
) -> None:
    host = start_host(topology=TYPE1)
    opened = Opened(client(), page)
    opened.container.map_dma(BASE, HVA, 4 * MIB)
    device = opened.device()
    for offset in (0, 2 * MIB - 8, 3 * MIB):
        assert burst(device, BASE + offset, 8, 3, regs.COMMAND_WRITE, pattern=offset + 1) == 3
        assert opened.ram.words[offset // 8] == offset + 1
    with pytest.raises(OSError) as error:
        opened.container.map_dma(BASE + PAGE, HVA, PAGE)
    assert error.value.errno == EEXIST
    opened.container.unmap_dma(BASE, 4 * MIB)
    assert burst(device, BASE, 8, 1, regs.COMMAND_WRITE) == 0
    assert host.status()["locked_vm"] == 0


def test_what_the_device_writes_is_dirty_from_the_answer_to_start_on(opened: Opened) -> None:
    opened.container.map_dma(BASE, HVA, 4 * MIB)
    device = opened.device()
    assert burst(device, BASE, 8, 4, regs.COMMAND_WRITE, stride=PAGE, pattern=1) == 4
    opened.type1.set_dirty_page_tracking(True)
    assert opened.written(BASE, 4 * MIB) == set()
    assert burst(device, BASE + 5 * PAGE, 8, 4, regs.COMMAND_WRITE, stride=2 * PAGE, pattern=1) == 4
    assert burst(device, BASE + 100 * PAGE, 8, 4, 0, stride=PAGE) == 4
    assert opened.written(BASE, 4 * MIB) == {5, 7, 9, 11}
    assert opened.written(BASE, 4 * MIB) == set()
    assert burst(device, BASE + 9 * PAGE, 8, 1, regs.COMMAND_WRITE) == 1
    found = opened.type1.unmap_dirty_bitmap(BASE, 4 * MIB)
    assert int.from_bytes(found, "little") == 1 << 9
    opened.type1.set_dirty_page_tracking(False)


def test_copying_what_is_dirty_copies_everything(opened: Opened) -> None:
    """As a migration does: while the device writes, pages that were written are copied, and at its end the rest."""
    opened.container.map_dma(BASE, HVA, 4 * MIB)
    device = opened.device()
    opened.type1.set_dirty_page_tracking(True)
    copy, view, copied = bytearray(opened.ram.view), opened.ram.view, 0

    def collect() -> int:
        written = opened.written(BASE, 4 * MIB)
        for page in written:
            copy[page * PAGE : (page + 1) * PAGE] = view[page * PAGE : (page + 1) * PAGE]
        return len(written)

    program(device, BASE, 64, 1000, stride=PAGE, pattern=1)
    command = regs.COMMAND_START | regs.COMMAND_WRITE | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER
    device.write(0, regs.COMMAND, 8, command)
    for number in range(2, 60):
        copied += collect()
        device.write(0, regs.PATTERN, 8, number)
    device.write(0, regs.COMMAND, 8, regs.COMMAND_STOP)
    assert not device.read(0, regs.STATUS, 8) & (regs.STATUS_RUNNING | regs.STATUS_FAILURES)
    assert copied > 0 and device.read(0, regs.COMPLETED, 8) > 58
    collect()
    assert copy == view
    assert not opened.written(BASE, 4 * MIB)


def test_a_writer_that_was_killed_may_have_written_everything(opened: Opened) -> None:
    opened.container.map_dma(BASE, HVA, MIB)
    opened.container.map_dma(BASE + MIB, HVA + MIB, MIB, flags=1)
    device = opened.device()
    opened.type1.set_dirty_page_tracking(True)
    program(device, BASE, 64, 64, pattern=1)
    command = regs.COMMAND_START | regs.COMMAND_WRITE | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER
    device.write(0, regs.COMMAND, 8, command)
    os.kill(device.pid, signal.SIGKILL)
    wait_dead(device.pidfd.fileno())
    opened.group.get_status()
    assert opened.written(BASE, 2 * MIB) == set(range(MIB // PAGE))
