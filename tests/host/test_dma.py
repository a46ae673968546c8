"""The assigned path: what a device's DMA does, for every placement of memory and depth of table."""

from __future__ import annotations

import random

import pytest

from tests.host.rig import DEVICE, MIB, Rig
from vfio_model.host.segments import Segments
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.lane import SECTION_BYTES
from vfio_model.memory.types import DMADirection, MemTxResult

OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR


@pytest.fixture(params=["contiguous", "scatter", "two levels"])
def rig(request: pytest.FixtureRequest) -> Rig:
    return Rig(
        hpa="scatter" if request.param == "scatter" else "contiguous", levels=2 if request.param == "two levels" else 1
    )


@pytest.fixture(params=["fast", "gated"])
def gated(request: pytest.FixtureRequest) -> bool:
    return request.param == "gated"


def path(rig: Rig, gated: bool) -> DMASpace:
    return DMASpace(rig.impl((lambda: None) if gated else None))


def test_bytes_arrive_where_the_table_says(rig: Rig, gated: bool) -> None:
    dma = path(rig, gated)
    rig.map(0, 3 * 4096)
    rig.map(4096, 9 * 4096)
    for _ in range(3):  # the first access teaches the fast path
        assert dma.write(100, b"hello") == OK
        assert rig.ram[3 * 4096 + 100 : 3 * 4096 + 105] == b"hello"
        out = bytearray(5)
        assert dma.read(100, out) == OK
        assert out == b"hello"
    data = bytes(range(200))
    assert dma.write(4096 - 100, data) == OK
    assert bytes(rig.ram[4 * 4096 - 100 : 4 * 4096]) + bytes(rig.ram[9 * 4096 : 9 * 4096 + 100]) == data
    assert dma.write(7, b"") == OK
    assert not rig.lane.inside


def test_large_transfers_take_several_sections(rig: Rig, gated: bool) -> None:
    dma = path(rig, gated)
    rig.map(0, 0, 4 * MIB)
    before = rig.lane.words[rig.lane.slot]
    data = random.Random(1).randbytes(MIB)
    assert dma.write(12345, data) == OK
    assert rig.ram[12345 : 12345 + MIB] == data
    assert rig.lane.words[rig.lane.slot] - before >= 2 * MIB // SECTION_BYTES


def test_permissions(rig: Rig, gated: bool) -> None:
    dma = path(rig, gated)
    rig.map(0, 0, flags=1)
    rig.map(4096, 4096, flags=2)
    rig.ram[0:4] = b"abcd"
    out = bytearray(b"xxxx")
    for _ in range(2):
        assert (dma.read(0, out), bytes(out)) == (OK, b"abcd")
        assert dma.write(0, b"zzzz") == DECODE_ERROR
        assert dma.write(4096, b"zzzz") == OK
        assert (dma.read(4096, out), bytes(out)) == (DECODE_ERROR, bytes(4))
    assert rig.ram[0:4] == b"abcd"


def test_a_failed_read_zero_fills_and_a_failed_write_keeps_its_prefix(rig: Rig, gated: bool) -> None:
    dma = path(rig, gated)
    rig.map(0, 0)
    rig.ram[:4096] = b"r" * 4096
    out = bytearray(b"x" * 8192)
    assert dma.read(0, out) == DECODE_ERROR
    assert out == b"r" * 4096 + bytes(4096)
    assert dma.write(0, b"w" * 8192) == DECODE_ERROR
    assert rig.ram[:4096] == b"w" * 4096


@pytest.mark.parametrize("iova", [4096, 64 * MIB - 4, 64 * MIB, 1 << 59, (1 << 64) - 8])
def test_wild_addresses_are_values_not_exceptions(rig: Rig, gated: bool, iova: int) -> None:
    dma = path(rig, gated)
    rig.map(0, 0)
    assert dma.write(0, b"x") == OK
    assert dma.write(iova, b"12345678") == DECODE_ERROR
    assert dma.read(iova, bytearray(16)) == DECODE_ERROR


