"""The devices in ``docs/examples``: on a bench, and behind ``vfio-model serve`` as a client by the letter sees them."""

from __future__ import annotations

import mmap
import os
import random
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from hostd.model_name import find_class
from tests.deploy import raw_client as raw
from tests.deploy.raw_client import Ram, RawClient, served
from vfio_model.errors import VMStateError
from vfio_model.testing import Bench

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
PAGE = 4096
EINVAL = 22


def example(name: str, cls: str) -> ModuleType:
    return sys.modules[find_class(f"{EXAMPLES / name}.py:{cls}").__module__]


screen, copier, sampler = example("screen", "Screen"), example("copier", "Copier"), example("sampler", "Sampler")


@pytest.fixture
def ram() -> Iterator[Ram]:
    with Ram(512) as memory:
        yield memory


@pytest.fixture
def events() -> Iterator[list[int]]:
    made = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(4)]
    yield made
    for event in made:
        os.close(event)


def await_ring(event: int) -> int:
    assert select.select([event], [], [], raw.SECONDS)[0], "no interrupt came"
    return os.eventfd_read(event)


# -- screen: sparse mmap areas ---------------------------------------------------------------------------------------


def test_a_screen_on_a_bench() -> None:
    bench = Bench(screen.Screen)
    bench.write(screen.FRAMES + 4, 0x01020304)
    bench.write(screen.FRAMES + screen.FRAME_SIZE, 0x10)
    assert bench.read(screen.SUM) == 10
    bench.write(screen.FRAME, 1)
    assert bench.read(screen.SUM) == 16
    there = bench.migrate()
    assert (there.read(screen.SUM), there.read(screen.FRAMES + 4)) == (16, 0x01020304)
    bench.reset()
    assert bench.read(screen.SUM) == 0 and not any(bench.device.bar_memory(0))


def test_a_frame_that_is_not_there_is_not_taken() -> None:
    device = Bench(screen.Screen).device
    with pytest.raises(VMStateError, match="frame 2 of 2"):
        device.check_state({**device.export_state(), "frame": 2}, where="screen")


def test_what_is_painted_through_the_map_is_what_the_device_shows(runtime_dir: Path) -> None:
    with served(f"{EXAMPLES}/screen.py:Screen", runtime_dir / "s") as _, RawClient(runtime_dir / "s") as client:
        client.bus_master()
        size, offset, areas, fds = client.region(0)
        assert (size, areas) == (0x10000, [(0x1000, 0x1000), (0x4000, 0x8000)])
        (fd,) = fds
        with (
            mmap.mmap(fd, 0x8000, offset=offset + 0x4000) as frames,
            mmap.mmap(fd, PAGE, offset=offset + PAGE) as cursor,
        ):
            frames[0x4000:0x8000] = b"\3" * 0x4000
            cursor[:] = b"\1" * PAGE
            client.write(0, screen.FRAME, 4, 1)
            assert client.read(0, screen.SUM, 4) == 3 * 0x4000
            assert client.read(0, screen.CURSOR_SUM, 4) == PAGE
            client.write(0, screen.FRAMES, 4, 0x42)
            assert frames[0] == 0x42, "an access by message finds the same bytes"
            client.call(raw.DEVICE_RESET)
            assert not any(frames[:]) and client.read(0, screen.FRAME, 4) == 0
        os.close(fd)


def test_mapped_frames_move_with_the_device(runtime_dir: Path) -> None:
    source, target = runtime_dir / "a", runtime_dir / "b"
    device = f"{EXAMPLES}/screen.py:Screen"
    picture = random.Random(1).randbytes(0x8000)
    with served(device, source), RawClient(source) as here, served(device, target), RawClient(target) as there:
        _, offset, _, (fd,) = here.region(0)
        with mmap.mmap(fd, 0x8000, offset=offset + 0x4000) as frames:
            frames[:] = picture
        os.close(fd)
        here.write(0, screen.FRAME, 4, 1)
        here.go(raw.PRE_COPY, raw.STOP_COPY)
        there.go(raw.RESUMING)
        there.load(here.save())
        there.go(raw.RUNNING)
        assert there.read(0, screen.SUM, 4) == sum(picture[0x4000:])
        _, offset, _, (fd,) = there.region(0)
        with mmap.mmap(fd, 0x8000, offset=offset + 0x4000) as frames:
            assert frames[:] == picture
        os.close(fd)


# -- copier: migration state, DMA in flight --------------------------------------------------------------------------


def submit(place: Bench | RawClient, source: int, target: int, length: int) -> None:
    for offset, value in (copier.SOURCE, source), (copier.TARGET, target), (copier.LENGTH, length), (copier.SUBMIT, 1):
        if isinstance(place, RawClient):
            place.write(0, offset, 8, value)
        else:
            place.write(offset, value, 8)


