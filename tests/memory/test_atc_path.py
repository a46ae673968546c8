"""The compiled table and path of a cache of translations: what a dict does, held buffers, and when a hit is none."""

from __future__ import annotations

import gc
import shutil
import sysconfig
from array import array
from pathlib import Path as FilePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfio_model.memory import atc_path
from vfio_model.memory.lane import SECTION_BYTES
from vfio_model.memory.types import MemTxResult

PAGE = 0x1000
HEAD = 8
needs_it = pytest.mark.skipif(atc_path.Path is None, reason="not built: the first test here says whether it had to")


def test_it_is_there_wherever_it_can_be_built() -> None:
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0])
    header = FilePath(sysconfig.get_paths()["include"], "Python.h")
    assert atc_path.Path is not None or compiler is None or not header.exists()


def entry(page: int, view: memoryview) -> tuple[int, int, memoryview]:
    return page * PAGE, page * PAGE + len(view), view


# numbers that share their lowest and their highest bits
KEYS = st.one_of(
    st.integers(0, 40), st.integers(0, 40).map(lambda n: n << 32), st.integers(0, 40).map(lambda n: n << 46)
)


@needs_it
@given(st.lists(st.tuples(st.sampled_from(["set", "set", "set", "pop", "clear"]), KEYS), max_size=300))
def test_the_table_is_a_dict(steps: list[tuple[str, int]]) -> None:
    front, oracle = atc_path.Front(True), dict[int, Any]()
    for number, (kind, page) in enumerate(steps):
        if kind == "set":
            front[page] = oracle[page] = entry(page, memoryview(bytearray([number & 255])))
        elif kind == "pop":
            assert front.pop(page, None) == oracle.pop(page, None)
        elif number % 16 == 0:
            front.clear()
            oracle.clear()
        assert len(front) == len(oracle)
        assert front.get(page) == oracle.get(page)
    for page, hit in oracle.items():
        assert front.get(page) is hit


@needs_it
def test_a_table_of_many_entries_finds_them_all() -> None:
    front, view = atc_path.Front(False), memoryview(bytes(1))
    for page in range(5000):
        front[page * 512] = entry(page * 512, view)
    for page in range(0, 5000, 2):
        assert front.pop(page * 512, None) is not None
    for page in range(5000):
        assert (front.get(page * 512) is not None) == bool(page % 2)
    assert len(front) == 2500 and front.get(1) is None


@needs_it
def test_a_buffer_is_held_as_long_as_its_entry_is_there() -> None:
    front = atc_path.Front(True)
    rams = [bytearray(PAGE) for _ in range(4)]
    for page, ram in enumerate(rams):
        front[page] = entry(page, memoryview(ram))
    for ram in rams:
        with pytest.raises(BufferError):
            ram.append(0)
    front.pop(0, None)
    rams[0].append(0)
    front[1] = entry(1, memoryview(rams[0]))
    rams[1].append(0)
    front.clear()
    rams[2].append(0)
    front[0] = entry(0, memoryview(rams[3]))
    del front
    rams[3].append(0)


@needs_it
def test_what_is_no_entry_is_refused() -> None:
    front: Any = atc_path.Front(True)
    for wrong in (None, (0, PAGE), [0, PAGE, b""], (0, PAGE, 5), ("0", PAGE, b"")):
        with pytest.raises(TypeError):
            front[0] = wrong
    with pytest.raises(OverflowError):
        front[-1] = entry(0, memoryview(b""))
    with pytest.raises(TypeError):
        front["page"] = entry(0, memoryview(b""))
    with pytest.raises(TypeError):
        del front[0]
    assert len(front) == 0 and front.get(0) is None


class Rig:
    """A path over words made by hand; the slow half says that it was called."""

    def __init__(self, ram: bytearray | None = None) -> None:
        self.ram = bytearray(2 * PAGE) if ram is None else ram
        self.ring, self.lanes, self.seen = array("Q", [0] * 16), array("Q", [0] * 16), array("Q", [0])
        self.gate = array("Q", [1])
        self.fronts = atc_path.Front(False), atc_path.Front(True)
        self.path: Any = atc_path.Path(self._slow, self._slow, self._slow_access, MemTxResult.OK, "moved")
        self.know()
        for front in self.fronts:
            front[8] = (8 * PAGE, 8 * PAGE + len(self.ram), memoryview(self.ram))

    def know(self, **other: Any) -> None:
        words = {"ring": self.ring, "lanes": self.lanes, "slot": 3, "seen": self.seen, "gate": self.gate, **other}
        self.path.know(*words.values(), *self.fronts)

    def _slow(self, iova: int, view: object) -> str:
        return "slow"

    def _slow_access(self, addr: int, view: object, is_write: bool) -> tuple[int, str]:
        return 0, "slow"

    def write(self, at: int, data: Any) -> object:
        return self.path.write(8 * PAGE + at, data)


