"""A pseries guest with two bridges and three assigned devices, over a host with any kind of container.

Groups 26 and 27 are behind the first bridge, 28 behind the second. The host can die, in the middle of a hypercall too,
and a new one can take its place.
"""

from __future__ import annotations

from tests.acceleration import HOST_PAGE, kvm, locked_in_kernel
from vfio_model.errors import PeerLost, VfioModelError
from vfio_model.host.container import IommuDriver
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.host import Host
from vfio_model.host.spapr_container import SpaprTables
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.host.type1 import Type1Container
from vfio_model.iommu.spapr.ddw import DmaOptions
from vfio_model.iommu.spapr.regs import HCall, RtasToken, pci_liobn, phb_buid
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U32_MAX, Hva
from vfio_model.uapi.containers import ContainerKind
from vfio_model.vfio.address_space import ContainerOptions, VFIOAddressSpace
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.kvm import KvmAccelerator

MIB = 1 << 20
HVA = Hva(0x7F00_0000_0000)
RAM = 2 * MIB
BACKING = 1 << 16
PAGES = 16
"""Of the default windows."""
BRIDGE_OF = {26: 0, 27: 0, 28: 1}
DEVICES = {number: f"{number:04x}:01:00.0" for number in BRIDGE_OF}
View = dict[int, tuple[int, int]]
"""Bus address → (guest-physical address, what VFIO is asked for: 1 read, 3 both), for each 4 KiB."""


class DyingPort(DirectPort):
    """A port whose host dies before the ioctl that :attr:`left` counts down to; None: it lives."""

    left: int | None = None

    def _live(self) -> None:
        if self.left is not None:
            self.left = max(0, self.left - 1)
            if not self.left:
                raise PeerLost("hostd", "answering")

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        self._live()
        return super().ioctl(handle, cmd, arg)

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        self._live()
        return super().ioctl_many(handle, cmd, args, count)


