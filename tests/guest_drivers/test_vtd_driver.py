"""The VT-d driver model on a q35 machine, and device drivers behind it: what a guest maps is what devices reach."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.guest_drivers.vtd_rig import DATA, EDU, TESTDEV, Rig
from vfio_model.devices.iommu_testdev.regs import PATTERN, RESULT_DMA_FAILED, RESULT_OK
from vfio_model.devices.nvme.device import NvmeDevice
from vfio_model.devices.nvme.regs import Status
from vfio_model.guest_drivers.nvme import MEMORY_PAGES, NvmeDriver
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd import PASS_THROUGH_DID, Domain, FaultRecord, VtdDriver
from vfio_model.guest_drivers.vtd_tables import READ, RID_PASID, WRITE, PageAllocator, Stage
from vfio_model.iommu.vtd import quirks
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.structures import Reason
from vfio_model.pci.iommu_ops import AtsRequest

PAGE = 4096
IOVA = 0x4000_0000
LEGACY = VtdOptions()
SCALABLE = VtdOptions(scalable_mode=True)
FIRST_STAGE = VtdOptions(scalable_mode=True, fsts=True)


class Mode:
    """A way to use the unit."""

    def __init__(self, options: VtdOptions, *, queued: bool = True, caching: bool = False) -> None:
        self.options = replace(options, caching_mode=caching)
        self.queued, self.scalable = queued, options.scalable_mode
        self.stage = Stage.FIRST if options.fsts else Stage.SECOND

    def rig(self, **more: type[NvmeDevice]) -> Rig:
        return Rig(self.options, self.queued, self.scalable, dict(zip((0x20,), more.values(), strict=False)))

    def reasons(self) -> tuple[int, int]:
        """Of a read and of a write where nothing is mapped."""
        if self.stage is Stage.FIRST:
            return Reason.FIRST_NOT_PRESENT, Reason.FIRST_NOT_PRESENT
        return Reason.READ, Reason.WRITE


MODES = {
    "registers": Mode(LEGACY, queued=False),
    "queue": Mode(LEGACY),
    "queue, caching mode": Mode(LEGACY, caching=True),
    "registers, caching mode": Mode(LEGACY, queued=False, caching=True),
    "39 bits": Mode(replace(LEGACY, aw_bits=39)),
    "scalable": Mode(SCALABLE),
    "scalable, caching mode": Mode(SCALABLE, caching=True),
    "first stage": Mode(FIRST_STAGE),
    "first stage, caching mode": Mode(FIRST_STAGE, caching=True),
}
QEMU = quirks.selected([quirks.ALL])
QEMU_SCALABLE, QEMU_FIRST_STAGE = Mode(replace(SCALABLE, quirks=QEMU)), Mode(replace(FIRST_STAGE, quirks=QEMU))
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def attached(rig: Rig, mode: Mode, *sids: int) -> Domain:
    domain = rig.vtd.domain(mode.stage)
    for sid in sids:
        rig.vtd.attach(domain, sid)
    return domain


@modes
def test_devices_reach_what_is_mapped_and_nothing_else(mode: Mode) -> None:
    rig = mode.rig()
    machine, vtd = rig.machine, rig.vtd
    domain = attached(rig, mode, EDU, TESTDEV)
    vtd.map(domain, IOVA, DATA, 2 * PAGE)
    machine.write_memory(DATA + PAGE, b"from memory".ljust(64))
    rig.edu.copy(IOVA + PAGE, IOVA + 0x100, 64)
    assert machine.read_memory(DATA + 0x100, 11) == b"from memory"
    assert rig.testdev.run(IOVA + 8, DATA + 8) == RESULT_OK
    assert machine.mmio_read(DATA + 8, 4) == PATTERN
    assert vtd.faults() == []
    assert rig.testdev.run(IOVA + 2 * PAGE, DATA) == RESULT_DMA_FAILED
    assert vtd.faults() == [FaultRecord(mode.reasons()[1], TESTDEV, IOVA + 2 * PAGE, False, None)]
    rig.edu.load(DATA, 16)
    assert vtd.faults() == [FaultRecord(mode.reasons()[0], EDU, DATA, True, None)]
    assert vtd.faults() == []


@modes
def test_what_is_unmapped_is_out_of_reach(mode: Mode) -> None:
    rig = mode.rig()
    domain = attached(rig, mode, TESTDEV)
    rig.vtd.map(domain, IOVA, DATA, 8 * PAGE)
    for page in range(8):
        assert rig.testdev.run(IOVA + page * PAGE, DATA + page * PAGE) == RESULT_OK
    assert rig.vtd.unmap(domain, IOVA + PAGE, 3 * PAGE) == 3 * PAGE
    results = [rig.testdev.run(IOVA + page * PAGE, DATA + page * PAGE) for page in range(8)]
    assert [result == RESULT_OK for result in results] == [True, False, False, False, True, True, True, True]
    assert rig.vtd.unmap(domain, IOVA + PAGE, 3 * PAGE) == 0
    rig.vtd.map(domain, IOVA + PAGE, DATA + 32 * PAGE, PAGE)
    assert rig.testdev.run(IOVA + PAGE, DATA + 32 * PAGE) == RESULT_OK


@modes
def test_permissions(mode: Mode) -> None:
    rig = mode.rig()
    domain = attached(rig, mode, EDU)
    rig.vtd.map(domain, IOVA, DATA, PAGE, READ)
    rig.edu.load(IOVA, 8)
    assert rig.vtd.faults() == []
    rig.edu.store(IOVA, 8)
    reason = Reason.SCALABLE_WRITE if mode.stage is Stage.FIRST else Reason.WRITE
    assert rig.vtd.faults() == [FaultRecord(reason, EDU, IOVA, False, None)]


@modes
def test_large_pages(mode: Mode) -> None:
    rig = mode.rig()
    domain = attached(rig, mode, TESTDEV)
    rig.vtd.map(domain, IOVA, 0x100_0000, 2 << 20, level=2)
    rig.vtd.map(domain, IOVA + (1 << 30), 0, 1 << 30, level=3)
    assert rig.testdev.run(IOVA + 0x12_3450, 0x112_3450) == RESULT_OK
    assert rig.testdev.run(IOVA + (1 << 30) + 0x212_3450, 0x212_3450) == RESULT_OK
    assert rig.vtd.unmap(domain, IOVA, 2 << 20) == 2 << 20
    assert rig.testdev.run(IOVA + 0x12_3450, 0x112_3450) == RESULT_DMA_FAILED
    assert rig.testdev.run(IOVA + (1 << 30) + 0x212_3450, 0x212_3450) == RESULT_OK
    with pytest.raises(DriverError, match="is in a page of 1073741824 bytes"):
        rig.vtd.map(domain, IOVA + (1 << 30), 0, PAGE)


@modes
def test_domains_are_apart(mode: Mode) -> None:
    rig = mode.rig()
    mine, theirs = attached(rig, mode, TESTDEV), attached(rig, mode, EDU)
    rig.vtd.map(mine, IOVA, DATA, PAGE)
    rig.vtd.map(theirs, IOVA, DATA + PAGE, PAGE)
    rig.machine.write_memory(DATA + PAGE, b"12345678")
    assert rig.testdev.run(IOVA, DATA, 8) == RESULT_OK
    rig.edu.copy(IOVA, IOVA + 8, 8)
    assert rig.machine.read_memory(DATA + PAGE, 16) == b"12345678" * 2


@modes
def test_functions_without_a_domain_are_blocked(mode: Mode) -> None:
    rig = mode.rig()
    domain = attached(rig, mode, TESTDEV)
    rig.vtd.map(domain, IOVA, DATA, PAGE)
    assert rig.testdev.run(IOVA, DATA) == RESULT_OK
    rig.vtd.detach(domain, TESTDEV)
    assert rig.testdev.run(IOVA, DATA) == RESULT_DMA_FAILED
    assert [fault.sid for fault in rig.vtd.faults()] == [TESTDEV]
    other = rig.vtd.domain(mode.stage)
    rig.vtd.map(other, IOVA, DATA + PAGE, PAGE)
    rig.vtd.attach(other, TESTDEV)
    assert rig.testdev.run(IOVA, DATA + PAGE) == RESULT_OK


@modes
def test_pass_through(mode: Mode) -> None:
    rig = mode.rig()
    rig.vtd.attach_pass_through(TESTDEV)
    assert rig.testdev.run(DATA, DATA) == RESULT_OK
    rig.vtd.detach_pass_through(TESTDEV)
    assert rig.testdev.run(DATA, DATA) == RESULT_DMA_FAILED


@pytest.mark.parametrize("mode", [QEMU_SCALABLE, QEMU_FIRST_STAGE], ids=["second stage", "first stage"])
def test_pass_through_lingers_on_qemu(mode: Mode) -> None:
    rig = mode.rig()
    rig.vtd.attach_pass_through(TESTDEV)
    assert rig.testdev.run(DATA, DATA) == RESULT_OK
    rig.vtd.detach_pass_through(TESTDEV)
    assert rig.testdev.run(DATA, DATA) == RESULT_OK
    rig.vtd.invalidation.contexts()
    assert rig.testdev.run(DATA, DATA) == RESULT_DMA_FAILED
    rig.vtd.attach_pass_through(TESTDEV)
    rig.vtd.invalidation.pasid_cache(PASS_THROUGH_DID, RID_PASID)
    assert rig.testdev.run(DATA, DATA) == RESULT_OK
    rig.vtd.detach_pass_through(TESTDEV)
    assert rig.testdev.run(DATA, DATA) == RESULT_DMA_FAILED


@modes
def test_without_translation_everything_is_reached(mode: Mode) -> None:
    rig = mode.rig()
    assert rig.testdev.run(DATA, DATA) == RESULT_DMA_FAILED
    rig.vtd.stop()
    assert rig.testdev.run(DATA, DATA) == RESULT_OK
    rig.vtd.start()
    assert rig.testdev.run(DATA, DATA) == RESULT_DMA_FAILED


@pytest.mark.parametrize("mode", [MODES["queue"], MODES["first stage"]], ids=["queue", "first stage"])
def test_nvme_works_behind_it(mode: Mode) -> None:
    rig = mode.rig(nvme=NvmeDevice)
    domain = attached(rig, mode, 0x20)
    pages = MEMORY_PAGES + 8
    for page in range(pages):
        rig.vtd.map(domain, IOVA + page * PAGE, gpa_of(page), PAGE)
    nvme = NvmeDriver(rig.machine, rig.bar(0x1B36, 0x0010), DATA, IOVA)
    nvme.start()
    data = IOVA + MEMORY_PAGES * PAGE
    for page in range(MEMORY_PAGES, pages):
        rig.machine.write_memory(gpa_of(page), bytes((page,)) * PAGE)
    blocks = 8 * PAGE // nvme.block_size
    assert nvme.write(8, blocks, data) == Status.SUCCESS
    for page in range(MEMORY_PAGES, pages):
        rig.machine.write_memory(gpa_of(page), bytes(PAGE))
    assert nvme.read(8, blocks, data) == Status.SUCCESS
    assert all(rig.machine.read_memory(gpa_of(page), 1) == bytes((page,)) for page in range(MEMORY_PAGES, pages))
    rig.vtd.unmap(domain, data + 3 * PAGE, PAGE)
    assert nvme.read(8, blocks, data) == Status.DATA_TRANSFER_ERROR
    assert [fault.address for fault in rig.vtd.faults()] == [data + 3 * PAGE]


def gpa_of(page: int) -> int:
    """The driver's own pages in order, those of data backwards."""
    return DATA + page * PAGE if page < MEMORY_PAGES else DATA + (64 - page) * PAGE


