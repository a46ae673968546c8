"""A q35 machine's state goes to another: whatever a driver set up works on there."""

from __future__ import annotations

import pytest

from tests.guest_drivers.vtd_rig import DATA, EDU, TESTDEV, WIDE_EDU, Rig
from tests.machine.q35_boards import AHCI, LPC, MCH, config_read, config_write, ram_block
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.devices.iommu_testdev.regs import RESULT_DMA_FAILED, RESULT_OK
from vfio_model.errors import VMStateError
from vfio_model.guest_drivers.iommu_testdev import IommuTestdevDriver
from vfio_model.guest_drivers.pc import EcamConfig, mmio_window
from vfio_model.guest_drivers.pci import enable_msi
from vfio_model.guest_drivers.pci_bridges import BusTree
from vfio_model.guest_drivers.vtd_interrupts import remappable_message
from vfio_model.guest_drivers.vtd_tables import Stage
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import FaultReason
from vfio_model.machine.migration import load_device_state, save_device_state
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.bridges import PcieRootPort

IOVA = 0x4000_0000


def bare(options: VtdOptions | None) -> Q35Machine:
    made = Q35Machine([ram_block()], Q35Options(iommu=options))
    made.root_bus.plug(EduDevice, EDU, **WIDE_EDU)
    made.root_bus.plug(IOMMUTestDevice, TESTDEV)
    return made


def moved(source: Q35Machine, target: Q35Machine) -> Q35Machine:
    """``target`` with the memory and the state of ``source``."""
    target.ram[0].view[:] = source.ram[0].view
    load_device_state(target, save_device_state(source))
    return target


@pytest.mark.parametrize(
    ("options", "queued"),
    [
        (VtdOptions(), True),
        (VtdOptions(), False),
        (VtdOptions(scalable_mode=True), True),
        (VtdOptions(scalable_mode=True, fsts=True), True),
    ],
)
def test_translation_invalidation_and_faults_go_on(options: VtdOptions, queued: bool) -> None:
    rig = Rig(options, queued, options.scalable_mode)
    domain = rig.vtd.domain(Stage.FIRST if options.fsts else Stage.SECOND)
    rig.vtd.attach(domain, TESTDEV)
    rig.vtd.map(domain, IOVA, DATA, 0x2000)
    assert rig.testdev.run(IOVA, DATA) == RESULT_OK
    rig.edu.load(IOVA, 8)
    rig.cpu.move(moved(rig.machine, bare(options)))
    assert [fault.sid for fault in rig.vtd.faults()] == [EDU]
    assert rig.testdev.run(IOVA + 0x1000, DATA + 0x1000) == RESULT_OK
    rig.vtd.unmap(domain, IOVA + 0x1000, 0x1000)
    assert rig.testdev.run(IOVA + 0x1000, DATA + 0x1000) == RESULT_DMA_FAILED
    assert [fault.sid for fault in rig.vtd.faults()] == [TESTDEV]
    assert rig.testdev.run(IOVA, DATA) == RESULT_OK


def test_interrupt_remapping_goes_on() -> None:
    rig = Rig()
    table = rig.vtd.remap_interrupts()
    index = table.allocate(EDU, 0x62)
    enable_msi(rig.config, EDU, *remappable_message(index))
    machine = moved(rig.machine, bare(VtdOptions()))
    rig.cpu.move(machine)
    irq_raise = rig.bar(0x1234, 0x11E8) + edu.IRQ_RAISE
    machine.mmio_write(irq_raise, 4, 1)
    table.free(index)
    machine.mmio_write(irq_raise, 4, 1)
    assert [message.vector for message in machine.messages.arrived] == [0x62]
    assert [fault.reason for fault in rig.vtd.faults()] == [FaultReason.IR_ENTRY_NOT_PRESENT]


def test_chipset_and_ports() -> None:
    source = bare(None)
    config_write(source, MCH, 0x60, 0xB000_0001)
    config_write(source, MCH, 0x91, 0x33, 1)
    config_write(source, MCH, 0x9D, 0x1A, 1)
    config_write(source, LPC, 0xF0, 0xFED1C001)
    config_write(source, LPC, 0x6A, 0x05, 1)
    config_write(source, AHCI, 0x24, 0xFE00_0000)
    source.mmio_write(0xFED1F144, 2, 0x3216)
    source.mmio_write(0xC3FF8, 4, 7)
    source.port_write(0xCF9, 1, 0x0A)
    source.port_write(0xCF8, 4, 0x8000F860)
    target = moved(source, bare(None))
    assert (target.port_read(0xCF8, 4), target.port_read(0xCF9, 1)) == (0x8000F860, 0x0A)
    assert target.mmio_read(0xB000_0000, 4) == 0x29C08086
    assert target.mmio_read(0xFED1F144, 2) == 0x3216 and target.mmio_read(0xC3FF8, 4) == 7
    assert config_read(target, AHCI, 0x24) == 0xFE00_0000 and config_read(target, MCH, 0x9D, 1) == 0x1A


def test_interrupts_that_are_up() -> None:
    source = bare(None)
    config_write(source, EDU, 0x10, 0xFE00_0000)
    config_write(source, EDU, 4, 6, 2)
    config_write(source, LPC, 0x6A, 0x05, 1)
    source.mmio_write(0xFEC00000, 4, 0x10 + 2 * 22)
    source.mmio_write(0xFEC00010, 4, 0x8041)
    source.mmio_write(0xFE00_0060, 4, 1)
    target = moved(source, bare(None))
    assert target.irqs.high == {5, 22} and target.irqs.raised == source.irqs.raised
    assert target.mmio_read(0xFEC00010, 4) == 0xC041 and not target.messages.arrived
    target.mmio_write(0xFE00_0064, 4, 1)
    assert not target.irqs.high


def test_bridges() -> None:
    def made() -> Q35Machine:
        machine = Q35Machine([ram_block()], Q35Options(iommu=VtdOptions()))
        port = machine.root_bus.plug(PcieRootPort, 0x20, id="rp0", chassis=1, slot=1)
        assert isinstance(port, PCIBridge)
        port.secondary.plug(IOMMUTestDevice, 0)
        return machine

    source = made()
    config_write(source, MCH, 0x60, 0xB000_0001)
    found = BusTree(lambda number: EcamConfig(source, number), mmio_window()).bring_up()
    bar = next(each.bars[0].address for each in found if each.device_id == 5)
    target = moved(source, made())
    assert target.bus_numbered(1) is target.buses["rp0"]
    assert IommuTestdevDriver(target, bar).run(DATA, DATA) == RESULT_OK


def test_another_unit_does_not_take_it() -> None:
    state = save_device_state(bare(VtdOptions()))
    with pytest.raises(VMStateError, match="CAP"):
        load_device_state(bare(VtdOptions(caching_mode=True)), state)
    with pytest.raises(VMStateError, match="no such object"):
        load_device_state(bare(None), state)
