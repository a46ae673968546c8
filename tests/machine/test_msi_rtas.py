"""Message interrupts by RTAS: numbers, blocks, what is refused, what a reset takes back."""

from __future__ import annotations

import pytest

from tests.machine.boards import pseries
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import RtasToken
from vfio_model.machine.msi import MsiNumbers
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PCIDevice
from vfio_model.pci.msix import MsixSpec
from vfio_model.ranges import U32_MAX

pytestmark = pytest.mark.machine

EDU, TESTDEV = 1 << 11, 2 << 11
PARAM_ERROR, HW_ERROR = (-3 & U32_MAX), (-1 & U32_MAX)


class FourMessages(PCIDevice):
    """A function that could use four."""

    VENDOR_ID, DEVICE_ID, MSI_VECTORS = 0x1234, 0x4444, 4


@pytest.fixture
def machine() -> PseriesMachine:
    made = pseries()
    made.phb().bus.plug(EduDevice, EDU >> 8)
    made.phb().bus.plug(IOMMUTestDevice, TESTDEV >> 8)
    made.phb().bus.plug(FourMessages, 3 << 3)
    return made


def change(machine: PseriesMachine, config_addr: int, requested: int, *, function: int = 3, nret: int = 4) -> list[int]:
    buid = machine.phb().buid
    args = (config_addr, buid >> 32, buid & U32_MAX, function, requested, 7)
    return machine.rtas(RtasToken.IBM_CHANGE_MSI, args, nret)


def source(machine: PseriesMachine, config_addr: int, which: int) -> list[int]:
    buid = machine.phb().buid
    args = (config_addr, buid >> 32, buid & U32_MAX, which)
    return machine.rtas(RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER, args, 3)


@pytest.mark.parametrize(("function", "status"), [(1, 0), (3, 0), (4, PARAM_ERROR), (0, PARAM_ERROR), (2, PARAM_ERROR)])
def test_functions(machine: PseriesMachine, function: int, status: int) -> None:
    assert change(machine, EDU, 1, function=function)[0] == status


def test_a_request_gives_a_number_and_writes_the_capability(machine: PseriesMachine) -> None:
    assert change(machine, EDU, 1) == [0, 1, 8, 1]
    assert source(machine, EDU, 0) == [0, regs.MSI_BASE, 1]
    msi = machine.phb().bus.devices[EDU >> 8].msi
    assert msi is not None
    assert msi.message(0) == (regs.MSI_WINDOW, regs.MSI_BASE)
    assert not msi.enabled


def test_the_message_arrives_as_the_number_that_was_given(machine: PseriesMachine) -> None:
    change(machine, EDU, 1)
    bus = machine.phb().bus
    device = bus.devices[EDU >> 8]
    assert device.msi is not None
    bus.config_write(EDU >> 8, 4, 2, 4)
    bus.config_write(EDU >> 8, device.msi.offset + 2, 2, 1)
    device.raise_irq()
    assert dict(machine.irqs.raised) == {regs.MSI_BASE: 1}


def test_more_than_the_function_can_use_gives_nothing_but_the_number_it_could_have(machine: PseriesMachine) -> None:
    assert change(machine, EDU, 5) == [0, 1, 8, 1]
    assert source(machine, EDU, 0) == [HW_ERROR]


def test_a_block_is_aligned_to_its_size(machine: PseriesMachine) -> None:
    change(machine, EDU, 1)
    four = 3 << 11
    device = machine.phb().bus.devices[four >> 8]
    assert device.msi is not None
    machine.phb().bus.config_write(four >> 8, device.msi.offset + 2, 2, 2 << 4)
    assert change(machine, four, 4) == [0, 4, 8, 1]
    assert source(machine, four, 3) == [0, regs.MSI_BASE + 7, 1]
    assert source(machine, four, 4) == [HW_ERROR]


def test_asking_for_none_takes_back(machine: PseriesMachine) -> None:
    assert change(machine, EDU, 0) == [HW_ERROR]
    change(machine, EDU, 1)
    assert change(machine, EDU, 0) == [0, 0]
    assert source(machine, EDU, 0) == [HW_ERROR]
    msi = machine.phb().bus.devices[EDU >> 8].msi
    assert msi is not None
    assert msi.message(0) == (0, 0)


def test_a_function_without_messages_or_none_at_all_is_refused(machine: PseriesMachine) -> None:
    assert change(machine, TESTDEV, 1) == [PARAM_ERROR]
    assert change(machine, 9 << 11, 1) == [PARAM_ERROR]
    assert change(machine, 1 << 16 | EDU, 1) == [PARAM_ERROR]
    assert source(machine, 9 << 11, 0) == [PARAM_ERROR]


def test_a_bridge_reset_takes_every_number_back(machine: PseriesMachine) -> None:
    change(machine, EDU, 1)
    machine.phb().reset()
    assert source(machine, EDU, 0) == [HW_ERROR]
    assert change(machine, 3 << 11, 1)[0] == 0
    assert source(machine, 3 << 11, 0) == [0, regs.MSI_BASE, 1]


def test_numbers_end_somewhere() -> None:
    numbers = MsiNumbers()
    blocks = [numbers.allocate(32) for _ in range(regs.MSI_NUMBERS // 32)]
    assert all(block is not None for block in blocks)
    assert numbers.allocate(32) is None
    first = blocks[0]
    assert first is not None
    numbers.free(first)
    assert numbers.allocate(3) == (regs.MSI_BASE, 3)
    assert numbers.allocate(4) == (regs.MSI_BASE + 4, 4)


class Table(PCIDevice):
    VENDOR_ID, DEVICE_ID = 0x1234, 0x4445
    MSIX = MsixSpec(8, 0, 0, 0x800)
    BARS = (BarSpec(0, 4096),)


def test_a_table_gets_a_number_for_each_vector(machine: PseriesMachine) -> None:
    where = 5 << 11
    device = machine.phb().bus.plug(Table, where >> 8)
    assert change(machine, where, 4, function=3) == [PARAM_ERROR]
    assert change(machine, where, 9, function=4) == [0, 8, 8, 2]
    assert change(machine, where, 4, function=4) == [0, 4, 8, 2]
    assert change(machine, where, 4, function=1) == [0, 4, 8, 2]
    first = source(machine, where, 0)[1]
    assert source(machine, where, 3) == [0, first + 3, 1]
    assert device.msix is not None
    assert [device.msix.message(vector) for vector in (0, 3, 4)] == [
        (regs.MSI_WINDOW, first), (regs.MSI_WINDOW, first + 3), (0, 0)
    ]  # fmt: skip
    bus = machine.phb().bus
    bus.config_write(where >> 8, 4, 2, 4)
    bus.config_write(where >> 8, device.msix.offset + 2, 2, 0x8000)
    assert device.region_write(0, 3 * 16 + 12, 4, 0) is MemTxResult.OK
    device.raise_irq(3)
    assert dict(machine.irqs.raised) == {first + 3: 1}
    assert change(machine, where, 0, function=4) == [0, 0]
    assert device.msix.message(3) == (0, 0)
