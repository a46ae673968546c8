"""The pseries machine as a CPU sees it: bring-up, byte order, interrupts, DMA through windows, reset, RTAS."""

from __future__ import annotations

import pytest

from tests.acceleration import kvm
from tests.machine.boards import LIOBN, LIOBN64, LIST, PE, RAM_SIZE, pseries, put_list
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.iommu_testdev import IommuTestdevDriver
from vfio_model.guest_drivers.pci import (
    DriverError,
    MmioWindow,
    RtasConfig,
    bring_up,
    enable_msi,
    find_function,
    set_command,
)
from vfio_model.guest_drivers.pseries_ddw import PseriesDdw, TceWindow
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, RtasToken
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.types import MemTxResult
from vfio_model.trace import ListTrace

pytestmark = pytest.mark.machine

EDU_DEVFN, TESTDEV_DEVFN = 1 << 3, 2 << 3


def board(dma: DmaOptions | None = None) -> PseriesMachine:
    """A machine with an edu and an iommu-testdev."""
    machine = pseries(dma=dma)
    machine.phb().bus.plug(EduDevice, EDU_DEVFN, dma_mask=(1 << 64) - 1)
    machine.phb().bus.plug(IOMMUTestDevice, TESTDEV_DEVFN)
    return machine


def drivers(machine: PseriesMachine) -> tuple[DirectCpu, EduDriver, IommuTestdevDriver]:
    """Both devices, enumerated, placed and driven."""
    cpu, window = DirectCpu(machine), MmioWindow.pseries()
    functions = bring_up(cpu, regs.phb_buid(0), window)
    found = [
        window.to_cpu(find_function(functions, *identity).bars[0].address)
        for identity in ((edu.VENDOR_ID, edu.DEVICE_ID), (testdev.VENDOR_ID, testdev.DEVICE_ID))
    ]
    return cpu, EduDriver(cpu, found[0]), IommuTestdevDriver(cpu, found[1])


def test_enumeration_finds_sizes_and_places_what_is_plugged() -> None:
    machine = board()
    functions = bring_up(DirectCpu(machine), regs.phb_buid(0), MmioWindow.pseries())
    assert [(f.devfn, f.vendor_id, f.device_id) for f in functions] == [
        (EDU_DEVFN, 0x1234, 0x11E8),
        (TESTDEV_DEVFN, 0x1B36, 0x0005),
    ]
    assert functions[0].bars[0].size == 1 << 20
    assert functions[0].bars[0].address == regs.PCI_MEM32_BUS


def test_edu_registers_have_the_machines_byte_order() -> None:
    machine = board()
    _, driver, _ = drivers(machine)
    assert driver.identification() == edu.IDENTIFICATION_VALUE
    bar = regs.pci_mem32_window(0)
    assert machine.read_memory(bar, 4) == bytes.fromhex("010000ed")
    assert driver.invert(0x1234_5678) == 0xEDCB_A987
    assert driver.factorial(5) == 120


def test_edu_copies_through_the_default_window() -> None:
    machine = board()
    cpu, driver, _ = drivers(machine)
    window = TceWindow.default(cpu, list_gpa=LIST)
    window.map(0x3000, 0x20_0000, 4096, regs.TcePerm.READ)
    window.map(0x8000, 0x30_0000, 8192)
    machine.write_memory(0x20_0010, b"through the window")
    driver.copy(0x3010, 0x8FFE, 18)
    assert machine.read_memory(0x30_0FFE, 18) == b"through the window"


def test_a_write_through_a_read_only_tce_changes_nothing() -> None:
    machine = board()
    cpu, driver, _ = drivers(machine)
    TceWindow.default(cpu, list_gpa=LIST).map(0x3000, 0x20_0000, 4096, regs.TcePerm.READ)
    machine.write_memory(0x20_0000, b"keep")
    driver.store(0x3000, 4)
    assert machine.read_memory(0x20_0000, 4) == b"keep"


def test_iommu_testdev_reads_back_behind_the_iommu() -> None:
    machine = board()
    cpu, _, driver = drivers(machine)
    TceWindow.default(cpu, list_gpa=LIST).map(0x5000, 0x40_0000, 4096)
    assert driver.run(0x5000, 0x40_0000) == testdev.RESULT_OK
    assert driver.run(0x5000, 0x40_1000) == testdev.RESULT_MISMATCH
    assert driver.run(0x6000, 0x40_0000) == testdev.RESULT_DMA_FAILED


