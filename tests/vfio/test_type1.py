"""A pseries guest over a type 1 container: the host's table is the guest's view, whatever the guest does."""

from __future__ import annotations

from errno import EBUSY, EEXIST, EINVAL

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.acceleration import accelerate, kvm
from tests.vfio.direct_chain import DEVICE, HVA, LIOBN0, LIOBN1, MIB, Chain, FaultyPort
from vfio_model.errors import VfioModelError
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.host import Host
from vfio_model.host.topology import DeviceSpec, GroupSpec, HostTopology
from vfio_model.host.type1 import Type1Container
from vfio_model.iommu.spapr.ddw import DmaOptions
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Iova
from vfio_model.trace import ListTrace
from vfio_model.uapi.containers import ContainerKind
from vfio_model.uapi.vfio import Ioctl
from vfio_model.vfio import type1
from vfio_model.vfio.connect import connect_container
from vfio_model.vfio.direct import DirectPort
from vfio_model.vfio.dirty import DirtySync
from vfio_model.vfio.dirty_source import ContainerDirty
from vfio_model.vfio.ioctl import ContainerFile
from vfio_model.vfio.type1 import Type1, Type1Queue

pytestmark = pytest.mark.machine

H_SUCCESS = 0
RAM = 8 * MIB
DMA64 = 1 << 59


class Type1Chain(Chain):
    """A chain whose host offers ``kind`` alone and has pages of 4 KiB."""

    def __init__(
        self,
        kind: ContainerKind = "type1v2",
        *,
        backing: int = 2 * MIB,
        host_page: int = 4096,
        iova_ranges: tuple[tuple[int, int], ...] = ((0, (1 << 64) - 1),),
    ) -> None:
        self.trace = ListTrace()
        self.ram = RAMBlock("ram", bytearray(RAM), page_size=backing, hva=HVA)
        self.machine = PseriesMachine(
            [self.ram], PseriesOptions(dma=DmaOptions(dma_win_size=4 * MIB)), trace=self.trace
        )
        group = GroupSpec(26, (DeviceSpec(DEVICE, "edu"),))
        self.host = Host(
            HostTopology(
                (group,),
                host_page_size=host_page,
                domain_bytes=16 * MIB,
                containers=(kind,),
                iova_ranges=iova_ranges,
            )
        )
        self.direct = DirectPort(self.host, self.host.create_mm(None, "guest"))
        self.port = FaultyPort(self.direct)
        self.port.declare_memory(self.ram)
        self.kvm = accelerate(self.machine, self.port, trace=self.trace) if kvm() else None
        self.container = connect_container(
            self.port,
            "/dev/vfio/26",
            self.machine.system,
            self.machine.phb().address_space,
            host_page_size=host_page,
            trace=self.trace,
            kvm=self.kvm,
        )

    @property
    def driver(self) -> Type1Container:
        container = self.host.groups[26].container
        assert container is not None and isinstance(container.driver, Type1Container)
        return container.driver

    def host_view(self) -> dict[int, tuple[int, int]]:
        """As :meth:`guest_view`, from the host's table."""
        vma = self.direct.mm.find(HVA)
        assert vma is not None
        seen = {}
        for iova, size, entry in self.driver.table.mapped():
            for part in range(0, size, 4096):
                seen[iova + part] = (vma.segment.hpa.to_offset((entry & ~7) + part), entry & 3)
        return seen


@pytest.fixture(params=["type1v2", "type1"])
def chain(request: pytest.FixtureRequest) -> Type1Chain:
    return Type1Chain(request.param)


def test_the_container_is_of_the_kind_that_the_host_has(chain: Type1Chain) -> None:
    assert chain.container is not None
    backend = chain.container.backend
    assert isinstance(backend, Type1) and backend.kind in ("type1v2", "type1")
    assert backend.pgsizes == 4096 | 2 * MIB | 1 << 30
    assert [(window.min_iova, window.max_iova) for window in backend.windows] == [(0, (1 << 64) - 1)]
    assert (backend.dma_max_mappings, backend.dma_avail) == (65535, 65535)
    chain.put(0, 3)
    assert backend.dma_avail == 65534


