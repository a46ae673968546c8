"""The q35 machine against stock QEMU's: random accesses to its platform read the same, and the VT-d driver model finds
the same unit on both."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest

from tests.guest_drivers import test_vtd_driver as driver_tests
from tests.guest_drivers.vtd_rig import TABLES, TABLES_END
from tests.interop.pc import PcQemu
from tests.machine.q35_boards import ram_block
from vfio_model.devices.edu.device import EduDevice
from vfio_model.devices.iommu_testdev.device import IOMMUTestDevice
from vfio_model.guest_drivers.edu import EduDriver
from vfio_model.guest_drivers.iommu_testdev import IommuTestdevDriver
from vfio_model.guest_drivers.pc import PortConfig, enable_ecam, mmio_window
from vfio_model.guest_drivers.pci import bring_up_bus, find_function
from vfio_model.guest_drivers.vtd import VtdDriver
from vfio_model.guest_drivers.vtd_tables import PageAllocator
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.q35.machine import Q35Machine

DEVICES = ("-device", "edu,addr=02.0,dma_mask=0xffffffffffffffff", "-device", "iommu-testdev,addr=03.0")
FUNCTIONS = (0x00, 0x10, 0x18, 0x20, 0xF8, 0xFA, 0xFB)
"""The built-in ones, edu, iommu-testdev, and one that is not there."""
RESET_CPU = 0x04
RAM_SIZE = 256 << 20


class QemuCpu:
    """A CPU of a stock QEMU, by qtest."""

    big_endian = False

    def __init__(self, pc: PcQemu) -> None:
        self._pc = pc
        self.read_memory, self.write_memory = pc.read, pc.write
        self.mmio_read, self.mmio_write = pc.load, pc.store
        self.port_read = pc.inl

    def port_write(self, port: int, size: int, value: int) -> None:
        self._pc.outl(port, value, size)

    def clock_step(self, ns: int = 0) -> int:
        return int(self._pc.qtest.ask(f"clock_step {ns}" if ns else "clock_step"))


# -- the platform


class Access(NamedTuple):
    way: str
    address: int
    size: int
    value: int


def accesses(rng: random.Random, count: int) -> Iterator[Access]:
    """Ports and memory of the host bridge, chipset and I/O APIC; nothing that resets."""

    def value() -> int:
        return rng.choice((0, 0xFFFF_FFFF, 1 << 16, rng.randrange(0x44), rng.getrandbits(32), rng.getrandbits(64)))

    def config_address() -> Access:
        rare = rng.choice((0,) * 9 + (1 << 16, 0x7F00_0000))
        address = rng.choice((1 << 31,) * 9 + (0,)) | rare | rng.choice(FUNCTIONS) << 8 | rng.randrange(256)
        size = rng.choice((4,) * 9 + (1, 2))
        return Access("out", 0xCF8, size, address if size == 4 else address & 0xFBFF)

    def config_data() -> Access:
        return Access(rng.choice(("in", "out")), 0xCFC + rng.randrange(4), rng.choice((1, 2, 4)), value())

    def pciexbar() -> Access:
        bases = (0, 0xB000_0001, 0xB000_0003, 0xB000_0005, 0xE000_0001, 0xD000_0001)
        return Access("mch", 0x60, 4, rng.choice(bases))

    def other_port() -> Access:
        port = rng.choice((0xCF6, 0xCF7, 0xCF8, 0xCF9, 0xCFA, 0xCFB, 0xD00, 0x4E0))
        return Access("in", port, rng.choice((1, 2, 4)), 0)

    def reset_control() -> Access:
        return Access("out", 0xCF9, 1, rng.getrandbits(8) & ~RESET_CPU)

    def ecam() -> Access:
        base, bus = rng.choice((0xB000_0000, 0xB000_0000, 0xD000_0000)), rng.choice((0, 0, 0, 1, 63, 64, 127))
        offset = rng.choice((rng.randrange(256), rng.randrange(4096)))
        address = base + (bus << 20) + (rng.choice(FUNCTIONS) << 12) + offset
        return Access(rng.choice(("read", "write")), address, rng.choice((1, 2, 4, 8)), value())

    def ioapic() -> Access:
        offset = rng.choice((0, 0, 0x10, 0x10, 0x10, 0x14, 0x40, 1, 4))
        return Access(rng.choice(("read", "write")), 0xFEC0_0000 + offset, rng.choice((4, 4, 4, 1, 2, 8)), value())

    def memory() -> Access:
        base = rng.choice((0xA_0000, 0xB_C000, 0xFED1_C000, 0xFED1_F100, 0xC000_0000, 1 << 32, 0xFEE0_1000))
        way = "read" if base == 0xFEE0_1000 else rng.choice(("read", "write"))
        return Access(way, base + rng.randrange(0x1000), rng.choice((1, 2, 4, 8)), value())

    kinds: list[Callable[[], Access]] = [
        *(config_address, config_data, config_data, ecam, ecam, ioapic, memory, other_port, pciexbar),
        reset_control,
    ]
    for _ in range(count):
        access = rng.choice(kinds)()
        yield access._replace(value=access.value & (1 << 8 * access.size) - 1)


def perform(cpu: QemuCpu | Q35Machine, access: Access) -> int | None:
    way, address, size, value = access
    if way == "in":
        return cpu.port_read(address, size)
    if way == "out":
        cpu.port_write(address, size, value)
    elif way == "read":
        return cpu.mmio_read(address, size)
    elif way == "write":
        cpu.mmio_write(address, size, value)
    else:
        cpu.port_write(0xCF8, 4, 1 << 31 | address)
        cpu.port_write(0xCFC, size, value)
    return None


@pytest.mark.parametrize("seed", range(3))
def test_random_accesses_to_the_platform_read_the_same(seed: int) -> None:
    machine = Q35Machine([ram_block(RAM_SIZE)])
    machine.root_bus.plug(EduDevice, 0x10)
    machine.root_bus.plug(IOMMUTestDevice, 0x18)
    with PcQemu(DEVICES) as pc:
        qemu = QemuCpu(pc)
        history: list[Access] = []
        for access in accesses(random.Random(seed), 3000):
            history.append(access)
            assert perform(machine, access) == perform(qemu, access), f"seed {seed}, {len(history)}: {history[-8:]}"


# -- interrupts

SLOTS = (2, 3, 6)
PINS = (0, 2, 5, 10, 22, 23)
"""Of the I/O APIC: those of the slots, and ISA lines that PIRQs are routed to."""


def bar(slot: int) -> int:
    return 0xE000_0000 + (slot << 20)


def events(rng: random.Random, count: int) -> Iterator[list[Access]]:
    """edu's pins up and down, entries and ends of interrupts in the I/O APIC, routes of PIRQs."""

    def entry() -> list[Access]:
        bits = (0, 1 << 16), (0, 1 << 15), (0, 1 << 14), (0, 0, 0x100, 0x2000)
        value = sum(map(rng.choice, bits)) | rng.randrange(0x30, 0x34)
        return [Access("write", 0xFEC0_0000, 4, 0x10 + 2 * rng.choice(PINS)), Access("write", 0xFEC0_0010, 4, value)]

    def route() -> list[Access]:
        address = 1 << 31 | 0xF868
        port = 0xCFC + rng.randrange(4)
        return [Access("out", 0xCF8, 4, address), Access("out", port, 1, rng.choice((0x80, 5, 10, 0x15, 0, 0x8A)))]

    for _ in range(count):
        kind, slot = rng.random(), rng.choice(SLOTS)
        if kind < 0.6:
            yield [Access("write", bar(slot) + (0x60 if kind < 0.33 else 0x64), 4, 1)]
        elif kind < 0.85:
            yield entry()
        elif kind < 0.95:
            yield [Access("write", 0xFEC0_0040, 4, rng.randrange(0x30, 0x34))]
        else:
            yield route()


