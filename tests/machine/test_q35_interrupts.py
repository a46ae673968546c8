"""Interrupts of a q35 machine: pins, PIRQs, the I/O APIC, messages. Expected GSIs are QEMU 11.1's."""

from __future__ import annotations

import pytest

from tests.machine.q35_boards import LPC, config_write, q35
from vfio_model.devices.edu.device import EduDevice
from vfio_model.machine.q35.interrupts import Message
from vfio_model.machine.q35.machine import Q35Machine

IOAPIC, WINDOW, EOI = 0xFEC00000, 0xFEC00010, 0xFEC00040
LEVEL = 1 << 15


def with_edu(*slots: int) -> Q35Machine:
    machine = q35()
    for slot in slots:
        machine.root_bus.plug(EduDevice, slot << 3)
        config_write(machine, slot << 3, 0x10, bar(slot))
        config_write(machine, slot << 3, 4, 6, 2)
    return machine


def bar(slot: int) -> int:
    return 0xE000_0000 + (slot << 20)


def interrupt(machine: Q35Machine, slot: int, up: bool) -> None:
    machine.mmio_write(bar(slot) + (0x60 if up else 0x64), 4, 1)


def rte(machine: Q35Machine, pin: int, entry: int) -> None:
    for half in (1, 0):
        machine.mmio_write(IOAPIC, 4, 0x10 + 2 * pin + half)
        machine.mmio_write(WINDOW, 4, entry >> 32 * half & 0xFFFFFFFF)


def read_rte(machine: Q35Machine, pin: int) -> int:
    value = 0
    for half in (1, 0):
        machine.mmio_write(IOAPIC, 4, 0x10 + 2 * pin + half)
        value = value << 32 | machine.mmio_read(WINDOW, 4)
    return value


@pytest.mark.parametrize(
    ("slot", "gsi"), [(1, 21), (2, 22), (3, 23), (4, 20), (0x17, 23), (0x18, 20), (0x19, 16), (0x1D, 16), (0x1E, 20)]
)
def test_a_pin_of_a_slot_is_a_gsi(slot: int, gsi: int) -> None:
    machine = with_edu(slot)
    interrupt(machine, slot, True)
    assert machine.irqs.high == {gsi}
    interrupt(machine, slot, False)
    assert not machine.irqs.high


def test_pirqs_go_to_isa_lines_too() -> None:
    machine = with_edu(2, 3)
    for offset in (0x6A, 0x6B):
        config_write(machine, LPC, offset, 0x05, 1)
    interrupt(machine, 2, True)
    interrupt(machine, 3, True)
    assert machine.irqs.high == {5, 22, 23}
    interrupt(machine, 2, False)
    assert machine.irqs.high == {5, 23}, "another PIRQ holds the line"
    config_write(machine, LPC, 0x6B, 0x80, 1)
    assert machine.irqs.high == {5, 23}, "a route that is written moves nothing by itself"


def test_an_isa_line_is_left_when_its_route_is_off() -> None:
    machine = with_edu(2)
    config_write(machine, LPC, 0x6A, 0x15, 1)
    interrupt(machine, 2, True)
    assert machine.irqs.high == {5, 22}
    config_write(machine, LPC, 0x6A, 0x85, 1)
    interrupt(machine, 2, False)
    assert not machine.irqs.high


def test_slots_share_a_pirq() -> None:
    machine = with_edu(2, 6)
    for slot in (2, 6):
        interrupt(machine, slot, True)
    interrupt(machine, 2, False)
    assert machine.irqs.high == {22}
    interrupt(machine, 6, False)
    assert not machine.irqs.high and machine.irqs.raised[22] == 1


def test_the_chipset_configuration_routes_pins() -> None:
    machine = with_edu(0x1D)
    config_write(machine, LPC, 0xF0, 0xFED1C001)
    assert machine.mmio_read(0xFED1F140, 4) == 0x3210 and machine.mmio_read(0xFED1F144, 4) == 0x32103210
    machine.mmio_write(0xFED1F144, 2, 0x3216)
    interrupt(machine, 0x1D, True)
    assert machine.irqs.high == {22}
    machine.reset()
    config_write(machine, LPC, 0xF0, 0xFED1C001)
    assert machine.mmio_read(0xFED1F144, 2) == 0x3210 and not machine.irqs.high


# -- messages


