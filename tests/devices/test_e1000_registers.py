"""Registers, interrupts, resets and the link of the e1000, as the manual has them."""

from __future__ import annotations

import pytest

from tests.devices.e1000_driver import MS, Nic
from vfio_model.devices.e1000 import regs
from vfio_model.devices.e1000.phy import NEGOTIATION_NS
from vfio_model.devices.e1000.regs import Ctrl, CtrlExt, Interrupt, Mdic, Status
from vfio_model.errors import ConfigError

LINK_UP = Status.LU | Status.FD | 0x280
"""1000 Mb/s, as negotiated and as detected."""


@pytest.fixture
def nic() -> Nic:
    return Nic()


def phy_read(nic: Nic, number: int, address: int = 1) -> int:
    nic.write(regs.MDIC, Mdic.READ | address << 21 | number << 16)
    return nic.read(regs.MDIC)


def phy_write(nic: Nic, number: int, value: int) -> int:
    nic.write(regs.MDIC, Mdic.WRITE | 1 << 21 | number << 16 | value)
    return nic.read(regs.MDIC)


def test_it_is_an_82540em_in_a_board_of_qemu(nic: Nic) -> None:
    identity = [nic.device.config_read(offset, 2) for offset in (0x00, 0x02, 0x0A, 0x2C, 0x2E)]
    assert identity == [0x8086, 0x100E, 0x0200, 0x1AF4, 0x1100]
    assert nic.device.config_read(0x3D, 1) == 1
    for offset in (0x10, 0x14):
        nic.device.config_write(offset, 4, 0xFFFFFFFF)
    assert nic.device.config_read(0x10, 4) == 0xFFFE0000 and nic.device.config_read(0x14, 4) == 0xFFFFFFC1


def test_the_address_of_the_property_is_in_the_first_receive_address(nic: Nic) -> None:
    assert (nic.read(regs.RAL), nic.read(regs.RAH)) == (0x12005452, 0x80005634)
    other = Nic(mac="02:00:00:00:00:fe")
    assert (other.read(regs.RAL), other.read(regs.RAH)) == (0x00000002, 0x8000FE00)


@pytest.mark.parametrize("mac", ["", "52:54:00:12:34", "52:54:00:12:34:5g", "52:54:00:12:34:56:78", "525400123456"])
def test_what_is_no_address_is_refused(mac: str) -> None:
    with pytest.raises(ConfigError, match=r"e1000\.mac"):
        Nic(mac=mac)


def test_every_register_reads_its_reset_value_and_holds_what_is_writable() -> None:
    acting = {"CTRL", "ICR", "ICS", "IMS", "IMC", "EECD", "EERD", "MDIC", "STATUS", "RAL", "RAH", "TCTL"}
    for register in regs.REGISTERS:
        if register.name in acting:
            continue
        nic = Nic()
        last = register.offsets()[-1]
        assert nic.read(last) == register.reset, register.name
        nic.write(last, 0xFFFFFFFF)
        kept = register.reset & ~register.clear_on_read
        assert nic.read(last) == register.writable | (kept & ~register.writable), register.name


@pytest.mark.parametrize("offset", [0x00004, 0x000CC, 0x05C00, 0x1FFFC])
def test_where_there_is_no_register_reads_are_zero_and_writes_are_lost(nic: Nic, offset: int) -> None:
    nic.write(offset, 0xFFFFFFFF)
    assert nic.read(offset) == 0


def test_accesses_of_other_sizes_touch_the_bytes_they_name(nic: Nic) -> None:
    nic.write(regs.RAL + 8, 0x1122334455667788, 8)
    assert (nic.read(regs.RAL + 8), nic.read(regs.RAH + 8)) == (0x55667788, 0x11223344 & 0x8003FFFF)
    nic.write(regs.RAL + 10, 0xBEEF, 2)
    assert nic.read(regs.RAL + 8) == 0xBEEF7788 and nic.read(regs.RAL + 9, 2) == 0xEF77
    assert nic.read(regs.RAL + 8, 8) & 0xFFFFFFFF == 0xBEEF7788


# -- I/O ports ---------------------------------------------------------------------------------------------------------


