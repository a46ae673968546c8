"""Memory of a q35 machine."""

from __future__ import annotations

import pytest

from tests.machine.q35_boards import MCH, config_write, q35, ram_block
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.memory.types import MemTxResult

GIB = 1 << 30


@pytest.mark.parametrize(("size", "below"), [(0xAFF0_0000, 0xAFF0_0000), (0xB000_0000, 2 * GIB), (3 * GIB, 2 * GIB)])
def test_ram_is_split_at_4_gib(size: int, below: int) -> None:
    machine = q35(size)
    view = machine.ram[0].view
    machine.mmio_write(below - 8, 8, 0x1122334455667788)
    assert view[below - 8 : below] == bytes.fromhex("8877665544332211")
    machine.mmio_write(below, 4, 7)
    assert machine.mmio_read(below, 4) == 0
    machine.mmio_write(4 * GIB, 4, 0xCAFE)
    assert machine.mmio_read(4 * GIB, 4) == (0xCAFE if below < size else 0)
    if below < size:
        assert view[below : below + 2] == bytes.fromhex("feca")
        machine.mmio_write(4 * GIB + size - below - 4, 4, 0xBEEF)
        assert view[size - 4 : size - 2] == bytes.fromhex("efbe")
    assert machine.mmio_read(4 * GIB + size - below, 4) == 0


def test_blocks_follow_each_other() -> None:
    machine = Q35Machine([ram_block(2 << 20, "a"), ram_block(2 << 20, "b")])
    machine.write_memory((2 << 20) - 2, b"abcd")
    assert bytes(machine.ram[0].view[-2:]) + bytes(machine.ram[1].view[:2]) == b"abcd"


def test_pam_registers_put_ram_in_place_of_rom() -> None:
    machine = q35()
    assert machine.write_memory(0xC3FFC, bytes((1, 0, 0, 0))) == MemTxResult.DECODE_ERROR
    assert machine.mmio_read(0xC3FFC, 4) == 0
    config_write(machine, MCH, 0x91, 0x03, 1)
    machine.mmio_write(0xC3FFC, 4, 0x12345678)
    machine.mmio_write(0xC4000, 4, 0x12345678)
    assert (machine.mmio_read(0xC3FFC, 4), machine.mmio_read(0xC4000, 4)) == (0x12345678, 0)
    config_write(machine, MCH, 0x90, 0x30, 1)
    machine.mmio_write(0xF0000, 4, 5)
    assert machine.mmio_read(0xF0000, 4) == 5
    machine.reset()
    assert machine.mmio_read(0xC3FFC, 4) == 0x12345678, "PAM registers stay"
    config_write(machine, MCH, 0x90, 0, 4)
    assert (machine.mmio_read(0xC3FFC, 4), machine.mmio_read(0xF0000, 4)) == (0, 0)


@pytest.mark.parametrize("gpa", [0xC000_0000, 0xFED2_0000, 1 << 32, 0xFED9_0000])
def test_where_nobody_is_memory_reads_zero(gpa: int) -> None:
    machine = q35()
    machine.mmio_write(gpa, 8, 0xFF)
    assert machine.mmio_read(gpa, 8) == 0
