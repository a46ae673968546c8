"""The whole chain of a PC in one process: a q35 machine with VT-d in caching mode and its driver, containers of type 1
over the direct port, a host.
"""

from __future__ import annotations

from tests.guest_drivers.vtd_rig import MovableCpu
from tests.vfio.direct_chain import HVA, MIB, FaultyPort
from vfio_model.guest_drivers.vtd import Domain, VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator, Stage
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.host import Host
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.host.type1 import Type1Container
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine, Q35Options
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U64_MAX
from vfio_model.trace import ListTrace
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl
from vfio_model.vfio.address_space import ContainerOptions, VFIOAddressSpace
from vfio_model.vfio.direct import DirectPort

PAGE = 4096
RAM = 16 * MIB
TABLES, TABLES_END = MIB, 6 * MIB
DATA = 8 * MIB
NIC, DISK = 0x10, 0x18
GROUPS = {NIC: 26, DISK: 27}
DEVICES = {26: "0000:01:00.0", 27: "0000:02:00.0"}
RANGES = ((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1))
"""What a host of 48 bits can map: not where messages go."""
MODES = {
    "registers": (VtdOptions(caching_mode=True), False),
    "queue": (VtdOptions(caching_mode=True), True),
    "qemu": (VtdOptions(caching_mode=True, quirks=frozenset({"qemu"})), True),
    "scalable": (VtdOptions(caching_mode=True, scalable_mode=True), True),
    "async": (VtdOptions(caching_mode=True, invalidation="async"), True),
}
NO_CACHING = VtdOptions(), True
"""Nobody hears of new mappings."""


class RecordingPort(FaultyPort):
    """Keeps what MAP_DMA and UNMAP_DMA asked for."""

    def __init__(self, port: DirectPort) -> None:
        super().__init__(port)
        self.maps: list[tuple[str, int, int, int]] = []
        """("map" or "unmap", iova, size, offset in RAM) of what went through, in order."""

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        """See ``VfioPort``."""
        done = super().ioctl_many(handle, cmd, args, count)
        if cmd == Ioctl.VFIO_IOMMU_MAP_DMA:
            self.maps += [("map", iova, size, at - HVA) for _, _, at, iova, size in DmaMap.FORMAT.iter_unpack(args)]
        elif cmd == Ioctl.VFIO_IOMMU_UNMAP_DMA:
            self.maps += [("unmap", iova, size, 0) for _, _, iova, size in DmaUnmap.FORMAT.iter_unpack(args)]
        return done

    def take(self) -> list[tuple[str, int, int, int]]:
        """What was asked for since the last time."""
        maps, self.maps = self.maps, []
        return maps


class SteppingCpu(MovableCpu):
    """While it looks whether the queue has answered, the queue goes on."""

    def __init__(self, machine: Q35Machine) -> None:
        super().__init__(machine)
        self._machine = machine
        self.mmio_read = self._read  # type: ignore[method-assign]

    def _read(self, gpa: int, size: int) -> int:
        assert self._machine.iommu is not None
        self._machine.iommu.queue.step()
        return self._machine.mmio_read(gpa, size)


