"""What a type 1 container is, whoever implements the seam: as :mod:`tests.conformance.test_container`, of its own kind.

What is tested follows the kernel's selftests: ``vfio_dma_mapping_test`` and the mapping and dirty tracking cases of
``iommufd``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from errno import errorcode

import pytest

from tests.conformance.adapters import Adapter, Client, Running
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.uapi.containers import IOMMU_TYPES, ContainerKind
from vfio_model.uapi.vfio import DirtyBitmap, DmaMap, DmaUnmap, Ioctl
from vfio_model.vfio.ioctl import BatchError, ContainerFile, VfioGroup
from vfio_model.vfio.type1 import Type1

KIB, MIB = 1 << 10, 1 << 20
PAGE = 4 * KIB
HVA = 0x7F00_0000_0000
TOP = (1 << 64) - PAGE
ALL = 2
MAP, UNMAP, DIRTY = Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA, Ioctl.VFIO_IOMMU_DIRTY_PAGES
TOPOLOGY = HostTopology(
    groups=(
        GroupSpec(26, (DeviceSpec("0000:01:00.0", "edu"),)),
        GroupSpec(27, (DeviceSpec("0000:02:00.0", "edu"),)),
        GroupSpec(31, iommu="none"),
    ),
    host_page_size=PAGE,
    containers=("type1v2", "type1"),
    iova_ranges=((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 64) - 1)),
)


def errno_of(call: Callable[[], object]) -> str:
    """The name of the errno that ``call`` fails with."""
    with pytest.raises(OSError) as caught:
        call()
    return errorcode[caught.value.errno or 0]


class World:
    """A client with a typed container around group 26 and 16 MiB of memory in pages of 2 MiB."""

    def __init__(self, running: Running, kind: ContainerKind, memlock: int | None = None) -> None:
        self.client: Client = running.client(memlock)
        self.ram = self.client.memory("ram", 16 * MIB, HVA, 2 * MIB)
        port = self.client.port
        self.container = ContainerFile(port, port.open("/dev/vfio/vfio"))
        self.group = self.open_group(26)
        self.group.set_container(self.container.handle)
        self.type1 = Type1(self.container, host_page_size=PAGE, kind=kind)
        self.type1.set_type()
        self.type1.start()

    def open_group(self, number: int) -> VfioGroup:
        return VfioGroup(self.client.port, self.client.port.open(f"/dev/vfio/{number}"))

    def ioctl(self, cmd: int, arg: bytes) -> bytes:
        return self.client.port.ioctl(self.container.handle, cmd, arg)

    def map(self, iova: int, offset: int, size: int, flags: int = 3) -> None:
        self.ioctl(MAP, DmaMap(0, flags, HVA + offset, iova, size).pack())

    def unmap(self, iova: int, size: int, flags: int = 0) -> int:
        return DmaUnmap.unpack(self.ioctl(UNMAP, DmaUnmap(0, flags, iova, size).pack())).size

    def map_errno(self, iova: int, offset: int, size: int, flags: int = 3) -> str:
        return errno_of(lambda: self.map(iova, offset, size, flags))

    def unmap_errno(self, iova: int, size: int, flags: int = 0) -> str:
        return errno_of(lambda: self.unmap(iova, size, flags))


@pytest.fixture
def running(adapter: Adapter) -> Iterator[Running]:
    with adapter(TOPOLOGY) as host:
        yield host


@pytest.fixture(params=["type1v2", "type1"])
def kind(request: pytest.FixtureRequest) -> ContainerKind:
    found: ContainerKind = request.param
    return found


@pytest.fixture
def world(running: Running, kind: ContainerKind) -> World:
    return World(running, kind)


def test_the_type_belongs_to_the_container(running: Running, kind: ContainerKind) -> None:
    port = running.client().port
    container = ContainerFile(port, port.open("/dev/vfio/vfio"))
    assert [container.check_extension(number) for number in (1, 3, 9, 10, 2, 7, 5)] == [1, 1, 1, 1, 0, 0, 0]
    assert errno_of(lambda: container.set_iommu(IOMMU_TYPES[kind])) == "EINVAL"
    group = VfioGroup(port, port.open("/dev/vfio/31"))
    group.set_container(container.handle)
    assert errno_of(lambda: container.set_iommu(IOMMU_TYPES[kind])) == "ENODEV"


def test_map_and_unmap(world: World) -> None:
    for size in (PAGE, 2 * MIB, 16 * MIB):
        for iova in (0, 1 << 32, 1 << 59, (1 << 64) - size):
            world.map(iova, 0, size)
            assert world.client.locked_vm() == size // PAGE
            assert world.map_errno(iova, 0, size) == "EEXIST"
            assert world.unmap(iova, size) == size
            assert world.unmap(iova, size) == 0
    assert world.client.locked_vm() == 0


def test_unmap_a_range_and_unmap_all(world: World) -> None:
    for number in range(16):
        world.map(number * MIB, number * MIB, MIB)
    assert world.unmap(4 * MIB, 4 * MIB) == 4 * MIB
    assert world.unmap(0, 8 * MIB) == 4 * MIB
    assert world.unmap_errno(0, 16 * MIB, ALL) == "EINVAL"
    assert world.unmap(0, 0, ALL) == 8 * MIB
    assert world.unmap(0, 0, ALL) == 0


def test_overflow(world: World) -> None:
    world.map(TOP, 0, PAGE)
    assert world.map_errno(TOP, 0, 2 * PAGE) == "EOVERFLOW"
    assert world.unmap_errno(TOP, 2 * PAGE) == "EOVERFLOW"
    assert world.unmap(TOP, PAGE) == PAGE
    assert world.map_errno(TOP + PAGE - 1, 0, 1) == "EINVAL"


def test_alignment(world: World) -> None:
    for shift in range(12):
        low = 1 << shift
        assert world.map_errno(low, 0, PAGE) == "EINVAL"
        assert world.map_errno(0, low, PAGE) == "EINVAL"
        assert world.map_errno(0, 0, PAGE + low) == "EINVAL"
        assert world.unmap_errno(low, PAGE) == "EINVAL"
        assert world.unmap_errno(0, low) == "EINVAL"
    assert world.client.locked_vm() == 0


def test_the_ends_of_a_mapping(world: World, kind: ContainerKind) -> None:
    world.map(4 * MIB, 0, 4 * MIB)
    if kind == "type1v2":
        for iova, size in ((4 * MIB, PAGE), (6 * MIB, 2 * MIB), (0, 6 * MIB)):
            assert world.unmap_errno(iova, size) == "EINVAL"
        assert world.unmap(0, 16 * MIB) == 4 * MIB
    else:
        assert world.unmap(6 * MIB, 2 * MIB) == 0
        assert world.unmap(4 * MIB, PAGE) == 4 * MIB


def test_the_hole_in_the_iova_ranges(world: World) -> None:
    assert [(w.min_iova, w.max_iova) for w in world.type1.windows] == [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 64) - 1)]
    assert world.map_errno(0xFEE0_0000, 0, PAGE) == "EINVAL"
    assert world.map_errno(0xFED0_0000, 0, 4 * MIB) == "EINVAL"
    world.map(0xFED0_0000, 0, MIB)
    world.map(0xFEF0_0000, 0, MIB)


def test_memory_that_is_not_there_and_memory_that_may_not_be_locked(running: Running, kind: ContainerKind) -> None:
    world = World(running, kind, memlock=MIB)
    assert world.map_errno(0, 16 * MIB, PAGE) == "EFAULT"
    assert world.map_errno(0, 0, MIB + PAGE) == "ENOMEM"
    assert world.map_errno(0, 16 * MIB - MIB // 2, MIB) == "EFAULT"
    world.map(0, 0, MIB)
    assert world.map_errno(1 << 32, 16 * MIB, PAGE) == "ENOMEM"
    assert world.client.locked_vm() == MIB // PAGE


def test_a_batch_stops_at_the_first_that_fails(world: World) -> None:
    world.map(30 * PAGE, 0, PAGE)
    structs = b"".join(DmaMap(0, 3, HVA + n * PAGE, n * PAGE, PAGE).pack() for n in range(64))
    with pytest.raises(BatchError) as caught:
        world.client.port.ioctl_many(world.container.handle, MAP, structs, 64)
    assert (errorcode[caught.value.errno or 0], caught.value.done) == ("EEXIST", 30)
    assert world.client.locked_vm() == 31
    unmaps = b"".join(DmaUnmap(0, 0, n * PAGE, PAGE).pack() for n in range(64))
    assert world.client.port.ioctl_many(world.container.handle, UNMAP, unmaps, 64) == 64
    assert world.client.port.ioctl_many(world.container.handle, MAP, structs, 64) == 64
    assert world.type1.dma_avail == 65535 - 64
    assert world.unmap(0, 0, ALL) == 64 * PAGE


def test_a_second_group_joins_and_the_last_takes_everything_along(world: World) -> None:
    world.map(0, 0, MIB)
    second = world.open_group(27)
    second.set_container(world.container.handle)
    world.group.unset_container()
    assert world.client.locked_vm() == MIB // PAGE
    second.unset_container()
    assert world.client.locked_vm() == 0
    assert errno_of(lambda: world.map(0, 0, PAGE)) == "EINVAL"


def test_dirty_pages_of_a_container_without_writers(world: World, kind: ContainerKind) -> None:
    world.map(0, 0, MIB)
    if kind == "type1":
        assert errno_of(lambda: world.type1.set_dirty_page_tracking(True)) == "EACCES"
        return
    assert errno_of(lambda: world.type1.query_dirty_bitmap(0, MIB)) == "EINVAL"
    assert errno_of(lambda: world.ioctl(DIRTY, DirtyBitmap(flags=3).pack())) == "EINVAL"
    assert errno_of(lambda: world.type1.unmap_dirty_bitmap(0, MIB)) == "EINVAL"
    world.type1.set_dirty_page_tracking(True)
    assert world.type1.query_dirty_bitmap(0, 2 * MIB) == bytes(64)
    assert errno_of(lambda: world.type1.query_dirty_bitmap(0, MIB // 2)) == "EINVAL"
    assert world.type1.unmap_dirty_bitmap(0, MIB) == bytes(32)
    world.type1.set_dirty_page_tracking(False)
    assert world.client.locked_vm() == 0
