"""Files, devices and the end of a client, beyond what the uapi's conformance tests see."""

from __future__ import annotations

from errno import EBUSY, EINVAL, EIO
from itertools import pairwise

import pytest

from tests.host.rig import DEVICE, HVA, MIB, Rig
from vfio_model.errors import ConfigError
from vfio_model.host.group import Group, HostDevice
from vfio_model.host.host import Host
from vfio_model.host.hpa import HpaSpace
from vfio_model.host.layout import DOMAIN_MAGIC, PE_GENERATION, PE_MAGIC
from vfio_model.host.mm import Vma
from vfio_model.host.pending import Pending
from vfio_model.host.table_memory import TableMemory
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.memory.layout import check_header
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.ioctl import SpaprContainer, VfioGroup


def test_areas_carry_their_headers() -> None:
    rig = Rig()
    assert check_header(rig.device.pe.words, PE_MAGIC) == 128
    assert check_header(rig.domain(), DOMAIN_MAGIC) == 16 * MIB


def test_every_change_bumps_the_generation() -> None:
    rig = Rig()
    words, seen = rig.device.pe.words, []
    for change in (
        lambda: rig.port.run(rig.host.freeze(rig.host.groups[26])),
        lambda: rig.host.unfreeze(rig.host.groups[26]),
        lambda: rig.container.tce_remove(0),
        lambda: rig.container.tce_create(12, MIB),
    ):
        change()
        seen.append(words[PE_GENERATION])
    assert seen == sorted(set(seen))


def test_record_offsets_are_never_used_twice() -> None:
    rig = Rig()
    seen = set()
    for _ in range(1200):
        rig.container.tce_remove(0)
        rig.container.tce_create(12, MIB)
        seen.add(rig.device.pe.words[10])
    assert len(seen) == 1200


def test_a_group_that_closes_takes_its_device_along() -> None:
    closed: list[tuple[str, int]] = []

    def opened(group: Group, device: HostDevice) -> int:
        return 77

    def on_close(group: Group, device: HostDevice, token: int) -> None:
        closed.append((device.name, token))

    topology = HostTopology(groups=(GroupSpec(1, (DeviceSpec("a"),)),), domain_bytes=16 * MIB)
    host = Host(topology, on_device_open=opened, on_device_close=on_close)
    port = DirectPort(host)
    container, group = SpaprContainer(port, port.open("/dev/vfio/vfio")), VfioGroup(port, port.open("/dev/vfio/1"))
    group.set_container(container.handle)
    container.set_iommu(7)
    assert group.get_device_fd("a") == 77
    with pytest.raises(OSError) as busy:
        group.get_device_fd("a")
    assert busy.value.errno == EBUSY
    with pytest.raises(OSError) as open_device:
        group.unset_container()
    assert open_device.value.errno == EBUSY
    outcome = host.close(group.handle)
    assert isinstance(outcome, Pending) and outcome.lane_devices == ("a",)
    assert closed == [], "its DMA may still be under way"
    outcome.finish()
    assert closed == [("a", 77)]
    assert host.groups[1].devices["a"].open_count == 0
    assert host.device_closed(77) is None, "it is closed already"


def test_a_device_that_does_not_start_stays_closed() -> None:
    def refuse(group: Group, device: HostDevice) -> int:
        raise OSError(EIO, "no such model")

    host = Host(HostTopology(groups=(GroupSpec(1, (DeviceSpec("a"),)),), domain_bytes=16 * MIB), on_device_open=refuse)
    port = DirectPort(host)
    container, group = SpaprContainer(port, port.open("/dev/vfio/vfio")), VfioGroup(port, port.open("/dev/vfio/1"))
    group.set_container(container.handle)
    container.set_iommu(7)
    with pytest.raises(OSError) as caught:
        group.get_device_fd("a")
    assert caught.value.errno == EIO
    assert host.device("a").open_count == 0
    assert host.device("a").pe.words[9] == 0
    group.unset_container()


def test_a_dead_client_leaves_nothing() -> None:
    rig = Rig(blocks=2)
    rig.map(0, 0, MIB)
    rig.map(2 * MIB, 0, MIB, block=1)
    outcome = rig.host.mm_gone(rig.mm)
    assert isinstance(outcome, Pending) and outcome.lane_devices == (DEVICE,)
    assert rig.mm.locked_vm > 0
    outcome.finish()
    assert rig.mm.locked_vm == 0
    again = DirectPort(rig.host)
    assert again.open("/dev/vfio/26") > rig.group.handle, "handles are never used twice"
    assert rig.host.mm_gone(rig.mm) is None