def test_an_entry_is_mapped_overwritten_and_unmapped(chain: Type1Chain) -> None:
    assert chain.put(0x3000, 0x5000 | 3) == H_SUCCESS
    assert chain.host_view() == chain.guest_view() == {0x3000: (0x5000, 3)}
    assert chain.put(0x3000, 0x7000 | 1) == H_SUCCESS
    assert chain.host_view() == chain.guest_view() == {0x3000: (0x7000, 1)}
    assert chain.mm == 1
    assert chain.put(0x3000, 0) == H_SUCCESS
    assert chain.host_view() == {} and chain.mm == 0


def test_a_list_of_512_entries_is_one_message_and_overwriting_it_three(chain: Type1Chain) -> None:
    chain.port.calls.clear()
    assert chain.indirect(0, [(n + 1) * 4096 | 3 for n in range(512)]) == H_SUCCESS
    assert chain.port.calls == [(Ioctl.VFIO_IOMMU_MAP_DMA, 512)]
    assert chain.host_view() == chain.guest_view() and len(chain.host_view()) == 512
    chain.port.calls.clear()
    assert chain.indirect(100 * 4096, [(n + 9) * 4096 | 3 for n in range(512)]) == H_SUCCESS
    assert [count for _, count in chain.port.calls] == [512, 512, 512]
    assert chain.host_view() == chain.guest_view() and len(chain.host_view()) == 612
    chain.port.calls.clear()
    assert chain.stuff(0, 0, 512) == H_SUCCESS
    assert chain.stuff(512 * 4096, 0, 512) == H_SUCCESS
    assert len(chain.port.calls) == 2
    assert chain.host_view() == {} and chain.mm == 0


def test_overwriting_in_the_middle_of_a_list(chain: Type1Chain) -> None:
    chain.put(20 * 4096, 3)
    chain.put(25 * 4096, 0x9000 | 1)
    assert chain.indirect(10 * 4096, [(n + 1) * 4096 | 3 for n in range(32)]) == H_SUCCESS
    assert chain.host_view() == chain.guest_view() and chain.mm == 32


