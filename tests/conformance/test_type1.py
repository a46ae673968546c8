"""What a type 1 container is beside what every kind is: IOVA ranges, several groups, dirty pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.conformance.adapters import Adapter, Running
from tests.conformance.container_kinds import HVA, KINDS, MAP, MIB, PAGE, TYPE1, UNMAP, Kind, World, errno_of
from vfio_model.devices.dma_burst import regs
from vfio_model.uapi.containers import IOMMU_TYPES
from vfio_model.uapi.vfio import DirtyBitmap, DmaMap, DmaUnmap, Ioctl
from vfio_model.vfio.ioctl import ContainerFile, VfioGroup
from vfio_model.vfio.type1 import Type1

DIRTY = Ioctl.VFIO_IOMMU_DIRTY_PAGES
START, STOP, GET = 1, 2, 4
RAM = 16 * MIB
TOPOLOGY = replace(TYPE1, iova_ranges=((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 64) - 1)))


class Type1World(World):
    """With its user's side, and 16 MiB of memory in pages of 2 MiB."""

    def __init__(self, running: Running, kind: Kind, memlock: int | None = None) -> None:
        super().__init__(running, running.client(memlock), kind)
        self.ram = self.client.memory("ram", RAM, HVA, 2 * MIB)
        self.type1 = Type1(self.container, host_page_size=PAGE, kind=kind.name)
        self.type1.start()

    def dirty(self, iova: int, size: int) -> set[int]:
        return bits(self.type1.query_dirty_bitmap(iova, size))


def bits(bitmap: bytes) -> set[int]:
    number = int.from_bytes(bitmap, "little")
    return {at for at in range(number.bit_length()) if number >> at & 1}


@pytest.fixture
def running(adapter: Adapter) -> Iterator[Running]:
    with adapter(TOPOLOGY) as host:
        yield host