def test_the_io_window_reaches_every_register(nic: Nic) -> None:
    device = nic.device
    device.bar_write(1, regs.IOADDR, 4, regs.LEDCTL)
    device.bar_write(1, regs.IODATA, 4, 0x12345678)
    assert nic.read(regs.LEDCTL) == 0x12345678
    assert device.bar_read(1, regs.IOADDR, 4) == regs.LEDCTL
    assert device.bar_read(1, regs.IODATA, 4) == 0x12345678
    assert device.bar_read(1, regs.IODATA + 1, 2) == 0x3456
    device.bar_write(1, regs.IOADDR, 4, 0x20000)
    device.bar_write(1, regs.IODATA, 4, 1)
    assert device.bar_read(1, regs.IODATA, 4) == 0 and device.bar_read(1, 0x20, 4) == 0


def test_a_reset_through_the_io_window_is_a_reset(nic: Nic) -> None:
    nic.write(regs.LEDCTL, 1)
    nic.device.bar_write(1, regs.IOADDR, 4, regs.CTRL)
    nic.device.bar_write(1, regs.IODATA, 4, Ctrl.RST)
    assert nic.read(regs.LEDCTL) == 0x07068302


# -- interrupts --------------------------------------------------------------------------------------------------------


def test_a_cause_interrupts_when_it_is_not_masked_and_reading_acknowledges(nic: Nic) -> None:
    nic.write(regs.ICS, Interrupt.LSC)
    assert nic.host.signals == []
    nic.write(regs.IMS, Interrupt.LSC | Interrupt.RXT0)
    assert nic.host.signals == ["raise"] and nic.read(regs.IMS) == Interrupt.LSC | Interrupt.RXT0
    assert nic.read(regs.ICR) == Interrupt.LSC and nic.read(regs.ICR) == 0
    assert nic.host.signals == ["raise", "lower"]


def test_writing_ones_to_icr_clears_those_and_imc_masks(nic: Nic) -> None:
    nic.write(regs.IMS, 0xFFFFFFFF)
    nic.write(regs.ICS, Interrupt.LSC | Interrupt.TXDW)
    nic.write(regs.ICR, Interrupt.LSC)
    assert nic.device.intx_level
    nic.write(regs.IMC, Interrupt.TXDW)
    assert not nic.device.intx_level
    assert nic.read(regs.ICR) == Interrupt.TXDW and nic.read(regs.IMS) == regs.INTERRUPTS & ~Interrupt.TXDW


def test_the_throttle_keeps_interrupts_apart(nic: Nic) -> None:
    nic.write(regs.ITR, 1000)
    nic.write(regs.IMS, Interrupt.LSC)
    for _ in range(2):
        nic.write(regs.ICS, Interrupt.LSC)
        nic.read(regs.ICR)
    nic.write(regs.ICS, Interrupt.LSC)
    assert nic.host.signals == ["raise", "lower"]
    nic.idle(1000 * 256 - 1)
    assert nic.host.signals == ["raise", "lower"]
    nic.idle(1)
    assert nic.host.signals == ["raise", "lower", "raise"]


# -- the link ----------------------------------------------------------------------------------------------------------


def test_the_link_is_up_at_power_on_and_the_phy_says_what_it_is(nic: Nic) -> None:
    assert nic.read(regs.STATUS) == LINK_UP
    assert [phy_read(nic, number) & 0xFFFF for number in (2, 3)] == [0x0141, 0x0C20]
    assert phy_read(nic, 1) & 0x24 == 0x24 and phy_read(nic, 17) & 0xEC00 == 0xAC00
    assert phy_read(nic, 5) & 0xFFFF and phy_read(nic, 10) & 0x3000 == 0x3000


def test_a_phy_at_another_address_does_not_answer(nic: Nic) -> None:
    assert phy_read(nic, 2, address=2) & Mdic.ERROR
    assert not phy_read(nic, 2) & Mdic.ERROR
    nic.write(regs.MDIC, 1 << 21 | 2 << 16)
    assert nic.read(regs.MDIC) & (Mdic.READY | Mdic.ERROR) == Mdic.READY | Mdic.ERROR


def test_an_access_to_the_phy_may_interrupt(nic: Nic) -> None:
    nic.write(regs.IMS, Interrupt.MDAC)
    nic.write(regs.MDIC, Mdic.INTERRUPT | Mdic.READ | 1 << 21 | 2 << 16)
    assert nic.host.signals == ["raise"] and nic.read(regs.MDIC) & Mdic.READY


