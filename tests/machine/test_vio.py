"""VIO devices: unit addresses, the window of each, and the way around it."""

from __future__ import annotations

import pytest

from tests.machine.boards import LIOBN, LIST, RAM_SIZE, Follower, put_list, tce
from tests.machine.boards import pseries as board
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import HCall, RtasStatus, RtasToken
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.machine.vio import KINDS, VioDma
from vfio_model.memory.dma import DMASpace
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.types import MemTxResult

pytestmark = pytest.mark.machine

UNIT = regs.VIO_UNIT_BASE


def lan(machine: PseriesMachine) -> VioDma:
    """The DMA side of a network card at ``UNIT`` whose page 0 is mapped to 0x500000, read and write."""
    dma = machine.vio.add(KINDS["llan"]).dma
    assert dma is not None
    assert machine.hcall(HCall.H_PUT_TCE, UNIT, 0, 0x50_0003)[0] == 0
    return dma


def set_bypass(machine: PseriesMachine, *args: int, nret: int = 1) -> int:
    return regs.rtas_status(machine.rtas(RtasToken.SET_TCE_BYPASS, args, nret))


def test_units_go_up_by_one_and_pass_over_those_taken() -> None:
    vio = board().vio
    vio.add(KINDS["vty"], UNIT + 1)
    assert [vio.add(KINDS[name]).unit for name in ("vty", "llan", "vscsi")] == [UNIT, UNIT + 2, UNIT + 3]


@pytest.mark.parametrize("unit", [UNIT, regs.PCI_LIOBN_BIT, LIOBN, 1 << 32, -1])
def test_a_unit_is_31_bits_and_one_device(unit: int) -> None:
    machine = board()
    machine.vio.add(KINDS["vty"], UNIT)
    before = dict(machine.tables)
    with pytest.raises(ConfigError):
        machine.vio.add(KINDS["llan"], unit)
    assert machine.tables == before


@pytest.mark.parametrize("name", ["llan", "vscsi", "tpm"])
def test_a_window_is_256_mib_of_4k_pages_and_its_liobn_is_the_unit(name: str) -> None:
    machine = board()
    device = machine.vio.add(KINDS[name])
    table = machine.tables[device.unit]
    assert device.dma is not None and device.dma.table is table
    assert (table.liobn, table.bus_offset, table.page_shift, table.nb_table) == (UNIT, 0, 12, 1 << 16)
    assert tce(machine, (1 << 28) - 4096, UNIT) == 0
    assert tce(machine, 1 << 28, UNIT) is None


def test_a_terminal_has_no_table() -> None:
    machine = board()
    assert machine.vio.add(KINDS["vty"]).dma is None
    assert UNIT not in machine.tables
    assert machine.hcall(HCall.H_PUT_TCE, UNIT, 0, 3)[0] == regs.H_PARAMETER


def test_devices_do_not_see_each_others_windows() -> None:
    machine = board()
    dma = lan(machine)
    other = machine.vio.add(KINDS["vscsi"]).dma
    assert other is not None
    assert dma.address_space.write(0x10, b"mine") == MemTxResult.OK
    assert other.address_space.write(0x10, b"your") != MemTxResult.OK
    assert machine.read_memory(0x50_0010, 4) == b"mine"


def test_bypass_and_table_change_places() -> None:
    machine = board()
    dma = lan(machine)
    device = DMASpace(dma.address_space)
    assert set_bypass(machine, UNIT, 1) == RtasStatus.SUCCESS and dma.bypass
    assert device.write(0x10, b"around") == MemTxResult.OK
    assert device.write(0x20_0000, b"unmapped") == MemTxResult.OK
    assert (machine.read_memory(0x10, 6), machine.read_memory(0x50_0010, 6)) == (b"around", bytes(6))
    assert set_bypass(machine, UNIT, 0) == RtasStatus.SUCCESS and not dma.bypass
    assert device.write(0x10, b"through") == MemTxResult.OK
    assert machine.read_memory(0x50_0010, 7) == b"through", "the entries survived"
    assert device.write(0x20_0000, b"x") != MemTxResult.OK


def test_a_bypass_ends_where_ram_ends() -> None:
    machine = board()
    dma = lan(machine)
    dma.set_bypass(True)
    assert dma.address_space.write(RAM_SIZE - 4, b"last") == MemTxResult.OK
    assert dma.address_space.write(RAM_SIZE, b"next") == MemTxResult.DECODE_ERROR


def test_the_guest_may_prepare_the_table_during_a_bypass() -> None:
    machine = board()
    dma = lan(machine)
    follower = Follower(dma.table)
    set_bypass(machine, UNIT, 0xFFFF_FFFF)
    put_list(machine, [0x51_0003, 0x52_0001])
    assert machine.hcall(HCall.H_PUT_TCE_INDIRECT, UNIT, 0x1000, LIST, 2)[0] == 0
    assert machine.translate(UNIT, 0x1000) == (0x51_0000, 3, 0xFFF)
    assert follower.shadow.items() <= follower.expected().items() and len(follower.shadow) == 2


class Sections(MemoryListener):
    """Writes down what came and went, a list per commit."""

    def __init__(self) -> None:
        self.commits: list[list[str]] = []

    def begin(self) -> None:
        self.commits.append([])

    def region_add(self, section: MemoryRegionSection) -> None:
        self.commits[-1].append(f"+{section.mr.name}")

    def region_del(self, section: MemoryRegionSection) -> None:
        self.commits[-1].append(f"-{section.mr.name}")


def test_the_change_is_one_commit() -> None:
    machine = board()
    dma = lan(machine)
    sections = Sections()
    dma.address_space.register_listener(sections)
    sections.commits.clear()
    set_bypass(machine, UNIT, 1)
    set_bypass(machine, UNIT, 1)
    window = f"tce-iommu-{UNIT:x}"
    assert sections.commits == [[f"-{window}", "+ram"]]
    set_bypass(machine, UNIT, 0)
    assert sections.commits[1:] == [["-ram", f"+{window}"]]


def test_a_reset_empties_the_table_and_ends_the_bypass() -> None:
    machine = board()
    dma = lan(machine)
    set_bypass(machine, UNIT, 1)
    machine.reset()
    assert not dma.bypass
    assert tce(machine, 0, UNIT) == 0
    assert dma.address_space.write(0x10, b"x") != MemTxResult.OK


@pytest.mark.parametrize(
    "args",
    [(), (UNIT,), (UNIT, 1, 0), (UNIT + 1, 1), (UNIT + 7, 1), (LIOBN, 1)],
    ids=["none", "one", "three", "no table", "no device", "pci"],
)
def test_bypass_refuses(args: tuple[int, ...]) -> None:
    machine = board()
    dma = lan(machine)
    machine.vio.add(KINDS["vty"])
    assert set_bypass(machine, *args) == RtasStatus.PARAM_ERROR
    assert not dma.bypass
    assert machine.phb().dma.tables[0].root.enabled


def test_bypass_from_guest_memory() -> None:
    machine = board()
    dma = lan(machine)
    cells = [RtasToken.SET_TCE_BYPASS, 2, 1, UNIT, 1, 0xFFFF_FFFF]
    machine.write_memory(LIST, b"".join(int(cell).to_bytes(4, "big") for cell in cells))
    assert machine.hcall(HCall.H_RTAS, LIST)[0] == 0
    assert machine.read_memory(LIST + 20, 4) == bytes(4)
    assert dma.bypass
