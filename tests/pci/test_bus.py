"""The bus: plugging, BARs in memory, bus mastering, interrupts, reset, byte order."""

from __future__ import annotations

import pytest

from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec, BarType
from vfio_model.pci.bus import BusOptions, PCIBus, Window
from vfio_model.pci.device import PCIDevice, Prop
from vfio_model.pci.iommu_ops import PCIIOMMUOps, RequesterBus
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace

RAM_SIZE = 1 << 20
WINDOW = 0x8000_0000
OK, DECODE_ERROR = MemTxResult.OK, MemTxResult.DECODE_ERROR


class Scratch(PCIDevice):
    """Sixteen registers of whatever was written."""

    VENDOR_ID, DEVICE_ID = 0x1234, 0x0001
    INTERRUPT_PIN = 1
    MSI_VECTORS = 1
    BARS = (BarSpec(0, 0x1000, access=(1, 8)), BarSpec(2, 0x4000, BarType.MEM64), BarSpec(4, 32, BarType.IO))
    PROPS = {"speed": Prop(int, 3, "how fast")}
    life = ""

    def realize(self) -> None:
        self.registers: dict[tuple[int, int], int] = {}
        self.life += "R"

    def unrealize(self) -> None:
        self.life += "U"

    def bar_read(self, bar: int, offset: int, size: int) -> int | None:
        return self.registers.get((bar, offset), 0) & (1 << size * 8) - 1

    def bar_write(self, bar: int, offset: int, size: int, value: int) -> MemTxResult:
        self.registers[bar, offset] = value
        return OK


class NativeScratch(Scratch):
    ENDIANNESS = "native"


class Machine:
    def __init__(self, *, base: int = 0, options: BusOptions | None = None) -> None:
        self.ram = bytearray(RAM_SIZE)
        system = MemoryRegion("system", 1 << 64)
        system.add_subregion(0, RAMRegion("ram", RAMBlock("ram", self.ram, page_size=0x1000, hva=Hva(0x7F0000000000))))
        self.pci_memory = MemoryRegion("pci.memory", 0x4000_0000)
        self.pci_io = MemoryRegion("pci.io", 0x10000)
        system.add_subregion(WINDOW, self.pci_memory)
        self.space = AddressSpace("system", system)
        self.io_space = AddressSpace("io", self.pci_io)
        self.clock, self.trace = VirtualClock(), ListTrace()
        self.pins: list[tuple[int, int, bool]] = []
        options = options or BusOptions()
        options.intx = lambda devfn, pin, level: self.pins.append((devfn, pin, level))
        self.bus = PCIBus(
            "pci.0",
            memory=Window(self.pci_memory, base),
            io=Window(self.pci_io),
            system=self.space,
            clock=self.clock,
            options=options,
            trace=self.trace,
        )

    def mmio(self, address: int, size: int = 4) -> bytes | None:
        out = bytearray(size)
        return None if self.space.read(address, out) else bytes(out)


DEVFN = 0x10


@pytest.fixture
def machine() -> Machine:
    machine = Machine()
    machine.bus.plug(Scratch, DEVFN)
    return machine


# -- plugging


def test_a_taken_or_impossible_devfn_is_refused(machine: Machine) -> None:
    with pytest.raises(ConfigError, match=r"0000:00:02\.0.*taken by Scratch"):
        machine.bus.plug(Scratch, DEVFN)
    with pytest.raises(ConfigError, match="does not exist"):
        machine.bus.plug(Scratch, 256)


def test_properties_are_checked() -> None:
    bus = Machine().bus
    assert bus.plug(Scratch, 8).props == {"speed": 3}
    assert bus.plug(Scratch, 9, speed=7).props == {"speed": 7}
    with pytest.raises(ConfigError, match="speed"):
        bus.plug(Scratch, 10, colour=1)
    with pytest.raises(ConfigError, match="how fast"):
        bus.plug(Scratch, 10, speed="fast")
    assert 10 not in bus.devices


def test_free_slots_are_found_until_there_are_none() -> None:
    bus = Machine().bus
    for slot in range(1, 32):
        assert bus.free_devfn() == slot << 3
        bus.plug(Scratch, slot << 3)
    with pytest.raises(ConfigError, match="no free slot"):
        bus.free_devfn()


def test_an_unplugged_function_reads_all_ones(machine: Machine) -> None:
    assert machine.bus.config_read(0x18, 0, 4) == 0xFFFFFFFF
    machine.bus.config_write(0x18, 4, 2, 6)
    assert machine.bus.config_read(DEVFN, 0, 4) == 0x00011234


# -- BARs