def test_a_fault_interrupts() -> None:
    rig = Rig()
    rig.vtd.fault_event(0x55, destination=3)
    assert rig.testdev.run(IOVA, DATA) == RESULT_DMA_FAILED
    assert [*rig.machine.messages.arrived][-1] == (0xFEE03000, 0x55)
    assert rig.vtd.faults()[0].reason == Reason.ROOT_NOT_PRESENT


def test_the_queue_goes_round_and_survives_an_error() -> None:
    rig = Rig()
    queue = rig.vtd.invalidation
    for _ in range(300):
        queue.iotlb()
    with pytest.raises(DriverError, match="the invalidation queue stopped at"):
        queue.submit((0xD, 0))  # type: ignore[attr-defined]


def test_scalable_mode_needs_a_unit_that_has_it() -> None:
    rig = Rig()
    with pytest.raises(DriverError, match="scalable mode"):
        VtdDriver(rig.machine, PageAllocator(rig.machine, 0x90_0000, 0xA0_0000), scalable=True)


def test_pages_of_tables_run_out() -> None:
    rig = Rig()
    pages = PageAllocator(rig.machine, 0x90_0000, 0x90_2000)
    assert pages.take() == 0x90_0000
    with pytest.raises(DriverError, match="no 2 pages left"):
        pages.take(2)


