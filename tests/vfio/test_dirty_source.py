"""Who is asked which pages devices wrote; what an unmap, an overwritten entry and absent RAM make of the answers."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable

import pytest

from hostd.device_migration import DeviceMigration
from hostd.device_surroundings import ProcessSurroundings
from tests.memory.fakes import ram_block
from tests.vfio.direct_chain import DEVICE, GROUP, Chain
from tests.vfio.test_type1 import Type1Chain
from vfio_model.devices.edu.device import EduDevice
from vfio_model.errors import PeerLost
from vfio_model.host.dma import AssignedImpl
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.discard import RamDiscardManager
from vfio_model.memory.lane import Lane
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.pci.config_space import COMMAND, COMMAND_MASTER
from vfio_model.trace import NULL_TRACE
from vfio_model.uapi.migration import Feature, FeatureFlags
from vfio_model.uapi.vfio import dirty_bitmap_bytes
from vfio_model.vfio.container import MappingQueue
from vfio_model.vfio.dirty import DirtySync
from vfio_model.vfio.dirty_source import ContainerDirty, DeviceDirty, EverythingDirty, choose_source

pytestmark = pytest.mark.machine

PAGE = 4096
DMA64 = 1 << 59


class Device:
    """An assigned device with features, whose DMA goes through the tables of ``chain``."""

    def __init__(self, chain: Chain, name: str = "device") -> None:
        self.name = name
        host = chain.host.device(DEVICE)
        assert chain.container is not None
        noted = memoryview(bytearray(64 << 20))
        if host.token is None:
            chain.host.set_dirty_map(chain.container.groups[GROUP].get_device_fd(DEVICE), noted)
        host.pe.set_bus_master(True)
        self.around = ProcessSurroundings(NULL_TRACE)
        self.device = EduDevice(self.around)
        self.migration = DeviceMigration(self.device, NULL_TRACE, logs=True)
        words = chain.driver.domain_words
        lane = Lane.private()
        self.migration.attach_dma(AssignedImpl(host.pe.words, words, chain.direct.segments, lane, dirty=noted))
        self.device.config_write(COMMAND, 2, COMMAND_MASTER)
        self.gone = False
        self.refuses: Feature | None = None

    def device_feature(self, flags: int, data: bytes = b"") -> bytes:
        if self.gone:
            raise PeerLost(self.name)
        if self.refuses is not None and flags & 0xFFFF == self.refuses:
            raise OSError(errno.EOPNOTSUPP, "refused")
        return self.migration.feature(flags, data)

    def write(self, iova: int) -> bool:
        return not self.device.dma.write(iova, b"x")


class Tracked:
    """A chain whose device's writes are reported."""

    def __init__(self, chain: Chain, *, devices: bool = True) -> None:
        self.chain, self.device = chain, Device(chain)
        assert chain.container is not None
        backend = chain.container.backend
        self.pages: set[int] = set()
        source = choose_source(backend, [self.device if devices else None])
        self.source = type(source)
        space, system = chain.machine.phb().address_space, chain.machine.system
        self.sync = DirtySync(source, backend, space, system, self.mark)
        self.sync.start()

    def mark(self, block: RAMBlock, offset: int, size: int) -> None:
        assert block is self.chain.ram and size > 0
        self.pages.update(range(offset >> 12, (offset + size - 1 >> 12) + 1))

    def written(self) -> set[int]:
        self.sync.sync()
        found, self.pages = self.pages, set()
        return found


def test_the_choice() -> None:
    for chain, by_container in (
        (Type1Chain(), ContainerDirty),
        (Type1Chain("type1"), EverythingDirty),
        (Chain(), None),
    ):
        chain_of: Chain = chain
        assert chain_of.container is not None
        backend, device = chain_of.container.backend, Device(chain_of)
        otherwise = by_container or EverythingDirty
        assert type(choose_source(backend, [device])) is type(choose_source(backend, [device, device])) is DeviceDirty
        assert type(choose_source(backend, [device, None])) is type(choose_source(backend, [])) is otherwise
        unable = Device(chain_of)
        unable.refuses = Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
        assert type(choose_source(backend, [device, unable])) is otherwise


def test_one_device_that_cannot_start_stops_the_others() -> None:
    chain = Chain()
    assert chain.container is not None
    devices = [Device(chain, str(number)) for number in range(3)]
    source = DeviceDirty(chain.container.backend, devices)
    devices[2].refuses = Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_START
    with pytest.raises(OSError):
        source.start()
    devices[2].refuses = None
    source.start()
    source.stop()
    with pytest.raises(OSError):
        devices[0].device_feature(
            int(FeatureFlags.VFIO_DEVICE_FEATURE_GET) | Feature.VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, bytes(24)
        )


@pytest.mark.parametrize("make", [Chain, Type1Chain])
def test_devices_say_what_they_wrote_through_entries_that_came_and_went(make: Callable[[], Chain]) -> None:
    chain = make()
    tracked = Tracked(chain)
    device = tracked.device
    assert tracked.source is DeviceDirty
    chain.indirect(0, [(n + 5) * PAGE | 3 for n in range(32)])
    assert tracked.written() == set()
    assert device.write(3 * PAGE) and not device.write(40 * PAGE)
    assert tracked.written() == {8} and tracked.written() == set()
    device.write(4 * PAGE)
    assert chain.put(4 * PAGE, 0) == 0
    assert chain.put(4 * PAGE, 0x64 * PAGE | 3) == 0
    device.write(5 * PAGE)
    assert chain.put(5 * PAGE, 0x65 * PAGE | 3) == 0, "overwritten in place"
    device.write(10 * PAGE)
    assert chain.stuff(10 * PAGE, 0, 5) == 0
    assert {9, 10, 15} <= tracked.pages
    assert tracked.written() - {0x65} == {9, 10, 15}
    device.write(5 * PAGE)
    assert tracked.written() == {0x65}
    device.write(20 * PAGE)
    assert chain.remove_window(0x8000_0000) == 0
    assert tracked.written() == {25}
    tracked.sync.stop()
    assert chain.host_view() == chain.guest_view()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Chain, Type1Chain])