def test_a_bar_appears_when_it_is_set_and_decoding_is_on(machine: Machine) -> None:
    bus = machine.bus
    bus.config_write(DEVFN, 0x10, 4, 0x10_0000)
    assert machine.mmio(WINDOW + 0x10_0000) is None
    bus.config_write(DEVFN, 4, 2, 2)
    assert machine.mmio(WINDOW + 0x10_0000) == bytes(4)
    assert machine.space.write(WINDOW + 0x10_0010, b"\x78\x56\x34\x12") == OK
    assert machine.bus.devices[DEVFN].bar_read(0, 0x10, 4) == 0x12345678
    bus.config_write(DEVFN, 0x10, 4, 0x20_0000)
    assert machine.mmio(WINDOW + 0x10_0010) is None
    assert machine.mmio(WINDOW + 0x20_0010) == b"\x78\x56\x34\x12"
    bus.config_write(DEVFN, 4, 2, 0)
    assert machine.mmio(WINDOW + 0x20_0010) is None


def test_a_64_bit_and_an_io_bar(machine: Machine) -> None:
    bus, device = machine.bus, machine.bus.devices[DEVFN]
    bus.config_write(DEVFN, 0x18, 4, 0x300_0000)
    bus.config_write(DEVFN, 0x20, 4, 0xC000)
    bus.config_write(DEVFN, 4, 2, 3)
    machine.space.write(WINDOW + 0x300_0008, b"m")
    machine.io_space.write(0xC004, b"i")
    assert device.bar_read(2, 8, 1) == ord("m") and device.bar_read(4, 4, 1) == ord("i")


def test_sizing_does_not_show_the_bar(machine: Machine) -> None:
    bus = machine.bus
    bus.config_write(DEVFN, 4, 2, 2)
    bus.config_write(DEVFN, 0x10, 4, 0xFFFFFFFF)
    assert bus.config_read(DEVFN, 0x10, 4) == 0xFFFFF000
    assert machine.pci_memory.subregions == []


def test_bus_addresses_begin_where_the_host_bridge_says() -> None:
    machine = Machine(base=0x8000_0000)
    machine.bus.plug(Scratch, DEVFN)
    machine.bus.config_write(DEVFN, 4, 2, 2)
    machine.bus.config_write(DEVFN, 0x10, 4, 0x8000_1000)
    assert machine.mmio(WINDOW + 0x1000) == bytes(4)
    machine.bus.config_write(DEVFN, 0x10, 4, 0x1000)
    assert machine.pci_memory.subregions == [], "below the window"


def test_bus_address_zero_counts_where_the_machine_says_so() -> None:
    for allowed in (False, True):
        machine = Machine(options=BusOptions(allow_zero_bars=allowed))
        machine.bus.plug(Scratch, DEVFN)
        machine.bus.config_write(DEVFN, 4, 2, 2)
        assert (machine.mmio(WINDOW) is not None) is allowed


@pytest.mark.parametrize(
    ("device_class", "big_endian", "value"),
    [(Scratch, False, 0x0102), (Scratch, True, 0x0102), (NativeScratch, False, 0x0102), (NativeScratch, True, 0x0201)],
)
def test_registers_are_little_endian_or_native(device_class: type[PCIDevice], big_endian: bool, value: int) -> None:
    machine = Machine(options=BusOptions(big_endian=big_endian))
    device = machine.bus.plug(device_class, DEVFN)
    machine.bus.config_write(DEVFN, 4, 2, 2)
    machine.bus.config_write(DEVFN, 0x10, 4, 0x1000)
    machine.space.write(WINDOW + 0x1000, b"\x02\x01")
    assert device.bar_read(0, 0, 2) == value


# -- DMA


def test_bus_mastering_gates_dma(machine: Machine) -> None:
    bus, device = machine.bus, machine.bus.devices[DEVFN]
    out = bytearray(b"stale")
    assert device.dma.write(0x1000, b"x") == DECODE_ERROR
    assert device.dma.read(0x1000, out) == DECODE_ERROR and out == bytes(5)
    bus.config_write(DEVFN, 4, 2, 4)
    assert device.dma.write(0x1000, b"dma") == OK and machine.ram[0x1000:0x1003] == b"dma"
    bus.config_write(DEVFN, 4, 2, 0)
    assert device.dma.write(0x1000, b"xxx") == DECODE_ERROR


def test_without_an_iommu_the_bound_method_is_the_system_address_space_s_own(machine: Machine) -> None:
    machine.bus.config_write(DEVFN, 4, 2, 4)
    device = machine.bus.devices[DEVFN]
    assert device.dma.read is machine.space.read and device.dma.write is machine.space.write


def test_the_iommu_is_asked_once_per_function_at_plug() -> None:
    machine, asked = Machine(), list[int]()
    behind = AddressSpace("edu-as", MemoryRegion("empty", 1 << 64))

    class Ops(PCIIOMMUOps):
        def get_address_space(self, bus: RequesterBus, devfn: int) -> AddressSpace:
            asked.append(devfn)
            return behind

    machine.bus.setup_iommu(Ops())
    device = machine.bus.plug(Scratch, DEVFN)
    machine.bus.config_write(DEVFN, 4, 2, 4)
    assert device.dma.write(0x1000, b"x") == DECODE_ERROR
    assert device.dma.impl is behind and asked == [DEVFN]
    with pytest.raises(AssertionError):
        machine.bus.setup_iommu(Ops())


