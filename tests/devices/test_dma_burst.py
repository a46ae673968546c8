"""The DMA load generator: what one register write does."""

from __future__ import annotations

import struct

import pytest

from vfio_model.devices import DEVICES
from vfio_model.devices.dma_burst import regs
from vfio_model.devices.dma_burst.device import DMABurstDevice
from vfio_model.ranges import U64_MAX
from vfio_model.testing.bench import RAM_SIZE, Bench

W, START = regs.COMMAND_WRITE, regs.COMMAND_START
PATTERN = 0x1122334455667788
BYTES = PATTERN.to_bytes(8, "little")


@pytest.fixture
def burst() -> Bench:
    return Bench(DMABurstDevice)


def run(burst: Bench, command: int, **registers: int) -> None:
    for name, value in registers.items():
        burst.write(getattr(regs, name.upper()), value, 8)
    burst.write(regs.COMMAND, command | START, 8)


def state(burst: Bench) -> tuple[int, int, int]:
    """(status, completed, failed)."""
    return burst.read(regs.STATUS), burst.read(regs.COMPLETED, 8), burst.read(regs.FAILED, 8)


def test_identity_and_registry(burst: Bench) -> None:
    assert burst.device.config.read(0, 4) == 0x0B571234 and burst.read(0) == regs.IDENTIFICATION_VALUE
    assert DEVICES["dma-burst"] is DMABurstDevice


def test_registers_are_eight_bytes_or_two_halves(burst: Bench) -> None:
    burst.write(regs.IOVA, 0x1_0000_2000, 8)
    assert burst.read(regs.IOVA, 8) == 0x1_0000_2000
    assert (burst.read(regs.IOVA, 4), burst.read(regs.IOVA + 4, 4)) == (0x2000, 1)
    burst.write(regs.IOVA + 4, 0x7, 4)
    burst.write(regs.IOVA, 0x3000, 4)
    assert burst.read(regs.IOVA, 8) == 0x7_0000_3000
    burst.write(regs.COMPLETED, 5, 8)
    burst.write(0x800, 5, 8)
    assert burst.read(regs.COMPLETED, 8) == 0 and burst.read(0x800, 8) == 0


def test_writes_with_a_stride(burst: Bench) -> None:
    run(burst, W, iova=0x1000, length=8, count=10, stride=0x100, pattern=PATTERN)
    assert state(burst) == (regs.STATUS_DONE, 10, 0)
    assert all(burst.ram[0x1000 + at * 0x100 :][:8] == BYTES for at in range(10))
    assert burst.ram.count(BYTES) == 10


@pytest.mark.parametrize("command", [0, regs.COMMAND_BATCH])
def test_reads_show_the_first_bytes_of_the_last(burst: Bench, command: int) -> None:
    burst.ram[0x1F00:0x1F08] = BYTES
    run(burst, command, iova=0x1000, length=16, count=16, stride=0x100)
    assert state(burst) == (regs.STATUS_DONE, 16, 0)
    assert burst.read(regs.DATA, 8) == (PATTERN if not command else 0)


def test_a_span_goes_round(burst: Bench) -> None:
    run(burst, W, iova=0x1000, length=8, count=1000, stride=0x1000, span=3, pattern=PATTERN)
    assert state(burst) == (regs.STATUS_DONE, 1000, 0) and burst.ram.count(BYTES) == 3


def test_addresses_wrap_at_2_to_the_64(burst: Bench) -> None:
    run(burst, W, iova=U64_MAX - 0xFFF, length=8, count=3, stride=0x1000, pattern=PATTERN)
    assert state(burst) == (regs.STATUS_DONE | regs.STATUS_FAILURES, 2, 1)
    assert burst.read(regs.FIRST_FAILED, 8) == U64_MAX - 0xFFF
    assert burst.ram[0:8] == BYTES and burst.ram[0x1000:0x1008] == BYTES


def test_failures_are_counted_and_the_first_is_kept(burst: Bench) -> None:
    run(burst, W, iova=RAM_SIZE - 0x2000, length=8, count=5, stride=0x1000)
    assert state(burst) == (regs.STATUS_DONE | regs.STATUS_FAILURES, 2, 3)
    assert burst.read(regs.FIRST_FAILED, 8) == RAM_SIZE and burst.read(regs.LAST_RESULT) == 2
    run(burst, W, iova=0)
    assert burst.read(regs.FIRST_FAILED, 8) == regs.NO_FAILURE and state(burst)[0] == regs.STATUS_DONE


def test_a_run_can_stop_at_its_first_failure(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_STOP_ON_FAILURE, iova=RAM_SIZE - 0x1000, length=8, count=100, stride=0x1000)
    assert state(burst)[1:] == (1, 1)


