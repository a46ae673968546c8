"""The compiled fast path does what the Python closures do: same results, same bytes, lane even afterwards."""

from __future__ import annotations

import gc
import shutil
import sysconfig
from array import array
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vfio_model.batch import variant
from vfio_model.host import dma
from vfio_model.host.dma import AssignedImpl
from vfio_model.host.hpa import HpaMap
from vfio_model.host.layout import PE_BUS_MASTER, PE_STATE, PE_WINDOW0, PE_WORDS
from vfio_model.host.segments import Segments
from vfio_model.memory.lane import SECTION_BYTES, Lane
from vfio_model.memory.types import MemTxResult
from vfio_model.ranges import U64_MAX

OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR
ENTRIES, TABLE0, TABLE1 = 8, 32, 64
SEGMENT_BYTES = 5 * 4096 + 100  # ends inside a page
BASES = (1 << 32, 1 << 40)
needs_it = pytest.mark.skipif(dma.Path is None, reason="not built: the first test here says whether it had to")


def test_it_is_there_wherever_it_can_be_built() -> None:
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    header = FilePath(sysconfig.get_paths()["include"], "Python.h")
    assert dma.Path is not None or compiler is None or not header.exists()


@dataclass
class Area:
    """Shared words made by hand: two windows of eight pages each, two segments."""

    impl: AssignedImpl
    pe: memoryview
    domain: memoryview
    lane: Lane
    rams: list[bytearray]
    segments: Segments

    @classmethod
    def make(cls, compiled: bool, shift: int, starts: tuple[int, int], scatter: bool = False) -> Area:
        pe, domain = memoryview(array("Q", [0] * PE_WORDS)), memoryview(array("Q", [0] * 96))
        pe[PE_BUS_MASTER] = 1
        for slot, table in enumerate((TABLE0, TABLE1)):
            record = 8 + 8 * slot
            last = starts[slot] + (ENTRIES << shift) - 1
            domain[record : record + 6] = memoryview(array("Q", [starts[slot], last, shift, 1, 0, table * 8]))
            pe[PE_WINDOW0 + slot] = record * 8
        rams = [bytearray(SEGMENT_BYTES) for _ in BASES]
        places = [HpaMap(base, 12, 6, 3, *(5, 3) if scatter else (1, 0)) for base in BASES]
        segments = Segments(zip(places, map(memoryview, rams), strict=True))
        lane = Lane.private()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(variant, "chosen", "compiled" if compiled else "numpy")
            impl = AssignedImpl(pe.toreadonly(), domain.toreadonly(), segments, lane)
        return cls(impl, pe, domain, lane, rams, segments)


