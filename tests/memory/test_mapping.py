"""Mappings: zero copy, bounce buffers and their budget, invalidation."""

from __future__ import annotations

import errno

import pytest

from tests.memory.fakes import PAGE, Registers, iommu_space, ram_block, system_memory
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iotlb import IOMMUTLBEntry, IOMMUTLBEvent
from vfio_model.memory.mapping import DMAMapping
from vfio_model.memory.region import IORegion, MemoryRegion, RAMRegion
from vfio_model.memory.types import DMADirection, IOMMUAccessFlags, IOMMUNotifierFlag

TO, FROM = DMADirection.TO_DEVICE, DMADirection.FROM_DEVICE


def ignore(mapping: DMAMapping) -> None:
    """A device that wants to hear of invalidations and does nothing."""


def mapped(space: AddressSpace, iova: int, length: int, direction: DMADirection = FROM) -> DMAMapping:
    mapping = space.map(iova, length, direction, ignore)
    assert mapping is not None
    return mapping


def registers_space(budget: int = 4096, size: int = 16384) -> tuple[AddressSpace, Registers]:
    ops = Registers(size=64)
    ops.data = bytearray(i % 256 for i in range(size))
    root = MemoryRegion("root", 1 << 64)
    root.add_subregion(0, IORegion("io", size, ops))
    return AddressSpace("space", root, bounce_budget=budget), ops


def test_ram_is_shown_in_place() -> None:
    space, ram = system_memory(1 << 16)
    mapping = mapped(space, 0x100, 0x200)
    assert (mapping.iova, mapping.last, mapping.length) == (0x100, 0x2FF, 0x200)
    mapping.view[0] = 0x5A
    assert ram.view[0x100] == 0x5A and not mapping.bounce
    space.unmap(mapping, 1)
    assert len(space.mappings) == 0


def test_a_device_that_reads_gets_a_read_only_view() -> None:
    space, ram = system_memory(4096)
    mapping = mapped(space, 0, 16, TO)
    assert mapping.view.readonly
    ram.view[3] = 9
    assert mapping.view[3] == 9


def test_a_mapping_ends_with_the_region() -> None:
    space, _ = system_memory(0x1000)
    assert mapped(space, 0xF00, 0x1000).last == 0xFFF
    assert space.map(0x1000, 16, FROM) is None
    assert space.map(0, 0, FROM) is None


def test_through_an_iommu_contiguous_pages_make_one_mapping() -> None:
    space, iommu, ram = iommu_space()
    iommu.pages = {0: (0x4000, 3), 1: (0x5000, 3), 2: (0x9000, 3), 3: (0xA000, 1)}
    mapping = mapped(space, 0x800, 0x3000)
    assert (mapping.iova, mapping.last) == (0x800, 0x1FFF)
    mapping.view[-1] = 1
    assert ram.view[0x5FFF] == 1
    assert mapped(space, 0x2000, 0x2000).last == 0x2FFF  # page 3 may not be written
    assert mapped(space, 0x2000, 0x2000, TO).last == 0x3FFF


def test_handles_are_unique_and_found() -> None:
    space, _ = system_memory(4096)
    first, second = mapped(space, 0, 16), mapped(space, 0, 16)
    assert first.handle != second.handle
    assert space.mappings.get(first.handle) is first
    space.unmap(first, 0)
    assert space.mappings.get(first.handle) is None and space.mappings.get(second.handle) is second


# -- bounce buffers


def test_what_is_not_ram_bounces() -> None:
    space, ops = registers_space()
    incoming = space.map(16, 8, TO)
    assert incoming is not None and incoming.bounce
    assert bytes(incoming.view) == bytes(range(16, 24))
    outgoing = space.map(32, 8, FROM)
    assert outgoing is not None
    outgoing.view[:] = b"ABCDEFGH"
    assert ops.data[32] == 32
    space.unmap(outgoing, 4)  # only what was accessed goes back
    assert ops.data[32:40] == b"ABCD" + bytes(range(36, 40))
    space.unmap(incoming, 8)
    assert space.bounce.used == 0


def test_a_rom_and_device_memory_bounce() -> None:
    root = MemoryRegion("root", 1 << 64)
    rom, bar = ram_block(64, fill=7), ram_block(64, fill=8)
    root.add_subregion(0, RAMRegion("rom", rom, readonly=True))
    root.add_subregion(64, RAMRegion("bar", bar, ram_device=True))
    space = AddressSpace("space", root)
    written = space.map(0, 16, FROM)
    assert written is not None and written.bounce
    written.view[:] = bytes(16)
    space.unmap(written, 16)
    assert rom.view[0] == 7
    read = space.map(0, 16, TO)
    assert read is not None and not read.bounce
    device = space.map(64, 16, TO)
    assert device is not None and device.bounce and bytes(device.view) == b"\x08" * 16


