"""A host with one open device and the path that the device's DMA takes, for the tests beside it."""

from __future__ import annotations

from collections.abc import Callable

from vfio_model.host.dma import AssignedImpl
from vfio_model.host.group import HostDevice
from vfio_model.host.host import Host
from vfio_model.host.hpa import Placement
from vfio_model.host.segments import Segments
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.lane import LANES_SIZE, Lane, LaneArea, init_lanes
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva
from vfio_model.uapi.vfio import IommuType
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup

MIB = 1 << 20
HVA = 0x7F00_0000_0000
DEVICE = "0000:01:00.0"


class Rig:
    """``blocks`` RAM blocks of 4 MiB each, registered; one window of 4 KiB pages at 0 in place of the default one."""

    def __init__(
        self,
        *,
        hpa: Placement = "contiguous",
        blocks: int = 1,
        levels: int = 1,
        window: int = 64 * MIB,
        memlock: int | None = None,
    ) -> None:
        self.host = Host(
            HostTopology(groups=(GroupSpec(26, (DeviceSpec(DEVICE, "edu"),)),), hpa=hpa, domain_bytes=16 * MIB)
        )
        words = memoryview(bytearray(LANES_SIZE)).cast("Q")
        init_lanes(words)
        self.lane, area = Lane(words, 0), LaneArea(DEVICE, words)
        self.idle: Callable[[], None] = lambda: None
        self.waited_for: list[list[str]] = []

        def lanes(names: object) -> list[LaneArea]:
            self.waited_for.append(list(names))  # type: ignore[call-overload]
            return [area] * bool(self.waited_for[-1])

        mm = self.host.create_mm(memlock, "guest")
        self.port = DirectPort(self.host, mm, lanes=lanes, idle=lambda: self.idle())
        self.mm = mm
        self.blocks = [
            RAMBlock(f"ram{n}", bytearray(4 * MIB), page_size=0x1_0000, hva=Hva(HVA + n * 8 * MIB))
            for n in range(blocks)
        ]
        self.container = SpaprContainer(self.port, self.port.open("/dev/vfio/vfio"))
        self.group = VfioGroup(self.port, self.port.open("/dev/vfio/26"))
        self.group.set_container(self.container.handle)
        self.container.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)
        for block in self.blocks:
            self.port.declare_memory(block)
            self.container.register_memory(block.hva, block.size)
        self.container.tce_remove(0)
        self.container.tce_create(12, window, levels)
        self.token = self.group.get_device_fd(DEVICE)
        self.device: HostDevice = self.host.device(DEVICE)

    @property
    def ram(self) -> memoryview:
        return self.blocks[0].view

    def domain(self) -> memoryview:
        container = self.host.groups[26].container
        assert container is not None and container.driver is not None
        return container.driver.domain_words

    def impl(
        self,
        gate: Callable[[], None] | None = None,
        *,
        segments: Segments | None = None,
        on_unknown_hpa: Callable[[], None] = lambda: None,
    ) -> AssignedImpl:
        """The device's path; read-only views, as a device process has them."""
        pe, domain = self.device.pe.words.toreadonly(), self.domain().toreadonly()
        return AssignedImpl(
            pe,
            domain,
            self.port.segments if segments is None else segments,
            self.lane,
            gate,
            on_unknown_hpa=on_unknown_hpa,
        )

    def map(self, iova: int, offset: int, size: int = 4096, flags: int = 3, block: int = 0) -> None:
        self.container.map_dma(iova, self.blocks[block].hva + offset, size, flags)
