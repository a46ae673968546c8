"""What the platform loads and stores in memory for the guest: RTAS cells and TCE lists, one access each."""

from __future__ import annotations

import pytest

from tests.machine.boards import RAM_SIZE, pseries
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall, RtasToken
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.ranges import U32_MAX, U64_MAX

pytestmark = pytest.mark.machine

EDU = 1 << 11


def machine_with_edu() -> PseriesMachine:
    made = pseries()
    made.phb().bus.plug(EduDevice, EDU >> 8)
    return made


def in_memory(machine: PseriesMachine, token: int, cells: list[int], nargs: int, nret: int) -> list[int]:
    """A call of which ``nargs`` of ``cells`` are said to be arguments: five cells where the results go."""
    machine.write_memory(0x1000, b"".join(cell.to_bytes(4, "big") for cell in cells))
    machine.write_memory(0x2000, b"\xee" * 20)
    assert machine.rtas_in_memory(token, (nargs, 0x1000), (nret, 0x2000)) == 0
    return [machine.mmio_read(0x2000 + 4 * n, 4) for n in range(5)]


@pytest.mark.parametrize("nargs", [0, 3, 6, 9])
@pytest.mark.parametrize("nret", [0, 1, 3, 4, 9])
def test_neither_call_counts_its_cells(nargs: int, nret: int) -> None:
    machine = machine_with_edu()
    buid, untouched = machine.phb().buid, 0xEEEE_EEEE
    pe = [EDU, buid >> 32, buid & U32_MAX]
    kind = 1 if nret > 3 else untouched
    assert in_memory(machine, RtasToken.IBM_CHANGE_MSI, [*pe, 3, 1, 7], nargs, nret) == [0, 1, 8, kind, untouched]
    found = in_memory(machine, RtasToken.IBM_QUERY_INTERRUPT_SOURCE_NUMBER, [*pe, 0], nargs, nret)
    assert found == [0, regs.MSI_BASE, 1, untouched, untouched]
    assert in_memory(machine, RtasToken.IBM_CHANGE_MSI, [*pe, 3, 0, 7], nargs, nret)[:3] == [0, 0, untouched]


def test_an_rtas_cell_across_the_end_of_ram_is_not_there() -> None:
    machine = machine_with_edu()
    machine.write_memory(RAM_SIZE - 16, b"\x77" * 16)
    config_read = [1 << 11, regs.phb_buid(0) >> 32, regs.phb_buid(0) & 0xFFFF_FFFF, 4]
    machine.write_memory(0x1000, b"".join(cell.to_bytes(4, "big") for cell in config_read))
    machine.rtas_in_memory(RtasToken.IBM_READ_PCI_CONFIG, (4, 0x1000), (2, RAM_SIZE - 6))
    assert machine.read_memory(RAM_SIZE - 16, 16) == b"\x77" * 10 + bytes(4) + b"\x77" * 2
    machine.write_memory(RAM_SIZE - 14, b"".join(cell.to_bytes(4, "big") for cell in config_read[:3]) + b"\0\0")
    machine.rtas_in_memory(RtasToken.IBM_READ_PCI_CONFIG, (4, RAM_SIZE - 14), (2, 0x2000))
    assert machine.read_memory(0x2000, 4) == b"\xff" * 4


def test_a_tce_list_in_a_bar_is_loaded_entry_by_entry_and_is_zeros_where_loads_are_narrower() -> None:
    machine = machine_with_edu()
    machine.phb().bus.plug(IOMMUTestDevice, 2 << 3)
    for slot, bar in ((1, regs.PCI_MEM32_BUS), (2, regs.PCI_MEM32_BUS + 0x10_0000)):
        machine.phb().bus.config_write(slot << 3, 0x10, 4, bar)
        machine.phb().bus.config_write(slot << 3, 4, 2, 2)
    edu_bar, test_bar = (regs.pci_mem32_window(0) + at for at in (0, 0x10_0000))
    assert machine.read_memory(test_bar, 32) != bytes(32)
    for gpa, expected in ((edu_bar, U64_MAX), (test_bar, 0)):
        assert machine.hcall(HCall.H_STUFF_TCE, regs.pci_liobn(0, 0), 0, 0x1000, 8)[0] == 0
        assert machine.hcall(HCall.H_PUT_TCE_INDIRECT, regs.pci_liobn(0, 0), 0, gpa, 8)[0] == 0
        found = [machine.hcall(HCall.H_GET_TCE, regs.pci_liobn(0, 0), n << 12) for n in range(8)]
        assert found == [(0, [expected])] * 8


def test_a_window_up_to_the_last_bus_address_is_reached_to_its_last_byte() -> None:
    machine = pseries(dma=DmaOptions(dma64_win_addr=(1 << 64) - 0x1_0000))
    cells = [0, machine.phb().buid >> 32, machine.phb().buid & U32_MAX, 12]
    assert machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*cells, 17], 4) == [U32_MAX]
    assert machine.rtas(RtasToken.IBM_CREATE_PE_DMA_WINDOW, [*cells, 16], 4)[0] == 0
    assert machine.hcall(HCall.H_PUT_TCE, regs.pci_liobn(0, 1), U64_MAX, 0x20_0003)[0] == 0
    machine.write_memory(0x20_0FFF, b"z")
    last = bytearray(8)
    assert machine.phb().address_space.read(U64_MAX - 7, last) == 0 and last == b"\0" * 7 + b"z"