def test_the_budget_shortens_then_refuses() -> None:
    space, _ = registers_space(budget=4096)
    first = space.map(0, 3000, TO)
    second = space.map(0, 3000, TO)
    assert first is not None and second is not None
    assert (first.length, second.length) == (3000, 1096)
    assert space.map(0, 1, TO) is None
    space.unmap(first, 0)
    assert space.bounce.used == 1096


def test_a_map_client_is_woken_once_when_bytes_come_back() -> None:
    space, _ = registers_space(budget=16)
    woken: list[str] = []
    space.register_map_client(lambda: woken.append("at once"))
    assert woken == ["at once"]
    mapping = space.map(0, 16, TO)
    assert mapping is not None
    space.register_map_client(lambda: woken.append("later"))
    forgotten = lambda: woken.append("never")  # noqa: E731  the same object registers and unregisters
    space.register_map_client(forgotten)
    space.unregister_map_client(forgotten)
    assert woken == ["at once"]
    space.unmap(mapping, 16)
    assert woken == ["at once", "later"]
    again = space.map(0, 16, TO)
    assert again is not None
    space.unmap(again, 16)
    assert woken == ["at once", "later"]


# -- invalidation


class Device:
    def __init__(self) -> None:
        self.rung: list[DMAMapping] = []

    def __call__(self, mapping: DMAMapping) -> None:
        self.rung.append(mapping)
        mapping.unmap(0)


def unmap(iova: int, mask: int = 0xFFF) -> IOMMUTLBEvent:
    entry = IOMMUTLBEntry(None, iova, 0, mask, IOMMUAccessFlags.NONE)
    return IOMMUTLBEvent(IOMMUNotifierFlag.UNMAP, entry)


def test_an_unmap_rings_the_device_at_the_flush_if_it_overlaps() -> None:
    space, iommu, _ = iommu_space()
    iommu.pages = {i: (i * PAGE, 3) for i in range(4)}
    device = Device()
    mapping = space.map(0x1000, 0x2000, FROM, device)
    assert mapping is not None
    assert iommu.notify_flags is IOMMUNotifierFlag.UNMAP
    iommu.notify(unmap(0x3000))
    iommu.flush()
    assert device.rung == []
    iommu.notify(unmap(0x2000))
    assert device.rung == []  # a callback only queues
    iommu.flush()
    assert device.rung == [mapping]
    assert iommu.notifiers == [] and len(space.mappings) == 0


def test_without_a_callback_nobody_is_registered() -> None:
    space, iommu, _ = iommu_space()
    iommu.pages = {0: (0, 3)}
    assert space.map(0, 16, FROM) is not None
    assert iommu.notifiers == []


def test_an_iommu_that_refuses_to_be_followed_makes_a_bounce_buffer() -> None:
    space, iommu, ram = iommu_space()
    iommu.pages = {0: (0x3000, 3)}
    iommu.refused, iommu.refusal = IOMMUNotifierFlag.ALL, OSError(errno.EINVAL, "no")
    mapping = space.map(0, 16, FROM, Device())
    assert mapping is not None and mapping.bounce
    mapping.view[:] = b"x" * 16
    iommu.pages = {}  # unmapped meanwhile: the write back must miss
    space.unmap(mapping, 16)
    assert ram.view[0x3000] == 0


def test_ram_that_goes_away_rings_also_behind_an_iommu() -> None:
    space, iommu, _ = iommu_space()
    iommu.pages = {0: (0, 3)}
    system = iommu.target
    direct, behind = Device(), Device()
    assert system.map(0, 16, FROM, direct) is not None
    assert space.map(0, 16, FROM, behind) is not None
    assert system.root is not None
    system.root.del_subregion(system.root.subregions[0])
    assert len(direct.rung) == 1 and len(behind.rung) == 1


def test_invalidate_names_those_who_did_not_give_back() -> None:
    space, _ = system_memory(4096)
    rung: list[int] = []
    stubborn = space.map(0, 16, FROM, lambda m: rung.append(m.handle))
    assert stubborn is not None
    assert space.map(8, 16, FROM, Device()) is not None
    assert space.invalidate(100, 200) == []
    assert space.invalidate(15, 15) == [stubborn]
    assert space.invalidate(15, 15) == [stubborn] and rung == [stubborn.handle]  # rung once


def test_access_len_counts_bytes_of_the_mapping() -> None:
    space, _ = system_memory(4096)
    with pytest.raises(AssertionError):
        space.unmap(mapped(space, 0, 16), 17)
