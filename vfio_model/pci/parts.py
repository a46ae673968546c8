"""Parts of a BAR that are not the device class's to answer: memory that its user may map, MSI-X structures.

A part is the ops of an I/O region (:class:`~vfio_model.memory.region.RegionOps`, addresses from the part's start) that
knows where in the BAR it lies. Whoever carries accesses to a device puts them to the part first: the guest's bus as
subregions, a device process through :meth:`~vfio_model.pci.device.PCIDevice.region_read`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from vfio_model.errors import ConfigError, VMStateError
from vfio_model.memory.region import RegionOps
from vfio_model.memory.types import MemTxResult
from vfio_model.pci.bar import BarSpec
from vfio_model.pci.msix import MsixCapability, MsixPendingBits, MsixTable
from vfio_model.vmstate.fields import Field as StateField
from vfio_model.vmstate.fields import State, Type, VMStateDescription


class BarPart(RegionOps, Protocol):
    """``size`` bytes from ``offset`` of a BAR."""

    @property
    def offset(self) -> int:
        """Bytes from the BAR's start."""

    @property
    def size(self) -> int:
        """Bytes."""


class MemoryPart:
    """Bytes that are just there: what a client maps, and what an access by message finds."""

    min_access_size, max_access_size = 1, 8

    def __init__(self, offset: int, view: memoryview) -> None:
        self.offset, self.size, self._view = offset, len(view), view

    def read(self, addr: int, size: int) -> int | None:
        """See ``RegionOps``; little-endian."""
        return int.from_bytes(self._view[addr : addr + size], "little")

    def write(self, addr: int, size: int, value: int) -> MemTxResult:
        """See ``RegionOps``."""
        self._view[addr : addr + size] = value.to_bytes(size, "little")
        return MemTxResult.OK


STATE = StateField(
    "bar_memory",
    struct=VMStateDescription("PCIBARMemory", 1, (StateField("size"), StateField("bytes", Type.U8, array="size"))),
)
"""A field for the description of a device with mmap areas: their bytes, one after another."""


@runtime_checkable
class MemoryHost(Protocol):
    """A ``DeviceHost`` that can share a BAR's memory with the device's user."""

    def bar_memory(self, index: int, size: int) -> memoryview:
        """``size`` writable bytes, zero, for BAR ``index``; the same bytes each time."""


class BarParts:
    """The parts of one device's ``bars``."""

    def __init__(
        self,
        bars: tuple[BarSpec, ...],
        host: object,
        msix: MsixCapability | None,
        more: Mapping[int, Sequence[BarPart]] = {},
    ) -> None:
        """``more``: parts of the caller's own making, by the BAR's index.

        :raise ConfigError: parts overlap, or do not lie in memory BARs.
        """
        self.memory = {bar.index: _memory(host, bar) for bar in bars if bar.mmap}
        """The bytes of each BAR that has mmap areas, by its index."""
        self._areas = [self.memory[bar.index][at : at + size] for bar in bars for at, size in bar.mmap]
        if msix is not None:
            memory = {bar.index for bar in bars if not bar.is_io}
            for index in (msix.spec.bar, msix.spec.pending_bar):
                if index not in memory:
                    raise ConfigError(f"MSI-X structures in BAR {index}, which is no memory BAR of the device")
        self._parts = {bar.index: self._of(bar, msix, more.get(bar.index, ())) for bar in bars}

    def _of(self, bar: BarSpec, msix: MsixCapability | None, more: Sequence[BarPart]) -> tuple[BarPart, ...]:
        parts: list[BarPart] = [*more]
        parts += [MemoryPart(at, self.memory[bar.index][at : at + size]) for at, size in bar.mmap]
        if msix is not None and msix.spec.bar == bar.index:
            parts.append(MsixTable(msix))
        if msix is not None and msix.spec.pending_bar == bar.index:
            parts.append(MsixPendingBits(msix))
        return in_order(bar, parts)

    def of(self, index: int) -> tuple[BarPart, ...]:
        """Those of BAR ``index``, by offset."""
        return self._parts.get(index, ())

    def export_state(self) -> State:
        """What :data:`STATE` describes."""
        memory = b"".join(self._areas)
        return {"size": len(memory), "bytes": memory}

    def check_state(self, state: Mapping[str, Any], *, where: str) -> None:
        """:raise VMStateError: when ``state`` is of other areas."""
        size = sum(map(len, self._areas))
        if state["size"] != size:
            raise VMStateError(f"{state['size']} bytes of BAR memory, not {size}", where=where)

    def import_state(self, state: Mapping[str, Any]) -> None:
        """Take a checked ``state``."""
        at = 0
        for area in self._areas:
            area[:] = state["bytes"][at : at + len(area)]
            at += len(area)


def in_order(bar: BarSpec, parts: list[BarPart]) -> tuple[BarPart, ...]:
    """``parts`` by offset.

    :raise ConfigError: they do not lie inside ``bar``, and apart.
    """
    parts.sort(key=lambda part: part.offset)
    end, where = 0, f"BAR {bar.index}"
    for part in parts:
        if part.offset < end:
            raise ConfigError(f"mmap areas, MSI-X table or pending bits overlap at {part.offset:#x}", where=where)
        end = part.offset + part.size
    if end > bar.size:
        raise ConfigError(f"it has {bar.size:#x} bytes, and MSI-X structures that end at {end:#x}", where=where)
    return tuple(parts)


def _memory(host: object, bar: BarSpec) -> memoryview:
    if isinstance(host, MemoryHost):
        return host.bar_memory(bar.index, bar.size)
    return memoryview(bytearray(bar.size))