def test_a_copier_moves_in_mid_copy_on_a_bench() -> None:
    bench = Bench(copier.Copier)
    data = bench.ram[:0x4000] = random.Random(2).randbytes(0x4000)
    submit(bench, 0, 0x10000, 0x4000)
    submit(bench, 0, 0x20000, 100)
    submit(bench, 1 << 40, 0, 100)
    bench.advance(2 * copier.NS_PER_PIECE + 400)
    assert bench.ram[0x10000:0x13000] == data[:0x2000] + bytes(0x1000) and bench.read(copier.QUEUED, 8) == 3
    there = bench.migrate()
    there.advance(599)
    assert not any(there.ram[0x12000:0x13000])
    there.advance(4 * copier.NS_PER_PIECE)
    assert there.ram[0x10000:0x14000] == data and there.ram[0x20000:0x20064] == data[:100]
    assert [there.read(offset, 8) for offset in (copier.QUEUED, copier.DONE, copier.FAILED)] == [0, 2, 1]
    assert there.signals == ["raise"]


def test_a_copier_may_be_reset_in_a_dma() -> None:
    bench = Bench(copier.Copier)
    submit(bench, 0, 0x10000, 100)
    bench.during_dma(bench.reset)
    bench.advance(10 * copier.NS_PER_PIECE)
    assert [bench.read(offset, 8) for offset in (copier.QUEUED, copier.DONE, copier.FAILED)] == [0, 0, 0]
    assert bench.signals == []


def test_a_queue_that_is_too_long_is_not_taken() -> None:
    device = Bench(copier.Copier).device
    with pytest.raises(VMStateError, match="9 jobs"):
        device.check_state({**device.export_state(), "job_count": 9}, where="copier")


def test_a_copy_goes_on_in_another_process(runtime_dir: Path, ram: Ram, events: list[int]) -> None:
    source, target = runtime_dir / "a", runtime_dir / "b"
    device = f"{EXAMPLES}/copier.py:Copier"
    length, copy = 200 * PAGE, 300 * PAGE
    data = ram.view[:length] = random.Random(3).randbytes(length)
    with (
        served(f"{device},ns_per_piece=50000000", source),
        RawClient(source) as here,
        served(device, target),
        RawClient(target) as there,
    ):
        assert here.migration == 7, "STOP_COPY, P2P, PRE_COPY"
        for client in here, there:
            client.bus_master()
            client.map(0, ram.size, ram.fd)
        there.irqs(raw.INTX, events[:1])
        submit(here, 0, copy, length)
        here.wait(lambda: ram.view[copy : copy + PAGE] == data[:PAGE])
        here.go(raw.PRE_COPY)
        first = here.save()
        assert first and here.save() == b"", "its state, while it goes on; then what of it has changed"
        here.go(raw.STOP_COPY)
        assert here.read(0, copier.QUEUED, 8) == 1, "under way"
        moved = ram.view[copy : copy + length]
        there.go(raw.RESUMING)
        there.load(first + here.save())
        assert there.read(0, copier.QUEUED, 8) == 0, "not taken before all of it was written"
        there.go(raw.STOP)
        assert there.read(0, copier.QUEUED, 8) == 1
        assert ram.view[copy : copy + length] == moved, "who stands copies nothing"
        there.go(raw.RUNNING)
        assert await_ring(events[0]) == 1
        assert ram.view[copy : copy + length] == data and there.read(0, copier.DONE, 8) == 1
        here.go(raw.STOP)
        assert (here.state, here.read(0, copier.QUEUED, 8), here.read(0, copier.DONE, 8)) == (raw.STOP, 1, 0)


def test_a_state_that_is_damaged_is_refused_and_a_reset_helps(runtime_dir: Path) -> None:
    path = runtime_dir / "c"
    with served(f"{EXAMPLES}/copier.py:Copier", path), RawClient(path) as client:
        client.go(raw.STOP_COPY)
        state = client.save()
        client.go(raw.STOP)
        for damaged in (state[:-1], state + b"x", state.replace(b"\x34\x12\x91\xc0", b"\x34\x12\x92\xc0"), b"copier"):
            assert damaged != state
            client.go(raw.RESUMING)
            client.load(damaged)
            with pytest.raises(OSError) as refused:
                client.go(raw.STOP)
            assert (refused.value.errno, client.state) == (EINVAL, raw.STATE_ERROR)
            client.call(raw.DEVICE_RESET)
            assert client.state == raw.RUNNING
            client.go(raw.STOP)
        client.go(raw.RESUMING)
        client.load(state)
        client.go(raw.RUNNING)


# -- sampler: a log of what is written, MSI-X, timers ----------------------------------------------------------------