def test_restarting_negotiation_takes_the_link_down_for_its_time(nic: Nic) -> None:
    nic.write(regs.IMS, Interrupt.LSC)
    phy_write(nic, 0, 0x1340)
    assert not nic.read(regs.STATUS) & Status.LU and nic.read(regs.ICR) == Interrupt.LSC
    assert phy_read(nic, 1) & 0x24 == 0
    nic.idle(NEGOTIATION_NS - 1)
    assert not nic.read(regs.STATUS) & Status.LU
    nic.idle(1)
    assert nic.read(regs.ICR) == Interrupt.LSC and nic.read(regs.STATUS) == LINK_UP
    assert phy_read(nic, 1) & 0x04 == 0, "the fault is latched until it was read"
    assert phy_read(nic, 1) & 0x24 == 0x24


def test_what_is_advertised_is_what_the_link_runs_at(nic: Nic) -> None:
    phy_write(nic, 9, 0)
    phy_write(nic, 4, 0x0101)
    phy_write(nic, 0, 0x1340)
    nic.idle(NEGOTIATION_NS)
    assert nic.read(regs.STATUS) == Status.LU | Status.FD | 1 << 6 | 1 << 8
    phy_write(nic, 0, 0x8000)
    nic.idle(NEGOTIATION_NS)
    assert nic.read(regs.STATUS) == Status.LU


def test_a_phy_without_power_has_no_link_and_wakes_with_a_negotiation(nic: Nic) -> None:
    phy_write(nic, 0, 0x1940)
    nic.idle(2 * NEGOTIATION_NS)
    assert not nic.read(regs.STATUS) & Status.LU
    phy_write(nic, 0, 0x1140)
    nic.idle(NEGOTIATION_NS)
    assert nic.read(regs.STATUS) & Status.LU


def test_ctrl_resets_the_phy_and_looks_away_from_it(nic: Nic) -> None:
    phy_write(nic, 16, 0x1234)
    nic.write(regs.CTRL, Ctrl.PHY_RST | Ctrl.SLU)
    assert not nic.read(regs.STATUS) & Status.LU
    nic.write(regs.CTRL, Ctrl.SLU)
    nic.idle(NEGOTIATION_NS)
    assert nic.read(regs.STATUS) & Status.LU and phy_read(nic, 16) & 0xFFFF == 0x0068
    nic.write(regs.CTRL, 0)
    assert not nic.read(regs.STATUS) & Status.LU


def test_ctrl_may_force_what_status_shows(nic: Nic) -> None:
    nic.write(regs.CTRL, Ctrl.SLU | Ctrl.FRCSPD | Ctrl.FRCDPLX | 1 << 8)
    assert nic.read(regs.STATUS) == Status.LU | 1 << 6 | 2 << 8


# -- resets ------------------------------------------------------------------------------------------------------------


def test_a_reset_of_the_controller_leaves_phy_and_configuration_space(nic: Nic) -> None:
    phy_write(nic, 16, 0x1234)
    nic.up()
    nic.write(regs.IMS, Interrupt.LSC)
    nic.write(regs.ICS, Interrupt.LSC)
    nic.write(regs.RAL, 0)
    nic.write(regs.CTRL, Ctrl.RST)
    assert nic.host.signals == ["raise", "lower"]
    assert nic.read(regs.CTRL) == Ctrl.FD | Ctrl.SLU | Ctrl.SPEED_1000
    assert nic.read(regs.IMS) == nic.read(regs.ICR) == nic.read(regs.RCTL) == nic.read(regs.TDT) == 0
    assert nic.read(regs.RAL) == 0x12005452 and phy_read(nic, 16) & 0xFFFF == 0x1234
    assert nic.device.bus_master


def test_ee_rst_loads_the_address_again(nic: Nic) -> None:
    nic.write(regs.RAL, 0)
    nic.write(regs.LEDCTL, 1)
    nic.write(regs.CTRL_EXT, CtrlExt.EE_RST)
    assert nic.read(regs.RAL) == 0x12005452 and nic.read(regs.LEDCTL) == 1 and nic.read(regs.CTRL_EXT) == 0


def test_a_device_reset_stops_timers_and_puts_everything_back(nic: Nic) -> None:
    nic.up()
    nic.write(regs.IMS, Interrupt.LSC)
    phy_write(nic, 0, 0x1340)
    nic.device.reset()
    assert nic.read(regs.STATUS) == LINK_UP and nic.read(regs.IMS) == 0 and not nic.device.bus_master
    nic.idle(2 * NEGOTIATION_NS)
    assert nic.read(regs.ICR) == 0


def test_taking_the_device_out_closes_its_network_and_stops_its_timers(nic: Nic) -> None:
    phy_write(nic, 0, 0x1340)
    nic.device.unrealize()
    assert nic.wire.closed
    nic.idle(1000 * MS)
    assert not nic.read(regs.STATUS) & Status.LU
