"""A PCI Express root bus in a machine without a CPU, and a guest that numbers buses and opens windows."""

from __future__ import annotations

from vfio_model.clock import VirtualClock
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.bridge import PCIBridge
from vfio_model.pci.bridges import BRIDGES
from vfio_model.pci.bus import BusOptions, PCIBus, Window
from vfio_model.pci.device import PARENT, PCIDevice
from vfio_model.pci.expander import PxbPcie
from vfio_model.pci.express import ExpressSpec
from vfio_model.pci.iommu_ops import PCIIOMMUOps, RequesterBus
from vfio_model.pci.requester import requester_id
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace
from vfio_model.vmstate.fields import VMStateDescription

RAM_SIZE = 1 << 20
SLOT = 4 << 3
"""Where the first bridge of a test is."""


class Endpoint(PCIDevice):
    """A register, an I/O port and a pin; conventional."""

    VENDOR_ID, DEVICE_ID = 0x1234, 1
    INTERRUPT_PIN = 1
    BARS = (BarSpec(0, 0x1000), BarSpec(2, 0x1000, BarType.MEM64, prefetch=True), BarSpec(4, 32, BarType.IO))
    VMSTATE = VMStateDescription("endpoint", 1, (PARENT,))
    value = 0

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        """What was written last."""
        return self.value & (1 << 8 * size) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        """Keep it."""
        self.value = value
        return MemTxResult.OK


class ExpressEndpoint(Endpoint):
    """The same, PCI Express."""

    EXPRESS = ExpressSpec(flr=True)


class Ops(PCIIOMMUOps):
    """An address space per requester; each is asked for once in its life."""

    def __init__(self) -> None:
        self.spaces: dict[tuple[int, int], AddressSpace] = {}
        self.asked: list[tuple[RequesterBus, int]] = []

    def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
        """See :class:`PCIIOMMUOps`."""
        self.asked.append((bus, devfn))
        root = MemoryRegion("empty", 1 << 64)
        return self.spaces.setdefault((id(bus), devfn), AddressSpace(f"{bus.name} {devfn:02x}", root))

    @property
    def requester_ids(self) -> list[int]:
        """Of all who were asked for, with the bus numbers of now."""
        return [requester_id(bus, devfn) for bus, devfn in self.asked]


class Board:
    """The machine: ``root`` is its bus."""

    def __init__(self, *, ops: PCIIOMMUOps | None = None, bypass_iommu: bool = False, gate: bool = True) -> None:
        self.ram = bytearray(RAM_SIZE)
        system = MemoryRegion("system", 1 << 64)
        system.add_subregion(0, RAMRegion("ram", RAMBlock("ram", self.ram, page_size=0x1000, hva=Hva(0x7F0000000000))))
        memory, io = MemoryRegion("pci", 1 << 64), MemoryRegion("io", 0x10000)
        system.add_subregion(0, memory, priority=-1)
        self.space, self.ports = AddressSpace("system", system), AddressSpace("io", io)
        self.pins: list[tuple[int, int, bool]] = []
        options = BusOptions(intx=lambda *change: self.pins.append(change), bridges_gate_dma=gate)
        self.trace = ListTrace()
        self.root = PCIBus(
            "pcie.0",
            memory=Window(memory),
            io=Window(io),
            system=self.space,
            clock=VirtualClock(),
            options=options,
            trace=self.trace,
            express=True,
            bypass_iommu=bypass_iommu,
        )
        if ops is not None:
            self.root.setup_iommu(ops)

    def bridge(self, model: str, bus: PCIBus | None = None, devfn: int = SLOT, **props: object) -> PCIBridge:
        """Plug one of :data:`BRIDGES`."""
        made = (bus or self.root).plug(BRIDGES[model], devfn, **props)
        assert isinstance(made, PCIBridge)
        return made

    def expander(self, devfn: int = SLOT, **props: object) -> PxbPcie:
        """Plug an expander."""
        return self.root.plug(PxbPcie, devfn, **props)

    # -- the guest ---------------------------------------------------------------------------------------------------

    def read(self, bus: int, devfn: int, offset: int, size: int = 4) -> int:
        """A configuration read by numbers."""
        found = self.root.find(bus)
        return (1 << 8 * size) - 1 if found is None else found.config_read(devfn, offset, size)

    def write(self, bus: int, devfn: int, offset: int, value: int, size: int = 4) -> None:
        """A configuration write by numbers."""
        found = self.root.find(bus)
        if found is not None:
            found.config_write(devfn, offset, size, value)

    def mmio(self, address: int) -> int | None:
        """A dword of memory, as the CPU sees it; None where nothing decodes."""
        out = bytearray(4)
        return None if self.space.read(address, out) else int.from_bytes(out, "little")

    def port(self, address: int) -> int | None:
        """The same of I/O space."""
        out = bytearray(4)
        return None if self.ports.read(address, out) else int.from_bytes(out, "little")


def number(bridge: PCIBridge, secondary: int, subordinate: int | None = None) -> None:
    """Give the bus behind ``bridge`` its number, and the last below it."""
    last = secondary if subordinate is None else subordinate
    bridge.config_write(0x18, 4, bridge.bus.number | secondary << 8 | last << 16)


def command(device: PCIDevice, value: int) -> None:
    """1: I/O, 2: memory, 4: bus master."""
    device.config_write(4, 2, value)


def open_memory(bridge: PCIBridge, first: int, last: int) -> None:
    """The window from ``first`` to ``last``, in units of 1 MiB."""
    bridge.config_write(0x20, 4, first >> 16 & 0xFFF0 | (last >> 16 & 0xFFF0) << 16)
