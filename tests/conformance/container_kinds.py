"""The kinds of container that :mod:`tests.conformance.test_container` runs over, and a client of one of them.

Every kind maps pages of 4 KiB at bus addresses from 0 on. A :class:`Kind` is data: what it does that another does not.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from errno import errorcode

import pytest

from tests.conformance.adapters import Client, Running
from vfio_model.devices.dma_burst import regs
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.ram import RAMBlock
from vfio_model.uapi.containers import IOMMU_TYPES, ContainerKind
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, PciRegion
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup
from vfio_model.vfio.region import DeviceConnection

MIB, GIB = 1 << 20, 1 << 30
PAGE = 4096
RAM = 4 * MIB
HVA = 0x7F00_0000_0000
BEYOND = HVA + 1024 * GIB
"""Where no client has memory."""
TOP = (1 << 64) - PAGE
MAP, UNMAP = Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA
UNMAP_ALL = 2
GROUPS = (
    GroupSpec(26, (DeviceSpec("0000:01:00.0", "dma-burst"),)),
    GroupSpec(27, (DeviceSpec("0000:02:00.0", "dma-burst"),)),
    GroupSpec(31, iommu="none"),
    GroupSpec(33, viable=False),
)
DEVICES = {group.id: group.devices[0].name for group in GROUPS if group.devices}


@dataclass(frozen=True)
class Kind:
    """``last`` is the last bus address of a new container; ``overwrites``: a mapping replaces what is there, else it is
    refused; ``splits``: pages that were mapped at once can be unmapped one by one; ``locks_pages``: each mapping counts
    against the memlock limit; ``no_memory`` is the errno of mapping where the client has none.
    """

    name: ContainerKind
    topology: HostTopology
    last: int
    overwrites: bool
    splits: bool
    locks_pages: bool
    no_memory: str

    def errno(self, *, spapr: str, type1: str) -> str:
        """Which of two this kind gives."""
        return spapr if self.name.startswith("spapr") else type1


SPAPR = HostTopology(groups=GROUPS, containers=("spapr-v2", "spapr-v1"))
TYPE1 = HostTopology(groups=GROUPS, containers=("type1v2", "type1"), host_page_size=PAGE)
KINDS: dict[ContainerKind, Kind] = {
    kind.name: kind
    for kind in (
        Kind("spapr-v1", SPAPR, 2 * GIB - 1, True, True, False, "EFAULT"),
        Kind("spapr-v2", SPAPR, 2 * GIB - 1, True, True, False, "EINVAL"),
        Kind("type1v2", TYPE1, (1 << 64) - 1, False, False, True, "EFAULT"),
        Kind("type1", TYPE1, (1 << 64) - 1, False, False, True, "EFAULT"),
    )
}


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that ``call`` fails with."""
    with pytest.raises(OSError) as caught:
        call()
    return errorcode[caught.value.errno or 0]


class Device:
    """An open dma-burst, bus master."""

    def __init__(self, connection: DeviceConnection) -> None:
        self.connection = connection
        connection.region_write(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX, 4, struct.pack("<H", 6))

    def set(self, register: int, value: int) -> None:
        self.connection.region_write(PciRegion.VFIO_PCI_BAR0_REGION_INDEX, register, struct.pack("<Q", value))

    def get(self, register: int) -> int:
        found = self.connection.region_read(PciRegion.VFIO_PCI_BAR0_REGION_INDEX, register, 8)
        return int.from_bytes(found, "little")

    def run(self, iova: int, command: int, *, count: int = 1, stride: int = 0) -> int:
        """``count`` accesses of 8 bytes; how many succeeded."""
        for register, value in ((regs.IOVA, iova), (regs.LENGTH, 8), (regs.COUNT, count), (regs.STRIDE, stride)):
            self.set(register, value)
        self.set(regs.COMMAND, regs.COMMAND_START | command)
        return self.get(regs.COMPLETED)

    def write(self, iova: int, value: int = 0x1122334455667788) -> bool:
        """Whether 8 bytes could be written."""
        self.set(regs.PATTERN, value)
        return self.run(iova, regs.COMMAND_WRITE) == 1

    def read(self, iova: int) -> int | None:
        """8 bytes, None where they could not be read."""
        return self.get(regs.DATA) if self.run(iova, 0) else None


class World:
    """A container of ``kind`` around ``number`` that is ready to map ``ram``."""

    def __init__(self, running: Running, client: Client, kind: Kind, number: int = 26) -> None:
        self.running, self.client, self.kind, self.number = running, client, kind, number
        port = client.port
        self.container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
        self.group = VfioGroup(port, port.open(f"/dev/vfio/{number}"))
        self.group.set_container(self.container.handle)
        self.container.set_iommu(IOMMU_TYPES[kind.name])
        self.ram: RAMBlock

    def start(self, size: int = RAM) -> None:
        """What comes between SET_IOMMU and the first map."""
        if self.kind.name == "spapr-v1":
            self.container.enable()
        elif self.kind.name == "spapr-v2":
            self.container.register_memory(HVA, size)

    def open_group(self, number: int) -> VfioGroup:
        return VfioGroup(self.client.port, self.client.port.open(f"/dev/vfio/{number}"))

    def device(self) -> Device:
        return Device(self.client.port.take_device(self.group.get_device_fd(DEVICES[self.number])))

    def ioctl(self, cmd: int, arg: bytes) -> bytes:
        return self.client.port.ioctl(self.container.handle, cmd, arg)

    def map(self, iova: int, offset: int, size: int = PAGE, flags: int = 3) -> None:
        """``offset`` is from the start of ``ram``."""
        self.ioctl(MAP, DmaMap(32, flags, HVA + offset, iova, size).pack())

    def unmap(self, iova: int, size: int = PAGE, flags: int = 0) -> int:
        """What the struct says afterwards: of type 1, how many bytes were unmapped."""
        return DmaUnmap.unpack(self.ioctl(UNMAP, DmaUnmap(24, flags, iova, size).pack())).size

    def map_errno(self, iova: int, offset: int, size: int = PAGE, flags: int = 3) -> str:
        return errno_of(lambda: self.map(iova, offset, size, flags))

    def unmap_errno(self, iova: int, size: int = PAGE, flags: int = 0) -> str:
        return errno_of(lambda: self.unmap(iova, size, flags))

    def locked(self) -> int:
        return self.client.locked_vm()
