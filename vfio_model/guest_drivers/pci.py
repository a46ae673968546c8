"""What a guest's firmware and kernel do to a PCI bus: find functions, size and place their BARs, set the command
register, arm MSI.

PCI Local Bus Specification 3.0, chapter 6. How configuration space is reached is the platform's business
(:class:`ConfigAccess`): on pseries by RTAS, on a PC by ports or memory (:mod:`.pc`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from vfio_model.errors import VfioModelError
from vfio_model.guest_drivers.cpu import PseriesCpu
from vfio_model.iommu.spapr import regs as spapr
from vfio_model.pci.bar import BAR_OFFSET, BARS
from vfio_model.pci.config_space import (
    CAPABILITY_POINTER,
    CLASS_DEVICE,
    COMMAND,
    COMMAND_IO,
    COMMAND_MASTER,
    COMMAND_MEMORY,
    DEVICE_ID,
    HEADER_TYPE,
    MULTIFUNCTION,
    STATUS,
    STATUS_CAP_LIST,
    VENDOR_ID,
)
from vfio_model.pci.msi import CAP_ID_MSI, CONTROL_ENABLE
from vfio_model.ranges import U32_MAX, align_up

SLOTS = 32
HEADER_BRIDGE, BRIDGE_BARS = 1, 2


class DriverError(VfioModelError):
    """A device or the platform did not do what a driver needs."""


class ConfigAccess(Protocol):
    """Configuration cycles on one bus; sizes 1, 2 or 4."""

    def read(self, devfn: int, offset: int, size: int) -> int:
        """All ones where nothing answers."""

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """Lost where nothing answers."""


class RtasConfig:
    """Configuration cycles by ``ibm,read-pci-config`` and ``ibm,write-pci-config`` on bus ``bus`` of the PHB
    ``buid``.
    """

    def __init__(self, cpu: PseriesCpu, buid: int, bus: int = 0) -> None:
        self._cpu, self._bus = cpu, bus
        self._buid = [buid >> 32, buid & U32_MAX]

    def read(self, devfn: int, offset: int, size: int) -> int:
        """An error status reads as all ones, as Linux takes it."""
        cell = spapr.config_addr(self._bus, devfn, offset)
        rets = self._cpu.rtas(spapr.RtasToken.IBM_READ_PCI_CONFIG, [cell, *self._buid, size], 2)
        return rets[1] if spapr.rtas_status(rets) == 0 else (1 << size * 8) - 1

    def write(self, devfn: int, offset: int, size: int, value: int) -> None:
        """The status is not looked at."""
        cell = spapr.config_addr(self._bus, devfn, offset)
        self._cpu.rtas(spapr.RtasToken.IBM_WRITE_PCI_CONFIG, [cell, *self._buid, size, value], 1)


@dataclass
class Bar:
    """A BAR that a function implements: ``size`` in bytes; ``address`` on the bus once placed."""

    index: int
    size: int
    io: bool
    wide: bool
    address: int = 0


@dataclass
class PciFunction:
    """What enumeration found at ``devfn``."""

    devfn: int
    vendor_id: int
    device_id: int
    class_device: int
    bars: dict[int, Bar] = field(default_factory=dict)
    header: int = 0
    """Header type, without the multifunction bit."""
    bus: int = 0
    """The number of its bus, when it was found."""

    @property
    def is_bridge(self) -> bool:
        """Whether it is a PCI-to-PCI bridge."""
        return self.header == HEADER_BRIDGE


@dataclass
class MmioWindow:
    """A host bridge's window: bus addresses from ``bus`` on appear to the CPU from ``cpu`` on; ``next`` is the first
    free one.
    """

    bus: int
    cpu: int
    size: int
    next: int = 0

    def __post_init__(self) -> None:
        self.next = max(self.next, self.bus)

    @classmethod
    def pseries(cls, phb_index: int = 0) -> MmioWindow:
        """The 32-bit memory window of PHB ``phb_index``."""
        return cls(spapr.PCI_MEM32_BUS, spapr.pci_mem32_window(phb_index), spapr.PCI_MEM32_SIZE)

    def take(self, size: int) -> int:
        """A naturally aligned place of ``size`` bytes.

        :raise DriverError: when the window is full.
        """
        place = align_up(self.next, size)
        if place + size > self.bus + self.size:
            raise DriverError(f"no room for a BAR of {size:#x} bytes in the window at {self.bus:#x}")
        self.next = place + size
        return place

    def to_cpu(self, address: int) -> int:
        """Where the CPU sees bus address ``address``."""
        return address - self.bus + self.cpu


def probe(config: ConfigAccess, devfn: int) -> PciFunction | None:
    """Look at ``devfn``: its identity and BARs, or None when nothing answers. Decoding is off while BARs are sized."""
    vendor = config.read(devfn, VENDOR_ID, 2)
    if vendor in (0xFFFF, 0):
        return None
    found = PciFunction(devfn, vendor, config.read(devfn, DEVICE_ID, 2), config.read(devfn, CLASS_DEVICE, 2))
    found.header = config.read(devfn, HEADER_TYPE, 1) & ~MULTIFUNCTION
    command = config.read(devfn, COMMAND, 2)
    config.write(devfn, COMMAND, 2, command & ~(COMMAND_IO | COMMAND_MEMORY))
    bars = BRIDGE_BARS if found.is_bridge else BARS
    index = 0
    while index < bars:
        bar = _size_bar(config, devfn, index)
        if bar is not None:
            found.bars[index] = bar
        index += 2 if bar is not None and bar.wide else 1
    config.write(devfn, COMMAND, 2, command)
    return found


def _size_bar(config: ConfigAccess, devfn: int, index: int) -> Bar | None:
    offset = BAR_OFFSET + 4 * index
    old = config.read(devfn, offset, 4)
    config.write(devfn, offset, 4, U32_MAX)
    mask = config.read(devfn, offset, 4)
    config.write(devfn, offset, 4, old)
    if not mask:
        return None
    if mask & 1:
        return Bar(index, -(mask & ~0x3) & 0xFFFF, io=True, wide=False, address=old & ~0x3)
    wide = mask >> 1 & 3 == 2
    mask &= ~0xF
    if wide:
        old_high = config.read(devfn, offset + 4, 4)
        config.write(devfn, offset + 4, 4, U32_MAX)
        mask |= config.read(devfn, offset + 4, 4) << 32
        config.write(devfn, offset + 4, 4, old_high)
        old |= old_high << 32
    return Bar(index, -mask & (1 << (64 if wide else 32)) - 1, io=False, wide=wide, address=old & ~0xF)


def enumerate_bus(config: ConfigAccess) -> list[PciFunction]:
    """Every function 0 on the bus, and the further functions of multifunction devices, by devfn."""
    found = []
    for slot in range(SLOTS):
        first = probe(config, slot << 3)
        if first is None:
            continue
        found.append(first)
        if config.read(slot << 3, HEADER_TYPE, 1) & MULTIFUNCTION:
            others = (probe(config, slot << 3 | function) for function in range(1, 8))
            found += [other for other in others if other is not None]
    return found


def assign_bars(config: ConfigAccess, function: PciFunction, window: MmioWindow) -> None:
    """Give every memory BAR of ``function`` a place in ``window``, the largest first.

    :raise DriverError: when the window is full.
    """
    for bar in sorted(function.bars.values(), key=lambda bar: -bar.size):
        if bar.io:
            continue
        bar.address = window.take(bar.size)
        offset = BAR_OFFSET + 4 * bar.index
        config.write(function.devfn, offset, 4, bar.address & U32_MAX)
        if bar.wide:
            config.write(function.devfn, offset + 4, 4, bar.address >> 32)


def set_command(config: ConfigAccess, devfn: int, *, memory: bool = True, master: bool = True) -> None:
    """Switch memory decoding and bus mastering; the other bits stay."""
    keep = config.read(devfn, COMMAND, 2) & ~(COMMAND_MEMORY | COMMAND_MASTER)
    config.write(devfn, COMMAND, 2, keep | (COMMAND_MEMORY if memory else 0) | (COMMAND_MASTER if master else 0))


def find_capability(config: ConfigAccess, devfn: int, cap_id: int) -> int | None:
    """The offset of the first capability ``cap_id``, or None."""
    if not config.read(devfn, STATUS, 2) & STATUS_CAP_LIST:
        return None
    offset = config.read(devfn, CAPABILITY_POINTER, 1) & ~0x3
    for _ in range(48):  # the list cannot be longer, but a broken one can be a ring
        if not offset:
            return None
        if config.read(devfn, offset, 1) == cap_id:
            return offset
        offset = config.read(devfn, offset + 1, 1) & ~0x3
    return None


def enable_msi(config: ConfigAccess, devfn: int, address: int, data: int) -> None:
    """Arm one message with a 64-bit address.

    :raise DriverError: when the function has no MSI capability.
    """
    cap = find_capability(config, devfn, CAP_ID_MSI)
    if cap is None:
        raise DriverError(f"function {devfn:#x} has no MSI capability")
    config.write(devfn, cap + 4, 4, address & U32_MAX)
    config.write(devfn, cap + 8, 4, address >> 32)
    config.write(devfn, cap + 12, 2, data)
    config.write(devfn, cap + 2, 2, config.read(devfn, cap + 2, 2) | CONTROL_ENABLE)


def bring_up(cpu: PseriesCpu, buid: int, window: MmioWindow) -> list[PciFunction]:
    """:func:`bring_up_bus` on the bus of PHB ``buid``."""
    return bring_up_bus(RtasConfig(cpu, buid), window)


def bring_up_bus(config: ConfigAccess, window: MmioWindow) -> list[PciFunction]:
    """What firmware leaves behind: every function found, placed, decoding and mastering."""
    functions = enumerate_bus(config)
    for function in functions:
        assign_bars(config, function, window)
        set_command(config, function.devfn)
    return functions


def find_function(functions: Sequence[PciFunction], vendor_id: int, device_id: int) -> PciFunction:
    """The first function of this identity.

    :raise DriverError: when there is none.
    """
    for function in functions:
        if (function.vendor_id, function.device_id) == (vendor_id, device_id):
            return function
    raise DriverError(f"no function {vendor_id:04x}:{device_id:04x} on the bus")
