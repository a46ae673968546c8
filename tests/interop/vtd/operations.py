"""What programs are made of: qtest commands with a name. Both machines get the very same text."""

from __future__ import annotations

from dataclasses import dataclass

from tests.interop.vtd.places import EDU_BAR, TESTDEV_BAR, UNIT
from tests.interop.vtd.topology import ROOT_BUS, Place, Topology, config
from vfio_model.devices.edu import regs as edu
from vfio_model.devices.iommu_testdev import regs as testdev
from vfio_model.ranges import U32_MAX

_LETTER = {1: "b", 2: "w", 4: "l", 8: "q"}
_EDU_MSI = 0x40
"""Where edu has its MSI capability."""
EDU_DONE_NS = (edu.DMA_DELAY_MS + 1) * 1_000_000


@dataclass(frozen=True)
class Operation:
    """``text``: for a reader; ``commands``: what it does; ``kind``: for counting."""

    kind: str
    text: str
    commands: tuple[str, ...]

    def __str__(self) -> str:
        return self.text


def load(gpa: int, size: int) -> str:
    """One command."""
    return f"read{_LETTER[size]} {gpa:#x}"


def store(gpa: int, size: int, value: int) -> str:
    """One command."""
    return f"write{_LETTER[size]} {gpa:#x} {value & (1 << 8 * size) - 1:#x}"


def entry(name: str, gpa: int, *words: int) -> Operation:
    """Words of 8 bytes in a table."""
    text = f"{name} {gpa:#x} = {' '.join(f'{word:#x}' for word in words)}"
    return Operation("entry", text, tuple(store(gpa + 8 * n, 8, word) for n, word in enumerate(words)))


def register(offset: int, size: int, value: int | None = None) -> Operation:
    """A register access of the unit; a write is followed by a read."""
    at = UNIT + offset
    if value is None:
        return Operation("register", f"read {offset:#x}/{size}", (load(at, size),))
    text = f"write {offset:#x}/{size} {value:#x}"
    return Operation("register", text, (store(at, size, value), load(at, size)))


def sequence(kind: str, text: str, *steps: tuple[int, int, int | None]) -> Operation:
    """Register accesses in a row: (offset, size, value or None to read)."""
    commands = [load(UNIT + at, size) if value is None else store(UNIT + at, size, value) for at, size, value in steps]
    return Operation(kind, text, tuple(commands))


def edu_dma(iova: int, length: int, *, to_ram: bool, offset: int = 0) -> Operation:
    """A DMA of edu's, started and ended; what it read it shows by writing it out again elsewhere."""
    inside = edu.BUFFER_ADDRESS + offset
    src, dst = (inside, iova) if to_ram else (iova, inside)
    command = edu.DMA_RUN | (edu.DMA_TO_RAM if to_ram else 0)
    registers = ((edu.DMA_SRC, src), (edu.DMA_DST, dst), (edu.DMA_COUNT, length), (edu.DMA_COMMAND, command))
    commands = [store(EDU_BAR + at, 8, value) for at, value in registers]
    commands += [f"clock_step {EDU_DONE_NS}", load(EDU_BAR + edu.DMA_COMMAND, 8)]
    return Operation("edu", f"edu {'writes' if to_ram else 'reads'} {length:#x} at {iova:#x}", tuple(commands))


def device_test(iova: int, gpa: int, length: int) -> Operation:
    """iommu-testdev writes through the IOMMU and looks by the guest-physical address."""
    values = (
        (testdev.IOVA_LO, iova & U32_MAX),
        (testdev.IOVA_HI, iova >> 32),
        (testdev.LENGTH, length),
        (testdev.GPA_LO, gpa & U32_MAX),
        (testdev.GPA_HI, gpa >> 32),
        (testdev.ATTRIBUTES, 0),
        (testdev.DOORBELL, testdev.DOORBELL_ARM),
    )
    commands = [store(TESTDEV_BAR + at, 4, value) for at, value in values]
    commands += [load(TESTDEV_BAR + testdev.TRIGGER, 4), load(TESTDEV_BAR + testdev.RESULT, 4)]
    return Operation("testdev", f"testdev {length:#x} at {iova:#x}, {gpa:#x}", tuple(commands))


def bring_up(topology: Topology = ROOT_BUS) -> Operation:
    """What firmware does."""
    return Operation("bring-up", "bus numbers, windows, BARs, decoding, bus mastering", tuple(topology.bring_up()))


def edu_message(place: Place, address: int, data: int) -> Operation:
    """edu's MSI capability is set up, and it interrupts."""
    message = ((4, 4, address & U32_MAX), (8, 4, address >> 32), (12, 2, data & 0xFFFF), (2, 2, 1))
    commands = [
        text for at, size, value in message for text in config(place.bus, place.slot, _EDU_MSI + at, size, value)
    ]
    commands += [
        store(EDU_BAR + edu.IRQ_RAISE, 4, 1),
        load(EDU_BAR + edu.IRQ_STATUS, 4),
        store(EDU_BAR + edu.IRQ_ACK, 4, 1),
    ]
    return Operation("message", f"edu sends {data & 0xFFFF:#x} to {address:#x}", tuple(commands))


def memory(gpa: int, size: int) -> Operation:
    """RAM, read."""
    return Operation("memory", f"memory {gpa:#x}+{size:#x}", (f"b64read {gpa:#x} {size:#x}",))


def clear(gpa: int, size: int) -> Operation:
    """RAM, zeroed."""
    return Operation("clear", f"clear {gpa:#x}+{size:#x}", (f"memset {gpa:#x} {size:#x} 0x0",))