def test_unmap_remap_and_window_removal_are_seen_at_once(rig: Rig, gated: bool) -> None:
    dma = path(rig, gated)
    rig.map(0, 0)
    assert dma.write(0, b"1") == OK
    rig.container.unmap_dma(0, 4096)
    assert dma.write(0, b"2") == DECODE_ERROR
    rig.map(0, 4096)
    assert dma.write(0, b"3") == OK
    assert (rig.ram[0:1], rig.ram[4096:4097]) == (b"1", b"3")
    rig.container.tce_remove(0)
    assert dma.write(0, b"4") == DECODE_ERROR
    rig.container.tce_create(12, 64 * MIB, 1)
    assert dma.write(0, b"5") == DECODE_ERROR
    rig.map(0, 8192)
    assert dma.write(0, b"6") == OK
    assert rig.ram[8192:8193] == b"6"


def test_freeze_and_bus_master(rig: Rig, gated: bool) -> None:
    dma, host, group = path(rig, gated), rig.host, rig.host.groups[26]
    rig.map(0, 0)
    assert dma.write(0, b"1") == OK
    rig.port.run(host.freeze(group))
    assert dma.write(0, b"2") == DECODE_ERROR
    host.unfreeze(group)
    assert dma.write(0, b"3") == OK
    rig.port.run(host.set_bus_master(rig.device, False))
    assert dma.read(0, bytearray(1)) == DECODE_ERROR
    rig.port.run(host.set_bus_master(rig.device, True))
    assert dma.write(0, b"4") == OK
    rig.port.device_closed(rig.token)
    assert dma.write(0, b"5") == DECODE_ERROR
    assert rig.ram[0:1] == b"4"


def test_a_page_of_an_unknown_segment_is_asked_for_once() -> None:
    rig = Rig(blocks=2)
    known = Segments([(rig.mm.find(rig.blocks[0].hva).segment.hpa, rig.ram)])  # type: ignore[union-attr]
    asked: list[bool] = []

    def ask() -> None:
        asked.append(rig.lane.inside)
        if len(asked) == 2:
            known.add(rig.mm.find(rig.blocks[1].hva).segment.hpa, rig.blocks[1].view)  # type: ignore[union-attr]

    dma = DMASpace(rig.impl(segments=known, on_unknown_hpa=ask))
    rig.map(0, 0)
    rig.map(4096, 0, block=1)
    assert dma.write(0, b"1") == OK
    assert dma.write(4096, b"2") == DECODE_ERROR
    assert dma.write(4096, b"3") == OK
    assert asked == [False, False], "outside every section"
    assert rig.blocks[1].view[0:1] == b"3"
    known.remove(rig.mm.find(rig.blocks[0].hva).segment.hpa)  # type: ignore[union-attr]
    assert dma.write(0, b"4") == DECODE_ERROR


def test_revocation_waits_for_the_section_that_is_open() -> None:
    """The device stands at the gate, between translation and copy; the unmap ends only after its copy."""
    rig = Rig()
    rig.map(0, 0)
    order: list[str] = []
    outcome = None

    def gate() -> None:
        nonlocal outcome
        if outcome is None:
            arg = b"\x18\0\0\0\0\0\0\0" + bytes(8) + (4096).to_bytes(8, "little")
            outcome = rig.host.ioctl(rig.mm, rig.container.handle, 0x3B72, arg)
            order.append("entry gone, lane odd" if rig.lane.inside else "lane even")

    dma = DMASpace(rig.impl(gate))
    assert dma.write(0, b"late") == OK, "it had the translation before the unmap"
    assert order == ["entry gone, lane odd"]
    assert dma.write(0, b"more") == DECODE_ERROR
    assert outcome is not None and outcome.lane_devices == (DEVICE,)
    region = rig.mm.lookup(rig.blocks[0].hva, 4096)
    assert region is not None and region.mapped == 1, "still pinned until the lanes were waited for"
    rig.port.run(outcome)
    assert region.mapped == 0


