"""iommu-testdev against what QEMU's was seen to do."""

from __future__ import annotations

import pytest

from vfio_model.devices.iommu_testdev import regs
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.testing.bench import RAM_SIZE, Bench


@pytest.fixture
def testdev() -> Bench:
    bench = Bench(IOMMUTestDevice)
    bench.device.config_write(4, 2, 0)
    return bench


def run(testdev: Bench, iova: int, gpa: int, length: int) -> int:
    for offset, value in (
        (regs.IOVA_LO, iova & 0xFFFFFFFF),
        (regs.IOVA_HI, iova >> 32),
        (regs.GPA_LO, gpa & 0xFFFFFFFF),
        (regs.GPA_HI, gpa >> 32),
        (regs.LENGTH, length),
        (regs.DOORBELL, 1),
    ):
        testdev.write(offset, value)
    assert testdev.read(regs.RESULT) == regs.RESULT_ARMED
    assert testdev.read(regs.TRIGGER) == 0
    return testdev.read(regs.RESULT)


def test_identity_and_reset_values(testdev: Bench) -> None:
    assert testdev.device.config.read(0, 4) == 0x00051B36
    assert testdev.device.config.read(0x3D, 1) == 0
    assert testdev.read(regs.RESULT) == 0xFFFFFFFF and testdev.read(regs.ATTRIBUTES) == 2


@pytest.mark.parametrize("length", [1, 4, 6, 4096, 0x30001])
def test_it_writes_the_pattern_and_finds_it_without_bus_mastering(testdev: Bench, length: int) -> None:
    assert run(testdev, 0x4000, 0x4000, length) == 0
    pattern = b"\x78\x56\x34\x12" * (length // 4 + 1)
    assert testdev.ram[0x4000 : 0x4000 + length] == pattern[:length]
    assert testdev.ram[0x4000 + length] == 0


def test_looking_elsewhere_is_a_mismatch(testdev: Bench) -> None:
    assert run(testdev, 0x4000, 0x8000, 4) == 0xDEAD0004


def test_a_write_that_does_not_translate_fails(testdev: Bench) -> None:
    assert run(testdev, 1 << 40, 0x4000, 4) == 0xDEAD0002


def test_a_read_back_that_decodes_nowhere_fails(testdev: Bench) -> None:
    assert run(testdev, 0x4000, RAM_SIZE, 4) == 0xDEAD0003


def test_no_length_is_refused(testdev: Bench) -> None:
    assert run(testdev, 0x4000, 0x4000, 0) == 0xDEAD0001


def test_a_trigger_consumes_the_arming(testdev: Bench) -> None:
    assert run(testdev, 0x4000, 0x4000, 4) == 0
    testdev.read(regs.TRIGGER)
    assert testdev.read(regs.RESULT) == 0xDEAD0005


def test_disarming_makes_it_idle(testdev: Bench) -> None:
    testdev.write(regs.DOORBELL, 1)
    testdev.write(regs.DOORBELL, 0)
    assert testdev.read(regs.RESULT) == 0xFFFFFFFF and testdev.read(regs.DOORBELL) == 0


@pytest.mark.parametrize(
    ("attributes", "result"), [(0b1000, regs.RESULT_BAD_ATTRIBUTES), (0b1001, 0), (0b1010, 0), (0b1011, 0xDEAD0006)]
)
def test_contradicting_attributes_are_refused(testdev: Bench, attributes: int, result: int) -> None:
    testdev.write(regs.ATTRIBUTES, attributes)
    assert run(testdev, 0x4000, 0x4000, 4) == result


def test_values_are_those_of_the_trigger(testdev: Bench) -> None:
    testdev.write(regs.LENGTH, 4)
    testdev.write(regs.DOORBELL, 1)
    testdev.write(regs.IOVA_LO, 0x6000)
    testdev.write(regs.GPA_LO, 0x6000)
    testdev.read(regs.TRIGGER)
    assert testdev.read(regs.RESULT) == 0 and testdev.ram[0x6000] == 0x78


def test_what_is_not_a_register_reads_zero(testdev: Bench) -> None:
    testdev.write(0x100, 0x55)
    assert testdev.read(0x100) == 0


def test_reset_clears_and_disarms(testdev: Bench) -> None:
    testdev.write(regs.IOVA_LO, 0x1234)
    testdev.write(regs.DOORBELL, 1)
    testdev.device.reset()
    testdev.read(regs.TRIGGER)
    assert testdev.read(regs.IOVA_LO) == 0 and testdev.read(regs.RESULT) == regs.RESULT_NOT_ARMED
