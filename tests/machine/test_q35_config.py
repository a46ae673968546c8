"""Configuration space of a q35 machine: the built-in functions, and both ways to it. Expected bytes are QEMU 11.1's."""

from __future__ import annotations

import pytest

from tests.machine.q35_boards import AHCI, LPC, MCH, SMBUS, config_read, config_write, q35
from vfio_model.devices.edu.device import EduDevice
from vfio_model.machine.q35.machine import Q35Machine

RESET = {
    MCH: {0x00: 0x29C08086, 0x08: 0x06000000, 0x2C: 0x11001AF4, 0x50: 0x40, 0x60: 0xB0000000, 0x9C: 0x00380200},
    LPC: {
        0x00: 0x29188086, 0x08: 0x06010002, 0x0C: 0x00800000, 0x2C: 0x11001AF4, 0x40: 1,
        0x60: 0x80808080, 0x68: 0x80808080,
    },
    AHCI: {
        0x00: 0x29228086, 0x04: 0x00100000, 0x08: 0x01060102, 0x0C: 0x00800000, 0x20: 1, 0x2C: 0x11001AF4,
        0x34: 0x80, 0x3C: 0x100, 0x80: 0x0080A805, 0x90: 0x40, 0xA8: 0x00100012, 0xAC: 0x48,
    },
    SMBUS: {0x00: 0x29308086, 0x08: 0x0C050002, 0x0C: 0x00800000, 0x20: 1, 0x2C: 0x11001AF4, 0x3C: 0x100},
}  # fmt: skip
"""Dwords by offset; all others are zero."""

_HEADER = dict.fromkeys(range(0, 0x40, 4), 0) | {0x04: 0x507, 0x0C: 0xFF, 0x3C: 0xFF}
WRITABLE = {
    MCH: _HEADER,
    LPC: _HEADER | {0x40: 0xFF87},
    AHCI: _HEADER | {0x20: 0xFFFFFFE0, 0x24: 0xFFFFF000, 0x80: 0x10000, 0x84: 0xFFFFFFFC, 0xA8: 0, 0xAC: 0},
    SMBUS: _HEADER | {0x20: 0xFFFFFFC0, 0x40: 0xFFFFFFF7},
}
"""Masks by offset; all other dwords keep everything."""
OWN_RULES = {MCH: {0x50, 0x9C}, LPC: {0xA0}, AHCI: set[int](), SMBUS: set[int]()}


@pytest.mark.parametrize("devfn", RESET)
def test_built_in_functions_come_up_as_on_qemu(devfn: int) -> None:
    machine = q35()
    found = {offset: config_read(machine, devfn, offset) for offset in range(0, 256, 4)}
    assert {offset: value for offset, value in found.items() if value} == RESET[devfn]


@pytest.mark.parametrize("devfn", RESET)
def test_what_is_writable_is_as_on_qemu(devfn: int) -> None:
    machine = q35()
    for offset in sorted(set(range(0, 256, 4)) - OWN_RULES[devfn]):
        mask, reset = WRITABLE[devfn].get(offset, 0xFFFFFFFF), RESET[devfn].get(offset, 0)
        for value in (0xFFFFFFFF, 0):
            config_write(machine, devfn, offset, value)
            assert config_read(machine, devfn, offset) == reset & ~mask | value & mask, (hex(offset), hex(value))


def test_functions_that_are_not_there_read_ones() -> None:
    machine = q35()
    assert config_read(machine, 0x20, 0) == 0xFFFFFFFF and config_read(machine, 0x21, 2, 1) == 0xFF
    machine.port_write(0xCF8, 4, 0x80010000)
    assert machine.port_read(0xCFC, 4) == 0xFFFFFFFF


def test_smram_can_be_locked_until_a_reset() -> None:
    machine = q35()
    written = ((0x72, 0x32), (0x42, 0x12), (0x00, 0x12), (0x78, 0x32))
    for value, then in written:
        config_write(machine, MCH, 0x9D, value, 1)
        assert config_read(machine, MCH, 0x9D, 1) == then
    config_write(machine, MCH, 0x9E, 0, 1)
    assert config_read(machine, MCH, 0x9E, 1) == 0x38
    machine.reset()
    config_write(machine, MCH, 0x9D, 0x4A, 1)
    assert config_read(machine, MCH, 0x9D, 1) == 0x4A


def test_smbase_answers_and_is_locked() -> None:
    machine = q35()
    for value, then in ((0x55, 0x55), (0xFF, 0x01), (0x00, 0x01), (0x02, 0x02), (0xFD, 0x02), (0x00, 0x02)):
        config_write(machine, MCH, 0x9C, value, 1)
        assert config_read(machine, MCH, 0x9C, 1) == then
    machine.reset()
    assert config_read(machine, MCH, 0x9C, 1) == 0
    config_write(machine, MCH, 0x9C, 0x43, 1)
    assert config_read(machine, MCH, 0x9C, 1) == 2, "locked without having asked"


def test_tseg_says_how_much_it_can_be() -> None:
    machine = q35()
    for value, then in ((0x1234, 0x1234), (0xFFFF, 0x40), (8, 8)):
        config_write(machine, MCH, 0x50, value, 2)
        assert config_read(machine, MCH, 0x50, 2) == then


def test_smi_lock_stays() -> None:
    machine = q35()
    for value, then in ((0x20, 0x20), (0xFF, 0xFF), (0x00, 0x10), (0x03, 0x13)):
        config_write(machine, LPC, 0xA0, value, 1)
        assert config_read(machine, LPC, 0xA0, 1) == then


