"""A device model as a vfio-user server shows it: information, regions, reset.

Region indices are vfio-pci's; a BAR is little-endian; configuration space is region 7. Accesses of other sizes than a
register has are split into aligned ones. A BAR with mmap areas comes with the memfd behind them and a capability that
says which they are; neither goes with a reply that has no room for both.

Source: QEMU ``docs/interop/vfio-user.rst`` and ``include/uapi/linux/vfio.h`` ("VFIO_DEVICE_GET_REGION_INFO").
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Sequence

from hostd.device_irqs import DeviceIrqs
from hostd.device_surroundings import ProcessSurroundings
from protocols.vfio_user import messages as wire
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.device import PCIDevice
from vfio_model.uapi.vfio import (
    VFIO_PCI_NUM_IRQS,
    VFIO_PCI_NUM_REGIONS,
    DeviceFlags,
    PciRegion,
    RegionFlags,
)

_CONFIG = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_RW = int(RegionFlags.VFIO_REGION_INFO_FLAG_READ | RegionFlags.VFIO_REGION_INFO_FLAG_WRITE)
_MMAP = int(RegionFlags.VFIO_REGION_INFO_FLAG_MMAP)
_CAPS = int(RegionFlags.VFIO_REGION_INFO_FLAG_CAPS)
_SPARSE_MMAP = 1
"""``VFIO_REGION_INFO_CAP_SPARSE_MMAP``."""
_SPARSE_HEAD = struct.Struct("=HHIII")
"""``struct vfio_region_info_cap_sparse_mmap`` without its areas: id, version, next, nr_areas, reserved."""
_AREA = struct.Struct("=QQ")


class DeviceRegions:
    """``device`` behind region and interrupt numbers. Errors are ``OSError`` with the errno of the reply."""

    def __init__(self, device: PCIDevice, around: ProcessSurroundings) -> None:
        self.device, self._around = device, around
        self._bars = {bar.index: bar for bar in device.BARS}
        self._simple = {bar.index: (*bar.access, bar.size) for bar in device.BARS if not device.bar_parts(bar.index)}
        """Sizes of accesses, and of the BAR, where nobody but the device class answers."""
        self._irqs = DeviceIrqs(device, around)
        self.set_irqs, self.set_events = self._irqs.set, self._irqs.set_events
        self.irq_info, self.drop_irqs = self._irqs.info, self._irqs.drop
        self.accesses = 0
        """Region accesses served."""

    # -- information -------------------------------------------------------------------------------------------------

    def info(self) -> wire.DeviceInfo:
        """DEVICE_GET_INFO."""
        flags = int(DeviceFlags.VFIO_DEVICE_FLAGS_RESET | DeviceFlags.VFIO_DEVICE_FLAGS_PCI)
        return wire.DeviceInfo(16, flags, VFIO_PCI_NUM_REGIONS, VFIO_PCI_NUM_IRQS)

    def region_info(self, index: int, argsz: int = wire.RegionInfo.SIZE) -> tuple[wire.RegionInfo, tuple[int, ...]]:
        """DEVICE_GET_REGION_INFO: the answer, and the descriptor to map it by. A client whose ``argsz`` is too small
        gets neither that nor the capabilities, but the size that they need; the flag for capabilities goes with them,
        because QEMU takes it for a broken answer without them.

        :raise OSError: EINVAL when there is no such index.
        """
        if index >= VFIO_PCI_NUM_REGIONS:
            raise OSError(errno.EINVAL, f"region {index}")
        bar = self._bars.get(index)
        size = self.device.config.size if index == _CONFIG else bar.size if bar is not None else 0
        fd = self._around.bar_fd(index)
        if bar is None or fd is None:
            return wire.RegionInfo(wire.RegionInfo.SIZE, _RW if size else 0, index, 0, size, 0), ()
        caps = _sparse_mmap(bar)
        full = wire.RegionInfo.SIZE + len(caps)
        if argsz < full:
            return wire.RegionInfo(full, _RW | _MMAP, index, 0, size, 0), ()
        return wire.RegionInfo(full, _RW | _MMAP | _CAPS, index, wire.RegionInfo.SIZE, size, 0, caps), (fd,)

    # -- regions -----------------------------------------------------------------------------------------------------

    def read(self, index: int, offset: int, count: int) -> bytes:
        """REGION_READ. :raise OSError: EINVAL outside a region or for a size that no register has; EIO from the
        device."""
        self.accesses += 1
        if self._is_one(index, offset, count):
            value = self.device.bar_read(index, offset, count)
            if value is None:
                raise OSError(errno.EIO, f"BAR {index}+{offset:#x}")
            return (value & (1 << count * 8) - 1).to_bytes(count, "little")
        if index == _CONFIG:
            pieces = _pieces(offset, count, 1, 4, self.device.config.size)
            return b"".join(self.device.config_read(at, size).to_bytes(size, "little") for at, size in pieces)
        memory = self._memory(index, offset, count)
        if memory is not None:
            return bytes(memory)
        data, read = bytearray(), self.device.region_read
        for at, size in self._bar_pieces(index, offset, count):
            value = read(index, at, size)
            if value is None:
                raise OSError(errno.EIO, f"BAR {index}+{at:#x}")
            data += (value & (1 << size * 8) - 1).to_bytes(size, "little")
        return bytes(data)

    def write(self, index: int, offset: int, data: bytes) -> None:
        """REGION_WRITE. :raise OSError: as :meth:`read`."""
        self.accesses += 1
        if self._is_one(index, offset, len(data)):
            if self.device.bar_write(index, offset, len(data), int.from_bytes(data, "little")) is not MemTxResult.OK:
                raise OSError(errno.EIO, f"BAR {index}+{offset:#x}")
            return
        if index == _CONFIG:
            for at, size in _pieces(offset, len(data), 1, 4, self.device.config.size):
                self.device.config_write(at, size, int.from_bytes(data[at - offset : at - offset + size], "little"))
            return
        memory = self._memory(index, offset, len(data))
        if memory is not None:
            memory[:] = data
            return
        for at, size in self._bar_pieces(index, offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + size], "little")
            if self.device.region_write(index, at, size, value) is not MemTxResult.OK:
                raise OSError(errno.EIO, f"BAR {index}+{at:#x}")

    def _is_one(self, index: int, offset: int, count: int) -> bool:
        """Whether this is one access of a register, and the device class's to answer."""
        simple = self._simple.get(index)
        if simple is None or not simple[0] <= count <= simple[1] or offset + count > simple[2]:
            return False
        return not (count & (count - 1) or offset & (count - 1))

    def _memory(self, index: int, offset: int, count: int) -> memoryview | None:
        """The bytes themselves, where all of them lie in one mmap area."""
        bar = self._bars.get(index)
        if bar is not None and bar.mmap and count:
            for start, size in bar.mmap:
                if start <= offset and offset + count <= start + size:
                    return self.device.bar_memory(index)[offset : offset + count]
        return None

    def _bar_pieces(self, index: int, offset: int, count: int) -> Sequence[tuple[int, int]]:
        """(offset, size) of the accesses that ``count`` bytes are made of, whoever answers each."""
        bar = self._bars.get(index)
        if bar is None or not 0 < count <= bar.size - offset:
            raise OSError(errno.EINVAL, f"{count} bytes at {offset:#x} of region {index}")
        access, stop = self.device.region_access, offset + count
        smallest, largest, end = access(index, offset)
        if smallest <= count <= largest and stop <= end and not (count & (count - 1) or offset % count):
            return ((offset, count),)
        pieces: list[tuple[int, int]] = []
        at = offset
        while at < stop:
            smallest, largest, end = access(index, at)
            pieces += _pieces(at, min(stop, end) - at, smallest, largest, end)
            at = min(stop, end)
        return pieces

    def reset(self) -> None:
        """DEVICE_RESET: the device as after power-on; where its interrupts go is the client's and stays."""
        self.device.reset()
        self.device.config.forget()


def _sparse_mmap(bar: BarSpec) -> bytes:
    head = _SPARSE_HEAD.pack(_SPARSE_MMAP, 1, 0, len(bar.mmap), 0)
    return head + b"".join(_AREA.pack(offset, size) for offset, size in bar.mmap)


def _pieces(offset: int, count: int, smallest: int, largest: int, end: int) -> list[tuple[int, int]]:
    """(offset, size) of the register accesses that make up ``count`` bytes at ``offset``: aligned powers of two.

    :raise OSError: EINVAL, before the first one, when they do not fit.
    """
    if count == 0 or offset + count > end or offset % smallest or count % smallest:
        raise OSError(errno.EINVAL, f"an access of {count} bytes at {offset:#x}")
    pieces, at, stop = [], offset, offset + count
    while at < stop:
        size = largest
        while at % size or at + size > stop:
            size //= 2
        pieces.append((at, size))
        at += size
    return pieces
