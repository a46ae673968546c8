"""A register file does what its table says, whatever the size of an access."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.devices.register_file import Register, RegisterFile, fields_of
from vfio_model.errors import VMStateError

TABLE = (
    Register("RW", 0x00, "1", reset=0x11223344, writable=0xFFFFFFFF),
    Register("MASKED", 0x04, "2", reset=0xF0000000, writable=0x0000FFFF),
    Register("STATUS", 0x08, "3", clear_on_write=0xFF),
    Register("COUNTER", 0x0C, "4", clear_on_read=0xFFFFFFFF),
    Register("ARRAY", 0x20, "5", writable=0xFFFFFFFF, count=3, stride=8),
    Register("KEPT", 0x40, "6", writable=0xFFFFFFFF, keep=True),
)


@pytest.fixture
def registers() -> RegisterFile:
    return RegisterFile(TABLE)


def test_masks_and_clearing_bits(registers: RegisterFile) -> None:
    registers.write(0x04, 4, 0x12345678)
    assert registers.read(0x04, 4) == 0xF0005678
    registers[0x08] = 0x1FF
    registers.write(0x08, 4, 0x10F)
    assert registers.read(0x08, 4) == 0x1F0
    registers[0x0C] = 5
    assert (registers.read(0x0C, 4), registers.read(0x0C, 4)) == (5, 0)


def test_arrays_have_gaps(registers: RegisterFile) -> None:
    registers.write(0x28, 8, 0xAAAAAAAA_BBBBBBBB)
    assert [registers.read(at, 4) for at in (0x20, 0x24, 0x28, 0x2C, 0x30)] == [0, 0, 0xBBBBBBBB, 0, 0]


def test_handlers_are_asked_and_told(registers: RegisterFile) -> None:
    told: list[tuple[int, int]] = []
    registers.on_write(0x20, lambda offset, value: told.append((offset, value)))
    registers.on_read(0x0C, lambda value: value | 0x100)
    registers.write(0x30, 4, 9)
    registers.write(0x24, 4, 9)
    registers[0x0C] = 1
    assert told == [(0x30, 9)] and registers.read(0x0C, 4) == 0x101 and registers[0x0C] == 0


def test_a_reset_spares_what_is_kept(registers: RegisterFile) -> None:
    for at in (0x00, 0x28, 0x40):
        registers.write(at, 4, 7)
    registers.reset()
    assert [registers[at] for at in (0x00, 0x28, 0x40)] == [0x11223344, 0, 7]


@given(st.lists(st.tuples(st.integers(0, 0x48), st.sampled_from([1, 2, 4, 8]), st.integers(0, 2**64 - 1)), max_size=20))
def test_writes_of_any_size_are_writes_of_bytes(writes: list[tuple[int, int, int]]) -> None:
    registers = RegisterFile((Register("ALL", 0, "1", writable=0xFFFFFFFF, count=16),))
    memory = bytearray(0x60)
    for offset, size, value in writes:
        value &= (1 << size * 8) - 1
        registers.write(offset, size, value)
        memory[offset : offset + size] = value.to_bytes(size, "little")
        memory[64:] = bytes(len(memory) - 64)
    for offset in range(0x48):
        for size in (1, 2, 4, 8):
            assert registers.read(offset, size) == int.from_bytes(memory[offset : offset + size], "little")


def test_state_is_a_field_for_each_line(registers: RegisterFile) -> None:
    registers.write(0x28, 4, 6)
    state = registers.export_state()
    assert [field.name for field in fields_of(TABLE)] == list(state) == [each.name.lower() for each in TABLE]
    assert state["array"] == [0, 6, 0]
    other = RegisterFile(TABLE)
    other.check_state(state, where="test")
    other.import_state(state)
    assert other.export_state() == state
    with pytest.raises(VMStateError, match="MASKED"):
        other.check_state({**state, "masked": 0x00010000}, where="test")
