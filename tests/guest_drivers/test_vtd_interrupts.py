"""Interrupt remapping as a driver sets it up on a q35 machine: messages of devices, pins of the I/O APIC."""

from __future__ import annotations

import pytest

from tests.guest_drivers.vtd_rig import DATA, EDU, TESTDEV, Rig
from vfio_model.devices.edu import regs as edu
from vfio_model.guest_drivers.pci import DriverError, enable_msi
from vfio_model.guest_drivers.vtd_interrupts import remappable_message, remappable_pin
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import FaultReason
from vfio_model.machine.q35.ioapic import SELECT, TABLE, WINDOW
from vfio_model.machine.q35.regs import IOAPIC_BASE, IOAPIC_SID

PIN = 22
"""That of edu: slot 2, INTA."""


def rte(rig: Rig, pin: int, entry: int) -> None:
    for half in (1, 0):
        rig.machine.mmio_write(IOAPIC_BASE + SELECT, 4, TABLE + 2 * pin + half)
        rig.machine.mmio_write(IOAPIC_BASE + WINDOW, 4, entry >> 32 * half & 0xFFFFFFFF)


def raise_edu(rig: Rig) -> None:
    bar = rig.bar(0x1234, 0x11E8)
    rig.machine.mmio_write(bar + edu.IRQ_RAISE, 4, 1)
    rig.edu.interrupts()


def vectors(rig: Rig) -> list[int]:
    return [message.vector for message in rig.machine.messages.arrived]


def test_messages_in_compatibility_format_pass() -> None:
    rig = Rig()
    enable_msi(rig.config, EDU, 0xFEE0_1000, 0x41)
    raise_edu(rig)
    assert [*rig.machine.messages.arrived] == [(0xFEE0_1000, 0x41)]


def test_a_device_interrupts_by_its_entry_and_no_other() -> None:
    rig = Rig()
    table = rig.vtd.remap_interrupts()
    theirs, mine = table.allocate(TESTDEV, 0x61), table.allocate(EDU, 0x62, destination=2)
    enable_msi(rig.config, EDU, *remappable_message(mine))
    raise_edu(rig)
    assert vectors(rig) == [0x62] and rig.machine.messages.arrived[-1].address >> 12 & 0xFF == 2
    assert rig.machine.irqs.raised[0x100 + 0x62] == 1
    enable_msi(rig.config, EDU, *remappable_message(theirs))
    raise_edu(rig)
    table.free(mine)
    enable_msi(rig.config, EDU, *remappable_message(mine))
    fault = rig.vtd.faults()
    raise_edu(rig)
    assert vectors(rig) == [0x62]
    reasons = [(each.reason, each.sid) for each in fault + rig.vtd.faults()]
    assert reasons == [(FaultReason.IR_SID_MISMATCH, EDU), (FaultReason.IR_ENTRY_NOT_PRESENT, EDU)]


def test_pins_go_through_their_entries() -> None:
    rig = Rig()
    table = rig.vtd.remap_interrupts()
    index = table.allocate(IOAPIC_SID, 0x71, level=True)
    rte(rig, PIN, remappable_pin(index, 0x71, level=True))
    raise_edu(rig)
    assert vectors(rig) == [0x71]
    table.free(index)
    rig.machine.ioapic.end_of_interrupt(0x71)
    raise_edu(rig)
    assert vectors(rig) == [0x71]
    assert [(each.reason, each.sid) for each in rig.vtd.faults()] == [(FaultReason.IR_ENTRY_NOT_PRESENT, IOAPIC_SID)]


@pytest.mark.parametrize(("quirks", "passes"), [((), False), (("platform-without-source",), True)])
def test_pins_have_the_io_apics_source_id_but_by_quirk(quirks: tuple[str, ...], passes: bool) -> None:
    rig = Rig(VtdOptions(quirks=frozenset(quirks)))
    table = rig.vtd.remap_interrupts()
    index = table.allocate(EDU, 0x71, level=True)
    rte(rig, PIN, remappable_pin(index, 0x71, level=True))
    raise_edu(rig)
    table.free(index)
    rig.machine.ioapic.end_of_interrupt(0x71)
    raise_edu(rig)
    wrong = (FaultReason.IR_SID_MISMATCH, IOAPIC_SID)
    assert vectors(rig) == ([0x71] if passes else [])
    found = [(each.reason, each.sid) for each in rig.vtd.faults()]
    assert found == [(FaultReason.IR_ENTRY_NOT_PRESENT, 0xFFFF) if passes else wrong]


def test_the_table_has_an_end() -> None:
    rig = Rig()
    table = rig.vtd.remap_interrupts()
    for _ in range(table.ENTRIES):
        table.allocate(EDU, 0x30)
    with pytest.raises(DriverError, match="no interrupt remapping entry"):
        table.allocate(EDU, 0x30)


def test_registers_alone_cannot_remap() -> None:
    with pytest.raises(DriverError, match="and its queue"):
        Rig(queued=False).vtd.remap_interrupts()


def test_dma_into_the_message_window_is_an_interrupt_not_a_translation() -> None:
    rig = Rig()
    domain = rig.vtd.domain()
    rig.vtd.map(domain, 0xFEE0_0000, DATA, 4096)
    rig.vtd.attach(domain, EDU)
    rig.machine.mmio_write(DATA, 4, 0x39)
    rig.edu.load(DATA, 4)
    rig.edu.store(0xFEE0_0000, 4)
    assert rig.machine.mmio_read(DATA, 4) == 0x39 and len(rig.machine.messages.arrived) == 1
