"""A guest process's address space: areas, pages on demand, what is given back and when."""

from __future__ import annotations

import errno

import pytest

from tests.guest_drivers.svm_rig import SvmRig
from vfio_model.guest_drivers.frames import Frames
from vfio_model.guest_drivers.mm import MMAP_BASE, USER_END, MemFile, Mm
from vfio_model.guest_drivers.pci import DriverError

PAGE = 4096
MIB = 1 << 20
AT = 0x1234_5678_9000


@pytest.fixture(scope="module")
def rig() -> SvmRig:
    return SvmRig(128 * MIB)


@pytest.fixture
def mm(rig: SvmRig) -> Mm:
    return rig.mm()


def fails(mm: Mm, addr: int, *, write: bool = False) -> bool:
    try:
        mm.write(addr, b"x") if write else mm.read(addr, 1)
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def test_pages_come_when_they_are_used(mm: Mm) -> None:
    start = mm.mmap(5 * PAGE, AT)
    assert (start, mm.faults) == (AT, 0)
    mm.write(AT + PAGE - 2, b"over")
    assert mm.read(AT + PAGE - 3, 6) == b"\0over\0" and mm.faults == 2
    mm.exit()


def test_nothing_else_can_be_used(mm: Mm) -> None:
    mm.mmap(PAGE, AT, writable=False)
    assert [fails(mm, at) for at in (AT - 1, AT, AT + PAGE, 0, USER_END)] == [True, False, True, True, True]
    assert fails(mm, AT, write=True)
    mm.exit()


@pytest.mark.parametrize(
    ("size", "addr", "more"),
    [(0, AT, {}), (PAGE, AT + 1, {}), (PAGE, USER_END, {}), (2 * MIB, AT, {"level": 2})],
    ids=["nothing", "not aligned", "too high", "no large page"],
)
def test_what_cannot_be_mapped(mm: Mm, size: int, addr: int, more: dict[str, int]) -> None:
    with pytest.raises(OSError) as caught:
        mm.mmap(size, addr, **more)  # type: ignore[arg-type]
    assert caught.value.errno == errno.EINVAL


def test_areas_do_not_overlap(mm: Mm) -> None:
    mm.mmap(4 * PAGE, AT)
    for at in (AT - PAGE, AT + PAGE, AT + 3 * PAGE):
        with pytest.raises(OSError) as caught:
            mm.mmap(2 * PAGE, at)
        assert caught.value.errno == errno.EEXIST
    mm.mmap(PAGE, AT - PAGE)
    mm.exit()


def test_a_part_is_unmapped(mm: Mm) -> None:
    mm.mmap(6 * PAGE, AT)
    for page in range(6):
        mm.write(AT + page * PAGE, bytes([page + 1]))
    mm.munmap(AT + PAGE, 2 * PAGE)
    mm.munmap(AT + 4 * PAGE, PAGE)
    found = [None if fails(mm, AT + page * PAGE) else mm.read(AT + page * PAGE, 1)[0] for page in range(6)]
    assert found == [1, None, None, 4, None, 6]
    mm.mmap(PAGE, AT + PAGE)
    assert mm.read(AT + PAGE, 1) == b"\0"
    with pytest.raises(OSError) as caught:
        mm.munmap(AT, PAGE + 1)
    assert caught.value.errno == errno.EINVAL
    mm.exit()


def test_who_follows_hears_before_memory_is_free(rig: SvmRig, mm: Mm) -> None:
    told: list[tuple[int, int, int]] = []

    def hear(addr: int, size: int) -> None:
        told.append((addr, size, rig.frames.taken))

    mm.on_invalidate.append(hear)
    mm.mmap(3 * PAGE, AT)
    mm.munmap(AT, 3 * PAGE)
    assert told == [], "nothing was there"
    mm.mmap(3 * PAGE, AT)
    mm.write(AT, b"x" * (2 * PAGE))
    taken = rig.frames.taken
    mm.pageout(AT + PAGE, PAGE)
    mm.munmap(AT, 3 * PAGE)
    assert told == [(AT + PAGE, PAGE, taken), (AT, 3 * PAGE, taken - 1)]
    mm.on_invalidate.clear()
    mm.exit()