def test_no_write_is_lost_whatever_becomes_of_its_mapping(make: Callable[[], Chain], seed: int) -> None:
    """The oracle is a dict of what is mapped; more pages than were written may be reported, never fewer."""
    rng = random.Random(seed)
    tracked = Tracked(make(), devices=bool(seed % 2))
    chain, mapped, written = tracked.chain, dict[int, int](), set[int]()
    for _ in range(150):
        index, page = rng.randrange(24), rng.randrange(200)
        choice = rng.randrange(5)
        if choice == 0:
            assert chain.put(index * PAGE, page * PAGE | 3) == 0
            mapped[index] = page
        elif choice == 1:
            count = rng.randrange(1, 8)
            assert chain.stuff(index * PAGE, 0, count) == 0
            mapped = {at: where for at, where in mapped.items() if not index <= at < index + count}
        elif choice < 4:
            assert tracked.device.write(index * PAGE) == (index in mapped)
            written |= {mapped[index]} if index in mapped else set()
        else:
            assert written <= tracked.written()
            written.clear()
    assert written <= tracked.written()
    assert chain.host_view() == chain.guest_view()


def test_of_a_device_that_does_not_answer_everything_counts() -> None:
    tracked = Tracked(Chain())
    tracked.chain.indirect(0, [(n + 5) * PAGE | 3 for n in range(8)])
    tracked.device.gone = True
    assert tracked.written() == set(range(5, 13))


def test_where_nobody_tracks_what_is_mapped_counts_and_what_was() -> None:
    tracked = Tracked(Chain(), devices=False)
    assert tracked.source is EverythingDirty
    tracked.chain.indirect(0, [(n + 5) * PAGE | 3 for n in range(8)])
    assert tracked.written() == set(range(5, 13)) == tracked.written()
    tracked.chain.put(0, 0)
    tracked.chain.put(PAGE, 100 * PAGE | 3)
    assert tracked.pages >= {5, 6}
    assert tracked.written() == {*range(5, 13), 100}
    assert tracked.written() == {*range(7, 13), 100}


class Ones:
    """Says of every question that all was written, and remembers the questions."""

    page = PAGE

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def query(self, iova: int, size: int) -> bytes:
        self.asked.append((iova, size))
        return ((1 << size // PAGE) - 1).to_bytes(dirty_bitmap_bytes(size // PAGE), "little")

    unmap = query


class Container:
    """As far as the queue's place is taken."""

    def __init__(self) -> None:
        self.unmaps: list[tuple[int, int]] = []

    def unmap_dma(self, iova: int, size: int) -> None:
        self.unmaps.append((iova, size))


class Backend:
    def __init__(self) -> None:
        self.container, self.queue = Container(), MappingQueue(None, 1)  # type: ignore[arg-type]


def test_of_ram_with_absent_parts_the_populated_ones_are_asked_for() -> None:
    block = ram_block(64 * PAGE)
    region, manager = RAMRegion("ram", block), RamDiscardManager(64 * PAGE, 4 * PAGE)
    region.set_discard_manager(manager)
    root = MemoryRegion("bus", 1 << 64)
    root.add_subregion(0x10_0000, region)
    space, source, backend = AddressSpace("bus", root), Ones(), Backend()
    marked: set[int] = set()

    def mark(_block: RAMBlock, offset: int, size: int) -> None:
        marked.update(range(offset // PAGE, (offset + size) // PAGE))

    manager.populate(8 * PAGE, 8 * PAGE)
    manager.populate(32 * PAGE, 4 * PAGE)
    sync = DirtySync(source, backend, space, space, mark)  # type: ignore[arg-type]
    sync.start()
    sync.sync()
    assert source.asked == [(0x10_0000 + 8 * PAGE, 8 * PAGE), (0x10_0000 + 32 * PAGE, 4 * PAGE)]
    assert marked == {*range(8, 16), *range(32, 36)}
    marked.clear()
    sync.unmap(0x10_0000 + 8 * PAGE, 4 * PAGE)
    assert marked == set(range(8, 12)) and backend.container.unmaps[-1] == (0x10_0000 + 8 * PAGE, 4 * PAGE)
    sync.stop()


def test_pages_of_64k_lead_where_they_lead_in_one_piece_or_in_parts() -> None:
    tracked = Tracked(Chain())
    chain, device = tracked.chain, tracked.device
    assert chain.create_window(16, 23)[0] == 0
    for index, page in enumerate((9, 3, 4)):
        assert chain.put(DMA64 + (index << 16), page << 16 | 3, 0x8000_0001) == 0
    tracked.written()
    device.device.dma.write(DMA64 + 0xF000, bytes(0x2000))
    device.device.dma.write(DMA64 + 0x1_F000, bytes(0x1_2000))
    assert tracked.written() == {0x9F, 0x30, 0x3F, *range(0x40, 0x50)}
