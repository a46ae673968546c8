"""What an sPAPR v1 container is beside what every kind is: a window counted whole, pages pinned singly, one group."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import pytest

from tests.conformance.adapters import Adapter, Client, Running
from tests.conformance.test_spapr_v2 import (
    CREATE,
    GIB,
    HVA,
    KIB,
    MAP,
    MIB,
    PAGE,
    REGISTER,
    REMOVE,
    UNMAP,
    UNREGISTER,
    World,
    errno_of,
)
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, IommuType, SpaprTceInfo
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup

ENABLE, DISABLE = Ioctl.VFIO_IOMMU_ENABLE, Ioctl.VFIO_IOMMU_DISABLE
WINDOW_PAGES = 2 * GIB // PAGE
TABLE_PAGES = 128
"""Of the 32-bit window's table, in hardware and beside it."""

TOPOLOGY = HostTopology(
    groups=(
        GroupSpec(26, (DeviceSpec("0000:01:00.0", "edu"),)),
        GroupSpec(27, (DeviceSpec("0000:02:00.0", "edu"),)),
        GroupSpec(32, ddw=False),
        GroupSpec(35, create_window=False),
        GroupSpec(38, dma32_size=0),
    ),
    containers=("spapr-v1",),
)


def connect(running: Running, client: Client, number: int = 26) -> World:
    port = client.port
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    group = VfioGroup(port, port.open(f"/dev/vfio/{number}"))
    group.set_container(container.handle)
    container.set_iommu(IommuType.VFIO_SPAPR_TCE_IOMMU)
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


def map_arg(iova: int = 0, vaddr: int = HVA, size: int = 4096, *, flags: int = 3, argsz: int = 32) -> bytes:
    return DmaMap(argsz, flags, vaddr, iova, size).pack()


def test_the_host_offers_what_it_was_told_to(world: World) -> None:
    assert [world.container.check_extension(number) for number in (1, 2, 3, 5, 7)] == [0, 1, 0, 1, 0]
    port = world.client.port
    other = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    world.open_group(27).set_container(other.handle)
    assert errno_of(lambda: other.set_iommu(IommuType.VFIO_SPAPR_TCE_v2_IOMMU)) == "ENODEV"


def test_info_says_nothing_of_dynamic_windows(world: World) -> None:
    assert world.container.get_info() == SpaprTceInfo(32, 0, 0, 2 * GIB, 0, 0, 0)


def test_ioctls_of_version_2_do_not_exist(world: World) -> None:
    for cmd in (REGISTER, UNREGISTER, CREATE, REMOVE):
        assert world.errno(cmd, b"") == "ENOTTY"


def test_enable_counts_the_whole_window_and_disable_gives_it_back(world: World) -> None:
    world.container.enable()
    assert world.client.locked_vm() == WINDOW_PAGES
    assert world.errno(ENABLE, b"") == "EBUSY"
    world.container.disable()
    world.container.disable()
    assert world.client.locked_vm() == 0


def test_enable_errors(running: Running) -> None:
    client = running.client(memlock=WINDOW_PAGES * PAGE - PAGE)
    assert connect(running, client, 38).errno(ENABLE, b"") == "EPERM"
    world = connect(running, client)
    assert world.errno(ENABLE, b"") == "ENOMEM"
    assert client.locked_vm() == 0
    assert world.errno(MAP, map_arg()) == "EPERM", "it is not enabled"


def test_every_container_counts_its_own_window(running: Running) -> None:
    client = running.client()
    worlds = [connect(running, client, number) for number in (26, 27)]
    for world in worlds:
        world.container.enable()
    assert client.locked_vm() == 2 * WINDOW_PAGES
    worlds[0].close()
    assert client.locked_vm() == WINDOW_PAGES


def test_one_group_only_but_one_without_dynamic_windows_will_do(running: Running) -> None:
    world = connect(running, running.client(), 32)
    assert errno_of(lambda: world.open_group(27).set_container(world.container.handle)) == "EBUSY"


