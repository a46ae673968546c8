"""The whole chain in one process: a pseries machine, a container over the direct port, a host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests import acceleration
from tests.acceleration import accelerate, locked_in_kernel
from vfio_model.errors import PeerLost
from vfio_model.host.host import Host
from vfio_model.host.spapr_tce import SpaprTceContainer
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.iommu.spapr.acceleration import TOO_HARD
from vfio_model.iommu.spapr.ddw import DmaOptions
from vfio_model.iommu.spapr.regs import HCall, RtasToken, phb_buid
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import U32_MAX, Hva
from vfio_model.trace import ListTrace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.vfio.connect import VFIOContainer, connect_container
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import VfioPort

GROUP = "/dev/vfio/26"
DEVICE = "0005:01:00.0"
HVA = Hva(0x7F00_0000_0000)
MIB = 1 << 20
LIOBN0, LIOBN1 = 0x8000_0000, 0x8000_0001


class TooHard(Exception):
    """The host leaves a hypercall to the guest's process."""


class FaultyPort:
    """A port whose next calls can be made to fail: ``fail(cmd)`` is asked before each ioctl and may raise.

    It is asked with the number of each hypercall too, where it may raise :class:`TooHard`.
    """

    def __init__(self, port: DirectPort) -> None:
        self._port = port
        self.fail: Callable[[int], None] = lambda _cmd: None
        self.calls: list[tuple[int, int]] = []
        """(ioctl, count) of what went through."""
        self.open, self.close = port.open, port.close
        self.declare_memory, self.undeclare_memory = port.declare_memory, port.undeclare_memory
        self.take_device = port.take_device
        self.create_spapr_tce, self.unmap_spapr_tce = port.create_spapr_tce, port.unmap_spapr_tce
        self.hcalls: list[tuple[int, int]] = []
        """(opcode, answer) of the hypercalls that the host was asked."""

    def ioctl(self, handle: int, cmd: int, arg: bytes) -> bytes:
        self.fail(cmd)
        self.calls.append((cmd, 1))
        return self._port.ioctl(handle, cmd, arg)

    def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
        self.fail(cmd)
        self.calls.append((cmd, count))
        return self._port.ioctl_many(handle, cmd, args, count)

    def hcall(self, vm: int, nr: int, args: Sequence[int], links: int) -> int:
        try:
            self.fail(nr)
            ret = self._port.hcall(vm, nr, args, links)
        except TooHard:
            ret = TOO_HARD
        self.hcalls.append((nr, ret))
        return ret


def host_gone(_cmd: int) -> None:
    raise PeerLost("hostd", "answering")