@pytest.mark.parametrize("seed", range(3))
def test_pins_make_the_same_of_the_redirection_table(seed: int) -> None:
    machine = Q35Machine([ram_block(RAM_SIZE)])
    for slot in SLOTS:
        machine.root_bus.plug(EduDevice, slot << 3)
    with PcQemu([word for slot in SLOTS for word in ("-device", f"edu,addr={slot}.0")]) as pc:
        both = machine, QemuCpu(pc)
        for cpu, slot in itertools.product(both, SLOTS):
            PortConfig(cpu).write(slot << 3, 0x10, 4, bar(slot))
            PortConfig(cpu).write(slot << 3, 4, 2, 6)
        history: list[Access] = []
        for event in events(random.Random(seed), 1500):
            history += event
            for cpu, access in itertools.product(both, event):
                perform(cpu, access)
            mine, theirs = (redirection(cpu) for cpu in both)
            assert mine == theirs, f"seed {seed}, {len(history)}: {history[-12:]}"


def redirection(cpu: QemuCpu | Q35Machine) -> list[int]:
    found = []
    for pin in PINS:
        cpu.mmio_write(0xFEC0_0000, 4, 0x10 + 2 * pin)
        found.append(cpu.mmio_read(0xFEC0_0010, 4))
    return found


# -- the driver


