"""The NVMe driver model on a controller on a bench."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.devices.bench import Bench
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import Status
from vfio_model.guest_drivers.nvme import PAGE, Completion, NvmeDriver
from vfio_model.guest_drivers.pci import DriverError

BAR = 0x8000_0000
QUEUES, DATA = 0x10000, 0x40000


class BenchCpu:
    """A processor beside the bench; ``big_endian`` swaps register accesses as such a machine would."""

    def __init__(self, bench: Bench, *, big_endian: bool = False) -> None:
        self._bench, self.big_endian = bench, big_endian

    def _swap(self, value: int, size: int) -> int:
        return int.from_bytes(value.to_bytes(size, "little"), "big") if self.big_endian else value

    def read_memory(self, gpa: int, size: int) -> bytes:
        return bytes(self._bench.ram[gpa : gpa + size])

    def write_memory(self, gpa: int, data: bytes) -> object:
        self._bench.ram[gpa : gpa + len(data)] = data
        return None

    def mmio_read(self, gpa: int, size: int) -> int:
        return self._swap(self._bench.read(gpa - BAR, size), size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        self._bench.write(gpa - BAR, self._swap(value, size), size)

    def clock_step(self, ns: int = 0) -> int:
        self._bench.host.clock.advance(ns or 1000)
        return self._bench.host.clock.now_ns

    def hcall(self, nr: int, *args: int) -> tuple[int, list[int]]:
        raise NotImplementedError

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        raise NotImplementedError

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        raise NotImplementedError


def driver(bench: Bench, *, big_endian: bool = False, iova: int = QUEUES) -> NvmeDriver:
    return NvmeDriver(BenchCpu(bench, big_endian=big_endian), BAR, QUEUES, iova)


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("block", [512, 4096])
def test_it_finds_the_disk_and_moves_data(block: int, big_endian: bool) -> None:
    bench = Bench(NvmeDevice, drive="mem:1M", logical_block_size=block)
    nvme = driver(bench, big_endian=big_endian)
    nvme.start()
    assert (nvme.block_size, nvme.blocks) == (block, (1 << 20) // block)
    count = 5 * PAGE // block
    for length in (1, PAGE // block, 2 * PAGE // block, count):
        data = bytes(range(1, 256)) * 100
        bench.ram[DATA : DATA + length * block] = data[: length * block]
        assert nvme.write(3, length, DATA) == Status.SUCCESS and nvme.flush() == Status.SUCCESS
        assert nvme.read(3, length, DATA + 0x10200) == Status.SUCCESS
        assert bench.ram[DATA + 0x10200 : DATA + 0x10200 + length * block] == data[: length * block]


def test_queues_go_round_and_it_can_be_started_again() -> None:
    nvme = driver(Bench(NvmeDevice))
    for _ in range(2):
        nvme.start()
        for _ in range(300):
            assert nvme.submit(1, 0, nsid=1) == Completion(0, 0)
        nvme.stop()


def test_a_fault_is_a_status() -> None:
    nvme = driver(Bench(NvmeDevice, drive="mem:1M"))
    nvme.start()
    assert nvme.read(0, 1, 1 << 40) == Status.DATA_TRANSFER_ERROR
    assert nvme.read(2048, 1, DATA) == Status.LBA_OUT_OF_RANGE


def test_a_controller_that_cannot_reach_its_queues_is_an_error() -> None:
    with pytest.raises(DriverError, match="does not complete: CSTS is 0x3"):
        driver(Bench(NvmeDevice), iova=1 << 40).start()