# -- interrupts


def test_intx_has_a_level_a_status_bit_and_a_disable_bit(machine: Machine) -> None:
    bus, device = machine.bus, machine.bus.devices[DEVFN]
    device.raise_irq()
    device.raise_irq()
    assert machine.pins == [(DEVFN, 1, True)] and bus.config_read(DEVFN, 6, 2) & 8
    bus.config_write(DEVFN, 4, 2, 0x400)
    assert machine.pins[-1] == (DEVFN, 1, False) and bus.config_read(DEVFN, 6, 2) & 8
    bus.config_write(DEVFN, 4, 2, 0)
    device.lower_irq()
    device.lower_irq()
    assert machine.pins[1:] == [(DEVFN, 1, False), (DEVFN, 1, True), (DEVFN, 1, False)]


def test_msi_is_a_dma_write_of_the_device(machine: Machine) -> None:
    bus, device = machine.bus, machine.bus.devices[DEVFN]
    for offset, size, value in ((0x44, 4, 0x2000), (0x4C, 2, 0x4041), (0x42, 2, 1), (4, 2, 4)):
        bus.config_write(DEVFN, offset, size, value)
    device.raise_irq()
    assert machine.ram[0x2000:0x2004] == b"\x41\x40\x00\x00" and machine.pins == []
    bus.config_write(DEVFN, 4, 2, 0)
    machine.ram[0x2000:0x2004] = bytes(4)
    device.raise_irq()
    assert machine.ram[0x2000:0x2004] == bytes(4), "no bus mastering, no message"


def test_a_host_that_switches_msi_itself_decides(machine: Machine) -> None:
    device = machine.bus.devices[DEVFN]
    device.irq_by_msi = True
    device.raise_irq()
    assert machine.pins == [] and machine.trace.named("msi_message")
    device.irq_by_msi = False
    device.raise_irq()
    assert machine.pins == [(DEVFN, 1, True)]


# -- reset and unplug


def test_reset_stops_dma_first_then_registers_then_runs_again(machine: Machine) -> None:
    bus, device = machine.bus, machine.bus.devices[DEVFN]
    bus.config_write(DEVFN, 0x10, 4, 0x1000)
    bus.config_write(DEVFN, 4, 2, 6)
    device.raise_irq()
    bus.reset_enter()
    assert device.dma.write(0, b"x") == DECODE_ERROR and bus.config_read(DEVFN, 4, 2) == 6
    bus.reset_hold()
    assert bus.config_read(DEVFN, 4, 2) == 0 and bus.config_read(DEVFN, 0x10, 4) == 0
    assert machine.pins[-1] == (DEVFN, 1, False) and machine.pci_memory.subregions == []
    bus.reset_exit()
    bus.config_write(DEVFN, 4, 2, 4)
    assert device.dma.write(0, b"x") == OK


def test_an_unplugged_device_has_no_dma_no_bars_and_no_pin(machine: Machine) -> None:
    bus = machine.bus
    bus.config_write(DEVFN, 0x10, 4, 0x1000)
    bus.config_write(DEVFN, 4, 2, 6)
    device = bus.devices[DEVFN]
    device.raise_irq()
    assert isinstance(bus.detach(DEVFN), Scratch) and "U" in device.life  # type: ignore[attr-defined]
    assert device.dma.write(0, b"x") == DECODE_ERROR
    assert machine.mmio(WINDOW + 0x1000) is None
    assert machine.pins[-1] == (DEVFN, 1, False)
    assert bus.config_read(DEVFN, 0, 4) == 0xFFFFFFFF
    bus.plug(Scratch, DEVFN)


def test_idle_work_runs_in_the_loop_s_hook_or_in_virtual_time() -> None:
    calls: list[int] = []

    def work() -> bool:
        calls.append(1)
        return len(calls) < 3

    machine = Machine()
    machine.bus.plug(Scratch, DEVFN).run_when_idle(work)
    assert not calls
    machine.clock.advance(1_000_000)
    assert len(calls) == 3

    hooked: list[object] = []
    looped = Machine(options=BusOptions(idle=hooked.append))
    looped.bus.plug(Scratch, DEVFN).run_when_idle(work)
    assert hooked == [work]


def test_a_device_that_cannot_be_realized_is_not_plugged(machine: Machine) -> None:
    class Broken(Scratch):
        def realize(self) -> None:
            raise OSError("broken")

    devfn = machine.bus.free_devfn()
    with pytest.raises(OSError, match="broken"):
        machine.bus.plug(Broken, devfn)
    assert devfn not in machine.bus.devices
    machine.bus.plug(Scratch, devfn)