class QemuRig:
    """What a :class:`~tests.guest_drivers.vtd_rig.Rig` is, on stock QEMU."""

    def __init__(self, pc: PcQemu, *, queued: bool, scalable: bool) -> None:
        self.machine = QemuCpu(pc)
        functions = bring_up_bus(enable_ecam(self.machine), mmio_window())
        pages = PageAllocator(self.machine, TABLES, TABLES_END)
        self.vtd = VtdDriver(self.machine, pages, queued=queued, scalable=scalable)
        self.edu = EduDriver(self.machine, find_function(functions, 0x1234, 0x11E8).bars[0].address)
        self.testdev = IommuTestdevDriver(self.machine, find_function(functions, 0x1B36, 5).bars[0].address)
        self.vtd.start()


def unit(options: VtdOptions) -> str:
    """QEMU's option for it."""
    switches = {
        "caching-mode": options.caching_mode,
        "scalable-mode": options.scalable_mode,
        "fsts": options.fsts,
    }
    return ",".join(
        [f"intel-iommu,aw-bits={options.aw_bits}", *(f"{k}={'on' if v else 'off'}" for k, v in switches.items())]
    )


@dataclass
class QemuMode:
    """A mode of the driver's tests, whose rig is QEMU's."""

    mode: driver_tests.Mode
    pc: PcQemu

    @property
    def stage(self) -> object:
        return self.mode.stage

    def reasons(self) -> tuple[int, int]:
        return self.mode.reasons()

    def rig(self) -> QemuRig:
        return QemuRig(self.pc, queued=self.mode.queued, scalable=self.mode.scalable)


CASES = (
    driver_tests.test_devices_reach_what_is_mapped_and_nothing_else,
    driver_tests.test_what_is_unmapped_is_out_of_reach,
    driver_tests.test_large_pages,
    driver_tests.test_domains_are_apart,
    driver_tests.test_functions_without_a_domain_are_blocked,
    driver_tests.test_without_translation_everything_is_reached,
)
"""Those of the driver's own tests in which the unit of QEMU is as the specification has it."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("mode", driver_tests.MODES.values(), ids=driver_tests.MODES.keys())
def test_the_vtd_driver_finds_the_same_unit_on_qemu(mode: driver_tests.Mode, case: Callable[[QemuMode], None]) -> None:
    with PcQemu(("-device", unit(mode.options), *DEVICES)) as pc:
        case(QemuMode(mode, pc))


@pytest.mark.parametrize("mode", [driver_tests.QEMU_SCALABLE, driver_tests.QEMU_FIRST_STAGE], ids=["second", "first"])
def test_pass_through_lingers(mode: driver_tests.Mode) -> None:
    with PcQemu(("-device", unit(mode.options), *DEVICES)) as pc:
        case: Callable[[QemuMode], None] = driver_tests.test_pass_through_lingers_on_qemu
        case(QemuMode(mode, pc))