def start(place: Bench | RawClient, channel: int, ring: int, slots: int, period: int) -> None:
    for name, value in (sampler.RING, ring), (sampler.SLOTS, slots), (sampler.PERIOD, period):
        offset = channel * sampler.STRIDE + name
        if isinstance(place, RawClient):
            place.write(0, offset, 8, value)
        else:
            place.write(offset, value, 8)


def head(client: RawClient, channel: int) -> int:
    return client.read(0, channel * sampler.STRIDE + sampler.HEAD, 8)


def test_a_sampler_on_a_bench() -> None:
    bench = Bench(sampler.Sampler)
    bench.enable_msix()
    bench.log_writes()
    start(bench, 0, 0x1000, 512, 1000)
    start(bench, 3, 0x9000, 2, 10_000)
    bench.advance(10_000)
    assert bench.signals == ["msi 0"] * 9 + ["msi 3", "msi 0"]
    assert sampler.SAMPLE.unpack_from(bench.ram, 0x1000 + 9 * 16) == (9, 10_000)
    assert bench.written() == [0x1000, 0x9000] and bench.written() == []
    start(bench, 0, 0x1000, 512, 0)
    bench.advance(5_000)
    there = bench.migrate()
    there.advance(5_000)
    assert there.signals == ["msi 3"] and bench.written() == []
    there.during_dma(there.reset)
    there.advance(1_000_000)
    assert there.signals == ["msi 3"] and not any(there.device.words)


def test_the_log_has_the_pages_that_a_channel_writes(runtime_dir: Path, ram: Ram, events: list[int]) -> None:
    path = runtime_dir / "s"
    with served(f"{EXAMPLES}/sampler.py:Sampler", path), RawClient(path) as client:
        client.bus_master()
        client.map(0x100000, ram.size, ram.fd)
        client.irqs(raw.MSIX, events)
        client.log_writes((0x100000, ram.size))
        assert client.written(0x100000, ram.size) == []
        start(client, 2, 0x100000 + 5 * PAGE, 1, 1000)
        start(client, 1, 0x100000 + 7 * PAGE - 16, 2, 1000)
        assert await_ring(events[2]) and await_ring(events[1])
        client.wait(lambda: head(client, 1) > 1)
        for channel in 1, 2:
            start(client, channel, 0, 0, 0)
        both = [0x100000 + page * PAGE for page in (5, 6, 7)]
        assert client.written(0x100000, ram.size) == both
        assert client.written(0x100000, ram.size) == [], "a report cleans what it tells"
        assert sampler.SAMPLE.unpack_from(ram.view, 5 * PAGE)[0] == head(client, 2) - 1
        for event in events[:1] + events[3:]:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(event)
        client.stop_log()
        with pytest.raises(OSError) as refused:
            client.written(0x100000, ram.size)
        assert refused.value.errno == EINVAL


def test_a_sampler_moves_while_its_writes_are_logged(runtime_dir: Path, ram: Ram, events: list[int]) -> None:
    """RAM as a migration moves it: what the log names is copied again until the device stands, and then nothing is
    missing on the other side."""
    source, target = runtime_dir / "a", runtime_dir / "b"
    device = f"{EXAMPLES}/sampler.py:Sampler"
    with (
        Ram(512) as copy,
        served(device, source),
        RawClient(source) as here,
        served(device, target),
        RawClient(target) as there,
    ):
        for client, memory in (here, ram), (there, copy):
            client.bus_master()
            client.map(0, memory.size, memory.fd)
            client.irqs(raw.MSIX, events)

        def copy_dirty() -> int:
            pages = here.written(0, ram.size)
            for at in pages:
                copy.view[at : at + PAGE] = ram.view[at : at + PAGE]
            return len(pages)

        here.log_writes((0, ram.size))
        start(here, 0, 0, ram.size // 16, 20_000)
        start(here, 1, 0x180000, 4, 1_000_000)
        here.go(raw.PRE_COPY)
        here.wait(lambda: copy_dirty() > 0)
        here.wait(lambda: head(here, 0) > 300)
        here.go(raw.STOP_COPY)
        copy_dirty()
        assert copy.view[:] == ram.view[:] and here.written(0, ram.size) == []
        there.go(raw.RESUMING)
        there.load(here.save())
        there.go(raw.STOP)
        before = [head(there, channel) for channel in range(4)]
        assert before == [head(here, channel) for channel in range(4)] and before[0] > 300
        there.go(raw.RUNNING)
        there.wait(lambda: head(there, 0) > before[0] and head(there, 1) > before[1])
        assert ram.view[before[0] * 16 : before[0] * 16 + 16] == bytes(16), "the source wrote nothing more"
        assert sampler.SAMPLE.unpack_from(copy.view, before[0] * 16)[0] == before[0]