class Chain:
    """``ram`` bytes at ``page_size`` backing; the default window is ``window`` bytes."""

    def __init__(
        self,
        *,
        ram: int = 32 * MIB,
        page_size: int = 16 * MIB,
        window: int = 4 * MIB,
        group: GroupSpec | None = None,
        memlock: int | None = None,
        ddw: bool = True,
        connect: bool = True,
        kvm: bool | None = None,
        kvm_lacks: tuple[str, ...] = (),
        containers: tuple[ContainerKind, ...] = ("spapr-v2", "spapr-v1"),
    ) -> None:
        self.trace = ListTrace()
        self.ram = RAMBlock("ram", bytearray(ram), page_size=page_size, hva=HVA)
        options = PseriesOptions(dma=DmaOptions(ddw=ddw, dma_win_size=window))
        self.machine = PseriesMachine([self.ram], options, trace=self.trace)
        spec = group or GroupSpec(26, (DeviceSpec(DEVICE, "edu"),))
        self.host = Host(HostTopology((spec,), domain_bytes=16 * MIB, kvm_lacks=kvm_lacks, containers=containers))
        self.direct = DirectPort(self.host, self.host.create_mm(memlock, "guest"))
        self.port = FaultyPort(self.direct)
        self.port.declare_memory(self.ram)
        self.kvm = accelerate(self.machine, self.port, trace=self.trace) if acceleration.kvm(kvm) else None
        self.container = self.connect() if connect else None

    @property
    def mm(self) -> int:
        """Locked pages, without those of tables in the kernel: they are there as long as the guest has its windows."""
        return self.direct.mm.locked_vm - locked_in_kernel(self.machine, self.host.topology.host_page_size)

    def connect(self, port: VfioPort | None = None) -> VFIOContainer:
        phb = self.machine.phb()
        return connect_container(
            port or self.port,
            GROUP,
            self.machine.system,
            phb.address_space,
            host_page_size=1 << 16,
            trace=self.trace,
            kvm=self.kvm,
        )

    def come_back(self, host: Host) -> None:
        """What guestd does when it has lost its host and found ``host``."""
        if self.kvm is not None:
            self.kvm.disconnect()
        if self.container is not None:
            self.container.abandon()
        self.host, self.direct = host, DirectPort(host)
        self.direct.declare_memory(self.ram)
        if self.kvm is not None:
            self.kvm.connect(self.direct)
        self.container = self.connect(self.direct)

    # -- the guest's side

    def put(self, ioba: int, tce: int, liobn: int = LIOBN0) -> int:
        return self.machine.hcall(HCall.H_PUT_TCE, liobn, ioba, tce)[0]

    def stuff(self, ioba: int, value: int, count: int, liobn: int = LIOBN0) -> int:
        return self.machine.hcall(HCall.H_STUFF_TCE, liobn, ioba, value, count)[0]

    def indirect(self, ioba: int, tces: list[int], liobn: int = LIOBN0) -> int:
        self.machine.write_memory(0, b"".join(tce.to_bytes(8, "big") for tce in tces))
        return self.machine.hcall(HCall.H_PUT_TCE_INDIRECT, liobn, ioba, 0, len(tces))[0]

    def rtas(self, token: RtasToken, *args: int, nret: int = 1) -> list[int]:
        rets = self.machine.rtas(token, args, nret)
        return [ret - (1 << 32) if index == 0 and ret >> 31 else ret for index, ret in enumerate(rets)]

    def create_window(self, page_shift: int, window_shift: int) -> list[int]:
        buid = phb_buid(0)
        pe = (0, buid >> 32, buid & U32_MAX)
        return self.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, *pe, page_shift, window_shift, nret=4)

    def remove_window(self, liobn: int) -> int:
        return self.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, liobn)[0]

    def reset_windows(self) -> int:
        buid = phb_buid(0)
        return self.rtas(RtasToken.IBM_RESET_PE_DMA_WINDOW, 0, buid >> 32, buid & U32_MAX)[0]

    def guest_view(self, unit: int = 12) -> dict[int, tuple[int, int]]:
        """Bus address → (guest-physical address, permission) for each ``1 << unit`` bytes that the guest mapped to RAM.

        The permission is what VFIO asks for: MAP_DMA has no way to say "write-only".
        """
        seen: dict[int, tuple[int, int]] = {}
        for table in self.machine.tables.values():
            if not table.enabled:
                continue
            for index in range(table.nb_table):
                tce = table.get(index) or 0
                perm, gpa = tce & 3, tce & -(1 << table.page_shift)
                if perm and gpa + (1 << table.page_shift) <= self.ram.size:
                    for part in range(0, 1 << table.page_shift, 1 << unit):
                        seen[table.bus_offset + (index << table.page_shift) + part] = (gpa + part, 3 if perm & 2 else 1)
        return seen

    # -- the host's side

    @property
    def driver(self) -> SpaprTceContainer:
        group = self.host.groups[26]
        assert group.container is not None and isinstance(group.container.driver, SpaprTceContainer)
        return group.container.driver

    def host_windows(self) -> list[tuple[int, int, int]]:
        """(start, last, page shift) of every window, by start."""
        tables = [table for table in self.driver.tables if table is not None]
        return sorted((table.start, table.last, table.page_shift) for table in tables)

    def host_view(self, unit: int = 12) -> dict[int, tuple[int, int]]:
        """Bus address → (guest-physical address, permission) for each ``1 << unit`` bytes that the host maps."""
        seen: dict[int, tuple[int, int]] = {}
        for table in self.driver.tables:
            for index, tce in table.mapped() if table is not None else ():
                found = self.direct.segments.find(tce & ~3)
                assert found is not None, "the host maps declared memory only"
                for part in range(0, table.page, 1 << unit) if table is not None else ():
                    seen[table.start + index * table.page + part] = (found[2] + part, tce & 3)
        return seen
