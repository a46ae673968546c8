"""The BARs of the functions on one bus: regions in the windows that show the bus's memory and I/O space."""

from __future__ import annotations

from dataclasses import dataclass

from vfio_model.memory.region import IORegion, MemoryRegion, transaction
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.device import PCIDevice


@dataclass
class Window:
    """Where a kind of bus space appears: ``region`` shows bus addresses from ``base`` on (region offset 0)."""

    region: MemoryRegion
    base: int = 0


class _BarOps:
    """A BAR as the ops of an I/O region."""

    def __init__(self, device: PCIDevice, index: int) -> None:
        self.min_access_size, self.max_access_size = device.bar_spec(index).access
        self._device, self._index = device, index

    def read(self, addr: int, size: int) -> int | None:
        return self._device.bar_read(self._index, addr, size)

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        return self._device.bar_write(self._index, addr, size, value)


class BarMap:
    """``allow_zero``: whether a BAR at bus address 0 decodes."""

    def __init__(self, memory: Window, io: Window | None, *, big_endian: bool, allow_zero: bool) -> None:
        self._memory, self._io = memory, io
        self._big_endian, self._allow_zero = big_endian, allow_zero
        self._regions: dict[PCIDevice, dict[int, MemoryRegion]] = {}

    def add(self, device: PCIDevice, name: str) -> None:
        """Make the regions of ``device``; from now on they follow its BARs."""
        own = self._regions[device] = {}
        for bar in device.BARS:
            own[bar.index] = device.bar_region(bar.index) or self._region(device, name, bar.index)
        device.on_mapping_change = lambda: self._update(device)

    def remove(self, device: PCIDevice) -> None:
        """Nothing of ``device`` decodes any more."""
        device.on_mapping_change = None
        with transaction():
            for region in self._regions.pop(device).values():
                if region.parent is not None:
                    region.parent.del_subregion(region)

    def _region(self, device: PCIDevice, name: str, index: int) -> MemoryRegion:
        bar = device.bar_spec(index)
        big_endian = device.ENDIANNESS == "native" and self._big_endian
        name = f"{name} BAR{index}"
        region = IORegion(name, bar.size, _BarOps(device, index), big_endian=big_endian)
        for part in device.bar_parts(index):
            region.add_subregion(part.offset, IORegion(f"{name}+{part.offset:#x}", part.size, part))
        return region

    def _update(self, device: PCIDevice) -> None:
        with transaction():
            for index, region in self._regions[device].items():
                self._place(device, index, region)

    def _place(self, device: PCIDevice, index: int, region: MemoryRegion) -> None:
        window = self._io if device.bar_spec(index).is_io else self._memory
        where = device.bar_range(index, allow_zero=self._allow_zero)
        if window is None or where is None or not 0 <= where.start - window.base < window.region.size:
            if region.parent is not None:
                region.parent.del_subregion(region)
        elif region.parent is not None:
            region.set_offset(where.start - window.base)
        else:
            window.region.add_subregion(where.start - window.base, region, priority=1)
