"""What firmware does to a tree of PCI buses: number them, place everything's BARs, open the bridges' windows.

PCI-to-PCI Bridge Architecture Specification, 3.2.5 ("PCI Registers"), and as PC firmware does it: depth first; the
subordinate number of a bridge is 255 while what is behind it is being numbered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from vfio_model.guest_drivers.pci import (
    ConfigAccess,
    DriverError,
    MmioWindow,
    PciFunction,
    assign_bars,
    enumerate_bus,
    set_command,
)
from vfio_model.ranges import align_up

PRIMARY_BUS, SECONDARY_BUS, SUBORDINATE_BUS = 0x18, 0x19, 0x1A
MEMORY_BASE, MEMORY_LIMIT = 0x20, 0x22
PREFETCH_BASE, PREFETCH_LIMIT = 0x24, 0x26
CLOSED_BASE, CLOSED_LIMIT = 0xFFF0, 0
GRANULE = 1 << 20
LAST_BUS = 255

BusAccess = Callable[[int], ConfigAccess]
"""The way to configuration space of a bus, by its number."""


class BusTree:
    """Firmware at work: ``access`` reaches buses, BARs go into ``window``. ``functions`` is what was found."""

    def __init__(self, access: BusAccess, window: MmioWindow) -> None:
        self._access, self._window = access, window
        self._next = 0
        self.functions: list[PciFunction] = []

    def bring_up(self, roots: Iterable[int] = (0,)) -> list[PciFunction]:
        """Find, place and enable everything behind the root buses ``roots``, ascending: further ones belong to
        expanders, and have numbers already.

        :raise DriverError: bus numbers or the window run out.
        """
        numbers = sorted(roots)
        for root, end in zip(numbers, [*numbers[1:], LAST_BUS + 1], strict=True):
            self._next = root + 1
            self._bus(root, end)
        return self.functions

    def _bus(self, number: int, end: int) -> None:
        config = self._access(number)
        found = enumerate_bus(config)
        for function in found:
            function.bus = number
            assign_bars(config, function, self._window)
            self.functions.append(function)
        for function in found:
            if function.is_bridge:
                self._behind(config, function, end)
            set_command(config, function.devfn)

    def _behind(self, config: ConfigAccess, bridge: PciFunction, end: int) -> None:
        number, self._next = self._next, self._next + 1
        if number >= end:
            raise DriverError(f"no bus number is left below {end} for the bridge {bridge.bus:02x}:{bridge.devfn:#x}")
        for offset, value in ((PRIMARY_BUS, bridge.bus), (SECONDARY_BUS, number), (SUBORDINATE_BUS, LAST_BUS)):
            config.write(bridge.devfn, offset, 1, value)
        first = self._window.next = align_up(self._window.next, GRANULE)
        self._bus(number, end)
        config.write(bridge.devfn, SUBORDINATE_BUS, 1, self._next - 1)
        last = self._window.next = align_up(self._window.next, GRANULE)
        base, limit = (first >> 16, last - GRANULE >> 16) if last > first else (CLOSED_BASE, CLOSED_LIMIT)
        for offset, value in (
            (MEMORY_BASE, base),
            (MEMORY_LIMIT, limit),
            (PREFETCH_BASE, CLOSED_BASE),
            (PREFETCH_LIMIT, CLOSED_LIMIT),
        ):
            config.write(bridge.devfn, offset, 2, value)