class Bridges:
    """The guest, and a host that offers ``kind`` alone. Nothing is plugged."""

    def __init__(self, kind: ContainerKind) -> None:
        self.kind = kind
        self.ram = RAMBlock("ram", bytearray(RAM), page_size=BACKING, hva=HVA)
        self.machine = PseriesMachine([self.ram], PseriesOptions(phbs=2, dma=DmaOptions(dma_win_size=PAGES << 12)))
        self.plugged: dict[int, AssignedImpl] = {}
        """The DMA of each device."""
        self.kvm = KvmAccelerator(self.machine.system, HOST_PAGE) if kvm() else None
        if self.kvm is not None:
            self.kvm.on_change = self.machine.relocate_tables
            self.machine.accelerate(self.kvm)
        self.start_host()

    # -- the host

    def start_host(self) -> None:
        page = BACKING if self.kind.startswith("spapr") else 4096
        groups = tuple(GroupSpec(number, (DeviceSpec(name, "edu"),)) for number, name in DEVICES.items())
        topology = HostTopology(groups, domain_bytes=16 * MIB, host_page_size=page, containers=(self.kind,))
        self.host = Host(topology)
        self.port = DyingPort(self.host, self.host.create_mm(None, "guest"))
        self.port.declare_memory(self.ram)
        if self.kvm is not None:
            self.kvm.connect(self.port)
        options = ContainerOptions(page, kvm=self.kvm)
        self.spaces = [
            VFIOAddressSpace(self.port, self.machine.system, self.machine.phb(number).address_space, options)
            for number in range(2)
        ]

    def restart_host(self) -> list[int]:
        """The host is dead; a new one takes over, and every group that it has room for is plugged again. Those that
        were left out.
        """
        if self.kvm is not None:
            self.kvm.disconnect()
        for space in self.spaces:
            space.abandon()
        groups = sorted(self.plugged)
        self.plugged.clear()
        self.start_host()
        return [number for number in groups if not self.plug(number)]

    def plug(self, number: int) -> bool:
        """Whether the host can do what the guest's windows need; what it cannot leaves nothing behind."""
        space, path = self.spaces[BRIDGE_OF[number]], f"/dev/vfio/{number}"
        before = self.locked
        try:
            container = space.add_group(path)
        except (OSError, VfioModelError):
            assert self.locked == before and self.host.groups[number].container is None
            return False
        container.groups[path].get_device_fd(DEVICES[number])
        device = self.host.device(DEVICES[number])
        device.pe.set_bus_master(True)
        words = self.driver(number).domain_words.toreadonly()
        self.plugged[number] = AssignedImpl(device.pe.words.toreadonly(), words, self.port.segments, Lane.private())
        return True

    def unplug(self, number: int) -> None:
        token = self.host.device(DEVICES[number]).token
        assert token is not None
        self.port.device_closed(token)
        self.spaces[BRIDGE_OF[number]].remove_group(f"/dev/vfio/{number}")
        del self.plugged[number]

    def driver(self, number: int) -> IommuDriver:
        container = self.host.groups[number].container
        assert container is not None and container.driver is not None
        return container.driver

    def drivers(self) -> list[IommuDriver]:
        """Each once."""
        return list({id(driver): driver for driver in map(self.driver, self.plugged)}.values())

    @property
    def locked(self) -> int:
        """Locked pages, without those of tables in the kernel."""
        return self.port.mm.locked_vm - locked_in_kernel(self.machine, self.host.topology.host_page_size)

    def host_view(self, number: int) -> View:
        """What the container of a group maps."""
        driver, seen = self.driver(number), View()
        if isinstance(driver, Type1Container):
            for iova, size, entry in driver.table.mapped():
                for part in range(0, size, 4096):
                    seen[iova + part] = (self.guest_address((entry & ~0xFFF) + part), entry & 3)
            return seen
        assert isinstance(driver, SpaprTables)
        for table in driver.tables:
            for index, tce in table.mapped() if table is not None else ():
                for part in range(0, table.page, 4096) if table is not None else ():
                    seen[table.start + index * table.page + part] = (self.guest_address(tce & ~3) + part, tce & 3)
        return seen

    def guest_address(self, hpa: int) -> int:
        found = self.port.segments.find(hpa)
        assert found is not None, "the host maps declared memory only"
        return found[2]

    # -- the guest

    def put(self, liobn: int, ioba: int, tce: int) -> int:
        return self.machine.hcall(HCall.H_PUT_TCE, liobn, ioba, tce)[0]

    def stuff(self, liobn: int, ioba: int, value: int, count: int) -> int:
        return self.machine.hcall(HCall.H_STUFF_TCE, liobn, ioba, value, count)[0]

    def indirect(self, liobn: int, ioba: int, tces: list[int]) -> int:
        self.machine.write_memory(0, b"".join(tce.to_bytes(8, "big") for tce in tces))
        return self.machine.hcall(HCall.H_PUT_TCE_INDIRECT, liobn, ioba, 0, len(tces))[0]

    def get(self, liobn: int, ioba: int) -> tuple[int, list[int]]:
        status, registers = self.machine.hcall(HCall.H_GET_TCE, liobn, ioba)
        return status, list(registers)

    def create(self, bridge: int, page_shift: int, window_shift: int) -> list[int]:
        return self._rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, bridge, page_shift, window_shift, nret=4)

    def query(self, bridge: int) -> list[int]:
        return self._rtas(RtasToken.IBM_QUERY_PE_DMA_WINDOW, bridge, nret=5)

    def reset_windows(self, bridge: int) -> list[int]:
        return self._rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, bridge, nret=1)

    def _rtas(self, token: RtasToken, bridge: int, *args: int, nret: int) -> list[int]:
        buid = phb_buid(bridge)
        return self.machine.rtas(token, (0, buid >> 32, buid & U32_MAX, *args), nret)

    def remove(self, liobn: int) -> list[int]:
        return self.machine.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, (liobn,), 1)

    def dma(self, number: int, iova: int, value: int | None) -> tuple[bool, bytes]:
        """What the device of a group writes, 8 bytes, or reads: whether it could, and the bytes read."""
        impl, data = self.plugged[number], bytearray(8)
        if value is not None:
            return impl.write(iova, value.to_bytes(8, "little")) == MemTxResult.OK, b""
        return impl.read(iova, data) == MemTxResult.OK, bytes(data)

    def windows(self, bridge: int) -> list[tuple[int, int]]:
        found = [self.machine.tables[pci_liobn(bridge, number)].window for number in range(2)]
        return sorted((window.start, window.last) for window in found if window is not None)

    def guest_view(self, bridge: int) -> View:
        """What the guest mapped to RAM behind a bridge."""
        seen = View()
        for table in (self.machine.tables[pci_liobn(bridge, number)] for number in range(2)):
            for index in range(table.nb_table) if table.enabled else ():
                tce, page = table.get(index) or 0, 1 << table.page_shift
                gpa, perm = tce & -page, 3 if tce & 2 else tce & 1
                if perm and gpa + page <= RAM:
                    for part in range(0, page, 4096):
                        seen[table.bus_offset + index * page + part] = (gpa + part, perm)
        return seen
