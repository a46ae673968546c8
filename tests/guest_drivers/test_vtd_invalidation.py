"""What the VT-d driver model writes: descriptors and commands by range, from the specification's encodings."""

from __future__ import annotations

import pytest

from tests.guest_drivers.vtd_rig import Rig
from vfio_model.guest_drivers.pci import DriverError
from vfio_model.guest_drivers.vtd_invalidation import QueuedInvalidation, RegisterInvalidation, page_mask
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.iommu.vtd.regs import DescriptorType
from vfio_model.machine.q35.machine import Q35Machine
from vfio_model.trace import ListTrace


@pytest.mark.parametrize(
    ("iova", "size", "expected"),
    [
        (0x1000, 1, (0x1000, 0)),
        (0x1000, 0x1000, (0x1000, 0)),
        (0x1FFF, 2, (0x0, 2)),
        (0x2000, 0x2000, (0x2000, 1)),
        (0x3000, 0x2000, (0x0, 3)),
        (0x20_0000, 0x20_0000, (0x20_0000, 9)),
        (0x7F_F000, 0x2000, (0x0, 12)),
        ((1 << 57) - 0x1000, 0x1000, ((1 << 57) - 0x1000, 0)),
    ],
)
def test_a_range_becomes_one_power_of_two(iova: int, size: int, expected: tuple[int, int]) -> None:
    assert page_mask(iova, size) == expected


def descriptors(machine: Q35Machine) -> list[tuple[int, int]]:
    trace = machine.trace
    assert isinstance(trace, ListTrace)
    found = [(int(str(fields["low"])), int(str(fields["high"]))) for fields in trace.named("vtd_inv_desc")]
    trace.records.clear()
    return [(low, high) for low, high in found if low & 0xF != DescriptorType.WAIT]


def test_descriptors() -> None:
    rig = Rig(VtdOptions(scalable_mode=True, fsts=True, pasid_bits=8), scalable=True)
    descriptors(rig.machine)
    queue = rig.vtd.invalidation
    queue.contexts()
    queue.contexts(5)
    queue.contexts(5, 0x18)
    queue.iotlb()
    queue.iotlb(5)
    queue.pages(5, 0x20_0000, 0x20_0000)
    queue.pages(5, 0, 1 << 40)
    queue.pasid_iotlb(1, 5)
    queue.pasid_iotlb(1, 5, 0xC_0FFE_E000, 0x1000)
    queue.pasid_cache(1, 5)
    queue.device_tlb(0x18, 0xC_0FFE_E000, 0x1000)
    queue.pasid_device_tlb(0x18, 5, 0xC_0FFE_E000, 0x1000)
    queue.pasid_device_tlb(0x18, 5, 0xC_0FFE_C000, 0x4000)
    assert descriptors(rig.machine) == [
        (0x11, 0),
        (0x5_0021, 0),
        (0x18_0005_0031, 0),
        (0x12, 0),
        (0x5_0022, 0),
        (0x5_0032, 0x20_0009),
        (0x5_0022, 0),
        (0x5_0001_0026, 0),
        (0x5_0001_0036, 0xC_0FFE_E000),
        (0x5_0001_0017, 0),
        (0x18_0000_0003, 0xC_0FFE_E000),
        (0x5_0018_0008, 0xC_0FFE_E000),
        (0x5_0018_0008, 0xC_0FFE_D800),
    ]


def test_registers_do_without_a_queue() -> None:
    rig = Rig(queued=False)
    registers = rig.vtd.invalidation
    assert isinstance(registers, RegisterInvalidation)
    registers.contexts(5, 0x18)
    registers.iotlb(5)
    registers.pages(5, 0, 1 << 40)
    with pytest.raises(DriverError, match="by the queue alone"):
        registers.device_tlb(0x18, 0, 4096)


def test_a_queue_that_stopped_goes_on_once_the_descriptor_is_good() -> None:
    rig = Rig()
    queue = rig.vtd.invalidation
    assert isinstance(queue, QueuedInvalidation)
    with pytest.raises(DriverError, match="the invalidation queue stopped"):
        queue.submit((0xD, 0))
    head = rig.vtd.registers.read(0x80, 8)
    base = rig.vtd.registers.read(0x90, 8) & ~0xFFF
    rig.machine.mmio_write(base + head, 8, 0x12)
    queue.resume()
    queue.iotlb()
    assert rig.vtd.registers.read(0x80, 8) == rig.vtd.registers.read(0x88, 8)