@pytest.fixture(params=["type1v2", "type1"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def world(running: Running, kind: Kind) -> Type1World:
    return Type1World(running, kind)


@pytest.fixture
def tracked(running: Running) -> Type1World:
    """Of the second version, with 4 MiB mapped at 0 as one and 1 MiB far up."""
    world = Type1World(running, KINDS["type1v2"])
    world.map(0, 0, 4 * MIB)
    world.map(1 << 59, 8 * MIB, MIB)
    return world


def test_the_type_belongs_to_the_container(running: Running, kind: Kind) -> None:
    port = running.client().port
    container = ContainerFile(port, port.open("/dev/vfio/vfio"))
    assert [container.check_extension(number) for number in (1, 3, 9, 10, 2, 7, 5)] == [1, 1, 1, 1, 0, 0, 0]
    group = VfioGroup(port, port.open("/dev/vfio/31"))
    group.set_container(container.handle)
    assert errno_of(lambda: container.set_iommu(IOMMU_TYPES[kind.name])) == "ENODEV", "the group has no IOMMU"


def test_the_hole_in_the_iova_ranges(world: Type1World) -> None:
    assert [(w.min_iova, w.max_iova) for w in world.type1.windows] == [(0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 64) - 1)]
    assert world.map_errno(0xFEE0_0000, 0) == "EINVAL"
    assert world.map_errno(0xFED0_0000, 0, 4 * MIB) == "EINVAL"
    world.map(0xFED0_0000, 0, MIB)
    world.map(0xFEF0_0000, 0, MIB)


def test_what_is_locked_is_looked_at_before_what_is_there(running: Running, kind: Kind) -> None:
    world = Type1World(running, kind, memlock=MIB)
    assert world.map_errno(0, RAM) == "EFAULT"
    assert world.map_errno(0, 0, MIB + PAGE) == "ENOMEM"
    assert world.map_errno(0, RAM - MIB // 2, MIB) == "EFAULT"
    world.map(0, 0, MIB)
    assert world.map_errno(1 << 32, RAM) == "ENOMEM"
    assert world.locked() == MIB // PAGE


def test_a_batch_of_mappings_of_which_one_is_there(world: Type1World) -> None:
    world.map(30 * PAGE, 0)
    structs = b"".join(DmaMap(0, 3, HVA + n * PAGE, n * PAGE, PAGE).pack() for n in range(64))
    port, handle = world.client.port, world.container.handle
    assert errno_of(lambda: port.ioctl_many(handle, MAP, structs, 64)) == "EEXIST"
    assert world.locked() == 31
    unmaps = b"".join(DmaUnmap(0, 0, n * PAGE, PAGE).pack() for n in range(64))
    assert port.ioctl_many(handle, UNMAP, unmaps, 64) == 64
    assert port.ioctl_many(handle, MAP, structs, 64) == 64
    assert world.type1.dma_avail == 65535 - 64


def test_a_second_group_joins(world: Type1World) -> None:
    world.map(0, 0, MIB)
    second = world.open_group(27)
    second.set_container(world.container.handle)
    assert world.device().write(0, 5)
    world.number, world.group = 27, second
    assert world.device().read(0) == 5
    world.client.port.close(second.handle)
    assert world.locked() == MIB // PAGE


def test_the_first_version_tracks_nothing(running: Running) -> None:
    world = Type1World(running, KINDS["type1"])
    for flag in (START, STOP):
        assert errno_of(lambda: world.ioctl(DIRTY, DirtyBitmap(flags=flag).pack())) == "EACCES"  # noqa: B023
    assert errno_of(lambda: world.type1.query_dirty_bitmap(0, MIB)) == "EACCES"


def test_dirty_bitmap(tracked: Type1World) -> None:
    device = tracked.device()
    assert device.write(0)
    tracked.type1.set_dirty_page_tracking(True)
    assert tracked.dirty(0, 4 * MIB) == set(), "written before"
    for page in (1, 7, 1023):
        assert device.write(page * PAGE + 8)
    assert device.read(100 * PAGE) == 0
    assert not device.write(4 * MIB), "nothing is mapped there"
    assert device.run((1 << 59) + MIB - 4 * PAGE, regs.COMMAND_WRITE, count=3, stride=PAGE) == 3
    assert tracked.dirty(0, 8 * MIB) == {1, 7, 1023}
    assert tracked.dirty(0, 4 * MIB) == set(), "what was read is clean"
    assert tracked.dirty(1 << 59, MIB) == {252, 253, 254}
    assert device.write(7 * PAGE)
    assert tracked.dirty(0, 4 * MIB) == {7}


def test_dirty_bitmap_with_the_unmap(tracked: Type1World) -> None:
    device = tracked.device()
    tracked.type1.set_dirty_page_tracking(True)
    assert device.write(3 * PAGE) and device.write(512 * PAGE)
    assert bits(tracked.type1.unmap_dirty_bitmap(0, 4 * MIB)) == {3, 512}
    assert not device.write(3 * PAGE)
    tracked.map(0, 0, 4 * MIB)
    assert tracked.dirty(0, 4 * MIB) == set()


def test_dirty_bitmap_errors(tracked: Type1World) -> None:
    def get(iova: int, size: int) -> str:
        return errno_of(lambda: tracked.type1.query_dirty_bitmap(iova, size))

    assert get(0, 4 * MIB) == "EINVAL", "nothing is tracked"
    assert errno_of(lambda: tracked.type1.unmap_dirty_bitmap(0, 4 * MIB)) == "EINVAL"
    for flags in (0, START | STOP, START | GET, 8):
        assert errno_of(lambda: tracked.ioctl(DIRTY, DirtyBitmap(flags=flags).pack())) == "EINVAL"  # noqa: B023
    tracked.type1.set_dirty_page_tracking(True)
    tracked.type1.set_dirty_page_tracking(True)
    for iova, size in ((0, 2 * MIB), (PAGE, 8 * MIB), (8, 4 * MIB), ((1 << 64) - PAGE, 2 * PAGE)):
        assert get(iova, size) in ("EINVAL", "EOVERFLOW"), (iova, size)
    tracked.type1.set_dirty_page_tracking(False)
    tracked.type1.set_dirty_page_tracking(False)
    assert get(0, 4 * MIB) == "EINVAL"