def test_a_dead_client_frees_what_another_processs_group_walks() -> None:
    rig = Rig()
    topology = HostTopology(groups=(GroupSpec(1), GroupSpec(2)), domain_bytes=16 * MIB)
    host = Host(topology)
    owner, helper = DirectPort(host), DirectPort(host)
    container, group = (
        SpaprContainer(owner, owner.open("/dev/vfio/vfio")),
        VfioGroup(helper, helper.open("/dev/vfio/1")),
    )
    group.set_container(container.handle)
    container.set_iommu(7)
    owner.declare_memory(rig.blocks[0])
    container.register_memory(HVA, MIB)
    owner.exit()
    assert owner.mm.locked_vm == 0
    assert host.groups[1].container is None


def test_undeclared_memory_stays_pinned_and_reachable() -> None:
    rig = Rig()
    rig.map(0, 0)
    rig.port.undeclare_memory(rig.blocks[0])
    assert rig.mm.find(HVA) is None
    rig.map(4096, 4096)
    rig.container.unmap_dma(0, 8192)
    rig.container.unregister_memory(HVA, 4 * MIB)
    with pytest.raises(OSError):
        rig.container.register_memory(HVA, 4 * MIB)


@pytest.mark.parametrize("placement", ["contiguous", "scatter"])
@pytest.mark.parametrize("pages", [1, 2, 3, 17, 1000])
def test_hpa_is_a_bijection_that_reuses_nothing(placement: str, pages: int) -> None:
    space = HpaSpace("scatter" if placement == "scatter" else "contiguous", 4096)
    used: set[int] = set()
    for n in range(3):
        segment = space.place(f"s{n}", pages * 4096 - 100, 4096)
        where = [segment.hpa.to_hpa(page * 4096) for page in range(pages)]
        assert [segment.hpa.to_offset(hpa + 5) for hpa in where] == [page * 4096 + 5 for page in range(pages)]
        assert not used & set(where)
        used |= set(where)
        if placement == "scatter":
            assert all(abs(a - b) != 4096 for a, b in pairwise(where))
        assert segment.hpa.to_offset(segment.hpa.base - 1) == -1
        assert segment.hpa.to_offset(segment.hpa.end) == -1


def test_huge_backing_is_aligned() -> None:
    space = HpaSpace()
    space.place("small", 100, 4096)
    assert space.place("huge", 40 * MIB, 16 * MIB).hpa.base % (16 * MIB) == 0


def test_table_memory_comes_back_whole() -> None:
    memory = TableMemory(memoryview(bytearray(64 * 4096)).cast("Q"), 4096)
    start = memory.free_bytes
    first, second, third = memory.alloc(4096), memory.alloc(5000), memory.alloc(1)
    assert len({first, second, third, 0}) == 4
    for offset, size in ((second, 5000), (first, 4096), (third, 1)):
        memory.free(offset, size)
    assert memory.free_bytes == start
    assert memory.alloc(start) == 4096
    with pytest.raises(OSError):
        memory.alloc(1)


def test_a_mapping_disagrees_with_its_segment() -> None:
    host = Host(HostTopology(domain_bytes=16 * MIB))
    mm, segment = host.create_mm(), host.place_segment("s", MIB, 0x1_0000)
    assert host.place_segment("s", MIB, 4096) is segment
    for vma in (Vma(HVA + 4096, 4096, segment), Vma(HVA, 2 * MIB, segment), Vma(HVA, 0, segment)):
        with pytest.raises(OSError) as caught:
            mm.declare(vma)
        assert caught.value.errno == EINVAL
    with pytest.raises(OSError):
        host.place_segment("s", 2 * MIB, 4096)


@pytest.mark.parametrize(
    ("topology", "where"),
    [
        (HostTopology(host_page_size=5000), "host"),
        (HostTopology(domain_bytes=100), "host"),
        (HostTopology(platform="x86"), "host"),  # type: ignore[arg-type]
        (HostTopology(hpa="random"), "host"),  # type: ignore[arg-type]
        (HostTopology(groups=(GroupSpec(1), GroupSpec(1))), "host"),
        (HostTopology(groups=(GroupSpec(1, (DeviceSpec("a"), DeviceSpec("a"))),)), "host"),
        (HostTopology(groups=(GroupSpec(-1),)), "group -1"),
        (HostTopology(groups=(GroupSpec(7, pgsizes=1 << 16),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, dma32_size=3 << 20),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, dma32_start=4096),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, dma64_start=1 << 40),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, max_windows=3),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, levels=0),)), "group 7"),
        (HostTopology(groups=(GroupSpec(7, iommu="vtd"),)), "group 7"),  # type: ignore[arg-type]
    ],
)
def test_a_topology_that_makes_no_sense_is_refused(topology: HostTopology, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        topology.validate()
    assert caught.value.where == where