def test_a_reset_leaves_what_has_no_reset_value() -> None:
    machine = q35()
    kept = [(MCH, 0x44), (MCH, 0x91), (LPC, 0x45), (SMBUS, 0x44), (SMBUS, 0x40), (AHCI, 0x90)]
    for devfn, offset in (*kept, (LPC, 0x60), (LPC, 0xF0)):
        config_write(machine, devfn, offset, 0xA4, 1)
    machine.reset()
    assert [config_read(machine, devfn, at, 1) for devfn, at in kept] == [0xA4] * 6
    assert (config_read(machine, LPC, 0x60, 1), config_read(machine, LPC, 0xF0)) == (0x80, 0)


# -- CONFIG_ADDRESS and CONFIG_DATA


def test_config_address_takes_dwords_alone() -> None:
    machine = q35()
    machine.port_write(0xCF8, 4, 0x12345678)
    for port, size in ((0xCF8, 1), (0xCF8, 2), (0xCFA, 2), (0xCFB, 1)):
        machine.port_write(port, size, 0xFF)
    reads = [(0xCF8, 4), (0xCF8, 2), (0xCFA, 2), (0xCFA, 1), (0xCFB, 1)]
    assert [machine.port_read(*read) for read in reads] == [0x12345678, 0x5678, 0x5678, 0x78, 0x78]


@pytest.mark.parametrize(
    ("address", "port", "size", "value"),
    [
        (0x00000000, 0xCFC, 4, 0xFFFFFFFF),
        (0x80000000, 0xCFD, 1, 0x80),
        (0x80000000, 0xCFE, 2, 0x29C0),
        (0x80000000, 0xCFD, 2, 0),
        (0x80000000, 0xCFE, 4, 0),
        (0x80000001, 0xCFC, 4, 0x0029C080),
        (0x80000002, 0xCFC, 4, 0x000029C0),
        (0x80000002, 0xCFE, 2, 0x29C0),
        (0xFF000000, 0xCFC, 4, 0x29C08086),
        (0x8000F80F, 0xCFC, 4, 0),
        (0x8000FAFD, 0xCFC, 4, 0),
    ],
)
def test_config_data(address: int, port: int, size: int, value: int) -> None:
    machine = q35()
    machine.port_write(0xCF8, 4, address)
    assert machine.port_read(port, size) == value


def test_ports_where_nobody_is() -> None:
    machine = q35()
    assert [machine.port_read(0x4E0, size) for size in (1, 2, 4)] == [0xFF, 0xFFFF, 0xFFFFFFFF]
    assert [machine.port_read(0xFFFF, size) for size in (1, 2, 4)] == [0xFF, 0, 0]
    assert [machine.port_read(0xCF7, 2), machine.port_read(0xCF6, 4)] == [0, 0]


def test_the_reset_control_register_asks_for_a_reset() -> None:
    machine = q35()
    machine.port_write(0xCF9, 1, 0x0B)
    assert machine.port_read(0xCF9, 1) == 0x0A
    config_write(machine, MCH, 0x60, 0xC0000001)
    machine.port_write(0xCF9, 1, 0x06)
    assert config_read(machine, MCH, 0x60) == 0xB0000000 and machine.port_read(0xCF9, 1) == 0x0A


# -- ECAM


def ecam(value: int, high: int = 0) -> Q35Machine:
    machine = q35()
    config_write(machine, MCH, 0x64, high)
    config_write(machine, MCH, 0x60, value)
    return machine


def test_ecam_is_off_at_reset() -> None:
    assert q35().mmio_read(0xB0000000, 4) == 0


@pytest.mark.parametrize(
    ("value", "high", "base", "size"),
    [
        (0xB0000001, 0, 0xB0000000, 256),
        (0xB0000003, 0, 0xB0000000, 128),
        (0xB4000005, 0, 0xB4000000, 64),
        (0xB1234561, 0, 0xB0000000, 256),
        (0xE0000001, 0x11, 0x1_E0000000, 256),
    ],
)
def test_ecam_is_where_pciexbar_says(value: int, high: int, base: int, size: int) -> None:
    machine = ecam(value, high)
    assert machine.mmio_read(base, 4) == 0x29C08086 and machine.mmio_read(base + 0xF8000, 4) == 0x29188086
    assert (
        machine.mmio_read(base + (size << 20) - 4, 4) == 0xFFFFFFFF and machine.mmio_read(base + (size << 20), 4) == 0
    )


def test_a_reserved_length_changes_nothing() -> None:
    machine = ecam(0xB0000001)
    config_write(machine, MCH, 0x60, 0xC0000007)
    assert machine.mmio_read(0xB0000000, 4) == 0x29C08086


def test_ecam_accesses_of_every_size() -> None:
    machine = ecam(0xB0000001)
    assert [machine.mmio_read(0xB0000002, size) for size in (1, 2, 4, 8)] == [0xC0, 0x29C0, 0x29C0, 0x29C0]
    assert machine.mmio_read(0xB0000100, 8) == 0xFFFF_FFFF_FFFF_FFFF
    machine.mmio_write(0xB00F8070, 8, 0x0102030405060708)
    machine.mmio_write(0xB00F8072, 4, 0xA1A2A3A4)
    assert machine.mmio_read(0xB00F8070, 8) == 0x0102A1A2A3A40708


def test_a_device_is_placed_by_ports_and_by_ecam() -> None:
    machine = ecam(0xB0000001)
    machine.root_bus.plug(EduDevice, 0x10)
    machine.mmio_write(0xB0010010, 4, 0xFE000000)
    config_write(machine, 0x10, 4, 6, 2)
    assert machine.mmio_read(0xFE000000, 4) == 0x010000ED
    machine.reset()
    assert machine.mmio_read(0xFE000000, 4) == 0
