"""Writes of this process to RAM are noted while a block has a map, and only then, by whatever way they come."""

from __future__ import annotations

import random

import pytest

from vfio_model.memory import dirty_log
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import AliasRegion, MemoryRegion, RAMRegion
from vfio_model.memory.types import DMADirection
from vfio_model.ranges import Hva

PAGE = 4096
SIZE = 256 * PAGE
BASE, SECOND = 0x10_0000, 0x80_0000


class Memory:
    """One block, shown by a system space, and by an alias of its upper half in a bus's own space."""

    def __init__(self) -> None:
        self.block = RAMBlock("ram", bytearray(SIZE), page_size=PAGE, hva=Hva(0))
        root = MemoryRegion("system", 1 << 64)
        self.region = RAMRegion("ram", self.block)
        root.add_subregion(BASE, self.region)
        self.system = AddressSpace("system", root)
        bus = MemoryRegion("bus", 1 << 64)
        bus.add_subregion(SECOND, AliasRegion("upper", self.region, SIZE // 2, SIZE // 2))
        self.bus = AddressSpace("bus", bus)
        self.dma = DMASpace(self.bus)

    def start(self) -> dirty_log.DirtyMap:
        return dirty_log.start([self.region])[self.block]


def pages(log: dirty_log.DirtyMap) -> set[int]:
    return {page for at, size in log.take() for page in range(at // PAGE, -(-(at + size) // PAGE))}


def test_every_way_to_write_is_noted_and_reading_is_not() -> None:
    memory = Memory()
    memory.system.write(BASE, b"before")
    log = memory.start()
    assert pages(log) == set()
    memory.system.write(BASE + PAGE - 1, b"ab")
    memory.system.read(BASE + 9 * PAGE, bytearray(8))
    memory.dma.write(SECOND + 2 * PAGE, b"x" * PAGE)
    assert pages(log) == {0, 1, 130} and pages(log) == set()
    addresses = [SECOND + n * PAGE for n in range(100)]
    assert memory.dma.write_many(addresses, 8, bytes(800)) == 0
    assert pages(log) == set(range(128, 228))
    mapping = memory.dma.map(SECOND, 3 * PAGE, DMADirection.FROM_DEVICE)
    assert mapping is not None
    mapping.view[PAGE] = 1
    memory.dma.unmap(mapping, PAGE + 1)
    assert pages(log) == {128, 129}
    reading = memory.dma.map(SECOND, PAGE, DMADirection.TO_DEVICE)
    assert reading is not None
    memory.dma.unmap(reading, PAGE)
    assert log.dirty_bytes == 0


def test_without_a_log_writers_are_those_of_before() -> None:
    memory = Memory()
    before = memory.system.write.__code__
    log = memory.start()
    assert memory.system.write.__code__ is not before
    dirty_log.stop([memory.region])
    assert memory.system.write.__code__ is before and memory.dma.write == memory.bus.write
    memory.system.write(BASE, b"x")
    memory.dma.write(SECOND, b"x")
    assert pages(log) == set()


def test_regions_that_come_while_writes_are_logged_are_logged() -> None:
    memory = Memory()
    log = memory.start()
    other = MemoryRegion("other", 1 << 64)
    other.add_subregion(0, AliasRegion("all", memory.region, 0, SIZE))
    space = AddressSpace("other", other)
    space.write(5 * PAGE, b"x")
    assert pages(log) == {5}


@pytest.mark.parametrize("size", [PAGE, 7 * PAGE, 7 * PAGE + 100])
def test_a_map_is_a_set_of_pages(size: int) -> None:
    rng = random.Random(size)
    log, expected = dirty_log.DirtyMap(size), set[int]()
    for _ in range(200):
        offset = rng.randrange(size)
        length = rng.randrange(size - offset + 1)
        log.mark(offset, length)
        expected |= set(range(offset // PAGE, -(-(offset + length) // PAGE))) if length else set()
        assert log.dirty_bytes == len(expected) * PAGE
        if rng.random() < 0.2:
            runs = list(log.take())
            assert all(length > 0 and at + length <= size for at, length in runs)
            assert {page for at, n in runs for page in range(at // PAGE, -(-(at + n) // PAGE))} == expected
            expected.clear()