@needs_it
def test_a_hit_is_one_section() -> None:
    rig = Rig()
    assert rig.write(5, b"abc") is MemTxResult.OK and rig.ram[5:8] == b"abc"
    out = bytearray(3)
    assert rig.path.read(8 * PAGE + 5, out) is MemTxResult.OK and out == b"abc"
    assert rig.path.access(8 * PAGE + 6, memoryview(out), False) == (3, "moved") and out == b"bc\0"
    assert rig.lanes[3] == 6 and not any(rig.lanes[:3])


@needs_it
def test_a_part_is_enough_for_access_alone() -> None:
    rig = Rig()
    data = memoryview(bytes(range(16)))
    assert rig.path.access(10 * PAGE - 4, data, True) == (0, "slow"), "page 9 was not used yet"
    rig.fronts[1][9] = (8 * PAGE, 10 * PAGE, memoryview(rig.ram))
    assert rig.path.access(10 * PAGE - 4, data, True) == (4, "moved") and rig.ram[-4:] == bytes(range(4))
    assert rig.path.access(10 * PAGE - 8, data[:8], True) == (8, "moved")
    assert rig.path.write(10 * PAGE - 4, data) == "slow"


@needs_it
def test_a_section_stays_small() -> None:
    rig = Rig(bytearray(2 * SECTION_BYTES))
    data = memoryview(bytearray(SECTION_BYTES + 1))
    assert rig.write(0, data[:-1]) is MemTxResult.OK
    assert rig.write(0, data) == "slow"
    assert rig.path.access(8 * PAGE, data, True) == (SECTION_BYTES, "moved")


@needs_it
def test_what_is_no_hit_moves_nothing() -> None:
    rig = Rig()
    before = bytes(rig.ram)
    rig.ring[HEAD] = 1
    assert rig.write(0, b"x") == "slow", "an invalidation was published"
    rig.seen[0] = 1
    rig.gate[0] = 0
    assert rig.write(0, b"x") == "slow", "the gate is closed"
    rig.gate[0] = 1
    assert rig.path.write(7 * PAGE, b"x") == "slow" and rig.path.write((1 << 64) - 1, b"xy") == "slow"
    assert rig.lanes[3] % 2 == 0
    rig.lanes[3] += 1
    assert rig.write(0, b"x") == "slow" and rig.lanes[3] % 2 == 1, "a section inside a section"
    rig.lanes[3] += 1
    rig.path.forget()
    assert rig.write(0, b"x") == "slow" and rig.path.access(8 * PAGE, memoryview(b"x"), True) == (0, "slow")
    assert rig.ram == before
    rig.know()
    assert rig.write(0, b"x") is MemTxResult.OK


@needs_it
def test_what_is_no_buffer_or_address_goes_to_the_slow_half() -> None:
    rig = Rig()
    for wrong in (5, None, ["x"], array("Q", [1]), b""):
        assert rig.write(0, wrong) == "slow"
    assert rig.path.read(8 * PAGE, b"read only") == "slow"
    assert rig.path.write(-1, b"x") == "slow" and rig.path.write(1 << 64, b"x") == "slow"
    assert rig.path.write("address", b"x") == "slow"
    with pytest.raises(TypeError, match="access takes"):
        rig.path.access(0, b"x")


@needs_it
def test_memory_that_is_read_only_here_is_not_written() -> None:
    rig = Rig()
    for front in rig.fronts:
        front[8] = (8 * PAGE, 9 * PAGE, memoryview(bytes(PAGE)))
    out = bytearray(4)
    assert rig.write(0, b"x") == "slow" and rig.path.read(8 * PAGE, out) is MemTxResult.OK


@needs_it
def test_what_cannot_be_known_is_refused_and_given_back() -> None:
    rig = Rig()
    crooked = memoryview(bytearray(257))[1:]
    for wrong in (
        {"ring": array("Q", [0] * 8)},
        {"ring": crooked},
        {"slot": 16},
        {"lanes": crooked},
        {"seen": b""},
        {"gate": b""},
        {"gate": crooked[:8]},
    ):
        with pytest.raises(ValueError, match="too short or not aligned"):
            rig.know(**wrong)
        assert rig.write(0, b"x") == "slow"
    with pytest.raises(BufferError):
        rig.know(lanes=bytes(128))
    for words in (rig.ring, rig.lanes, rig.seen, rig.gate):
        words.append(0)
    rig.know(gate=b"\1")
    assert rig.write(0, b"x") is MemTxResult.OK
    with pytest.raises(BufferError):
        rig.ring.append(0)
    rig.path.forget()
    rig.ring.append(0)


@needs_it
def test_a_path_is_collected_with_its_cycle() -> None:
    rig = Rig()
    ring, ram = rig.ring, rig.ram
    del rig
    gc.collect()
    ring.append(0)
    ram.append(0)
