"""What an sPAPR v2 container is beside what every kind is: preregistration, windows, EEH; errors in their order."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from errno import errorcode
from functools import partial

import pytest

from tests.conformance.adapters import EXPECTED, Adapter, Client, Running, adapters
from tests.conformance.live_host import LiveHosts
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.uapi.vfio import (
    DmaMap,
    DmaUnmap,
    EehOp,
    EehPeOp,
    EehState,
    Ioctl,
    IommuType,
    SpaprRegisterMemory,
    SpaprTceCreate,
    SpaprTceInfo,
    SpaprTceRemove,
)
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
PAGE = 64 * KIB
HVA = 0x7F00_0000_0000
V2 = IommuType.VFIO_SPAPR_TCE_v2_IOMMU
DEVICE = "0000:01:00.0"
MAP, UNMAP = Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA
REGISTER, UNREGISTER = Ioctl.VFIO_IOMMU_SPAPR_REGISTER_MEMORY, Ioctl.VFIO_IOMMU_SPAPR_UNREGISTER_MEMORY
CREATE, REMOVE = Ioctl.VFIO_IOMMU_SPAPR_TCE_CREATE, Ioctl.VFIO_IOMMU_SPAPR_TCE_REMOVE
GET_INFO = Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO
EEH = Ioctl.VFIO_EEH_PE_OP

TOPOLOGY = HostTopology(
    groups=(
        GroupSpec(26, (DeviceSpec(DEVICE, "edu"),)),
        GroupSpec(27, (DeviceSpec("0000:02:00.0", "edu"),)),
        GroupSpec(30, iommu="emulated"),
        GroupSpec(31, iommu="none"),
        GroupSpec(32, ddw=False),
        GroupSpec(33, viable=False),
        GroupSpec(34, iommu="pseries"),
        GroupSpec(35, create_window=False),
        GroupSpec(36, unset_window=False),
        GroupSpec(37, max_windows=1, levels=2),
    )
)


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that ``call`` fails with."""
    with pytest.raises(OSError) as caught:
        call()
    return errorcode[caught.value.errno or 0]


@dataclass
class World:
    """A host, a client of it with a typed container, and 16 MiB of declared memory."""

    running: Running
    client: Client
    container: SpaprContainer
    group: VfioGroup

    def ioctl(self, cmd: int, arg: bytes) -> bytes:
        return self.client.port.ioctl(self.container.handle, cmd, arg)

    def errno(self, cmd: int, arg: bytes) -> str:
        return errno_of(lambda: self.ioctl(cmd, arg))

    def open_group(self, number: int) -> VfioGroup:
        return VfioGroup(self.client.port, self.client.port.open(f"/dev/vfio/{number}"))

    def close(self) -> None:
        self.client.port.close(self.group.handle)
        self.client.port.close(self.container.handle)


def connect(running: Running, client: Client, number: int = 26) -> World:
    port = client.port
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    group = VfioGroup(port, port.open(f"/dev/vfio/{number}"))
    group.set_container(container.handle)
    container.set_iommu(V2)
    return World(running, client, container, group)


@pytest.fixture
def running(adapter: Adapter) -> Iterator[Running]:
    with adapter(TOPOLOGY) as host:
        yield host


@pytest.fixture
def world(running: Running) -> World:
    client = running.client()
    client.memory("ram", 16 * MIB, HVA)
    return connect(running, client)


@pytest.fixture
def mapped(world: World) -> World:
    """With memory registered, and one window of 4 KiB pages at 0 in place of the default one."""
    world.container.register_memory(HVA, 16 * MIB)
    world.container.tce_remove(0)
    assert world.container.tce_create(12, GIB) == 0
    return world


