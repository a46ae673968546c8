"""What an opened PCI device says about itself: configuration space, BARs, capabilities, memory that can be mapped."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Final, Protocol, runtime_checkable

from vfio_model.errors import ConfigError
from vfio_model.pci.bar import BARS, BarSpec, BarType
from vfio_model.pci.config_space import (
    CAPABILITY_POINTER,
    CLASS_DEVICE,
    CONFIG_SIZE,
    DEVICE_ID,
    EXTENDED_CONFIG_SIZE,
    EXTENDED_NEXT_SHIFT,
    FIRST_CAPABILITY,
    FIRST_EXTENDED,
    STATUS,
    STATUS_CAP_LIST,
    SUBSYSTEM_ID,
    VENDOR_ID,
)
from vfio_model.pci.msi import CAP_ID_MSI, CONTROL_LAYOUT, CONTROL_MULTIPLE_CAPABLE_SHIFT
from vfio_model.pci.msix import BIR_MASK, CAP_ID_MSIX, CONTROL_SIZE_MASK, MsixSpec
from vfio_model.pci.translation_caps import (
    ATS_PAGE_ALIGNED,
    CAP_ID_ATS,
    CAP_ID_PASID,
    CAP_ID_PRI,
    MAX_PASID_WIDTH,
    PASID_EXEC,
    PASID_PRIV,
    PASID_WIDTH_SHIFT,
    PRI_PASID_REQUIRED,
    AtsSpec,
    PasidSpec,
    PriSpec,
)
from vfio_model.uapi.vfio import PciRegion
from vfio_model.vfio.region import DeviceConnection

_CONFIG: Final = int(PciRegion.VFIO_PCI_CONFIG_REGION_INDEX)
_IDENTITY: Final = (
    ("vendor", VENDOR_ID),
    ("device", DEVICE_ID),
    ("class", CLASS_DEVICE),
    ("subsystem", SUBSYSTEM_ID),
)
_MAX_CAPABILITIES: Final = 48
"""More than fit into configuration space: where a list with a loop ends."""
_MAX_EXTENDED: Final = 128
"""More than a device has."""


@runtime_checkable
class MappedRegions(Protocol):
    """A ``DeviceConnection`` that has mapped memory of the device's regions."""

    def region_memory(self, index: int) -> list[tuple[int, memoryview]]:
        """(offset, bytes) of each area of region ``index`` that is mapped, ascending and apart."""

    def region_vanished(self, index: int) -> bool:
        """Whether an access found that some of that memory is not the device's any more: its file was cut."""


@runtime_checkable
class RungRegions(Protocol):
    """A ``DeviceConnection`` that can ring for a write, where the device says so."""

    def region_doorbells(self, index: int, size: int) -> None:
        """Ask which writes to region ``index``, of ``size`` bytes, are signals: they are rung from then on.

        :raise PeerLost: the device is gone.
        """


