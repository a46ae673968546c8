"""The NVMe driver model on a controller on a bench."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tests.machine.boards import LIOBN, pseries
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import Status
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.nvme import MEMORY_PAGES, PAGE, Completion, NvmeDriver
from vfio_model.guest_drivers.pci import DriverError, MmioWindow, bring_up, find_function
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import HCall
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.testing.bench import Bench

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


# -- behind an IOMMU, on a big-endian machine

PAGES = MEMORY_PAGES + 8
IOVA = 0x100000


def mapped(machine: PseriesMachine) -> NvmeDriver:
    """The driver on ``machine``, the memory of driver and data mapped at IOVA, backwards."""
    cpu = DirectCpu(machine)
    window = MmioWindow.pseries()
    function = find_function(bring_up(cpu, regs.phb_buid(0), window), 0x1B36, 0x0010)
    for page in range(PAGES):
        assert machine.hcall(HCall.H_PUT_TCE, LIOBN, IOVA + page * PAGE, gpa_of(page) | 3)[0] == 0
    return NvmeDriver(cpu, window.to_cpu(function.bars[0].address), QUEUES, IOVA)


def gpa_of(page: int) -> int:
    """The driver's own pages in order, those of data backwards."""
    return QUEUES + page * PAGE if page < MEMORY_PAGES else DATA + (PAGES - page) * PAGE


@pytest.mark.machine
def test_it_works_behind_an_iommu() -> None:
    machine = pseries()
    machine.phb().bus.plug(NvmeDevice, 0x10, drive="mem:1M")
    nvme = mapped(machine)
    nvme.start()
    assert nvme.blocks == 2048
    data = IOVA + MEMORY_PAGES * PAGE
    for page in range(MEMORY_PAGES, PAGES):
        machine.write_memory(gpa_of(page), bytes((page,)) * PAGE)
    assert nvme.write(8, 64, data) == Status.SUCCESS
    for page in range(MEMORY_PAGES, PAGES):
        machine.write_memory(gpa_of(page), bytes(PAGE))
    assert nvme.read(8, 64, data) == Status.SUCCESS
    assert all(machine.read_memory(gpa_of(page), PAGE) == bytes((page,)) * PAGE for page in range(MEMORY_PAGES, PAGES))
    machine.hcall(HCall.H_PUT_TCE, LIOBN, data + 3 * PAGE, 0)
    assert nvme.read(8, 64, data) == Status.DATA_TRANSFER_ERROR
    machine.hcall(HCall.H_PUT_TCE, LIOBN, IOVA + 2 * PAGE, 0)
    with pytest.raises(DriverError, match="CSTS is 0x3"):
        nvme.flush()