def test_a_window_far_up_with_large_pages(chain: Type1Chain) -> None:
    chain.put(0x3000, 0x5000 | 3)
    status, liobn, high, low = (*chain.create_window(21, 23),)
    assert (status, liobn, high << 32 | low) == (0, LIOBN1, DMA64)
    for page in range(RAM // (2 * MIB)):
        assert chain.put(DMA64 + (page << 21), page << 21 | 3, LIOBN1) == H_SUCCESS
    leaves = {(iova, size) for iova, size, _ in chain.driver.table.mapped()}
    assert leaves == {(0x3000, 4096)} | {(DMA64 + (n << 21), 2 * MIB) for n in range(RAM >> 21)}
    assert chain.host_view() == chain.guest_view()
    assert chain.remove_window(LIOBN1) == 0
    assert chain.host_view() == {0x3000: (0x5000, 3)} and chain.mm == 1


def test_a_host_of_48_bits_refuses_the_window_far_up() -> None:
    chain = Type1Chain(iova_ranges=((0, 0xFEDF_FFFF), (0xFEF0_0000, (1 << 48) - 1)))
    assert chain.put(0x3000, 0x5000 | 3) == H_SUCCESS
    assert chain.create_window(16, 23)[0] != 0
    assert chain.host_view() == chain.guest_view() == {0x3000: (0x5000, 3)}


def test_iommu_pages_below_the_hosts_are_refused() -> None:
    with pytest.raises((OSError, VfioModelError)) as error:
        Type1Chain(host_page=0x1_0000)
    assert isinstance(error.value, OSError) and error.value.errno == EINVAL


@pytest.mark.parametrize("refusal", [EEXIST, EBUSY])
def test_the_retry_is_made_once(refusal: int) -> None:
    calls: list[int] = []

    class Stubborn(DirectPort):
        def ioctl_many(self, handle: int, cmd: int, args: bytes | bytearray | memoryview, count: int) -> int:
            calls.append(cmd)
            if cmd == Ioctl.VFIO_IOMMU_MAP_DMA:
                from vfio_model.vfio.ioctl import BatchError  # noqa: PLC0415

                raise BatchError(refusal, "in the way", 0)
            return count

    host = Host(HostTopology((), containers=("type1v2",)))
    queue = Type1Queue(Stubborn(host), 1)
    queue.map(0, 4096, HVA, readonly=False)  # type: ignore[arg-type]
    error = queue.flush()
    assert error is not None and error.errno == refusal
    assert calls == [Ioctl.VFIO_IOMMU_MAP_DMA, Ioctl.VFIO_IOMMU_UNMAP_DMA, Ioctl.VFIO_IOMMU_MAP_DMA]


def test_dirty_pages_are_asked_for_by_bus_address() -> None:
    chain = Type1Chain()
    assert chain.container is not None
    backend = chain.container.backend
    assert isinstance(backend, Type1) and backend.dirty_pages_supported
    chain.indirect(0, [(n + 1) * 4096 | 3 for n in range(16)])
    with pytest.raises(OSError, match="off"):
        backend.query_dirty_bitmap(0, 16 * 4096)
    backend.set_dirty_page_tracking(True)
    assert backend.query_dirty_bitmap(0, 64 * 4096) == bytes(8), "no device is open"
    token = chain.container.groups["/dev/vfio/26"].get_device_fd(DEVICE)
    noted = bytearray(64 * MIB)
    chain.host.set_dirty_map(token, memoryview(noted))
    place = chain.direct.mm.find(HVA).segment.hpa  # type: ignore[union-attr]
    noted[(place.to_hpa(4 * 4096) - (1 << 32)) >> 12] = 1
    assert backend.query_dirty_bitmap(0, 64 * 4096) == bytes([8]) + bytes(7)
    assert not any(noted)
    noted[(place.to_hpa(5 * 4096) - (1 << 32)) >> 12] = 1
    assert backend.unmap_dirty_bitmap(0, 16 * 4096) == bytes([16]) + bytes(7)
    backend.set_dirty_page_tracking(False)
    assert chain.host_view() == {}


@pytest.mark.parametrize("first", [0, 5, 16])
def test_a_mapping_that_is_longer_than_one_question_is_never_cut(monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    monkeypatch.setattr(type1, "_BITMAP_PAGES", 16)
    chain = Type1Chain()
    assert chain.container is not None
    backend, page = chain.container.backend, 4096
    assert isinstance(backend, Type1)
    backend.queue.map(Iova(first * page), 64 * page, HVA, readonly=False)
    assert backend.queue.flush() is None
    driver = chain.host.groups[26].container.driver  # type: ignore[union-attr]
    assert isinstance(driver, Type1Container)
    sizes = [block.bytes // page for block in driver.mappings]
    assert sum(sizes) == 64 and max(sizes) == 16
    backend.set_dirty_page_tracking(True)
    token = chain.container.groups["/dev/vfio/26"].get_device_fd(DEVICE)
    noted = bytearray(64 * MIB)
    chain.host.set_dirty_map(token, memoryview(noted))
    place = chain.direct.mm.find(HVA).segment.hpa  # type: ignore[union-attr]

    def note(*pages: int) -> int:
        for number in pages:
            noted[(place.to_hpa(number * page) - (1 << 32)) >> 12] = 1
        return sum(1 << number for number in pages)

    wanted = note(0, 10, 11, 15, 31, 63)
    assert int.from_bytes(backend.query_dirty_bitmap(first * page, 64 * page), "little") == wanted
    wanted = note(1, 12, 62)
    assert int.from_bytes(backend.unmap_dirty_bitmap(first * page, 64 * page), "little") == wanted
    assert not list(driver.mappings)


class Tracked:
    """A chain with an open device that writes, and the RAM that was reported as written."""

    def __init__(self) -> None:
        self.chain = Type1Chain()
        container = self.chain.container
        assert container is not None and isinstance(container.backend, Type1)
        token = container.groups["/dev/vfio/26"].get_device_fd(DEVICE)
        noted = memoryview(bytearray(64 * MIB))
        self.chain.host.set_dirty_map(token, noted)
        device = self.chain.host.device(DEVICE)
        words = self.chain.driver.domain_words
        self.dma = AssignedImpl(device.pe.words, words, self.chain.direct.segments, Lane.private(), dirty=noted)
        self.pages: set[int] = set()
        space = self.chain.machine.phb().address_space
        source = ContainerDirty(container.backend)
        self.sync = DirtySync(source, container.backend, space, self.chain.machine.system, self.mark)
        self.sync.start()

    def mark(self, block: RAMBlock, offset: int, size: int) -> None:
        assert block is self.chain.ram
        self.pages.update(range(offset >> 12, offset + size >> 12))

    def write(self, iova: int) -> None:
        assert self.dma.write(iova, b"x") == 0

    def written(self) -> set[int]:
        self.sync.sync()
        found, self.pages = self.pages, set()
        return found


def test_what_devices_write_is_found_in_the_guests_ram() -> None:
    tracked = Tracked()
    chain = tracked.chain
    chain.indirect(0, [(n + 5) * 4096 | 3 for n in range(32)])
    assert tracked.written() == set()
    tracked.write(3 * 4096)
    tracked.write(20 * 4096)
    assert tracked.written() == {8, 25}
    assert tracked.written() == set()
    assert chain.create_window(16, 23)[0] == 0
    assert chain.put(DMA64 + 0x1_0000, 0x2_0000 | 3, LIOBN1) == H_SUCCESS
    tracked.write(DMA64 + 0x1_3000)
    assert tracked.written() == {0x23}
    tracked.sync.stop()
    assert chain.host_view() == chain.guest_view()


def test_what_was_written_until_an_unmap_is_found_where_it_went() -> None:
    tracked = Tracked()
    chain = tracked.chain
    chain.indirect(0, [(n + 5) * 4096 | 3 for n in range(32)])
    tracked.write(3 * 4096)
    assert chain.put(3 * 4096, 0) == H_SUCCESS
    tracked.write(4 * 4096)
    assert chain.put(4 * 4096, 0x6_4000 | 3) == H_SUCCESS, "overwritten"
    tracked.write(4 * 4096)
    tracked.write(10 * 4096)
    assert chain.stuff(10 * 4096, 0, 5) == H_SUCCESS
    assert tracked.written() == {8, 9, 0x64, 15}
    tracked.write(20 * 4096)
    assert chain.remove_window(LIOBN0) == 0
    assert tracked.written() == {25}
    assert chain.host_view() == chain.guest_view() == {} and chain.mm == 0
    tracked.sync.stop()


STEP = st.tuples(
    st.sampled_from(["put", "put", "stuff", "indirect", "ddw", "remove", "reset"]),
    st.integers(0, 40),
    st.integers(0, 60),
    st.sampled_from([0, 1, 2, 3]),
    st.integers(1, 24),
    st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, min_size=1, max_size=30), st.sampled_from(["type1v2", "type1"]))
def test_the_hosts_table_is_the_guests_view(
    program: list[tuple[str, int, int, int, int, bool]], kind: ContainerKind
) -> None:
    chain = Type1Chain(kind)
    for what, index, page, perm, count, second in program:
        liobn, shift, base = (LIOBN1, 16, DMA64) if second else (LIOBN0, 12, 0)
        if what == "put":
            chain.put(base + (index << shift), page << shift | perm, liobn)
        elif what == "stuff":
            chain.stuff(base + (index << shift), page << shift | perm, count, liobn)
        elif what == "indirect":
            chain.indirect(base + (index << shift), [(page + n) << shift | perm for n in range(count)], liobn)
        elif what == "ddw":
            chain.create_window(16, 23)
        elif what == "remove":
            chain.remove_window(liobn)
        else:
            chain.reset_windows()
        assert chain.host_view() == chain.guest_view()
    assert chain.mm == len(chain.host_view())
    assert chain.container is not None
    chain.container.close()
    assert chain.mm == 0


def test_a_container_file_says_what_the_host_has(chain: Type1Chain) -> None:
    container = ContainerFile(chain.port, chain.port.open("/dev/vfio/vfio"))
    assert container.check_extension(9) == container.check_extension(10) == 1
    assert container.check_extension(7) == 0