def test_what_is_paged_out_comes_back(rig: SvmRig, mm: Mm) -> None:
    mm.mmap(2 * PAGE, AT)
    mm.write(AT, b"first" + bytes(PAGE) + b"second")
    taken = rig.frames.taken
    mm.pageout(AT - PAGE, 8 * PAGE)
    assert rig.frames.taken == taken - 2
    assert mm.read(AT, 5) == b"first" and mm.read(AT + PAGE + 5, 6) == b"second"
    mm.pageout(AT, PAGE)
    mm.munmap(AT, PAGE)
    mm.mmap(PAGE, AT)
    assert mm.read(AT, 5) == bytes(5), "swap space goes with its area"
    mm.exit()


def test_a_file_is_one_memory(rig: SvmRig, mm: Mm) -> None:
    file, other = MemFile(rig.frames), rig.mm()
    mine = mm.mmap(3 * PAGE, file=file)
    theirs = other.mmap(PAGE, file=file, offset=PAGE, writable=False)
    mm.write(mine + PAGE, b"shared")
    assert other.read(theirs, 6) == b"shared" and fails(other, theirs, write=True)
    mm.pageout(mine, 3 * PAGE)
    mm.munmap(mine, 3 * PAGE)
    assert other.read(theirs, 6) == b"shared"
    mm.exit()
    other.exit()
    file.close()


def test_a_large_page_takes_the_place_of_small_ones(mm: Mm) -> None:
    """The empty table that stood there is given back after everyone has forgotten it."""
    at = MMAP_BASE + 8 * MIB
    mm.mmap(PAGE, at)
    mm.write(at, b"small")
    mm.munmap(at, PAGE)
    told: list[int] = []
    mm.on_invalidate.append(lambda addr, size: told.append(size))
    mm.mmap(2 * MIB, at, level=2)
    mm.write(at + MIB, b"large")
    assert mm.read(at + MIB, 5) == b"large" and mm.table.find(at) is not None and told == [2 * MIB]
    mm.munmap(at, 2 * MIB)
    mm.mmap(2 * PAGE, at)
    mm.write(at + PAGE, b"small again")
    assert mm.read(at + PAGE, 5) == b"small"
    mm.on_invalidate.clear()
    mm.exit()


def test_a_child_has_a_copy(rig: SvmRig, mm: Mm) -> None:
    file = MemFile(rig.frames)
    mm.mmap(3 * PAGE, AT)
    shared = mm.mmap(PAGE, file=file)
    mm.write(AT, b"there" + bytes(PAGE) + b"swapped")
    mm.write(shared, b"both")
    mm.pageout(AT + PAGE, PAGE)
    child = mm.fork()
    mm.write(AT, b"mine")
    child.write(shared, b"BOTH")
    assert child.read(AT, 5) == b"there" and child.read(AT + PAGE + 5, 7) == b"swapped"
    assert mm.read(shared, 4) == b"BOTH"
    mm.exit()
    assert child.read(AT, 5) == b"there"
    child.exit()
    file.close()


def test_everything_comes_back(rig: SvmRig) -> None:
    taken = rig.frames.taken
    mm = rig.mm()
    for number in range(20):
        mm.mmap(PAGE, AT + number * 3 * MIB + (number << 33))
        mm.write(AT + number * 3 * MIB + (number << 33), b"x")
    mm.mmap(4 * MIB, level=2)
    mm.exit()
    assert rig.frames.taken == taken
    rig.frames.check()


def test_free_pages_are_looked_at(rig: SvmRig) -> None:
    frames = Frames(rig.cpu, 96 * MIB, 128 * MIB)
    page = frames.take()
    frames.give(page)
    rig.cpu.write_memory(page + 100, b"late")
    with pytest.raises(DriverError, match="was written to"):
        frames.check()
    with pytest.raises(DriverError, match="was written to"):
        frames.take()
    assert rig.cpu.read_memory(frames.take(), PAGE) == bytes(PAGE)


def test_frames_run_out_and_are_aligned(rig: SvmRig) -> None:
    frames = Frames(rig.cpu, 96 * MIB + PAGE, 104 * MIB)
    assert frames.take(512) == 98 * MIB and frames.take() in range(96 * MIB, 98 * MIB)
    frames.take(512)
    frames.take(512)
    with pytest.raises(DriverError, match="no 512 pages left"):
        frames.take(512)
    frames.give(98 * MIB, 512)
    assert frames.take(512) == 98 * MIB