@pytest.mark.parametrize(("address", "data"), [(0xFEE00000, 0x31), (0xFEE0100C, 0x4041)])
def test_a_message_is_counted_by_its_vector(address: int, data: int) -> None:
    machine = q35()
    machine.mmio_write(address, 4, data)
    machine.mmio_write(address, 2, data)
    assert list(machine.messages.arrived) == [Message(address, data)]
    assert machine.irqs.raised == {0x100 + (data & 0xFF): 1}


def test_the_message_window_reads_ones() -> None:
    machine = q35()
    assert [machine.mmio_read(0xFEE00030, size) for size in (1, 4, 8)] == [0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF]


# -- I/O APIC


@pytest.mark.parametrize(
    ("select", "reset", "ones", "zeros"),
    [
        (0x00, 0, 0x0F000000, 0),
        (0x01, 0x170020, 0x170020, 0x170020),
        (0x02, 0, 0, 0),
        (0x10, 0x10000, 0xFFFFAFFF, 0),
        (0x11, 0, 0xFFFFFFFF, 0),
        (0x3E, 0x10000, 0xFFFFAFFF, 0),
        (0x3F, 0, 0xFFFFFFFF, 0),
        (0x40, 0, 0, 0),
    ],
)
def test_ioapic_registers(select: int, reset: int, ones: int, zeros: int) -> None:
    machine = q35()
    machine.mmio_write(IOAPIC, 4, select)
    found = [machine.mmio_read(WINDOW, 4)]
    for value in (0xFFFFFFFF, 0):
        machine.mmio_write(WINDOW, 4, value)
        found.append(machine.mmio_read(WINDOW, 4))
    assert found == [reset, ones, zeros]


def test_ioapic_access_sizes() -> None:
    machine = q35()
    machine.mmio_write(IOAPIC, 2, 0x0201)
    assert machine.mmio_read(IOAPIC, 1) == 1 and machine.mmio_read(WINDOW, 4) == 0x170020
    assert [machine.mmio_read(WINDOW, 1), machine.mmio_read(WINDOW, 2), machine.mmio_read(WINDOW + 4, 4)] == [0, 0, 0]
    machine.mmio_write(IOAPIC, 4, 0xFFFFFF12)
    machine.mmio_write(WINDOW, 2, 0x77)
    assert machine.mmio_read(IOAPIC, 4) == 0x12 and machine.mmio_read(WINDOW, 4) == 0x10000


def test_an_edge_is_a_message_unless_masked() -> None:
    machine = q35()
    machine.set_gsi(4, True)
    machine.set_gsi(4, False)
    assert not machine.messages.arrived
    rte(machine, 4, 0x03 << 56 | 1 << 11 | 0x130)
    machine.set_gsi(4, True)
    machine.set_gsi(4, True)
    machine.set_gsi(4, False)
    assert list(machine.messages.arrived) == [Message(0xFEE03004, 0x130)]


def test_a_level_is_a_message_until_it_is_acknowledged() -> None:
    machine = q35()
    rte(machine, 20, LEVEL | 0x51)
    machine.set_gsi(20, True)
    rte(machine, 20, LEVEL | 0x51)
    assert len(machine.messages.arrived) == 1 and read_rte(machine, 20) == LEVEL | 1 << 14 | 0x51
    machine.mmio_write(EOI, 4, 0x50)
    assert len(machine.messages.arrived) == 1
    machine.mmio_write(EOI, 4, 0x51)
    assert len(machine.messages.arrived) == 2, "it is still up"
    machine.set_gsi(20, False)
    machine.mmio_write(EOI, 4, 0x51)
    assert len(machine.messages.arrived) == 2 and read_rte(machine, 20) == LEVEL | 0x51


def test_isa_interrupt_0_is_pin_2() -> None:
    machine = q35()
    rte(machine, 0, 0x40)
    rte(machine, 2, 0x42)
    machine.set_gsi(0, True)
    assert list(machine.messages.arrived) == [Message(0xFEE00000, 0x42)]


def test_a_remappable_entry_keeps_its_handle() -> None:
    machine = q35()
    handle = 0x8123
    rte(machine, 2, (handle & 0x7FFF) << 49 | 1 << 48 | (handle >> 15) << 11 | 0x22)
    machine.set_gsi(2, True)
    assert list(machine.messages.arrived) == [Message(0xFEE00000 | 0x123 << 5 | 1 << 4 | 1 << 2, 0x22)]
