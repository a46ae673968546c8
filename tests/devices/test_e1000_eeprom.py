"""The e1000's EEPROM, read by EERD and driven bit by bit as a 93C46 is."""

from __future__ import annotations

import pytest

from tests.devices.e1000_driver import Nic
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.eeprom import WORDS, Eecd

READ, WRITE, ERASE, EXTENDED = 0b110, 0b101, 0b111, 0b100


@pytest.fixture
def nic() -> Nic:
    return Nic()


class Microwire:
    """The bus, driven through EECD."""

    def __init__(self, nic: Nic) -> None:
        self.nic = nic

    def select(self) -> None:
        self.nic.write(regs.EECD, Eecd.REQ)
        self.nic.write(regs.EECD, Eecd.REQ | Eecd.CS)

    def deselect(self) -> None:
        self.nic.write(regs.EECD, Eecd.REQ)

    def put(self, value: int, bits: int) -> None:
        for place in reversed(range(bits)):
            lines = Eecd.REQ | Eecd.CS | (Eecd.DI if value >> place & 1 else 0)
            self.nic.write(regs.EECD, lines)
            self.nic.write(regs.EECD, lines | Eecd.SK)
            self.nic.write(regs.EECD, lines)

    def get(self, bits: int) -> int:
        value = 0
        for _ in range(bits):
            self.nic.write(regs.EECD, Eecd.REQ | Eecd.CS | Eecd.SK)
            value = value << 1 | bool(self.nic.read(regs.EECD) & Eecd.DO)
            self.nic.write(regs.EECD, Eecd.REQ | Eecd.CS)
        return value

    def read(self, address: int, words: int = 1) -> list[int]:
        self.select()
        self.put(READ, 3)
        self.put(address, 6)
        found = [self.get(16) for _ in range(words)]
        self.deselect()
        return found

    def command(self, opcode: int, address: int, data: int | None = None) -> None:
        self.select()
        self.put(opcode, 3)
        self.put(address, 6)
        if data is not None:
            self.put(data, 16)
        self.deselect()


@pytest.fixture
def bus(nic: Nic) -> Microwire:
    return Microwire(nic)


def eerd(nic: Nic, address: int) -> int:
    nic.write(regs.EERD, regs.EERD_START | address << 8)
    value = nic.read(regs.EERD)
    assert value & regs.EERD_DONE and not value & regs.EERD_START
    return value >> 16


def test_all_words_add_up(nic: Nic, bus: Microwire) -> None:
    words = bus.read(0, WORDS)
    assert sum(words) & 0xFFFF == 0xBABA
    assert words[:3] == [0x5452, 0x1200, 0x5634] and words[0x0B:0x0F] == [0x1100, 0x1AF4, 0x100E, 0x8086]
    assert [eerd(nic, address) for address in range(WORDS)] == words
    assert [bus.read(address)[0] for address in range(WORDS)] == words


def test_a_read_goes_on_at_the_first_word_after_the_last(bus: Microwire) -> None:
    assert bus.read(0x3F, 2)[1] == 0x5452


def test_the_bus_is_granted_and_the_eeprom_is_there(nic: Nic) -> None:
    assert nic.read(regs.EECD) & (Eecd.PRES | Eecd.GNT) == Eecd.PRES
    nic.write(regs.EECD, Eecd.REQ)
    assert nic.read(regs.EECD) & Eecd.GNT


def test_the_bit_before_the_first_is_zero(nic: Nic, bus: Microwire) -> None:
    bus.select()
    bus.put(READ, 3)
    bus.put(0x04, 6)
    assert not nic.read(regs.EECD) & Eecd.DO
    assert bus.get(16) == 0xFFFF


def test_nothing_is_written_unless_writing_is_enabled(bus: Microwire) -> None:
    bus.command(WRITE, 0x20, 0x1234)
    assert bus.read(0x20) == [0]
    bus.command(EXTENDED, 0x30)
    bus.command(WRITE, 0x20, 0x1234)
    assert bus.read(0x20) == [0x1234]
    bus.command(EXTENDED, 0x00)
    bus.command(WRITE, 0x20, 0x5678)
    bus.command(ERASE, 0x20)
    assert bus.read(0x20) == [0x1234]


def test_a_written_eeprom_is_ready_and_keeps_its_words_over_a_reset(nic: Nic, bus: Microwire) -> None:
    bus.command(EXTENDED, 0x30)
    bus.command(WRITE, 0x00, 0x0002)
    bus.select()
    assert nic.read(regs.EECD) & Eecd.DO
    bus.deselect()
    nic.device.reset()
    assert eerd(nic, 0) == 2 and nic.read(regs.RAL) == 0x12000002
    bus.command(WRITE, 0x00, 0x0004)
    assert eerd(nic, 0) == 2, "a reset disables writing"


def test_all_words_can_be_erased_and_written_at_once(bus: Microwire) -> None:
    bus.command(EXTENDED, 0x30)
    bus.command(EXTENDED, 0x20)
    assert set(bus.read(0, WORDS)) == {0xFFFF}
    bus.command(EXTENDED, 0x10, 0xA5A5)
    assert set(bus.read(0, WORDS)) == {0xA5A5}
    bus.command(ERASE, 0x07)
    assert bus.read(0x06, 3) == [0xA5A5, 0xFFFF, 0xA5A5]


def test_a_command_that_is_cut_short_does_nothing(bus: Microwire) -> None:
    bus.command(EXTENDED, 0x30)
    bus.select()
    bus.put(WRITE, 3)
    bus.put(0x20, 6)
    bus.put(0x12, 8)
    bus.deselect()
    assert bus.read(0x20) == [0]


def test_zeros_before_the_start_bit_count_for_nothing(bus: Microwire) -> None:
    bus.select()
    bus.put(0, 5)
    bus.put(READ, 3)
    bus.put(0x0D, 6)
    assert bus.get(16) == 0x100E