class VtdChain:
    """Two functions with a group each; the driver has started, and nobody is attached. ``memlock`` in bytes."""

    def __init__(
        self,
        mode: str = "queue",
        *,
        memlock: int | None = None,
        iova_ranges: tuple[tuple[int, int], ...] = RANGES,
    ) -> None:
        options, queued = MODES.get(mode, NO_CACHING)
        self.trace = ListTrace()
        self.ram = RAMBlock("ram", bytearray(RAM), page_size=2 * MIB, hva=HVA)
        self.machine = Q35Machine([self.ram], Q35Options(iommu=options), trace=self.trace)
        groups = tuple(GroupSpec(group, (DeviceSpec(name, "edu"),)) for group, name in DEVICES.items())
        topology = HostTopology(
            groups, host_page_size=PAGE, domain_bytes=16 * MIB, containers=("type1v2",), iova_ranges=iova_ranges
        )
        self.host = Host(topology)
        self.direct = DirectPort(self.host, self.host.create_mm(memlock, "guest"))
        self.port = RecordingPort(self.direct)
        self.port.declare_memory(self.ram)
        self.spaces: dict[int, VFIOAddressSpace] = {}
        cpu = SteppingCpu(self.machine) if options.invalidation == "async" else MovableCpu(self.machine)
        self.pages = PageAllocator(cpu, TABLES, TABLES_END)
        self.driver = VtdDriver(cpu, self.pages, queued=queued, scalable=options.scalable_mode)
        self.tokens: dict[int, int] = {}

    def plug(self, devfn: int = NIC) -> None:
        """What plugging an assigned function does at the host."""
        self.spaces[devfn] = VFIOAddressSpace(
            self.port,
            self.machine.system,
            self.machine.root_bus.iommu_address_space(devfn),
            ContainerOptions(PAGE),
            trace=self.trace,
        )
        self.spaces[devfn].add_group(f"/dev/vfio/{GROUPS[devfn]}")

    def unplug(self, devfn: int = NIC) -> None:
        """The opposite."""
        self.spaces.pop(devfn).remove_group(f"/dev/vfio/{GROUPS[devfn]}")

    def started(self, devfn: int = NIC) -> Domain:
        """Plugged, translation on, in a domain of its own."""
        self.plug(devfn)
        self.driver.start()
        domain = self.domain()
        self.driver.attach(domain, devfn)
        self.port.take()
        return domain

    def domain(self) -> Domain:
        """An empty one, of second-stage tables."""
        return self.driver.domain(Stage.SECOND)

    def container(self, devfn: int = NIC) -> Type1Container:
        """The host's."""
        found = self.host.groups[GROUPS[devfn]].container
        assert found is not None and isinstance(found.driver, Type1Container)
        return found.driver

    def table(self, devfn: int = NIC) -> dict[int, tuple[int, int, int]]:
        """The host's mappings as the user made them: by iova, (size, offset in RAM, permission)."""
        vma = self.direct.mm.find(HVA)
        assert vma is not None
        pages = {
            iova + part: (vma.segment.hpa.to_offset((entry & ~7) + part), entry & 3)
            for iova, size, entry in self.container(devfn).table.mapped()
            for part in range(0, size, PAGE)
        }
        found = {}
        for block in self.container(devfn).mappings:
            for iova in range(block.iova, block.end, block.size):
                own = [pages.pop(at) for at in range(iova, iova + block.size, PAGE)]
                assert own == [(own[0][0] + n * PAGE, own[0][1]) for n in range(len(own))]
                found[iova] = (block.size, *own[0])
        assert not pages, "the table has nothing but mappings"
        return found

    def one_to_one(self, devfn: int = NIC) -> bool:
        """Whether the host has all RAM at its own addresses, and nothing else."""
        low = self.machine.system.view.lookup(0)
        assert low is not None
        pages = {
            iova + at: (offset + at, perm)
            for iova, (size, offset, perm) in self.table(devfn).items()
            for at in range(0, size, PAGE)
        }
        return bool(pages) and all(iova == offset for iova, (offset, _) in pages.items()) and DATA in pages

    @property
    def locked(self) -> int:
        """Pages that the guest's process has locked."""
        return self.direct.mm.locked_vm

    def dma(self, devfn: int = NIC) -> AssignedImpl:
        """The device's DMA, by the host's table."""
        name = DEVICES[GROUPS[devfn]]
        space = self.spaces[devfn]
        if devfn not in self.tokens:
            (container,) = space.containers
            self.tokens[devfn] = container.groups[f"/dev/vfio/{GROUPS[devfn]}"].get_device_fd(name)
        pe = self.host.device(name).pe
        pe.set_bus_master(True)
        return AssignedImpl(pe.words, self.container(devfn).domain_words, self.direct.segments, Lane.private())

    def guest_table(self, domain: Domain, last: int = U64_MAX) -> dict[int, tuple[int, int, int]]:
        """What the guest's page table says, read from its memory: as :meth:`table`; what is not RAM is left out."""
        found: dict[int, tuple[int, int, int]] = {}
        self._below(domain.table.root, domain.table.levels, 0, 3, found)
        return {iova: page for iova, page in found.items() if iova <= last}

    def _below(self, table: int, level: int, base: int, perm: int, found: dict[int, tuple[int, int, int]]) -> None:
        words = memoryview(self.machine.read_memory(table, PAGE)).cast("Q")
        shift = 3 + 9 * level
        for number, entry in enumerate(words):
            iova, granted = base + (number << shift), perm & entry
            if not entry & 3:
                continue
            if level > 1 and not entry & 0x80:
                self._below(entry & ((1 << 52) - PAGE), level - 1, iova, granted, found)
                continue
            gpa = entry & ((1 << 52) - (1 << shift))
            if granted and gpa + (1 << shift) <= RAM:
                found[iova] = (1 << shift, gpa, 1 | granted)
