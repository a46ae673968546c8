"""The user program's ten tests, device and IOMMU in this process."""

from __future__ import annotations

import pytest

from tests.guest_drivers.svm_rig import SvmRig
from vfio_model.guest_drivers import svm_program
from vfio_model.guest_drivers.svm_process import MIB, Process
from vfio_model.iommu.vtd.structures import Reason

GIB = 1 << 30
MOST_CACHED = 8
"""Translations in the device's caches with large pages, at most: of a write of 14 MiB and 4 KiB."""


@pytest.fixture(scope="module")
def large() -> SvmRig:
    return SvmRig(2 * GIB)


@pytest.mark.parametrize("name", [*svm_program.TESTS])
def test_the_program(name: str, large: SvmRig) -> None:
    before = len(large.trace.records)
    result = svm_program.run(name, large.cpu, large.frames, large.driver)
    assert result.reason == ""
    done = [fields for event, fields in large.trace.records[before:] if event == "svm_done"]
    assert done
    if name == "huge_pages":
        assert max(one["cached"] for one in done) <= MOST_CACHED
        assert result.page_requests == 1 + 8 + 1
    large.trace.records.clear()


def test_page_requests_bring_in_what_is_missing() -> None:
    rig = SvmRig()
    process = rig.process()
    with process.mapped(5 * 4096) as start:
        process.mm.write(start + 4096, b"here")
        process.write_and_check(start, 5 * 4096)
        assert (rig.sva.queue.requests, process.mm.faults) == (4, 5 + 1)
        process.write_and_check(start, 5 * 4096)
        assert rig.sva.queue.requests == 4
    process.exit()


def test_the_interrupt_range_is_refused_even_where_the_process_has_memory() -> None:
    rig = SvmRig()
    process = rig.process()
    with process.mapped(1 * MIB, 0xFEE0_0000):
        assert not process.device_write(0xFEE0_1000, 1)
        assert process.mm.read(0xFEE0_1000, 1) == b"\0"
    assert rig.vtd.faults()[0].reason == Reason.SCALABLE_INTERRUPT_ADDRESS
    process.exit()


def test_everything_is_given_back() -> None:
    rig = SvmRig()
    taken = rig.frames.taken
    process = rig.process()
    with process.mapped(4 * MIB) as start:
        process.write_and_check(start, 3 * MIB)
        child = process.fork()
        process.close()
        child.open()
        child.write_and_check(start + MIB, MIB)
        child.exit()
    process.exit()
    assert rig.frames.taken == taken
    rig.frames.check()
    rig.cpu.clock_step(10_000)
    assert rig.device.cached == 0


def test_a_process_cannot_reach_another_one() -> None:
    rig = SvmRig()
    process = rig.process()
    other = Process(rig.cpu, rig.frames, rig.driver)
    page = other.mm.mmap(4096)
    other.mm.write(page, b"theirs")
    assert not process.device_write(page, 4096)
    assert other.mm.read(page, 6) == b"theirs"
    process.exit()
    other.exit()
