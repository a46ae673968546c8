"""Address spaces: reads and writes by region kind, commits, listeners."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory.fakes import DictIOMMU, Registers, ram_block, system_memory
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.region import AliasRegion, IORegion, MemoryRegion, RAMRegion, transaction
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

OK, ERROR, DECODE = MemTxResult.OK, MemTxResult.ERROR, MemTxResult.DECODE_ERROR


def space_of(*placed: tuple[int, MemoryRegion]) -> AddressSpace:
    root = MemoryRegion("root", 1 << 64)
    for at, region in placed:
        root.add_subregion(at, region)
    return AddressSpace("space", root)


def test_ram_at_zero_and_elsewhere() -> None:
    low, high = ram_block(256, "low"), ram_block(1024, "high")
    space = space_of((0, RAMRegion("low", low)), (1 << 32, RAMRegion("high", high)))
    assert space.write((1 << 32) + 8, b"high") is OK
    assert space.write(252, b"last") is OK
    out = bytearray(4)
    assert space.read((1 << 32) + 8, out) is OK and out == b"high"
    assert bytes(low.view[252:]) == b"last"


def test_an_access_past_ram_moves_what_fits_and_fails() -> None:
    space, block = system_memory(256)
    assert space.write(252, b"12345678") is DECODE
    assert bytes(block.view[252:]) == b"1234"
    out = bytearray(b"x" * 8)
    assert space.read(252, out) is DECODE
    assert out == b"1234\0\0\0\0"


def test_nothing_decodes_zero_fills() -> None:
    space, _ = system_memory(256)
    out = bytearray(b"x" * 8)
    assert space.read(1 << 40, out) is DECODE
    assert out == bytes(8)
    assert space.write(1 << 40, b"x") is DECODE


def test_an_empty_access_is_fine_anywhere() -> None:
    space, _ = system_memory(256)
    assert space.read(1 << 40, bytearray()) is OK
    assert space.write(1 << 40, b"") is OK


def test_an_access_wraps_at_the_top_of_the_bus() -> None:
    top, low = ram_block(16, "top"), ram_block(4096, "low")
    space = space_of((U64_MAX - 15, RAMRegion("top", top)), (0, RAMRegion("low", low)))
    assert space.write(U64_MAX - 3, b"abcdefgh") is OK
    assert bytes(top.view[12:]) == b"abcd" and bytes(low.view[:4]) == b"efgh"
    out = bytearray(8)
    assert space.read(U64_MAX - 3, out) is OK and out == b"abcdefgh"
    assert space.write((1 << 64) + 100, b"!") is OK and low.view[100] == ord("!")


@given(st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=80)), max_size=12))
def test_writes_equal_a_dict_of_bytes(writes: list[tuple[int, bytes]]) -> None:
    blocks = [(0, ram_block(100)), (100, ram_block(60)), (200, ram_block(50))]
    space = space_of(*((at, RAMRegion(f"at{at}", block)) for at, block in blocks))
    memory = {a: 0 for a in [*range(160), *range(200, 250)]}
    for addr, data in writes:
        result = space.write(addr, data)
        expected = OK
        for i, byte in enumerate(data):
            if addr + i not in memory:
                expected = DECODE
                break
            memory[addr + i] = byte
        assert result is expected
    for addr in range(0, 300, 7):
        out = bytearray(b"?" * 16)
        good = next((i for i in range(16) if addr + i not in memory), 16)
        assert space.read(addr, out) is (OK if good == 16 else DECODE)
        assert out == bytes(memory[addr + i] for i in range(good)) + bytes(16 - good)


# -- read-only RAM and device memory


def test_a_rom_reads_and_does_not_decode_writes() -> None:
    rom = ram_block(64, fill=7)
    space = space_of((0, RAMRegion("rom", rom, readonly=True)))
    out = bytearray(4)
    assert space.read(0, out) is OK and out == b"\7\7\7\7"
    assert space.write(0, b"x") is DECODE and rom.view[0] == 7


def test_device_memory_is_accessed_in_place() -> None:
    block = ram_block(64)
    space = space_of((0x1000, RAMRegion("bar", block, ram_device=True)))
    assert space.write(0x1010, b"abc") is OK and bytes(block.view[16:19]) == b"abc"


# -- I/O


def test_io_is_split_into_aligned_accesses_of_legal_size() -> None:
    ops = Registers(high=4)
    space = space_of((0x1000, IORegion("io", 64, ops)))
    out = bytearray(9)
    assert space.read(0x1003, out) is OK
    assert out == bytes(range(3, 12))
    assert [(addr, size) for _, addr, size, _ in ops.log] == [(3, 1), (4, 4), (8, 4)]


def test_an_access_below_the_minimum_does_not_reach_the_device() -> None:
    ops = Registers(low=4)
    space = space_of((0, IORegion("io", 64, ops)))
    out = bytearray(b"xx")
    assert space.read(0, out) is DECODE and out == bytes(2)
    assert space.write(2, b"12") is DECODE
    assert ops.log == []


def test_a_device_error_ends_the_access() -> None:
    ops = Registers()
    ops.broken = {4}
    space = space_of((0, IORegion("io", 64, ops)))
    out = bytearray(b"x" * 12)
    assert space.read(0, out) is ERROR
    assert out == b"\0\1\2\3" + bytes(8)
    assert space.write(0, b"abcdefgh") is ERROR
    assert ops.data[:8] == b"abcd\4\5\6\7"


def test_a_device_error_also_ends_an_access_that_goes_on_in_another_region() -> None:
    ops = Registers()
    ops.broken = {60}
    ram = ram_block(64, fill=9)
    space = space_of((0, IORegion("io", 64, ops)), (64, RAMRegion("ram", ram)))
    out = bytearray(b"?" * 16)
    assert space.read(56, out) is ERROR
    assert out == bytes(range(56, 60)) + bytes(12)
    assert space.write(56, b"x" * 16) is ERROR
    assert ram.view[0] == 9


def test_byte_order_of_values() -> None:
    ops = Registers()
    space = space_of((0, IORegion("io", 64, ops, big_endian=True)))
    assert space.write(0, b"\x12\x34\x56\x78") is OK
    assert ops.log == [("w", 0, 4, 0x12345678)]


def test_io_sees_its_own_offsets_through_an_alias() -> None:
    ops = Registers()
    target = IORegion("io", 64, ops)
    space = space_of((0x8000, AliasRegion("alias", target, 16, 16)))
    out = bytearray(2)
    assert space.read(0x8004, out) is OK and out == bytes([20, 21])


# -- commits


def test_closures_follow_a_commit() -> None:
    space, _ = system_memory(256)
    extra = ram_block(64, "extra")
    region = RAMRegion("extra", extra)
    assert space.root is not None
    before = space.write
    with transaction():
        space.root.add_subregion(0x10000, region)
        assert space.write(0x10000, b"x") is DECODE  # not yet
    assert space.write is not before
    assert space.write(0x10000, b"x") is OK
    region.set_enabled(False)
    assert space.write(0x10000, b"x") is DECODE
    region.set_enabled(True)
    region.set_offset(0x20000)
    assert space.write(0x20000, b"y") is OK and extra.view[0] == ord("y")
    space.root.del_subregion(region)
    assert space.write(0x20000, b"x") is DECODE


def test_a_change_below_an_alias_reaches_the_space_that_shows_it() -> None:
    container = MemoryRegion("container", 0x1000)
    space = space_of((0x4000, AliasRegion("alias", container, 0, 0x1000)))
    container.add_subregion(0x10, RAMRegion("ram", ram_block(16)))
    assert space.write(0x4010, b"x") is OK


def test_a_change_inside_a_hidden_region_shows_when_it_appears() -> None:
    hidden = MemoryRegion("hidden", 0x1000)
    hidden.enabled = False
    space = space_of((0, hidden))
    hidden.add_subregion(0, RAMRegion("ram", ram_block(16)))
    assert space.write(0, b"x") is DECODE
    hidden.set_enabled(True)
    assert space.write(0, b"x") is OK


def test_a_destroyed_space_shows_nothing() -> None:
    space, _ = system_memory(256)
    listener = Recorder("l", [])
    space.register_listener(listener)
    space.destroy()
    assert space.write(0, b"x") is DECODE
    assert [what for what, _ in listener.log if what == "del"] == ["del"]


# -- listeners


class Recorder(MemoryListener):
    def __init__(self, name: str, log: list[tuple[str, str]], priority: int = 0) -> None:
        self.name, self.log, self.priority = name, log, priority
        self.live: dict[int, MemoryRegionSection] = {}

    def begin(self) -> None:
        self.log.append(("begin", self.name))

    def region_add(self, section: MemoryRegionSection) -> None:
        assert section.offset_within_address_space not in self.live
        self.live[section.offset_within_address_space] = section
        self.log.append(("add", f"{self.name}:{section.mr.name}"))

    def region_del(self, section: MemoryRegionSection) -> None:
        assert self.live.pop(section.offset_within_address_space) == section
        self.log.append(("del", f"{self.name}:{section.mr.name}"))

    def region_nop(self, section: MemoryRegionSection) -> None:
        self.log.append(("nop", f"{self.name}:{section.mr.name}"))

    def commit(self) -> None:
        self.log.append(("commit", self.name))


def test_registering_replays_and_unregistering_takes_away() -> None:
    space, _ = system_memory(256)
    log: list[tuple[str, str]] = []
    listener = Recorder("l", log)
    space.register_listener(listener)
    assert log == [("begin", "l"), ("add", "l:ram"), ("commit", "l")]
    log.clear()
    space.unregister_listener(listener)
    assert ("del", "l:ram") in log and not listener.live


def test_adds_ascend_and_dels_descend_by_priority() -> None:
    space, _ = system_memory(256)
    log: list[tuple[str, str]] = []
    for name, priority in (("high", 10), ("low", 0)):
        space.register_listener(Recorder(name, log, priority))
    log.clear()
    assert space.root is not None
    (ram,) = space.root.subregions
    with transaction():
        space.root.del_subregion(ram)
        space.root.add_subregion(0, RAMRegion("new", ram_block(64)))
    assert [entry for entry in log if entry[0] in ("add", "del")] == [
        ("del", "high:ram"),
        ("del", "low:ram"),
        ("add", "low:new"),
        ("add", "high:new"),
    ]
    assert [entry[0] for entry in log].index("begin") == 0 and log[-1][0] == "commit"


def test_unchanged_sections_are_nops_and_an_unchanged_view_is_silence() -> None:
    space, _ = system_memory(256)
    log: list[tuple[str, str]] = []
    space.register_listener(Recorder("l", log))
    log.clear()
    assert space.root is not None
    space.root.add_subregion(0x1000, RAMRegion("more", ram_block(16)))
    assert log == [("begin", "l"), ("nop", "l:ram"), ("add", "l:more"), ("commit", "l")]
    log.clear()
    space.root.add_subregion(0x9000, MemoryRegion("empty", 16))
    assert log == []


def test_a_transaction_is_told_once_and_a_detour_not_at_all() -> None:
    space, _ = system_memory(256)
    log: list[tuple[str, str]] = []
    space.register_listener(Recorder("l", log))
    log.clear()
    assert space.root is not None
    (ram,) = space.root.subregions
    with transaction():
        ram.set_enabled(False)
        with transaction():
            ram.set_enabled(True)
    assert log == []


def test_a_listener_may_change_the_topology_during_a_commit() -> None:
    space, _ = system_memory(256)

    class Follower(MemoryListener):
        done = False

        def region_add(self, section: MemoryRegionSection) -> None:
            if section.mr.name == "trigger" and not self.done:
                self.done = True
                assert space.root is not None
                space.root.add_subregion(0x2000, RAMRegion("followed", ram_block(16)))

    space.register_listener(Follower())
    assert space.root is not None
    space.root.add_subregion(0x1000, RAMRegion("trigger", ram_block(16)))
    assert space.write(0x2000, b"x") is OK


def test_a_listener_that_raises_leaves_the_view_switched() -> None:
    space, _ = system_memory(256)

    class Broken(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            if section.mr.name == "new":
                raise OSError(12, "no memory")

    log: list[tuple[str, str]] = []
    space.register_listener(Broken())
    assert space.root is not None
    with pytest.raises(OSError, match="no memory"):
        space.root.add_subregion(0x1000, RAMRegion("new", ram_block(16)))
    assert space.write(0x1000, b"x") is OK
    space.register_listener(Recorder("l", log))
    assert ("add", "l:new") in log


def test_a_listener_that_raises_during_replay_is_not_registered() -> None:
    space, _ = system_memory(256)

    class Broken(MemoryListener):
        def region_add(self, section: MemoryRegionSection) -> None:
            raise OSError(22, "no")

    with pytest.raises(OSError, match="no"):
        space.register_listener(Broken())
    assert space.root is not None
    space.root.add_subregion(0x1000, RAMRegion("new", ram_block(16)))


def test_sections_name_region_offset_and_size() -> None:
    system, _ = system_memory(256)
    iommu = DictIOMMU(system, 1 << 64)
    space = AddressSpace("device", iommu)
    (section,) = space.sections()
    assert section.mr is iommu and section.size == 1 << 64
    assert (section.range.start, section.range.last) == (0, U64_MAX)