def test_dma_stops_without_bus_mastering() -> None:
    machine = board()
    cpu, driver, _ = drivers(machine)
    config = RtasConfig(cpu, regs.phb_buid(0))
    TceWindow.default(cpu, list_gpa=LIST).map(0x5000, 0x40_0000, 4096)
    machine.write_memory(0x40_0000, b"before")
    driver.load(0x5000, 6)
    set_command(config, EDU_DEVFN, master=False)
    machine.write_memory(0x40_0000, b"after!")
    driver.store(0x5000, 6)
    assert machine.read_memory(0x40_0000, 6) == b"after!"
    set_command(config, EDU_DEVFN)
    driver.load(0x5000, 6)
    driver.store(0x5000 + 8, 6)
    assert machine.read_memory(0x40_0008, 6) == b"after!"


def test_a_reset_empties_the_windows() -> None:
    machine = board()
    cpu, _, driver = drivers(machine)
    TceWindow.default(cpu, list_gpa=LIST).map(0x5000, 0x40_0000, 4096)
    assert driver.run(0x5000, 0x40_0000) == testdev.RESULT_OK
    machine.reset()
    _, _, driver = drivers(machine)
    assert driver.run(0x5000, 0x40_0000) == testdev.RESULT_DMA_FAILED


def test_a_message_is_a_write_through_the_window_of_the_phb() -> None:
    machine = board()
    cpu, driver, _ = drivers(machine)
    enable_msi(RtasConfig(cpu, regs.phb_buid(0)), EDU_DEVFN, regs.MSI_WINDOW, 0x1301)
    driver.start_dma(0x3000, edu.BUFFER_ADDRESS, 4, to_ram=False, irq=True)
    driver.finish_dma()
    assert machine.irqs.raised == {0x1301: 1}
    assert not machine.irqs.level(0x1301)
    assert isinstance(machine.trace, ListTrace)
    assert machine.trace.named("spapr_pci_msi_write") == [{"addr": 0, "data": 0x1301, "dt_irq": 0x1301}]


def test_the_message_page_is_write_only() -> None:
    space = pseries().phb().address_space
    assert space.read(regs.MSI_WINDOW, bytearray(4)) != MemTxResult.OK


def test_pins_are_swizzled_onto_four_level_lines() -> None:
    machine = board()
    _, driver, _ = drivers(machine)
    driver.start_dma(0x3000, edu.BUFFER_ADDRESS, 4, to_ram=False, irq=True)
    driver.finish_dma()
    assert machine.irqs.level(regs.LSI_BASE + 1), "slot 1, INTA"
    assert driver.interrupts() == edu.IRQ_CAUSE_DMA
    assert not machine.irqs.level(regs.LSI_BASE + 1)
    assert machine.irqs.raised == {regs.LSI_BASE + 1: 1}


@pytest.mark.parametrize(
    ("cell", "size"), [(9 << 11, 4), (EDU_DEVFN << 8 | 1, 2), (EDU_DEVFN << 8, 3), (1 << 16 | EDU_DEVFN << 8, 4)]
)
def test_config_calls_to_nobody_or_unaligned_are_hardware_errors(cell: int, size: int) -> None:
    machine = board()
    assert machine.rtas(RtasToken.IBM_READ_PCI_CONFIG, [cell, *PE[1:], size], 2) == [0xFFFF_FFFF]
    assert machine.rtas(RtasToken.IBM_WRITE_PCI_CONFIG, [cell, *PE[1:], size, 0], 1) == [0xFFFF_FFFF]


def test_config_reads_of_nobody_look_like_an_empty_slot_to_the_driver() -> None:
    assert RtasConfig(DirectCpu(board()), regs.phb_buid(0)).read(9 << 3, 0, 4) == 0xFFFF_FFFF


def test_rtas_through_guest_memory_writes_the_status_alone_on_an_error() -> None:
    machine = board()
    base = 0x9000
    cells = [RtasToken.IBM_QUERY_PE_DMA_WINDOW, 3, 5, *PE, *[0x5A5A_5A5A] * 5]
    machine.write_memory(base, b"".join(cell.to_bytes(4, "big") for cell in cells))
    assert machine.hcall(HCall.H_RTAS, base) == (0, [])
    rets = machine.read_memory(base + 24, 20)
    assert [int.from_bytes(rets[i : i + 4], "big") for i in range(0, 20, 4)] == [0, 1, 0x8000_0000, 0x107, 0]
    cells[3:6] = [0, 1, 2]
    cells[6:] = [0x5A5A_5A5A] * 5
    machine.write_memory(base, b"".join(int(cell).to_bytes(4, "big") for cell in cells))
    assert machine.hcall(HCall.H_RTAS, base) == (0, [])
    assert machine.read_memory(base + 24, 8) == bytes.fromhex("fffffffd5a5a5a5a")
    machine.write_memory(base, (0x2001).to_bytes(4, "big"))
    assert machine.hcall(HCall.H_RTAS, base)[0] == regs.H_PARAMETER


