"""DMA of an assigned device in its own process, through the host's tables, without a message."""

from __future__ import annotations

from collections.abc import Callable

from tests.processes.conftest import HostProcess
from tests.processes.port_client import Opened, RawDevice, RawPort
from vfio_model.devices.dma_burst import regs

PAGE = 4096


def burst(device: RawDevice, iova: int, length: int, count: int, command: int, *, stride: int = 0, pattern: int = 0) -> int:
    """Run a burst to its end; the number of accesses that succeeded."""
    values = ((regs.IOVA, iova), (regs.LENGTH, length), (regs.COUNT, count), (regs.STRIDE, stride), (regs.PATTERN, pattern))
    for register, value in values:
        device.write(0, register, 8, value)
    device.write(0, regs.COMMAND, 8, regs.COMMAND_START | command)
    return device.read(0, regs.COMPLETED, 8)


def test_a_mapped_page_is_reached_and_an_unmapped_one_is_not(
    host: HostProcess, client: Callable[..., RawPort]
) -> None:
    opened = Opened(client())
    opened.container.map_dma(0x1000, opened.hva, PAGE)
    device = opened.device()
    device.bus_master()
    assert burst(device, 0x1000, 64, 1, regs.COMMAND_WRITE, pattern=0x1122334455667788) == 1
    assert opened.ram.words[0] == 0x1122334455667788
    assert burst(device, 0x2000, 64, 1, regs.COMMAND_WRITE) == 0
    opened.container.unmap_dma(0x1000, PAGE)
    assert burst(device, 0x1000, 64, 1, regs.COMMAND_WRITE) == 0
