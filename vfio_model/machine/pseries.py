"""The pseries machine: memory, PHBs, hypercalls and RTAS, without a CPU.

What a CPU would do comes in through :meth:`PseriesMachine.hcall`, :meth:`~PseriesMachine.rtas`, memory and MMIO;
drivers (:mod:`vfio_model.guest_drivers`), qtest and the control socket are such CPUs. The machine is big-endian.
Facts follow LoPAPR and, where the platform may choose, QEMU's ``-machine pseries``.

Nothing here waits by itself: a hypercall returns when every follower of the table that it changed has answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from vfio_model.clock import VirtualClock
from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.acceleration import Accelerator
from vfio_model.iommu.spapr.ddw import PhbDma
from vfio_model.iommu.spapr.hcalls import HCallHandler, HCallResult, TceHcalls
from vfio_model.iommu.spapr.quirks import PGSZ_AS_GIVEN
from vfio_model.iommu.spapr.regs import DmaOptions
from vfio_model.iommu.spapr.rtas import PARAM_ERROR, DdwRtas, RtasHandler
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.base import Machine
from vfio_model.machine.device_tree import DeviceTree, phb_properties, vio_properties
from vfio_model.machine.eeh_rtas import EehRtas
from vfio_model.machine.msi import MsiNumbers
from vfio_model.machine.msi_rtas import UNCOUNTED, MsiRtas
from vfio_model.machine.pci_rtas import ConfigRtas
from vfio_model.machine.phb import SpaprPhb
from vfio_model.machine.vio import VioBus, VioKind
from vfio_model.memory.access import takes
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.region import MemoryRegion, RAMRegion
from vfio_model.pci.bus import BusOptions
from vfio_model.ranges import U32_MAX, U64_MAX
from vfio_model.trace import NULL_TRACE, Trace

_NO_ARGS = (0, 0, 0, 0)
_RTAS_MAX_CELLS = 16
_REAL_ADDRESS = (1 << 60) - 1


@dataclass(frozen=True, slots=True)
class PseriesOptions:
    """What the machine is made of besides RAM. ``dma`` holds for every PHB that ``per_phb`` (by index) does not
    name.
    """

    phbs: int = 1
    dma: DmaOptions = field(default_factory=DmaOptions)
    per_phb: Mapping[int, DmaOptions] = field(default_factory=dict)
    multi_tce: bool = True
    """Whether ``hcall-multi-tce`` is advertised; without it STUFF and INDIRECT are H_FUNCTION."""


class PseriesMachine(Machine):
    """A machine with ``ram`` (blocks one after another from address 0). It comes up reset.

    :raise ConfigError: for an impossible number of PHBs.
    """

    TYPE = "pseries"
    big_endian = True

    def __init__(
        self,
        ram: Sequence[RAMBlock],
        options: PseriesOptions | None = None,
        *,
        clock: VirtualClock | None = None,
        bus_options: BusOptions | None = None,
        trace: Trace = NULL_TRACE,
    ) -> None:
        super().__init__(ram, _system_root(ram), clock, trace)
        self.options = options or PseriesOptions()
        self._idle = bus_options.idle if bus_options is not None else None
        self.tables: dict[int, SpaprTceTable] = {}
        """TCE tables by LIOBN."""
        self.phbs: dict[int, SpaprPhb] = {}
        """PHBs by BUID."""
        self._dma: dict[int, PhbDma] = {}
        self._msi = MsiNumbers()
        self.vio = VioBus(self.tables, self.system, sum(block.size for block in ram), trace=trace)
        self._accelerator: Accelerator | None = None
        self._tce_hcalls = TceHcalls(self.tables, self.system, multi_tce=self.options.multi_tce, trace=trace)
        self._hcalls: dict[int, HCallHandler] = {
            **self._tce_hcalls.handlers,
            int(regs.HCall.H_RTAS): self._h_rtas,
        }
        self._rtas: dict[int, RtasHandler] = {
            **DdwRtas(self._dma, self.tables, trace=trace).handlers,
            **ConfigRtas(self.phbs).handlers,
            **MsiRtas(self.phbs, trace=trace).handlers,
            **EehRtas(self.phbs).handlers,
            **self.vio.handlers,
        }
        for index in range(self.options.phbs):
            self.add_phb(index)

    # -- building ------------------------------------------------------------------------------------------------

    def add_phb(self, index: int) -> SpaprPhb:
        """Add PHB ``index``, reset.

        :raise ConfigError: when the index is taken or too large.
        """
        if not 0 <= index < regs.MAX_PHBS:
            raise ConfigError(f"PHB index {index}", hint=f"indices go from 0 to {regs.MAX_PHBS - 1}")
        if regs.phb_buid(index) in self.phbs:
            raise ConfigError(f"PHB index {index} is taken")
        phb = SpaprPhb(
            index,
            self._dma_options(index),
            system=self.system,
            irqs=self.irqs,
            clock=self.clock,
            bus=BusOptions(big_endian=True, allow_zero_bars=True, idle=self._idle),
            msi=self._msi,
            trace=self.trace,
        )
        self.phbs[phb.buid], self._dma[phb.buid] = phb, phb.dma
        self.tables.update((table.liobn, table) for table in phb.dma.tables)
        phb.reset()
        self.relocate_tables()
        return phb

    def _dma_options(self, index: int) -> DmaOptions:
        options = self.options.per_phb.get(index, self.options.dma)
        if PGSZ_AS_GIVEN in options.quirks or not self.ram:
            return options
        return replace(options, pgsz=regs.pgsz_over(options.pgsz, min(block.page_size for block in self.ram)))

    def accelerate(self, accelerator: Accelerator) -> None:
        """From now on ``accelerator`` decides which TCE tables live in the kernel, and their hypercalls go there
        first."""
        self._accelerator = accelerator
        self._hcalls.update(self._tce_hcalls.accelerated())
        self.relocate_tables()

    def relocate_tables(self) -> None:
        """Move each TCE table to where the accelerator, if any, wants it now; no entry is lost."""
        if self._accelerator is not None:
            for table in self.tables.values():
                table.accelerator = self._accelerator
                table.relocate()

    def phb(self, index: int = 0) -> SpaprPhb:
        """PHB ``index``.

        :raise KeyError: when there is none.
        """
        return self.phbs[regs.phb_buid(index)]

    def add_vio_table(self, unit: int, window_size: int = regs.VIO_WINDOW_SIZE) -> AddressSpace:
        """The DMA address space of a VIO device of which no more than its window is known, as from a recorded log.

        :raise ConfigError: see :meth:`~vfio_model.machine.vio.VioBus.add`.
        """
        assert window_size, "a table has a window"
        dma = self.vio.add(VioKind("vio", window_size), unit).dma
        self.relocate_tables()
        assert dma is not None, "a kind with a window has a table"
        return dma.address_space

    def reset(self) -> None:
        """Reset every PHB and every VIO device."""
        for phb in self.phbs.values():
            phb.reset()
        self.vio.reset()
        self.irqs.reset()

    def device_tree(self) -> DeviceTree:
        """What the guest is told about DMA, by node: each PHB and each VIO device."""
        phbs: DeviceTree = {f"/{phb.name}": phb_properties(phb.dma) for phb in self.phbs.values()}
        return phbs | {device.node: vio_properties(device) for device in self.vio}

    # -- what a CPU does -----------------------------------------------------------------------------------------

    def hcall(self, nr: int, *args: int) -> HCallResult:
        """Hypercall ``nr``: the signed return code and the output registers. Unknown: H_FUNCTION."""
        handler = self._hcalls.get(nr)
        if handler is None:
            return int(regs.HReturn.H_FUNCTION), []
        return handler(args if len(args) >= len(_NO_ARGS) else args + _NO_ARGS)

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        """RTAS call ``token``: the return cells that are written (unsigned 32 bits), the status first.

        On an error that is the status alone, which is written even where no return cell is offered; a token nobody
        answers is a PARAM_ERROR. Calls that do not look at ``nret`` write all that they have.
        """
        handler = self._rtas.get(token)
        rets = PARAM_ERROR if handler is None else handler(args, nret)
        return [cell & U32_MAX for cell in rets]

    def rtas_in_memory(self, token: int, args: tuple[int, int], rets: tuple[int, int]) -> int:
        """RTAS as firmware calls it: ``args`` and ``rets`` are (number of cells, guest-physical address), big-endian.

        Returns H_SUCCESS, or H_PARAMETER when nobody answers the token. The topmost four bits of an address do not
        matter. Of arguments beyond those that any call takes, only their being there matters; calls that do not look
        at their number (:data:`~vfio_model.machine.msi_rtas.UNCOUNTED`) find what lies behind them.
        """
        (nargs, args_gpa), (nret, rets_gpa) = args, rets
        count = max(min(nargs, _RTAS_MAX_CELLS + 1), UNCOUNTED.get(token, 0))
        values = [self._load_cell(args_gpa + 4 * n & _REAL_ADDRESS) for n in range(count)]
        for n, cell in enumerate(self.rtas(token, values, nret)):
            self._store_cell(rets_gpa + 4 * n & _REAL_ADDRESS, cell)
        known = token in self._rtas
        return int(regs.HReturn.H_SUCCESS if known else regs.HReturn.H_PARAMETER)

    def _h_rtas(self, args: Sequence[int]) -> HCallResult:
        """``address`` of token, nargs, nret, arguments and return cells in guest memory."""
        base = args[0] & _REAL_ADDRESS
        token, nargs, nret = (self._load_cell(base + at) for at in (0, 4, 8))
        return self.rtas_in_memory(token, (nargs, base + 12), (nret, base + 12 + (nargs * 4 & U32_MAX))), []

    def _load_cell(self, gpa: int) -> int:
        """A cell is loaded in one access; what cannot be is 0."""
        return self.mmio_read(gpa, 4) if takes(self.system.view, gpa, 4) else 0

    def _store_cell(self, gpa: int, cell: int) -> None:
        """And stored in one, or not at all."""
        if takes(self.system.view, gpa, 4):
            self.mmio_write(gpa, 4, cell)

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        """What the window of ``liobn`` makes of bus address ``ioba``: (page address, permission bits, address mask).

        Outside the window, or without a table, (0, 0, all ones).
        """
        table = self.tables.get(liobn)
        if table is None or table.iommu is None or ioba < table.bus_offset:
            return 0, 0, U64_MAX
        entry = table.translate(ioba - table.bus_offset)
        return entry.translated_addr, int(entry.perm), entry.addr_mask


def _system_root(ram: Iterable[RAMBlock]) -> MemoryRegion:
    root = MemoryRegion("system", 1 << 64)
    gpa = 0
    for block in ram:
        root.add_subregion(gpa, RAMRegion(block.name, block))
        gpa += block.size
    return root