def test_phbs_are_numbered_below_31() -> None:
    machine = pseries()
    with pytest.raises(ConfigError):
        machine.add_phb(31)
    with pytest.raises(ConfigError):
        machine.add_phb(0)
    assert machine.add_phb(30).buid == regs.phb_buid(30)


def test_a_vio_device_has_a_table_of_its_own() -> None:
    machine = pseries()
    space = machine.add_vio_table(0x7100_0003)
    put_list(machine, [0x50_0003, 0x51_0003])
    assert machine.hcall(HCall.H_PUT_TCE_INDIRECT, 0x7100_0003, 0x1000, LIST, 2)[0] == 0
    assert machine.hcall(HCall.H_PUT_TCE, 0x7100_0003, 1 << 28, 3)[0] == regs.H_PARAMETER
    assert space.write(0x2004, b"vio!") == MemTxResult.OK
    assert machine.read_memory(0x51_0004, 4) == b"vio!"
    with pytest.raises(ConfigError):
        machine.add_vio_table(0x7100_0003)
    assert isinstance(machine.trace, ListTrace)
    assert len(machine.trace.named("kvm_hcall" if kvm() else "spapr_iommu_indirect")) == (2 if kvm() else 1)


def test_linux_maps_all_ram_in_one_window_of_the_largest_pages() -> None:
    machine = board()
    cpu, _, driver = drivers(machine)
    found = PseriesDdw(cpu, TESTDEV_DEVFN, ram_size=RAM_SIZE, list_gpa=LIST).enable()
    assert found is not None
    assert (found.direct, found.window_shift, found.window.page_shift) == (True, 26, 24)
    assert found.window.liobn == LIOBN64
    assert driver.run(found.window.bus_offset + 0x123_4000, 0x123_4000, 64) == testdev.RESULT_OK


def test_linux_trades_the_default_window_when_none_is_left() -> None:
    machine = board()
    cpu = DirectCpu(machine)
    first = PseriesDdw(cpu, EDU_DEVFN, ram_size=RAM_SIZE, list_gpa=LIST, outputs=5)
    assert first.enable() is not None
    machine.rtas(RtasToken.IBM_REMOVE_PE_DMA_WINDOW, [LIOBN64], 1)
    assert first.create(16, 20) is not None
    second = PseriesDdw(cpu, TESTDEV_DEVFN, ram_size=RAM_SIZE, list_gpa=LIST)
    assert second.enable() is None, "the 64-bit window is in the way"
    query = second.query()
    assert query is not None and query.available == 1, "the reset brought the default window back"


def test_linux_maps_on_demand_when_ram_does_not_fit_the_devices_mask() -> None:
    machine = board()
    found = PseriesDdw(DirectCpu(machine), TESTDEV_DEVFN, ram_size=RAM_SIZE, list_gpa=LIST, dma_mask_bits=25).enable()
    assert found is not None
    assert (found.direct, found.window_shift) == (False, 25)
    assert PseriesDdw(DirectCpu(machine), 0, ram_size=1, list_gpa=LIST).enable(disable_ddw=True) is None


def test_linux_stays_with_the_default_window_without_ddw() -> None:
    machine = board(DmaOptions(ddw=False))
    assert PseriesDdw(DirectCpu(machine), TESTDEV_DEVFN, ram_size=RAM_SIZE, list_gpa=LIST).enable() is None


def test_a_window_without_multi_tce_is_filled_tce_by_tce() -> None:
    machine = pseries(multi_tce=False)
    window = TceWindow.default(DirectCpu(machine), list_gpa=LIST)
    window.map(0x1000, 0x20_0000, 3 * 4096)
    assert [window.get(0x1000 * i) for i in range(5)] == [0, 0x20_0003, 0x20_1003, 0x20_2003, 0]
    window.unmap(0x1000, 3 * 4096)
    assert window.get(0x2000) == 0
    with pytest.raises(DriverError):
        window.unmap(1 << 30, 4096)


def test_the_clock_steps_to_the_next_timer() -> None:
    machine = board()
    _, driver, _ = drivers(machine)
    driver.start_dma(0x3000, edu.BUFFER_ADDRESS, 4, to_ram=False)
    assert machine.clock_step() == 100_000_000
    assert machine.clock_step() == 100_000_000, "no timer, no step"
    assert LIOBN in machine.tables
