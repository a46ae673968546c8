"""VIO devices as their DMA sees them: a unit address, and for most kinds a TCE window or the bypass of it (LoPAPR
"Virtual I/O"; QEMU's ``spapr-vio-bridge``).

The unit address is the device's LIOBN as well. Its address space holds two regions over each other: the bypass, an
alias of the machine's RAM (priority 1), and the TCE root (priority 2). Exactly one of them is enabled, and they change
places in one commit, so that nobody ever sees a device with both or with none. Entries survive a bypass; a reset zeroes
them and ends the bypass.

What a VIO device does with its DMA (queues, signals) is not modelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.rtas import PARAM_ERROR, RtasHandler
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.region import AliasRegion, MemoryRegion, transaction
from vfio_model.ranges import U32_MAX
from vfio_model.trace import NULL_TRACE, Trace


@dataclass(frozen=True, slots=True)
class VioKind:
    """A kind of VIO device: its name in the device tree, and its window in bytes (0: it does no DMA, has no table)."""

    node: str
    window_size: int = regs.VIO_WINDOW_SIZE


KINDS: Mapping[str, VioKind] = {
    "llan": VioKind("l-lan"),
    "vscsi": VioKind("v-scsi"),
    "tpm": VioKind("vtpm"),
    "vty": VioKind("vty", 0),
}
"""By the names that QEMU's ``spapr-*`` devices and the PAPR go by."""


class VioDma:
    """The two ways of a device's DMA: through the TCE table ``unit``, or around it into the ``ram_size`` bytes of RAM
    at the bottom of ``system``. Starts with the table.
    """

    def __init__(
        self, unit: int, window_size: int, *, system: AddressSpace, ram_size: int, trace: Trace = NULL_TRACE
    ) -> None:
        assert system.root is not None, "a machine's memory lives as long as its devices"
        self.table = SpaprTceTable(unit, system, trace=trace)
        self.table.enable(regs.TCE_PAGE_SHIFT, 0, window_size >> regs.TCE_PAGE_SHIFT)
        self._around = AliasRegion(f"vio-bypass-{unit:x}", system.root, 0, ram_size)
        self._around.set_enabled(False)
        root = MemoryRegion(f"vio-{unit:x}", 1 << 64)
        root.add_subregion(0, self._around, 1)
        root.add_subregion(0, self.table.root, 2)
        self.address_space = AddressSpace(root.name, root)

    @property
    def bypass(self) -> bool:
        """Whether DMA goes around the table."""
        return self._around.enabled

    def set_bypass(self, bypass: bool) -> None:
        """Go around the table, or through it again."""
        with transaction():
            self._around.set_enabled(bypass)
            self.table.root.set_enabled(not bypass)

    def reset(self) -> None:
        """An empty table, and no way around it."""
        self.table.reset()
        self.set_bypass(False)


@dataclass(frozen=True, slots=True)
class VioDevice:
    """A device at ``unit``; ``dma`` is None for a kind without a table."""

    unit: int
    kind: VioKind
    dma: VioDma | None

    @property
    def node(self) -> str:
        """Its path in the device tree."""
        return f"/vdevice/{self.kind.node}@{self.unit:x}"


class VioBus:
    """The devices by unit address, and the RTAS call about them. Tables are entered into ``tables`` too."""

    def __init__(
        self, tables: dict[int, SpaprTceTable], system: AddressSpace, ram_size: int, *, trace: Trace = NULL_TRACE
    ) -> None:
        self._tables, self._system, self._ram_size, self._trace = tables, system, ram_size, trace
        self.devices: dict[int, VioDevice] = {}
        self._next_unit = regs.VIO_UNIT_BASE
        self.handlers: dict[int, RtasHandler] = {int(regs.RtasToken.SET_TCE_BYPASS): self.set_tce_bypass}

    def __iter__(self) -> Iterator[VioDevice]:
        return iter(self.devices.values())

    def add(self, kind: VioKind, unit: int | None = None) -> VioDevice:
        """Add a device, at the next free unit address from :data:`~vfio_model.iommu.spapr.regs.VIO_UNIT_BASE` on when
        ``unit`` is None. A ``unit`` given may lie below that, as those of old machine descriptions do.

        :raise ConfigError: when the unit is taken, or is a LIOBN of PCI or no 32-bit number.
        """
        unit = self._free_unit() if unit is None else unit
        if not 0 <= unit <= U32_MAX or regs.is_pci_liobn(unit):
            raise ConfigError(f"VIO unit {unit:#x}", hint="units have 31 bits; with bit 31 a LIOBN belongs to PCI")
        if unit in self.devices or unit in self._tables:
            raise ConfigError(f"VIO unit {unit:#x} is taken")
        dma = None
        if kind.window_size:
            dma = VioDma(unit, kind.window_size, system=self._system, ram_size=self._ram_size, trace=self._trace)
            self._tables[unit] = dma.table
        device = self.devices[unit] = VioDevice(unit, kind, dma)
        return device

    def _free_unit(self) -> int:
        while self._next_unit in self.devices:
            self._next_unit += 1
        return self._next_unit

    def reset(self) -> None:
        """Reset every device."""
        for device in self:
            if device.dma is not None:
                device.dma.reset()

    def set_tce_bypass(self, args: Sequence[int], nret: int) -> list[int]:
        """ibm,set-tce-bypass: unit, enable (any but 0). How many return cells are offered does not matter.

        A unit without a table is as unknown as one without a device; a LIOBN of PCI is no unit.
        """
        device = self.devices.get(args[0]) if len(args) == 2 else None
        if device is None or device.dma is None:
            return PARAM_ERROR
        device.dma.set_bypass(bool(args[1]))
        return [int(regs.RtasStatus.SUCCESS)]