def test_the_window_is_made_by_the_first_map(world: World) -> None:
    world.container.enable()
    assert errno_of(lambda: world.container.unmap_dma(0, 4096)) == "ENXIO"
    world.container.map_dma(2 * GIB - 4096, HVA, 4096)
    assert world.client.locked_vm() == WINDOW_PAGES + TABLE_PAGES
    world.container.disable()
    assert world.client.locked_vm() == TABLE_PAGES
    assert errno_of(lambda: world.container.unmap_dma(0, 4096)) == "EPERM"
    world.container.enable()
    world.container.unmap_dma(0, 2 * GIB)


def test_map_errors_in_order(world: World) -> None:
    assert world.errno(MAP, b"") == "EPERM", "not enabled"
    world.container.enable()
    assert world.errno(MAP, map_arg()[:31]) == "EFAULT"
    for bad in (map_arg(argsz=31), map_arg(flags=4)):
        assert world.errno(MAP, bad) == "EINVAL"
    assert world.client.locked_vm() == WINDOW_PAGES, "what fails so early makes no window"
    assert world.errno(MAP, map_arg(iova=2 * GIB, size=1, flags=0)) == "ENXIO"
    for bad in (map_arg(size=1), map_arg(vaddr=1), map_arg(vaddr=1 << 40, flags=0), map_arg(1, 1 << 40)):
        assert world.errno(MAP, bad) == "EINVAL"
    assert world.errno(MAP, map_arg(vaddr=1 << 40)) == "EFAULT"
    assert world.errno(MAP, map_arg(0, HVA + 15 * MIB, 2 * MIB)) == "EFAULT", "the second half is not mapped"


def test_a_platform_that_makes_no_windows(running: Running) -> None:
    client = running.client()
    client.memory("ram", MIB, HVA)
    world = connect(running, client, 35)
    world.container.enable()
    assert world.errno(MAP, map_arg()) == "EPERM"


def test_unmap_errors_in_order(world: World) -> None:
    def arg(iova: int, size: int, flags: int = 0, argsz: int = 24) -> bytes:
        return DmaUnmap(argsz, flags, iova, size).pack()

    assert world.errno(UNMAP, b"") == "EPERM"
    world.container.enable()
    world.container.map_dma(0, HVA, 4096)
    assert world.errno(UNMAP, arg(0, 4096)[:20]) == "EFAULT"
    for bad in (arg(0, 4096, argsz=23), arg(4 * GIB, 1, flags=1), arg(0, 1), arg(1, 4096), arg(2 * GIB - 4096, 8192)):
        assert world.errno(UNMAP, bad) == "EINVAL"
    assert world.errno(UNMAP, arg(4 * GIB, 4096)) == "ENXIO"
    world.ioctl(UNMAP, arg(0, 2 * GIB))


@pytest.mark.parametrize("count", [3, 512])
def test_mapping_again_replaces_and_counts_nothing(world: World, count: int) -> None:
    world.container.enable()
    port, handle = world.client.port, world.container.handle
    for shift in (0, PAGE):
        maps = b"".join(map_arg(n * 4096, HVA + shift + n * 4096) for n in range(count))
        assert port.ioctl_many(handle, MAP, maps, count) == count
    assert world.client.locked_vm() == WINDOW_PAGES + TABLE_PAGES
    world.container.unmap_dma(0, count * 4 * KIB)


def test_a_stranger_may_do_nothing_once_it_is_enabled(world: World) -> None:
    world.container.enable()
    stranger = world.running.client().port
    for cmd in (ENABLE, DISABLE, MAP, UNMAP, REGISTER):
        assert errno_of(lambda cmd=cmd: stranger.ioctl(world.container.handle, cmd, b"")) in ("EPERM", "EBADF")  # type: ignore[misc]


def test_the_short_info(world: World) -> None:
    short = world.ioctl(Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO, struct.pack("=IIII", 16, 0, 0, 0) + b"\xaa" * 16)
    assert short == struct.pack("=IIII", 16, 0, 0, 2 * GIB) + b"\xaa" * 16