@pytest.mark.parametrize("command", [W, W | regs.COMMAND_BATCH])
def test_a_list_in_memory(burst: Bench, command: int) -> None:
    iovas = [0x9000, 0x3000, 0x8010]
    burst.ram[0x100:0x118] = struct.pack("<3Q", *iovas)
    run(burst, command | regs.COMMAND_LIST, list=0x100, length=8, count=3, pattern=PATTERN)
    assert state(burst) == (regs.STATUS_DONE, 3, 0)
    assert all(burst.ram[iova : iova + 8] == BYTES for iova in iovas) and burst.ram.count(BYTES) == 3


def test_a_list_that_cannot_be_read_is_a_failed_run(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_LIST, list=RAM_SIZE, length=8, count=3)
    assert state(burst) == (regs.STATUS_DONE | regs.STATUS_FAILURES, 0, 1)
    assert burst.read(regs.FIRST_FAILED, 8) == RAM_SIZE


def test_a_long_run_in_one_register_write(burst: Bench) -> None:
    run(burst, W, iova=0x1000, length=64, count=20_000)
    assert state(burst) == (regs.STATUS_DONE, 20_000, 0)


@pytest.mark.parametrize(
    ("command", "registers"),
    [
        (0, {"length": 0, "count": 1}),
        (0, {"length": regs.MAX_LENGTH + 1, "count": 1}),
        (0, {"length": 8, "count": 0}),
        (0, {"length": 8, "count": regs.MAX_COUNT + 1}),
        (regs.COMMAND_LIST | regs.COMMAND_BACKGROUND, {"length": 8, "count": regs.MAX_LIST + 1}),
        (regs.COMMAND_FOREVER, {"length": 8, "count": 1}),
    ],
)
def test_what_does_not_fit_is_refused(burst: Bench, command: int, registers: dict[str, int]) -> None:
    run(burst, command, **registers)
    assert state(burst)[0] == regs.STATUS_REFUSED
    burst.write(regs.STATUS, regs.STATUS_REFUSED, 8)
    assert state(burst)[0] == 0


def test_a_background_run_goes_slice_by_slice(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_BACKGROUND, iova=0x1000, length=8, count=100)
    assert state(burst) == (regs.STATUS_RUNNING, 0, 0)
    burst.host.clock.advance(1000)
    assert state(burst) == (regs.STATUS_RUNNING, 64, 0)
    burst.host.clock.advance(1000)
    assert state(burst) == (regs.STATUS_DONE, 100, 0)


def test_forever_until_stopped_with_the_pattern_of_the_moment(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER, iova=0x1000, length=8, count=10, pattern=1)
    burst.host.clock.advance(100_000)
    assert state(burst)[0] == regs.STATUS_RUNNING and state(burst)[1] > 100
    run(burst, W)
    assert state(burst)[0] == regs.STATUS_RUNNING | regs.STATUS_REFUSED, "one run at a time"
    burst.write(regs.PATTERN, PATTERN, 8)
    burst.host.clock.advance(2000)
    assert burst.ram[0x1000:0x1008] == BYTES
    burst.write(regs.COMMAND, regs.COMMAND_STOP, 8)
    before = state(burst)
    burst.host.clock.advance(100_000)
    assert state(burst) == before and before[0] & regs.STATUS_DONE


def test_a_run_after_a_stop_is_not_run_twice_as_fast(burst: Bench) -> None:
    forever = W | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER
    run(burst, forever, iova=0x1000, length=8, count=1000)
    burst.write(regs.COMMAND, regs.COMMAND_STOP, 8)
    run(burst, forever)
    burst.host.clock.advance(1000)
    assert state(burst)[1] == 64


def test_dma_follows_bus_mastering_between_slices(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_BACKGROUND, iova=0x1000, length=8, count=128)
    burst.host.clock.advance(1000)
    burst.device.config_write(4, 2, 0)
    burst.host.clock.advance(1000)
    assert state(burst) == (regs.STATUS_DONE | regs.STATUS_FAILURES, 64, 64)


def test_an_interrupt_at_the_end_until_acknowledged(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_IRQ, iova=0x1000, length=8, count=1)
    assert burst.host.signals == ["raise"]
    burst.write(regs.STATUS, regs.STATUS_DONE, 8)
    assert burst.host.signals == ["raise", "lower"]
    burst.enable_msi()
    run(burst, W | regs.COMMAND_IRQ)
    assert burst.host.signals[-1] == "msi 0"


def test_reset_abandons_a_run(burst: Bench) -> None:
    run(burst, W | regs.COMMAND_BACKGROUND | regs.COMMAND_FOREVER | regs.COMMAND_IRQ, length=8, count=10, iova=0x1000)
    burst.device.reset()
    burst.host.clock.advance(100_000)
    assert state(burst) == (0, 0, 0) and burst.host.signals == []
    assert burst.ram.count(0) == RAM_SIZE