STARTS = [(0, 1 << 59), (1 << 59, 0), (1 << 63, U64_MAX + 1 - (ENTRIES << 24))]
tces = st.one_of(
    st.just(0),
    st.builds(lambda base, page, perm: base + page * 4096 | perm, st.sampled_from(BASES), st.integers(-1, 8),
              st.integers(0, 3)),
    st.builds(lambda base, page: base + page * 4096 | 3, st.sampled_from(BASES), st.integers(0, 4)),
    st.integers(0, U64_MAX),
)  # fmt: skip


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, tuple[int, int], bool, list[tuple[Any, ...]]]:
    shift = draw(st.sampled_from([12, 12, 16, 24]))
    starts = draw(st.sampled_from(STARTS))
    inside = st.builds(
        lambda start, page, offset: start + (page << shift) + offset,
        st.sampled_from(starts), st.integers(0, ENTRIES - 1), st.sampled_from([0, 1, 64, 4000, 4095]),
    )  # fmt: skip
    iovas = st.one_of(inside, inside, inside, st.sampled_from([-1, -4096, U64_MAX, 1 << 64, 1 << 62]))
    sizes = st.sampled_from([0, 1, 8, 64, 96, 97, 4096, 5000])
    steps = st.one_of(
        st.tuples(st.just("write"), iovas, sizes),
        st.tuples(st.just("read"), iovas, sizes),
        st.tuples(st.just("tce"), st.sampled_from([TABLE0, TABLE1]), st.integers(0, ENTRIES - 1), tces),
        st.tuples(st.just("pe"), st.sampled_from([PE_STATE, PE_BUS_MASTER]), st.integers(0, 1)),
        st.tuples(st.just("root"), st.integers(0, 1), st.booleans()),
        st.tuples(st.just("segment"), st.integers(0, 1), st.booleans()),
    )
    first = [("tce", table, n, BASES[n & 1] + n // 2 * 4096 | 3) for table in (TABLE0, TABLE1) for n in range(ENTRIES)]
    return shift, starts, draw(st.booleans()), first + draw(st.lists(steps, max_size=30))


def step(area: Area, action: tuple[Any, ...], number: int) -> Any:
    """What a caller sees of one step."""
    kind, *args = action
    if kind == "write":
        return area.impl.write(args[0], bytes((number * 17 + n) % 256 for n in range(args[1])))
    if kind == "read":
        out = bytearray(b"\xee") * args[1]
        return area.impl.read(args[0], out), out
    if kind == "tce":
        area.domain[args[0] + args[1]] = args[2]
    elif kind == "pe":
        area.pe[args[0]] = args[1]
    elif kind == "root":
        area.pe[PE_WINDOW0 + args[0]] = (8 + 8 * args[0]) * 8 if args[1] else 0
    else:
        place = HpaMap(BASES[args[0]], 12, 6, 3)
        area.segments.remove(place)
        if args[1]:
            area.segments.add(place, memoryview(area.rams[args[0]]))
    return None


@needs_it
@settings(max_examples=200)
@given(programs())
def test_programs_go_alike_on_both(program: tuple[int, tuple[int, int], bool, list[tuple[Any, ...]]]) -> None:
    shift, starts, scatter, steps = program
    ours, theirs = (Area.make(compiled, shift, starts, scatter) for compiled in (True, False))
    for number, action in enumerate(steps):
        assert step(ours, action, number) == step(theirs, action, number)
        assert ours.rams == theirs.rams
        assert not ours.lane.inside and not theirs.lane.inside
    assert type(ours.impl.read(0, bytearray(1))) is MemTxResult


@pytest.fixture(params=[True, False], ids=["compiled", "Python"])
def area(request: pytest.FixtureRequest) -> Area:
    if request.param and dma.Path is None:
        pytest.skip("not built")
    made = Area.make(request.param, 24, (0, 1 << 59))
    made.rams[0] = bytearray(1 << 24)
    made.segments.remove(HpaMap(1 << 32, 24, 1, 0))
    made.segments.add(HpaMap(1 << 32, 24, 1, 0), memoryview(made.rams[0]))
    made.domain[TABLE0] = 1 << 32 | 3
    return made


def sections(area: Area, iova: int, size: int) -> int:
    before = area.lane.words[area.lane.slot]
    assert area.impl.write(iova, bytes(size)) == OK
    return int(area.lane.words[area.lane.slot] - before) // 2


def test_an_access_is_one_section_and_a_section_stays_small(area: Area) -> None:
    assert area.impl.write(0, b"learnt") == OK
    assert sections(area, 5, 64) == 1
    assert sections(area, 5, SECTION_BYTES) == 1
    assert sections(area, 5, SECTION_BYTES + 1) > 2
    assert sections(area, 5, 8 * SECTION_BYTES) >= 8


@needs_it
def test_a_segment_that_went_is_not_held() -> None:
    area = Area.make(True, 12, (0, 1 << 59))
    area.domain[TABLE0] = BASES[0] | 3
    assert area.impl.write(0, b"learnt") == OK and area.impl.write(0, b"again") == OK
    area.segments.remove(HpaMap(BASES[0], 12, 6, 3))
    assert area.impl.write(0, b"x") == DECODE_ERROR
    area.rams[0].extend(b"a bytearray that is exported refuses to grow")


def test_the_shared_areas_can_be_released_by_who_mapped_them(area: Area) -> None:
    assert area.impl.write(0, b"learnt") == OK and area.impl.write(0, b"again") == OK
    area.pe.release()
    area.domain.release()
    area.lane.words.release()


def test_buffers_that_do_not_fit_are_refused_like_a_slice_does(area: Area) -> None:
    assert area.impl.write(0, b"learnt") == OK
    for wrong in (5, None, ["x"]):
        with pytest.raises(TypeError):
            area.impl.write(0, wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        area.impl.read(0, b"read only")  # type: ignore[arg-type]
    assert not area.lane.inside


@needs_it
def test_a_path_is_collected_with_its_cycle() -> None:
    area = Area.make(True, 12, (0, 1 << 59))
    ram, segments = area.rams[0], area.segments
    area.domain[TABLE0] = BASES[0] | 3
    assert area.impl.write(0, b"learnt") == OK
    del area
    segments.__init__()  # type: ignore[misc]  # forget the watchers: nothing else knows the path
    gc.collect()
    ram.extend(b"free")


@needs_it
def test_what_cannot_be_known_is_refused() -> None:
    words, lanes, ram = array("Q", [0] * 16), array("Q", [0] * 16), bytearray(4096)

    def path(*args: Any) -> Any:
        return dma.Path(*args)

    def slow(iova: int, buffer: object) -> str:
        return "slow"

    for args in ((words[:9], lanes, 0), (words, lanes, 16), (bytearray(129)[1:], memoryview(bytearray(129))[1:], 0)):
        with pytest.raises(ValueError, match="too short or not aligned"):
            path(*args, slow, slow, "ok")
    with pytest.raises(BufferError):
        path(words, bytes(128), 0, slow, slow, "ok")
    made = path(words, lanes, 0, slow, slow, "ok")
    assert made.write(0, b"x") == "slow"
    for wrong in ((16, 0, 0, 12), (10, 0, 0, 64), (10, 0, 0, 1)):
        with pytest.raises(ValueError, match="root word"):
            made.know(*wrong, 0, words, ram)
    with pytest.raises(BufferError):
        made.know(10, 0, 0, 12, 0, words, bytes(4096))
    assert made.write(0, b"x") == "slow"
    words[10], words[9], words[0] = 80, 1, 0x9003
    made.know(10, 80, 0x4000, 12, 0x9000, words, ram)
    assert made.write(0x4004, b"x") == "ok" and ram[4:5] == b"x"
    assert lanes[0] == 2
