"""NVMe: configuration space, dword by dword, is what stock QEMU's ``nvme`` shows; switching it off and resetting it."""

from __future__ import annotations

import pytest

from tests.devices.nvme_host import NvmeHost
from tests.pci.hierarchy import SLOT, Board, number
from vfio_model.devices.nvme import regs
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.pci.config_space import EXTENDED_CONFIG_SIZE
from vfio_model.pci.device import PCIDevice
from vfio_model.testing.bench import Bench

ONES = 0xFFFF_FFFF
BAR = 0xE000_0000
DEVICE_CONTROL = 0x88
FLR = 0x8000
POWER_CONTROL = 0x64
CONFIG = """
000 00101b36 00101b36
004 00100000 00100507
008 01080202 01080202
00c 00000000 000000ff
010 00000004 ffffc004
014 00000000 ffffffff
02c 11001af4 11001af4
034 00000040 00000040
03c 00000100 000001ff
040 00408011 c0408011
044 00002000 00002000
048 00003000 00003000
060 00030001 00030001
064 00000008 0000000b
080 00026010 00026010
084 10008020 10008020
088 00000000 0000000f
08c 00000411 00000411
090 00110000 00110000
094 00000000 00000000
098 00000000 00000000
09c 00000000 00000000
0a0 00000000 00000000
0a4 00300000 00300000
0a8 00000000 00008000
0ac 00000000 00000000
0b0 00000000 00000000
0b4 00000000 00000000
0b8 00000000 00000000
100 00000000 00000000
"""
"""Offset, value after power-on, value after ones were written (function level reset apart). What is not here is zero
in the header, and behind it keeps what is written. :mod:`tests.interop.test_q35_faces` asks both."""
IN_ROOT_COMPLEX = 0x0092_6010
"""At 0x80, on a root bus."""


def place(*, behind_port: bool) -> tuple[Board, int, int]:
    """A board with the device, the number of its bus and its devfn."""
    board = Board()
    if behind_port:
        port = board.bridge("pcie-root-port", chassis=1)
        port.secondary.plug(NvmeDevice, 0)
        board.root.reset()
        number(port, 1)
        return board, 1, 0
    board.root.plug(NvmeDevice, SLOT)
    board.root.reset()
    return board, 0, SLOT


@pytest.mark.parametrize("behind_port", [False, True], ids=["root bus", "root port"])
def test_configuration_space_is_qemus(behind_port: bool) -> None:
    rows = (tuple(int(word, 16) for word in line.split()) for line in CONFIG.split("\n") if line)
    expected = {offset: (value, ones) for offset, value, ones in rows}
    if not behind_port:
        expected[0x80] = IN_ROOT_COMPLEX, IN_ROOT_COMPLEX
    board, bus, devfn = place(behind_port=behind_port)
    offsets = range(0, EXTENDED_CONFIG_SIZE, 4)
    before = [board.read(bus, devfn, offset) for offset in offsets]
    for offset in offsets:
        board.write(bus, devfn, offset, ONES & ~(FLR if offset == DEVICE_CONTROL else 0))
    after = [board.read(bus, devfn, offset) for offset in offsets]
    wrong = [
        (f"{offset:#x}", f"{was:08x}", f"{is_:08x}")
        for offset, was, is_ in zip(offsets, before, after, strict=True)
        if (was, is_) != expected.get(offset, (0, ONES if offset >= 0x40 else 0))
    ]
    assert wrong == []


@pytest.fixture
def placed() -> tuple[Board, PCIDevice]:
    """The device at :data:`BAR`."""
    board, bus, devfn = place(behind_port=False)
    board.write(bus, devfn, 0x10, BAR)
    board.write(bus, devfn, 4, 7, 2)
    return board, board.root.devices[devfn]


def test_a_function_that_is_off_decodes_nothing_and_forgets_nothing(placed: tuple[Board, PCIDevice]) -> None:
    board, device = placed
    aqa = 0x001F_000F
    device.region_write(0, regs.AQA, 4, aqa)
    assert board.mmio(BAR + regs.AQA) == aqa
    device.config_write(POWER_CONTROL, 2, 3)
    assert device.config_read(POWER_CONTROL, 2) == 0xB and board.mmio(BAR + regs.AQA) is None
    assert device.config_read(0x10, 4) == BAR | 4 and device.config_read(4, 2) == 7
    device.config_write(POWER_CONTROL, 2, 0)
    assert device.config_read(POWER_CONTROL, 2) == 8 and board.mmio(BAR + regs.AQA) == aqa


def test_states_between_are_not_entered(placed: tuple[Board, PCIDevice]) -> None:
    board, device = placed
    for state in 0, 3:
        device.config_write(POWER_CONTROL, 2, state)
        for other in 1, 2:
            device.config_write(POWER_CONTROL, 2, other)
            assert device.config_read(POWER_CONTROL, 2) == 8 | state
        assert (board.mmio(BAR + regs.VS) is None) == (state == 3)


def test_a_function_level_reset_switches_it_on_and_clears_what_was_set(placed: tuple[Board, PCIDevice]) -> None:
    board, device = placed
    device.config_write(POWER_CONTROL, 2, 3)
    device.config_write(DEVICE_CONTROL, 2, FLR)
    assert [device.config_read(at, 4) for at in (4, 0x10, POWER_CONTROL, DEVICE_CONTROL)] == [0x10_0000, 4, 8, 0]
    device.config_write(0x10, 4, BAR)
    device.config_write(4, 2, 2)
    assert board.mmio(BAR + regs.VS) == regs.VERSION


def test_a_function_level_reset_ends_a_controller_that_runs() -> None:
    host = NvmeHost()
    host.start()
    assert host.status == regs.CSTS_RDY
    host.device.config_write(DEVICE_CONTROL, 2, FLR)
    assert host.status == 0 and not host.device.bus_master
    host.bring_up()
    host.rings.clear()
    host.start()
    host.write_blocks(1, b"r" * 512)
    assert host.read_blocks(1, 1) == b"r" * 512


def test_a_function_that_is_off_is_so_elsewhere() -> None:
    host = Bench(NvmeDevice)
    host.device.config_write(POWER_CONTROL, 2, 3)
    assert host.device.bar_range(0, allow_zero=True) is None
    target = host.migrate()
    assert target.device.bar_range(0, allow_zero=True) is None
    target.device.config_write(POWER_CONTROL, 2, 0)
    assert target.device.bar_range(0, allow_zero=True) is not None
