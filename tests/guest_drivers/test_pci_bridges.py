"""Firmware on a q35 machine with a tree of buses, and DMA from behind bridges through the VT-d unit."""

from __future__ import annotations

from tests.machine.q35_boards import ram_block
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.devices.iommu_testdev.regs import RESULT_DMA_FAILED, RESULT_OK
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.iommu_testdev import IommuTestdevDriver
from vfio_model.guest_drivers.pc import EcamConfig, enable_ecam, mmio_window
from vfio_model.guest_drivers.pci_bridges import BusTree
from vfio_model.guest_drivers.vtd import VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.bridges import PciePciBridge, PcieRootPort
from vfio_model.pci.bus import PCIBus

IOVA, DATA = 0x4000_0000, 0x100_0000


def machine(**options: object) -> Q35Machine:
    made = Q35Machine([ram_block()], Q35Options(iommu=VtdOptions(**options)))  # type: ignore[arg-type]
    enable_ecam(made)
    return made


def below(bus: PCIBus, kind: type[PCIBridge], devfn: int, name: str, **props: object) -> PCIBus:
    bridge = bus.plug(kind, devfn, id=name, **props)
    assert isinstance(bridge, PCIBridge)
    return bridge.secondary


def tree(machine: Q35Machine) -> BusTree:
    return BusTree(lambda number: EcamConfig(machine, number), mmio_window())


def test_buses_are_numbered_depth_first() -> None:
    pc = machine()
    port = below(pc.root_bus, PcieRootPort, 0x20, "rp0", chassis=1, slot=1)
    conventional = below(port, PciePciBridge, 0, "br0")
    conventional.plug(IOMMUTestDevice, 0x28)
    other = below(pc.root_bus, PcieRootPort, 0x28, "rp1", chassis=2, slot=2)
    other.plug(EduDevice, 0)
    found = {(each.bus, each.devfn): each for each in tree(pc).bring_up()}
    assert [pc.buses[name].number for name in ("pcie.0", "rp0", "br0", "rp1")] == [0, 1, 2, 3]
    assert {(2, 0x28), (3, 0), (1, 0), (0, 0x20), (0, 0x28), (0, 0)} <= set(found)
    testdev = IommuTestdevDriver(pc, found[2, 0x28].bars[0].address)
    assert EduDriver(pc, found[3, 0].bars[0].address).invert(1) == 0xFFFFFFFE
    assert testdev.run(DATA, DATA) == RESULT_OK
    pc.reset()
    assert pc.bus_numbered(2) is None


def test_dma_from_behind_a_bridge_has_its_requester_id() -> None:
    pc = machine()
    port = below(pc.root_bus, PcieRootPort, 0x20, "rp0", chassis=1, slot=1)
    conventional = below(port, PciePciBridge, 0, "br0")
    conventional.plug(IOMMUTestDevice, 0x28)
    found = {(each.bus, each.devfn): each for each in tree(pc).bring_up()}
    testdev = IommuTestdevDriver(pc, found[2, 0x28].bars[0].address)
    vtd = VtdDriver(pc, PageAllocator(pc, 0x10_0000, 0x80_0000))
    vtd.start()
    domain = vtd.domain()
    vtd.map(domain, IOVA, DATA, 4096)
    assert testdev.run(IOVA, DATA) == RESULT_DMA_FAILED
    assert [fault.sid for fault in vtd.faults()] == [0x0200]
    vtd.attach(domain, 0x0200)
    assert testdev.run(IOVA, DATA) == RESULT_OK