def test_a_write_only_page_can_be_written_alone() -> None:
    rig = Rig()
    domain = attached(rig, MODES["queue"], EDU)
    rig.vtd.map(domain, IOVA, DATA, PAGE, WRITE)
    rig.edu.store(IOVA, 8)
    assert rig.vtd.faults() == []
    rig.edu.load(IOVA, 8)
    assert [fault.is_read for fault in rig.vtd.faults()] == [True]


@pytest.mark.parametrize("stage", Stage)
def test_a_pasid_has_an_address_space_of_its_own(stage: Stage) -> None:
    options = VtdOptions(scalable_mode=True, fsts=stage is Stage.FIRST, pasid_bits=8, device_iotlb=True)
    rig = Rig(options, scalable=True, device_tlb=True)
    own, shared = rig.vtd.domain(stage), rig.vtd.domain(stage)
    rig.vtd.map(own, IOVA, DATA, PAGE)
    rig.vtd.map(shared, IOVA, DATA + PAGE, PAGE)
    rig.vtd.attach(own, TESTDEV)
    rig.vtd.attach_pasid(shared, TESTDEV, 77)

    def translated(pasid: int) -> int | None:
        assert rig.machine.iommu is not None
        ops, bus = rig.machine.iommu.ops, rig.machine.root_bus
        (entry,) = ops.ats_request_translation(bus, TESTDEV, AtsRequest(IOVA, PAGE, pasid=pasid)).entries
        return entry.translated_addr if entry.perm else None

    assert (rig.testdev.run(IOVA, DATA), translated(77), translated(78)) == (RESULT_OK, DATA + PAGE, None)
    rig.vtd.unmap(shared, IOVA, PAGE)
    assert translated(77) is None
    rig.vtd.detach(shared, TESTDEV, 77)
    assert rig.testdev.run(IOVA, DATA) == RESULT_OK