class DeviceFacts:
    """Read once, when a device was opened."""

    def __init__(self, connection: DeviceConnection) -> None:
        """:raise OSError: when the device is not one that can be shown as a PCI function (a broken BAR, an MSI-X table
        that lies outside its BAR)."""
        self._raw = b"".join(connection.region_read(_CONFIG, offset, 64) for offset in range(0, CONFIG_SIZE, 64))
        size = connection.get_region_info(_CONFIG).size
        self.config_size = EXTENDED_CONFIG_SIZE if size >= EXTENDED_CONFIG_SIZE else CONFIG_SIZE
        """Bytes of configuration space."""
        self.bars = tuple(self._bars(connection))
        self.capabilities = dict(self._capabilities())
        """The offset of the first of each kind, by its id."""
        self.extended = dict(self._extended(connection)) if self.config_size > CONFIG_SIZE else {}
        """Offset, and the capability register behind the header, of the first of each kind of extended ones."""

    def difference(self, other: DeviceFacts) -> str:
        """What of ``other`` a guest would take for another device; empty when nothing."""
        for name, offset in _IDENTITY:
            if self.word(offset) != other.word(offset):
                return f"{name} {other.word(offset):#06x}, not {self.word(offset):#06x}"
        for what, mine, its in (
            ("BARs", self.bars, other.bars),
            ("capabilities", self.capabilities, other.capabilities),
            ("extended capabilities", self._services, other._services),
            ("messages", self._messages, other._messages),
        ):
            if mine != its:
                return f"{what} {its}, not {mine}"
        return ""

    @property
    def _services(self) -> tuple[object, ...]:
        return self.config_size, {kind: at for kind, (at, _) in self.extended.items()}, self.ats, self.pasid

    @property
    def _messages(self) -> tuple[object, ...]:
        return self.msi_vectors, self.msi_layout if self.msi_vectors else None, self.msix

    def word(self, offset: int) -> int:
        """The 16-bit register at ``offset``."""
        return int.from_bytes(self._raw[offset : offset + 2], "little")

    def dword(self, offset: int) -> int:
        """The 32-bit register at ``offset``."""
        return int.from_bytes(self._raw[offset : offset + 4], "little")

    def byte(self, offset: int) -> int:
        """The 8-bit register at ``offset``."""
        return self._raw[offset]

    def _bars(self, connection: DeviceConnection) -> Iterator[BarSpec]:
        index = 0
        while index < BARS:
            size = connection.get_region_info(index).size
            low = self._raw[0x10 + 4 * index]
            kind = BarType.IO if low & 1 else BarType.MEM64 if low & 6 == 4 else BarType.MEM32
            if size:
                try:
                    yield BarSpec(index, size, kind, bool(low & 8) and kind is not BarType.IO)
                except ConfigError as error:
                    raise OSError(errno.EINVAL, f"BAR {index} of {size} bytes: {error}") from error
            index += 2 if kind is BarType.MEM64 and size else 1

    def _capabilities(self) -> Iterator[tuple[int, int]]:
        seen: set[int] = set()
        at = self._raw[CAPABILITY_POINTER] & 0xFC if self.word(STATUS) & STATUS_CAP_LIST else 0
        for _ in range(_MAX_CAPABILITIES):
            if at < FIRST_CAPABILITY:
                return
            kind = self._raw[at]
            if kind not in seen:
                seen.add(kind)
                yield kind, at
            at = self._raw[at + 1] & 0xFC

    def _extended(self, connection: DeviceConnection) -> Iterator[tuple[int, tuple[int, int]]]:
        seen: set[int] = set()
        at = FIRST_EXTENDED
        for _ in range(_MAX_EXTENDED):
            if at < FIRST_EXTENDED or at > EXTENDED_CONFIG_SIZE - 8:
                return
            header = int.from_bytes(connection.region_read(_CONFIG, at, 8), "little")
            kind = header & 0xFFFF
            if not header & 0xFFFF_FFFF:
                return
            if kind not in seen:
                seen.add(kind)
                yield kind, (at, header >> 32)
            at = header >> EXTENDED_NEXT_SHIFT & 0xFFC

    @property
    def ats(self) -> AtsSpec | None:
        """How the function caches translations; None: it does not."""
        word = self._extended_word(CAP_ID_ATS)
        return None if word is None else AtsSpec(word & 31 or 32, bool(word & ATS_PAGE_ALIGNED))

    @property
    def pri(self) -> PriSpec | None:
        """How it asks for pages; None: it does not. How many at a time is the device's to say."""
        word = self._extended_word(CAP_ID_PRI)
        return None if word is None else PriSpec(pasid_required=bool(word >> 16 & PRI_PASID_REQUIRED))

    @property
    def pasid(self) -> PasidSpec | None:
        """Which PASIDs it has; None: none."""
        word = self._extended_word(CAP_ID_PASID)
        if word is None:
            return None
        width = min(max(word >> PASID_WIDTH_SHIFT & 0x1F, 1), MAX_PASID_WIDTH)
        return PasidSpec(width, bool(word & PASID_EXEC), bool(word & PASID_PRIV))

    def _extended_word(self, kind: int) -> int | None:
        found = self.extended.get(kind)
        return None if found is None else found[1]

    def place(self, kind: int) -> tuple[int, int]:
        """Where the capability ``kind`` lies, and where the next one in the list."""
        at = self.capabilities[kind]
        return at, self._raw[at + 1]

    @property
    def msi_vectors(self) -> int:
        """How many messages the MSI capability offers; 0 without one."""
        at = self.capabilities.get(CAP_ID_MSI)
        return 0 if at is None else 1 << min(self.word(at + 2) >> CONTROL_MULTIPLE_CAPABLE_SHIFT & 7, 5)

    @property
    def msi_layout(self) -> int:
        """Which layout the MSI capability has."""
        return self.word(self.capabilities[CAP_ID_MSI] + 2) & CONTROL_LAYOUT

    @property
    def msix(self) -> MsixSpec | None:
        """The MSI-X structures; None without the capability.

        :raise OSError: EINVAL when they do not lie in memory BARs, or overlap.
        """
        at = self.capabilities.get(CAP_ID_MSIX)
        if at is None:
            return None
        table, pending = self.dword(at + 4), self.dword(at + 8)
        offsets = table & ~BIR_MASK, pending & ~BIR_MASK
        spec = MsixSpec((self.word(at + 2) & CONTROL_SIZE_MASK) + 1, table & BIR_MASK, *offsets, pending & BIR_MASK)
        sizes = {bar.index: bar.size for bar in self.bars if not bar.is_io}
        ends = spec.table_offset + spec.table_size, spec.pba_offset + spec.pba_size
        overlap = spec.bar == spec.pba_bar and spec.table_offset < ends[1] and spec.pba_offset < ends[0]
        if overlap or ends[0] > sizes.get(spec.bar, 0) or ends[1] > sizes.get(spec.pending_bar, 0):
            raise OSError(errno.EINVAL, f"MSI-X table {table:#x}, pending bits {pending:#x}: not apart in memory BARs")
        return spec
