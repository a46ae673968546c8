"""What a container is, of whatever kind and whoever implements the seam.

``test_spapr_v1``, ``test_spapr_v2`` and ``test_type1`` hold what a kind has beside this.

What is tested follows the kernel's own selftests (``tools/testing/selftests``), so far as they are about a container
and its groups:

=========================================================== ==========================================================
selftest                                                    here
=========================================================== ==========================================================
vfio_dma_mapping_test: dma_map_unmap, anonymous, 2M, 1G     ``test_map_unmap``, ``test_map_unmap_by_large_pages``
vfio_dma_mapping_test: unmap_range                          ``test_unmap_range``
vfio_dma_mapping_test: unmap_all                            ``test_unmap_all``
vfio_dma_mapping_test: overflow                             ``test_overflow``
vfio_pci_driver_test: memcpy_success                        ``test_a_dma_reaches_exactly_what_is_mapped``
vfio_pci_driver_test: memcpy_to_unmapped_iova               ``test_dma_to_an_unmapped_iova``
vfio_pci_driver_test: memcpy_from_unmapped_iova             ``test_dma_from_an_unmapped_iova``
vfio_pci_driver_test: send_msi                              ``test_an_interrupt_comes_with_the_dma_before_it``
vfio_pci_driver_test: mix_and_match                         ``test_mix_and_match``
vfio_pci_driver_test: memcpy_storm                          ``test_a_storm_of_dma``
vfio_pci_driver_test: init_remove                           ``test_a_device_is_opened_again_and_again``
vfio_iommufd_setup_test: bind and attach errors             ``test_a_group_in_use``, ``test_a_group_that_does_not_fit``,
                                                            ``test_a_device_needs_a_container``
iommufd: ioas_area_destroy, ioas_destroy, simple_close      ``test_release_in_any_order``
iommufd: area, unmap_fully_contained_areas                  ``test_what_an_unmap_may_take``, ``test_overlaps``
iommufd: all_aligns                                         ``test_alignment``
iommufd: ro_unshare and permissions                         ``test_permission``
iommufd: vfio_compat map, get_info, simple_ioctls           ``test_what_is_asked_of_any_kind``, ``test_bad_arguments``
iommufd: dirty tracking, get_dirty_bitmap                   ``test_type1``: ``test_dirty_bitmap``; a bitmap that is read
                                                            is cleared: this uapi has no way to leave it (no_clear)
=========================================================== ==========================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import pytest

from tests.conformance.adapters import EXPECTED, Adapter, Running, adapters
from tests.conformance.container_kinds import (
    BEYOND,
    DEVICES,
    GIB,
    HVA,
    KINDS,
    MAP,
    MIB,
    PAGE,
    RAM,
    TOP,
    UNMAP,
    UNMAP_ALL,
    Device,
    Kind,
    World,
    errno_of,
)
from tests.conformance.live_host import LiveHosts
from vfio_model.devices.dma_burst import regs
from vfio_model.errors import PeerLost
from vfio_model.memory.ram import RAMBlock
from vfio_model.uapi.containers import CONTAINER_KINDS, IOMMU_TYPES
from vfio_model.uapi.vfio import DmaMap, DmaUnmap, Ioctl, PciIrq
from vfio_model.vfio.ioctl import BatchError, SpaprContainer, VfioGroup

PATTERN = 0x1122334455667788


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    found: Kind = KINDS[request.param]
    return found


@pytest.fixture
def running(adapter: Adapter, kind: Kind) -> Iterator[Running]:
    with adapter(kind.topology) as host:
        yield host


@pytest.fixture
def world(running: Running, kind: Kind) -> World:
    """A container that is ready, and has its table: what is locked changes with what is mapped alone."""
    client = running.client()
    world = World(running, client, kind)
    world.ram = client.memory("ram", RAM, HVA, 2 * MIB)
    world.start()
    world.map(0, 0)
    world.unmap(0)
    return world


def word(ram: RAMBlock, offset: int) -> int:
    return int.from_bytes(ram.view[offset : offset + 8], "little")


def test_every_kind_runs_over_every_adapter(request: pytest.FixtureRequest, live_hosts: LiveHosts) -> None:
    """What silently drops out would not be missed."""
    assert set(adapters(live_hosts)) == set(EXPECTED) == {"direct", "wire", "inline"}
    assert set(KINDS) == set(CONTAINER_KINDS)
    run: dict[str, set[tuple[str, str]]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.path == request.path and "adapter" in item.fixturenames:
            params = item.callspec.params
            run.setdefault(item.originalname, set()).add((str(params["adapter"]), str(params["kind"])))
    every = {(adapter, kind) for adapter in EXPECTED for kind in KINDS}
    assert len(run) > 20 and all(found == every for found in run.values())


# Files, groups, devices


def test_what_is_asked_of_any_kind(running: Running, kind: Kind) -> None:
    port = running.client().port
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    assert container.get_api_version() == 0
    offered = [name for name, number in IOMMU_TYPES.items() if container.check_extension(number)]
    assert set(offered) == set(kind.topology.containers)
    assert errno_of(lambda: container.set_iommu(IOMMU_TYPES[kind.name])) == "EINVAL", "no group yet"
    assert errno_of(lambda: container.map_dma(0, HVA, PAGE)) == "EINVAL", "no type yet"
    VfioGroup(port, port.open("/dev/vfio/26")).set_container(container.handle)
    assert errno_of(lambda: container.set_iommu(99)) == "ENODEV"
    other = next(number for name, number in IOMMU_TYPES.items() if name not in kind.topology.containers)
    assert errno_of(lambda: container.set_iommu(other)) == "ENODEV"
    container.set_iommu(IOMMU_TYPES[kind.name])
    assert errno_of(lambda: container.set_iommu(IOMMU_TYPES[kind.name])) == "EINVAL", "it has a type already"
    assert errno_of(lambda: port.ioctl(container.handle, 0x3BFF, bytes(40))) == "ENOTTY"


def test_open_names_only_what_exists(world: World) -> None:
    port = world.client.port
    for path in ("/dev/vfio/99", "/dev/vfio/026", "/etc/passwd"):
        assert errno_of(lambda path=path: port.open(path)) == "ENOENT"  # type: ignore[misc]


def test_a_group_in_use(world: World) -> None:
    port, handle = world.client.port, world.container.handle
    assert errno_of(lambda: port.open("/dev/vfio/26")) == "EBUSY"
    assert errno_of(lambda: world.group.set_container(handle)) == "EINVAL"
    other = world.open_group(27)
    assert errno_of(lambda: other.set_container(0xDEAD)) == "EBADF"
    assert errno_of(lambda: other.set_container(world.group.handle)) == "EBADFD"
    assert errno_of(other.unset_container) == "EINVAL"
    assert (world.group.get_status(), other.get_status()) == (3, 1)
    world.device()
    assert errno_of(world.group.unset_container) == "EBUSY"
    port.close(other.handle)
    assert errno_of(other.get_status) == "EBADF"
    world.open_group(27)


def test_a_group_that_does_not_fit(world: World) -> None:
    without, unviable = world.open_group(31), world.open_group(33)
    assert errno_of(lambda: unviable.set_container(world.container.handle)) == "EPERM"
    assert errno_of(lambda: without.set_container(world.container.handle)) in ("ENODEV", "EINVAL", "EBUSY")
    assert not without.get_status() & 2 and not unviable.get_status()


def test_a_device_needs_a_container(running: Running, kind: Kind) -> None:
    port = running.client().port
    container = SpaprContainer(port, port.open("/dev/vfio/vfio"))
    group = VfioGroup(port, port.open("/dev/vfio/26"))
    assert errno_of(lambda: group.get_device_fd(DEVICES[26])) == "EINVAL", "in no container"
    group.set_container(container.handle)
    assert errno_of(lambda: group.get_device_fd(DEVICES[26])) == "EINVAL", "of no type"
    container.set_iommu(IOMMU_TYPES[kind.name])
    assert errno_of(lambda: group.get_device_fd("0000:09:00.0")) == "ENODEV"
    assert errno_of(lambda: group.get_device_fd(DEVICES[27])) == "ENODEV", "of another group"
    device = Device(port.take_device(group.get_device_fd(DEVICES[26])))
    assert device.write(0) is False, "nothing is mapped"


def test_a_device_is_opened_again_and_again(world: World) -> None:
    world.map(0, 0)
    for number in range(1, 4):
        device = world.device()
        assert device.write(0, number) and word(world.ram, 0) == number
        device.connection.close()


def test_the_last_group_takes_everything_along(world: World) -> None:
    world.map(0, 0, RAM)
    world.group.unset_container()
    assert world.locked() == 0
    assert world.map_errno(0, 0) == "EINVAL", "of no type any more"
    world.group.set_container(world.container.handle)
    world.container.set_iommu(IOMMU_TYPES[world.kind.name])
    world.start()
    assert world.device().write(0) is False
    world.map(0, 0)


def test_release_in_any_order(running: Running, kind: Kind) -> None:
    client = running.client()
    client.memory("ram", RAM, HVA)
    for order in permutations(("device", "group", "container")):
        world = World(running, client, kind)
        world.start()
        world.map(0, 0, RAM)
        device = world.device()
        assert device.write(RAM - 8)
        for what in order:
            if what == "device":
                device.connection.close()
            else:
                client.port.close(world.group.handle if what == "group" else world.container.handle)
            if what == "group":
                assert not reaches(device), "its devices are closed with it"
            closed = order[: order.index(what) + 1]
            assert (client.locked_vm() == 0) is ("group" in closed), "the container stays as long as it has a group"


def reaches(device: Device) -> bool:
    try:
        return device.write(0)
    except PeerLost:
        return False


def test_two_containers(running: Running, kind: Kind) -> None:
    client = running.client()
    ram = client.memory("ram", RAM, HVA)
    worlds = [World(running, client, kind, number) for number in (26, 27)]
    for number, world in enumerate(worlds):
        world.start()
        world.map(0, number * PAGE)
    devices = [world.device() for world in worlds]
    assert [device.write(0, 7 + number) for number, device in enumerate(devices)] == [True, True]
    assert [word(ram, 0), word(ram, PAGE)] == [7, 8]
    worlds[0].unmap(0)
    assert [device.write(0, 9) for device in devices] == [False, True]
    devices[0].connection.close()
    client.port.close(worlds[0].container.handle)
    client.port.close(worlds[0].group.handle)
    assert client.locked_vm() > 0 and devices[1].read(0) == 9


# Map, unmap, and what the device reaches


def test_map_unmap(world: World) -> None:
    device, before = world.device(), world.locked()
    for size in (PAGE, 64 * 1024, 2 * MIB, RAM):
        for iova in (0, 512 * MIB, world.kind.last + 1 - size):
            world.map(iova, 0, size)
            assert world.locked() - before == (size // PAGE if world.kind.locks_pages else 0)
            assert device.write(iova, iova ^ size) and device.write(iova + size - 8, iova)
            assert word(world.ram, size - 8) == iova
            world.unmap(iova, size)
            assert not device.write(iova) and not device.write(iova + size - 8)
            assert world.locked() == before


@pytest.mark.parametrize("size", [2 * MIB, GIB])
def test_map_unmap_by_large_pages(running: Running, kind: Kind, size: int) -> None:
    client = running.client()
    ram = client.memory("ram", size, HVA, size)
    world = World(running, client, kind)
    world.start(size)
    world.map(GIB, 0, size)
    device, locked = world.device(), world.locked()
    for offset in (0, size // 2 - 8, size - 8):
        assert device.write(GIB + offset, offset + 1) and word(ram, offset) == offset + 1
    assert not device.write(GIB - 8) and not device.write(GIB + size)
    world.unmap(GIB, size)
    assert locked - world.locked() == (size // PAGE if kind.locks_pages else 0)
    assert [device.write(GIB + offset) for offset in (0, size // 2, size - 8)] == [False] * 3


def test_a_dma_reaches_exactly_what_is_mapped(world: World) -> None:
    world.map(MIB, 5 * PAGE, 2 * PAGE)
    device = world.device()
    reached = [device.write(MIB + at, PATTERN + at) for at in (-8, 0, PAGE - 8, PAGE, 2 * PAGE - 8, 2 * PAGE)]
    assert reached == [False, True, True, True, True, False]
    expected = bytearray(RAM)
    for at in (0, PAGE - 8, PAGE, 2 * PAGE - 8):
        expected[5 * PAGE + at : 5 * PAGE + at + 8] = (PATTERN + at).to_bytes(8, "little")
    assert world.ram.view == expected
    assert device.read(MIB + PAGE) == PATTERN + PAGE
    assert not device.write(2 * MIB) and not device.write(TOP)


def test_dma_to_an_unmapped_iova(world: World) -> None:
    device = world.device()
    assert not device.write(0)
    world.map(0, 0, 2 * PAGE)
    assert device.write(PAGE, 1)
    world.unmap(0, 2 * PAGE)
    assert not device.write(PAGE, 2) and word(world.ram, PAGE) == 1
    assert not device.write(2 * MIB)


def test_dma_from_an_unmapped_iova(world: World) -> None:
    world.ram.view[:8] = PATTERN.to_bytes(8, "little")
    device = world.device()
    assert device.read(0) is None
    world.map(0, 0)
    assert device.read(0) == PATTERN
    world.unmap(0)
    assert device.read(0) is None and device.get(regs.DATA) == 0


def test_an_interrupt_comes_with_the_dma_before_it(world: World) -> None:
    world.map(0, 0)
    device, seen = world.device(), list[int]()
    device.connection.set_irqs(PciIrq.VFIO_PCI_MSI_IRQ_INDEX, [lambda: seen.append(word(world.ram, 0))])
    for number in (1, 2):
        device.set(regs.PATTERN, number)
        assert device.run(0, regs.COMMAND_WRITE | regs.COMMAND_IRQ) == 1
        world.client.settle()
        assert seen == list(range(1, number + 1))
        device.set(regs.STATUS, regs.STATUS_DONE)


def test_mix_and_match(world: World) -> None:
    world.map(0, 0)
    device, rung = world.device(), list[int]()
    device.connection.set_irqs(PciIrq.VFIO_PCI_MSI_IRQ_INDEX, [lambda: rung.append(1)])
    for number in range(1, 6):
        assert device.write(0, number) and device.read(0) == number
        assert not device.write(MIB) and device.read(MIB) is None
        assert device.run(MIB, regs.COMMAND_WRITE | regs.COMMAND_IRQ) == 0
        device.set(regs.STATUS, regs.STATUS_DONE)
        world.client.settle()
        assert len(rung) == number
    assert word(world.ram, 0) == 5


def test_a_storm_of_dma(world: World) -> None:
    world.map(0, 0, RAM)
    device = world.device()
    device.set(regs.PATTERN, PATTERN)
    pages = RAM // PAGE
    assert device.run(0, regs.COMMAND_WRITE | regs.COMMAND_BATCH, count=4 * pages, stride=PAGE // 4) == 4 * pages
    assert all(word(world.ram, page * PAGE) == PATTERN for page in range(pages))
    world.unmap(0, RAM)
    assert device.run(0, regs.COMMAND_WRITE, count=100, stride=PAGE) == 0


def test_permission(world: World) -> None:
    world.map(0, 0, flags=1)
    world.map(PAGE, PAGE, flags=2)
    device = world.device()
    assert device.read(0) == 0 and not device.write(0)
    assert device.write(PAGE, PATTERN) and device.read(PAGE) is None
    assert (word(world.ram, 0), word(world.ram, PAGE)) == (0, PATTERN)
    assert world.map_errno(2 * PAGE, 0, flags=0) == "EINVAL"


def test_overlaps(world: World) -> None:
    world.map(MIB, 0, 4 * PAGE)
    device = world.device()
    for iova, pages in ((MIB, 4), (MIB + PAGE, 1), (MIB - PAGE, 2), (MIB + 3 * PAGE, 2), (MIB - PAGE, 6)):
        if world.kind.overwrites:
            world.map(iova, MIB, pages * PAGE)
            assert device.write(iova, iova) and word(world.ram, MIB) == iova
        else:
            locked = world.locked()
            assert world.map_errno(iova, MIB, pages * PAGE) == "EEXIST"
            assert device.write(MIB, iova) and word(world.ram, 0) == iova
            assert world.locked() == locked and not device.write(MIB - PAGE) and not device.write(MIB + 4 * PAGE)
    world.map(MIB + 5 * PAGE, 0)
    world.map(MIB - 2 * PAGE, 0)


def test_unmap_range(world: World) -> None:
    for number in range(8):
        world.map(number * MIB, number * PAGE, 2 * PAGE)
    device, before = world.device(), world.locked()
    world.unmap(2 * MIB, 4 * MIB)
    reached = [device.write(number * MIB + PAGE) for number in range(8)]
    assert reached == [True] * 2 + [False] * 4 + [True] * 2
    assert before - world.locked() == (8 if world.kind.locks_pages else 0)
    world.unmap(2 * MIB, 4 * MIB)
    world.unmap(0, 8 * MIB)
    assert not any(device.write(number * MIB) for number in range(8))


def test_unmap_all(world: World) -> None:
    iovas, before = (0, 3 * PAGE, GIB, world.kind.last + 1 - PAGE), world.locked()
    for iova in iovas:
        world.map(iova, 0)
    device = world.device()
    assert all(device.write(iova) for iova in iovas)
    if world.kind.name.startswith("spapr"):
        assert world.unmap_errno(0, 0, UNMAP_ALL) == "EINVAL"
        world.unmap(0, world.kind.last + 1)
    else:
        assert world.unmap_errno(0, PAGE, UNMAP_ALL) == "EINVAL"
        assert world.unmap(0, 0, UNMAP_ALL) == len(iovas) * PAGE
        assert world.unmap(0, 0, UNMAP_ALL) == 0
    assert not any(device.write(iova) for iova in iovas)
    assert world.locked() == before


def test_what_an_unmap_may_take(world: World) -> None:
    world.map(MIB, 0, 4 * PAGE)
    device = world.device()
    if world.kind.splits:
        world.unmap(MIB + PAGE, PAGE)
        world.unmap(MIB - PAGE, 2 * PAGE)
        assert [device.write(MIB + page * PAGE) for page in range(4)] == [False, False, True, True]
        world.map(MIB, 0)
        assert device.write(MIB)
        return
    if world.kind.name == "type1v2":
        for iova, pages in ((MIB, 1), (MIB + PAGE, 1), (MIB + PAGE, 3), (MIB - PAGE, 2), (MIB + 3 * PAGE, 9)):
            assert world.unmap_errno(iova, pages * PAGE) == "EINVAL"
    else:
        assert world.unmap(MIB + PAGE, 3 * PAGE) == 0, "it begins inside of a mapping"
    assert all(device.write(MIB + page * PAGE) for page in range(4))
    whole = PAGE if world.kind.name == "type1" else 4 * PAGE
    assert world.unmap(MIB, whole) == 4 * PAGE, "the first version takes a mapping whose first page is named"
    assert not any(device.write(MIB + page * PAGE) for page in range(4))


def test_mappings_come_back_in_any_order(world: World) -> None:
    before, device = world.locked(), world.device()
    for start in range(8):
        for number in range(8):
            world.map(number * 3 * PAGE, number * PAGE)
        for number in range(8):
            iova = (start + 3 * number) % 8 * 3 * PAGE
            world.unmap(iova)
            assert not device.write(iova)
        assert world.locked() == before


# What is refused


def test_overflow(world: World) -> None:
    kind, before, device = world.kind, world.locked(), world.device()
    end = kind.last + 1 - PAGE
    behind = kind.errno(spapr="EINVAL", type1="EOVERFLOW")
    world.map(end, 0)
    assert device.write(end + PAGE - 8)
    assert world.map_errno(end + PAGE - 2 * PAGE, 0, 3 * PAGE) == behind
    assert world.unmap_errno(end, 2 * PAGE) == behind
    for iova, size in ((TOP, 2 * PAGE), (2 * PAGE, TOP), (TOP, TOP)):
        expected = kind.errno(spapr="ENXIO" if iova == TOP else "EINVAL", type1="EOVERFLOW")
        assert world.map_errno(iova, 0, size) == world.unmap_errno(iova, size) == expected
    vaddr = DmaMap(32, 3, TOP, 0, 2 * PAGE).pack()
    assert errno_of(lambda: world.ioctl(MAP, vaddr)) == ("EOVERFLOW" if kind.locks_pages else kind.no_memory)
    assert device.write(end)
    world.unmap(end)
    assert world.locked() == before


def test_alignment(world: World) -> None:
    before = world.locked()
    for shift in range(12):
        low = 1 << shift
        for iova, offset, size in ((low, 0, PAGE), (0, low, PAGE), (0, 0, PAGE + low), (0, 0, low), (low, low, low)):
            assert world.map_errno(iova, offset, size) == "EINVAL"
        for iova, size in ((low, PAGE), (0, low), (0, PAGE + low), (low, PAGE - low)):
            assert world.unmap_errno(iova, size) == "EINVAL"
    assert world.locked() == before


def test_bad_arguments(world: World) -> None:
    assert world.map_errno(0, 0, flags=0) == world.map_errno(0, 0, flags=8) == "EINVAL"
    assert world.unmap_errno(0, flags=8) == "EINVAL"
    for cmd, whole in ((MAP, DmaMap(32, 3, HVA, 0, PAGE).pack()), (UNMAP, DmaUnmap(24, 0, 0, PAGE).pack())):
        short = (len(whole) - 1).to_bytes(4, "little") + whole[4:]
        assert errno_of(lambda: world.ioctl(cmd, whole[:-1])) == "EFAULT"  # noqa: B023
        assert errno_of(lambda: world.ioctl(cmd, short)) == "EINVAL"  # noqa: B023
    assert world.device().write(0) is False


def test_memory_that_is_not_there(world: World) -> None:
    before, device = world.locked(), world.device()
    for vaddr, size in ((BEYOND, PAGE), (HVA + RAM, PAGE), (HVA + RAM - PAGE, 2 * PAGE), (HVA - PAGE, 2 * PAGE)):
        arg = DmaMap(32, 3, vaddr, 0, size).pack()
        assert errno_of(lambda: world.ioctl(MAP, arg)) == world.kind.no_memory  # noqa: B023
        assert not device.write(0) and not device.write(PAGE), "what failed half way is undone"
    assert world.locked() == before


def test_the_memlock_limit(running: Running, kind: Kind) -> None:
    pages = {"spapr-v1": 2 * GIB // 65536 - 1, "spapr-v2": RAM // 65536 - 1}.get(kind.name, RAM // PAGE - 1)
    client = running.client(memlock=pages * kind.topology.host_page_size)
    client.memory("ram", RAM, HVA)
    world = World(running, client, kind)

    def lock_all() -> None:
        world.start()
        world.map(0, 0, RAM)

    assert errno_of(lock_all) == "ENOMEM"
    assert client.locked_vm() == 0
    assert not world.device().write(0)


@pytest.mark.parametrize("count", [3, 512])
def test_a_batch_stops_at_its_first_failure(world: World, count: int) -> None:
    port, handle, before = world.client.port, world.container.handle, world.locked()
    good = [DmaMap(32, 3, HVA + n * PAGE, n * PAGE, PAGE).pack() for n in range(count)]
    bad = DmaMap(32, 3, HVA, count * PAGE + 1, PAGE).pack()
    with pytest.raises(BatchError) as caught:
        port.ioctl_many(handle, MAP, b"".join([*good, bad, good[0]]), count + 2)
    assert (caught.value.errno, caught.value.done) == (22, count)
    device = world.device()
    assert device.run(0, regs.COMMAND_WRITE, count=count + 1, stride=PAGE) == count
    clear = b"".join(DmaUnmap(24, 0, n * PAGE, PAGE).pack() for n in range(count))
    assert port.ioctl_many(handle, UNMAP, clear, count) == count
    assert device.run(0, regs.COMMAND_WRITE, count=count, stride=PAGE) == 0
    assert world.locked() == before


def test_another_process_may_not(world: World) -> None:
    stranger = world.running.client().port
    for cmd in (MAP, UNMAP, Ioctl.VFIO_IOMMU_SPAPR_TCE_GET_INFO):
        with pytest.raises(OSError):
            stranger.ioctl(world.container.handle, cmd, b"")
