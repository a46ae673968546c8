"""What surrounds a device in a unit test: RAM behind an address space, a clock, and a list of what it signalled."""

from __future__ import annotations

from vfio_model.clock import VirtualClock
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.pci.device import PCIDevice
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace

RAM_SIZE = 1 << 20


class Host:
    def __init__(self) -> None:
        self.clock, self.trace = VirtualClock(), ListTrace()
        self.signals: list[str] = []

    def set_intx(self, level: bool) -> None:
        self.signals.append("raise" if level else "lower")

    def msi(self, vector: int) -> None:
        self.signals.append(f"msi {vector}")


class Bench:
    """A device on a bench, bus mastering on; ``HOST`` is what surrounds it."""

    HOST: type[Host] = Host

    def __init__(self, device_class: type[PCIDevice], **props: object) -> None:
        self.host = self.HOST()
        self.ram = bytearray(RAM_SIZE)
        root = MemoryRegion("system", 1 << 64)
        root.add_subregion(0, RAMRegion("ram", RAMBlock("ram", self.ram, page_size=0x1000, hva=Hva(0x7F0000000000))))
        self.space = AddressSpace("system", root)
        self.device = device_class(self.host, **props)
        self.device.attach_dma(self.space)
        self.device.system.bind(self.space)
        self.device.realize()
        self.device.config_write(4, 2, 4)

    def read(self, offset: int, size: int = 4) -> int:
        value = self.device.bar_read(0, offset, size)
        assert value is not None
        return value

    def write(self, offset: int, value: int, size: int = 4) -> None:
        assert not self.device.bar_write(0, offset, size, value)

    def enable_msi(self) -> None:
        assert self.device.msi is not None
        self.device.config_write(self.device.msi.offset + 2, 2, 1)