@pytest.mark.parametrize("size", [64, 4096, 24])
def test_many_pieces(rig: Rig, gated: bool, size: int) -> None:
    dma = path(rig, gated)
    order = list(range(256))
    random.Random(size).shuffle(order)
    for iova, page in enumerate(order):
        rig.map(iova * 4096, page * 4096)
    picks = random.Random(7).sample(range(256), 200)
    iovas = [pick * 4096 + (pick % 7 * size if size < 4096 else 0) for pick in picks]
    data = random.Random(9).randbytes(200 * size)
    assert dma.write_many(iovas, size, data) == OK
    for n, iova in enumerate(iovas):
        at = order[iova // 4096] * 4096 + iova % 4096
        assert rig.ram[at : at + size] == data[n * size : (n + 1) * size]
    out = bytearray(len(data))
    assert dma.read_many(iovas, size, out) == OK
    assert out == data


@pytest.mark.parametrize("bad", [0, 1, 70, 199])
def test_many_pieces_stop_at_the_first_that_fails(rig: Rig, gated: bool, bad: int) -> None:
    dma = path(rig, gated)
    rig.map(0, 0, MIB)
    iovas = [n * 4096 for n in range(200)]
    iovas[bad] = 2 * MIB
    data = b"d" * (200 * 4096)
    assert dma.write_many(iovas, 4096, data) == DECODE_ERROR
    assert bytes(rig.ram[:MIB]) == b"d" * (bad * 4096) + bytes(MIB - bad * 4096)
    out = bytearray(b"x" * len(data))
    assert dma.read_many(iovas, 4096, out) == DECODE_ERROR
    assert out == b"d" * (bad * 4096) + bytes(len(out) - bad * 4096)
    assert not rig.lane.inside


def test_many_pieces_after_a_revocation(rig: Rig) -> None:
    dma = path(rig, False)
    rig.map(0, 0, MIB)
    iovas, data = [n * 4096 for n in range(200)], b"d" * (200 * 4096)
    assert dma.write_many(iovas, 4096, data) == OK
    rig.container.unmap_dma(0, MIB)
    assert dma.write_many(iovas, 4096, data) == DECODE_ERROR
    rig.map(0, 2 * MIB, MIB, flags=1)
    assert dma.write_many(iovas, 4096, data) == DECODE_ERROR
    assert dma.read_many(iovas, 4096, bytearray(data)) == OK
    rig.port.run(rig.host.freeze(rig.host.groups[26]))
    assert dma.read_many(iovas, 4096, bytearray(data)) == DECODE_ERROR


def test_map_is_a_bounce_buffer(rig: Rig) -> None:
    dma = path(rig, False)
    rig.map(0, 0)
    rig.ram[10:14] = b"from"
    mapping = dma.map(10, 4, DMADirection.TO_DEVICE)
    assert mapping is not None and mapping.view == b"from"
    dma.unmap(mapping, 4)
    mapping = dma.map(100, 8192, DMADirection.FROM_DEVICE)
    assert mapping is None, "it reaches into an unmapped page"
    mapping = dma.map(100, 16, DMADirection.FROM_DEVICE)
    assert mapping is not None
    mapping.view[:] = b"0123456789abcdef"
    assert rig.ram[100:104] == bytes(4)
    dma.unmap(mapping, 8)
    assert rig.ram[100:116] == b"01234567" + bytes(8)
    assert dma.map(4096, 4, DMADirection.TO_DEVICE) is None


def sections(rig: Rig, action: object) -> int:
    before = rig.lane.words[rig.lane.slot]
    assert action() == OK  # type: ignore[operator]
    return (rig.lane.words[rig.lane.slot] - before) // 2


def test_a_fault_does_not_take_the_fast_path_away() -> None:
    rig = Rig()
    dma = path(rig, False)
    rig.map(0, 0)
    assert dma.write(0, b"1") == OK
    assert sections(rig, lambda: dma.write(0, b"2")) == 1
    for wild in (4096, 64 * MIB, 1 << 59):
        assert dma.write(wild, b"3") == DECODE_ERROR
        assert sections(rig, lambda: dma.write(0, b"4")) == 1


def test_whether_a_range_is_mapped_is_looked_up_in_sections_too() -> None:
    rig = Rig(levels=3)
    rig.map(0, 0)
    rig.map(4096, 4096, flags=1)
    impl = rig.impl()

    class Watched:
        """Table memory that is looked at inside a section only: outside of one it may be somebody else's."""

        def __init__(self, words: memoryview) -> None:
            self.words = words

        def __getitem__(self, index: int) -> int:
            assert rig.lane.inside
            return self.words[index]

    impl._walker.domain = Watched(impl._walker.domain)  # type: ignore[assignment]
    assert impl.valid(0, 4096, DMADirection.FROM_DEVICE)
    assert not impl.valid(0, 8192, DMADirection.FROM_DEVICE)
    assert impl.valid(0, 8192, DMADirection.TO_DEVICE)
    assert not rig.lane.inside