def test_all_adapters_are_collected(request: pytest.FixtureRequest, live_hosts: LiveHosts) -> None:
    """Each of them runs each test over an adapter: what silently drops out would not be missed."""
    assert set(adapters(live_hosts)) == set(EXPECTED) == {"direct", "wire", "inline"}
    run: dict[str, set[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and "adapter" in item.fixturenames:
            run.setdefault(item.originalname, set()).add(str(item.callspec.params["adapter"]))
    assert all(names == set(EXPECTED) for names in run.values())


class TestCore:
    def test_api_version_and_extensions(self, world: World) -> None:
        assert world.container.get_api_version() == 0
        assert world.container.check_extension(V2) == 1
        assert world.container.check_extension(IommuType.VFIO_EEH) == 1
        assert world.container.check_extension(IommuType.VFIO_SPAPR_TCE_IOMMU) == 1
        assert [world.container.check_extension(number) for number in (1, 3, 4, 8, 9, 99)] == [0] * 6

    def test_unknown_ioctls(self, world: World) -> None:
        for cmd in (0x3BFF, Ioctl.VFIO_IOMMU_ENABLE, Ioctl.VFIO_IOMMU_DISABLE):
            assert world.errno(cmd, bytes(40)) == "ENOTTY"
        assert errno_of(lambda: world.client.port.ioctl(world.group.handle, MAP, bytes(32))) == "ENOTTY"

    def test_set_iommu_in_order(self, running: Running) -> None:
        port = running.client().port
        container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
        assert errno_of(lambda: container.set_iommu(V2)) == "EINVAL", "no group yet"
        assert errno_of(container.get_info) == "EINVAL", "no type yet"
        group = VfioGroup(port, port.open("/dev/vfio/26"))
        group.set_container(container.handle)
        assert errno_of(lambda: container.set_iommu(IommuType.VFIO_TYPE1_IOMMU)) == "ENODEV"
        assert errno_of(lambda: container.set_iommu(IommuType.VFIO_EEH)) == "EINVAL", "an extension, but no type"
        assert errno_of(lambda: container.set_iommu(99)) == "ENODEV"
        container.set_iommu(V2)
        assert errno_of(lambda: container.set_iommu(V2)) == "EINVAL", "it has a type already"

    @pytest.mark.parametrize(
        ("number", "error"), [(30, "EINVAL"), (31, "ENODEV"), (32, "EINVAL"), (33, "EPERM"), (34, "EPERM")]
    )
    def test_groups_that_do_not_fit(self, world: World, number: int, error: str) -> None:
        group = world.open_group(number)
        assert errno_of(lambda: group.set_container(world.container.handle)) == error
        assert not group.get_status() & 2

    def test_set_container_errors(self, world: World) -> None:
        other = world.open_group(27)
        assert errno_of(lambda: other.set_container(0xDEAD)) == "EBADF"
        assert errno_of(lambda: other.set_container(world.group.handle)) == "EBADFD"
        assert errno_of(lambda: world.group.set_container(world.container.handle)) == "EINVAL"
        assert errno_of(other.unset_container) == "EINVAL"

    def test_group_status(self, world: World) -> None:
        assert world.group.get_status() == 3
        assert world.open_group(27).get_status() == 1
        assert world.open_group(33).get_status() == 0
        port = world.client.port
        cmd = Ioctl.VFIO_GROUP_GET_STATUS
        assert errno_of(lambda: port.ioctl(world.group.handle, cmd, b"1234")) == "EFAULT"
        assert errno_of(lambda: port.ioctl(world.group.handle, cmd, struct.pack("=II", 7, 0))) == "EINVAL"

    def test_a_device_name_ends_with_nul(self, world: World) -> None:
        port, cmd = world.client.port, Ioctl.VFIO_GROUP_GET_DEVICE_FD
        assert errno_of(lambda: port.ioctl(world.group.handle, cmd, DEVICE.encode())) == "EINVAL"


class TestInfo:
    def test_both_sizes_of_the_struct(self, world: World) -> None:
        info = world.container.get_info()
        assert (info.flags, info.dma32_window_start, info.dma32_window_size) == (1, 0, 2 * GIB)
        assert (info.pgsizes, info.max_dynamic_windows_supported, info.levels) == (0x1211000, 2, 5)
        short = world.ioctl(GET_INFO, struct.pack("=IIII", 16, 0, 0, 0) + b"\xaa" * 16)
        assert short[16:] == b"\xaa" * 16
        assert SpaprTceInfo.unpack(short).dma32_window_size == 2 * GIB

    def test_errors_in_order(self, world: World) -> None:
        assert world.errno(GET_INFO, bytes(15)) == "EFAULT"
        assert world.errno(GET_INFO, struct.pack("=IIII", 15, 0, 0, 0)) == "EINVAL"
        assert world.errno(GET_INFO, struct.pack("=IIII", 32, 0, 0, 0)) == "EFAULT"


class TestRegister:
    def arg(self, vaddr: int = HVA, size: int = PAGE, *, argsz: int = 24, flags: int = 0) -> bytes:
        return SpaprRegisterMemory(argsz, flags, vaddr, size).pack()

    def test_counts_pages_once(self, world: World) -> None:
        world.container.register_memory(HVA, MIB)
        assert world.client.locked_vm() == 16
        world.container.unregister_memory(HVA, MIB)
        assert world.client.locked_vm() == 0

    def test_errors_in_order(self, world: World) -> None:
        assert world.errno(REGISTER, self.arg(argsz=23, flags=1)[:23]) == "EFAULT"
        assert world.errno(REGISTER, self.arg(argsz=23, flags=1)) == "EINVAL"
        for bad in (self.arg(flags=1), self.arg(HVA + 1), self.arg(size=PAGE + 4096), self.arg(2**64 - PAGE)):
            assert world.errno(REGISTER, bad) == "EINVAL"
        world.ioctl(REGISTER, self.arg())
        assert world.errno(REGISTER, self.arg()) == "EBUSY"
        assert world.errno(REGISTER, self.arg(HVA + 15 * MIB, 2 * MIB)) == "EFAULT", "partly unmapped"
        assert world.errno(REGISTER, self.arg(HVA, 2 * PAGE)) == "EINVAL", "overlap"
        assert world.client.locked_vm() == 1

    def test_the_limit_is_met_before_the_memory(self, running: Running) -> None:
        client = running.client(memlock=4 * PAGE)
        client.memory("ram", MIB, HVA)
        world = connect(running, client)
        world.container.register_memory(HVA, 4 * PAGE)
        assert world.errno(REGISTER, self.arg(HVA + 4 * PAGE)) == "ENOMEM"
        assert world.errno(REGISTER, self.arg(0x1000_0000)) == "ENOMEM", "not EFAULT"
        assert world.errno(REGISTER, self.arg(HVA)) == "ENOMEM", "not EINVAL for the overlap"
        assert client.locked_vm() == 4

    def test_unregister_errors_in_order(self, world: World) -> None:
        assert world.errno(UNREGISTER, b"") == "EPERM", "bound to no process yet"
        world.container.register_memory(HVA, 2 * PAGE)
        assert world.errno(UNREGISTER, self.arg(flags=1)) == "EINVAL"
        assert world.errno(UNREGISTER, self.arg(HVA + 1)) == "EINVAL"
        assert world.errno(UNREGISTER, self.arg()) == "ENOENT", "another size"
        world.container.map_dma(0, HVA, 4096)
        assert world.errno(UNREGISTER, self.arg(size=2 * PAGE)) == "EBUSY"
        world.container.unmap_dma(0, 4096)
        world.ioctl(UNREGISTER, self.arg(size=2 * PAGE))
        assert world.errno(UNREGISTER, self.arg(size=2 * PAGE)) == "ENOENT"

    def test_two_containers_share_one_pin(self, world: World) -> None:
        other = connect(world.running, world.client, 27)
        world.container.register_memory(HVA, MIB)
        other.container.register_memory(HVA, MIB)
        assert world.client.locked_vm() == 16
        world.container.unregister_memory(HVA, MIB)
        assert world.client.locked_vm() == 16
        other.close()
        assert world.client.locked_vm() == 0

    def test_a_region_being_torn_down_is_not_mapped(self, world: World) -> None:
        """The other container maps, gives its registration up, and the first one closes: only TCEs hold the region."""
        other = connect(world.running, world.client, 27)
        world.container.register_memory(HVA, MIB)
        other.container.register_memory(HVA, MIB)
        other.container.map_dma(0, HVA, 4096)
        other.container.unregister_memory(HVA, MIB)
        world.close()
        assert errno_of(lambda: other.container.map_dma(4096, HVA, 4096)) == "ENXIO"
        other.container.unmap_dma(0, 4096)
        assert errno_of(lambda: other.container.map_dma(4096, HVA, 4096)) == "EINVAL"
        other.close()
        assert world.client.locked_vm() == 0

    def test_a_container_serves_one_process(self, world: World) -> None:
        world.container.register_memory(HVA, PAGE)
        stranger = world.running.client()
        for cmd in (GET_INFO, REGISTER, UNREGISTER, MAP, UNMAP, CREATE, REMOVE):
            assert errno_of(partial(stranger.port.ioctl, world.container.handle, cmd, b"")) in ("EPERM", "EBADF")

    def test_overlapping_declarations(self, world: World) -> None:
        assert errno_of(lambda: world.client.memory("more", MIB, HVA + MIB)) == "EEXIST"


class TestMap:
    def arg(self, iova: int = 0, vaddr: int = HVA, size: int = 4096, *, flags: int = 3, argsz: int = 32) -> bytes:
        return DmaMap(argsz, flags, vaddr, iova, size).pack()

    def test_errors_in_order(self, world: World) -> None:
        assert world.errno(MAP, b"") == "EPERM", "nothing registered"
        world.container.register_memory(HVA, MIB)
        world.container.tce_remove(0)
        assert world.errno(MAP, self.arg()[:31]) == "EFAULT"
        assert world.errno(MAP, self.arg(argsz=31)) == "EINVAL"
        assert world.errno(MAP, self.arg(flags=4)) == "EINVAL"
        assert world.errno(MAP, self.arg(size=1, flags=0)) == "ENXIO", "no window comes before alignment"
        world.container.tce_create(12, GIB)
        for bad in (
            self.arg(size=1),
            self.arg(vaddr=HVA + 1),
            self.arg(flags=0),
            self.arg(iova=1),
            self.arg(iova=GIB - 4096, size=8192),
            self.arg(vaddr=HVA + MIB),
        ):
            assert world.errno(MAP, bad) == "EINVAL"
        assert world.errno(MAP, self.arg(iova=GIB)) == "ENXIO"

    def test_the_default_window_is_made_when_needed(self, world: World) -> None:
        world.container.register_memory(HVA, PAGE)
        assert world.client.locked_vm() == 1
        world.container.map_dma(2 * GIB - 4096, HVA, 4096)
        assert world.client.locked_vm() == 1 + 128

    def test_a_failure_leaves_nothing_mapped(self, mapped: World) -> None:
        assert mapped.errno(MAP, self.arg(0, HVA + 15 * MIB, 2 * MIB)) == "EINVAL"
        mapped.container.unregister_memory(HVA, 16 * MIB)

    def test_pages_larger_than_the_backing(self, world: World) -> None:
        world.client.memory("huge", 32 * MIB, 0x6000_0000_0000, page_size=16 * MIB)
        world.container.register_memory(HVA, 16 * MIB)
        world.container.register_memory(0x6000_0000_0000, 32 * MIB)
        world.container.tce_remove(0)
        world.container.tce_create(24, GIB)
        assert world.errno(MAP, self.arg(size=16 * MIB)) == "EINVAL"
        world.container.map_dma(0, 0x6000_0000_0000, 32 * MIB)

    def test_mapping_again_replaces(self, mapped: World) -> None:
        mapped.container.map_dma(0, HVA, 8192)
        mapped.container.map_dma(4096, HVA + PAGE, 4096, 1)
        mapped.container.unmap_dma(0, 8192)
        mapped.container.unregister_memory(HVA, 16 * MIB)

    def test_unmap_errors_in_order(self, world: World) -> None:
        def arg(iova: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
            return DmaUnmap(argsz, flags, iova, size).pack()

        assert world.errno(UNMAP, b"") == "EPERM"
        world.container.register_memory(HVA, PAGE)
        assert world.errno(UNMAP, arg(0, 4096)) == "ENXIO", "a pending default window is not made by an unmap"
        world.container.map_dma(0, HVA, 4096)
        assert world.errno(UNMAP, arg(0, 4096)[:20]) == "EFAULT"
        assert world.errno(UNMAP, arg(0, 4096, argsz=23)) == "EINVAL"
        assert world.errno(UNMAP, arg(4 * GIB, 1, flags=1)) == "EINVAL"
        assert world.errno(UNMAP, arg(4 * GIB, 1)) == "ENXIO"
        for bad in (arg(0, 1), arg(1, 4096), arg(2 * GIB - 4096, 8192)):
            assert world.errno(UNMAP, bad) == "EINVAL"
        world.ioctl(UNMAP, arg(0, 2 * GIB))
        world.ioctl(UNMAP, arg(0, 2 * GIB))


class TestWindows:
    def arg(self, shift: int = 12, size: int = GIB, levels: int = 1, *, flags: int = 0, argsz: int = 40) -> bytes:
        return SpaprTceCreate(argsz, flags, shift, 0, size, levels).pack()

    def test_placed_by_slot(self, world: World) -> None:
        container = world.container
        container.tce_remove(0)
        assert container.tce_create(16, 16 * GIB) == 0
        assert container.tce_create(12, GIB) == 1 << 59
        assert world.errno(CREATE, self.arg()) == "ENOSPC"
        container.tce_remove(5 * GIB)
        assert container.tce_create(12, GIB) == 0, "the first free slot, whatever its size"

    def test_a_pending_default_window_is_made_first(self, world: World) -> None:
        assert world.container.tce_create(16, 16 * GIB) == 1 << 59
        assert world.client.locked_vm() == 128 + 64
        world.container.tce_remove(0)
        assert world.client.locked_vm() == 64

    def test_errors_in_order(self, world: World) -> None:
        assert world.errno(CREATE, self.arg()[:39]) == "EFAULT"
        assert world.errno(CREATE, self.arg(argsz=39, flags=1)) == "EINVAL"
        assert world.errno(CREATE, self.arg(flags=1)) == "EINVAL"
        world.container.tce_remove(0)
        bad = [
            self.arg(shift=13),
            self.arg(shift=200),
            self.arg(levels=0),
            self.arg(levels=6),
            self.arg(size=GIB + 4096),
            self.arg(size=2048),
            self.arg(size=0),
            self.arg(levels=4),
        ]
        for arg in bad:
            assert world.errno(CREATE, arg) == "EINVAL"
        assert world.errno(CREATE, self.arg(size=1 << 55)) == "EINVAL", "too deep"
        assert world.errno(CREATE, self.arg(size=1 << 54)) == "ENOMEM", "more than the domain has"
        assert world.client.locked_vm() == 0

    def test_no_free_slot_comes_before_the_page_size(self, world: World) -> None:
        world.container.tce_create(12, GIB)
        assert world.errno(CREATE, self.arg(shift=13)) == "ENOSPC"

    def test_the_table_counts_against_the_limit(self, running: Running) -> None:
        world = connect(running, running.client(memlock=64 * PAGE))
        world.container.tce_remove(0)
        assert world.errno(CREATE, self.arg(size=2 * GIB)) == "ENOMEM"
        assert world.container.tce_create(12, GIB) == 0
        assert world.client.locked_vm() == 64

    @pytest.mark.parametrize(
        ("shift", "size", "levels", "pages"),
        [
            (12, GIB, 1, 64),
            (12, 2 * GIB, 1, 128),
            (16, 16 * GIB, 1, 64),
            (16, 16 * GIB, 2, 66),
            (16, 1024 * GIB, 1, 4096),
            (24, 1024 * GIB, 1, 16),
        ],
    )
    def test_table_pages(self, world: World, shift: int, size: int, levels: int, pages: int) -> None:
        world.container.tce_remove(0)
        world.container.tce_create(shift, size, levels)
        assert world.client.locked_vm() == pages
        world.container.tce_remove(0)
        assert world.client.locked_vm() == 0

    def test_remove_errors_in_order(self, world: World) -> None:
        def arg(start: int, flags: int = 0, argsz: int = 16) -> bytes:
            return SpaprTceRemove(argsz, flags, start).pack()

        assert world.errno(REMOVE, arg(0)[:15]) == "EFAULT"
        assert world.errno(REMOVE, arg(0, argsz=15)) == "EINVAL"
        assert world.errno(REMOVE, arg(0, flags=1)) == "EINVAL"
        assert world.errno(REMOVE, arg(4096)) == "EINVAL", "the default window is not there yet"
        world.ioctl(REMOVE, arg(0))
        assert world.errno(REMOVE, arg(0)) == "EINVAL"

    def test_what_the_platform_lacks(self, running: Running) -> None:
        client = running.client()
        assert connect(running, client, 35).errno(CREATE, self.arg()) == "EPERM"
        world = connect(running, client, 36)
        world.container.tce_create(12, GIB)
        assert world.errno(REMOVE, SpaprTceRemove(start_addr=0).pack()) == "EPERM"
        assert errno_of(lambda: world.container.tce_remove(8 * GIB)) == "EINVAL", "the window comes first"

    def test_fewer_windows_and_levels(self, running: Running) -> None:
        world = connect(running, running.client(), 37)
        info = world.container.get_info()
        assert (info.max_dynamic_windows_supported, info.levels) == (1, 2)
        assert world.errno(CREATE, self.arg()) == "ENOSPC", "the default window takes the only slot"
        world.container.tce_remove(0)
        assert world.errno(CREATE, self.arg(levels=3)) == "EINVAL"

    def test_a_nested_host_has_one_level(self, running: Running) -> None:
        world = connect(running, running.client(), 34)
        assert world.container.get_info().levels == 1
        world.container.tce_remove(0)
        assert world.errno(CREATE, self.arg(levels=2)) == "ENOMEM"
        assert world.errno(CREATE, self.arg(size=GIB + 4096, levels=2)) == "ENOMEM", "before the size is looked at"
        assert world.errno(CREATE, self.arg(size=GIB + 4096)) == "EINVAL"
        assert world.container.tce_create(12, GIB, 0) == 0
        assert world.client.locked_vm() == 32, "one copy of the table"

    def test_removal_clears_and_gives_back(self, mapped: World) -> None:
        mapped.container.map_dma(0, HVA, 16 * MIB)
        mapped.container.tce_remove(0)
        assert mapped.client.locked_vm() == 256
        mapped.container.unregister_memory(HVA, 16 * MIB)
        assert mapped.client.locked_vm() == 0


class TestEeh:
    def arg(self, op: int, *, argsz: int = 40, flags: int = 0, kind: int = 0, func: int = 4) -> bytes:
        return EehPeOp(argsz, flags, op, kind, func).pack()

    def state(self, world: World) -> EehState:
        return world.container.eeh_pe_op(EehOp.VFIO_EEH_PE_GET_STATE)

    def test_a_group_recovers_as_documented(self, world: World) -> None:
        container, seen = world.container, [self.state(world)]
        container.eeh_pe_op(EehOp.VFIO_EEH_PE_ENABLE)
        container.eeh_inject_err(0, 4)
        seen.append(self.state(world))
        for op in (
            EehOp.VFIO_EEH_PE_UNFREEZE_IO,
            EehOp.VFIO_EEH_PE_RESET_HOT,
            EehOp.VFIO_EEH_PE_RESET_DEACTIVATE,
            EehOp.VFIO_EEH_PE_CONFIGURE,
        ):
            assert container.eeh_pe_op(op) == 0, "only GET_STATE returns a state"
            seen.append(self.state(world))
        assert seen == [0, 2, 4, 1, 0, 0]

    def test_errors_in_order(self, world: World) -> None:
        inject = EehOp.VFIO_EEH_PE_INJECT_ERR
        assert world.errno(EEH, self.arg(0, flags=1)[:11]) == "EFAULT"
        for bad in (self.arg(0, argsz=11), self.arg(0, flags=1), self.arg(10), self.arg(inject, argsz=39)):
            assert world.errno(EEH, bad) == "EINVAL"
        assert world.errno(EEH, self.arg(inject, argsz=39)[:12]) == "EINVAL"
        assert world.errno(EEH, self.arg(inject)[:39]) == "EFAULT"
        assert world.errno(EEH, self.arg(inject, kind=2)) == "EINVAL"
        assert world.errno(EEH, self.arg(inject, func=20)) == "EINVAL"
        assert self.state(world) == 0, "what failed has stopped nothing"
        assert world.ioctl(EEH, self.arg(4, argsz=12)[:12]) == bytes(4), "the union is not needed"

    def test_a_group_without_a_pe_comes_first(self, running: Running) -> None:
        assert connect(running, running.client(), 35).errno(EEH, b"") == "ENODEV"

    def test_only_its_process_may(self, mapped: World) -> None:
        stranger = mapped.running.client().port
        assert errno_of(lambda: stranger.ioctl(mapped.container.handle, EEH, self.arg(4))) in ("EPERM", "EBADF")

    def test_all_groups_in_turn(self, world: World) -> None:
        second = world.open_group(27)
        second.set_container(world.container.handle)
        world.container.eeh_inject_err(1, 0)
        world.container.eeh_pe_op(EehOp.VFIO_EEH_PE_UNFREEZE_IO)
        assert self.state(world) == EehState.VFIO_EEH_PE_STATE_STOPPED_DMA
        world.group.unset_container()
        assert self.state(world) == EehState.VFIO_EEH_PE_STATE_STOPPED_DMA, "the second was done too"
        world.open_group(35).set_container(world.container.handle)
        assert world.errno(EEH, self.arg(EehOp.VFIO_EEH_PE_UNFREEZE_DMA)) == "ENODEV"
        assert world.errno(EEH, self.arg(4)) == "ENODEV", "the second is normal again, the third has no PE"


def test_closing_gives_everything_back(mapped: World) -> None:
    mapped.container.map_dma(0, HVA, MIB)
    mapped.container.tce_create(16, 16 * GIB)
    mapped.container.map_dma(1 << 59, HVA, MIB)
    mapped.client.port.close(mapped.container.handle)
    assert mapped.client.locked_vm() > 0, "the group still holds the container"
    mapped.client.port.close(mapped.group.handle)
    assert mapped.client.locked_vm() == 0
