"""A recorded pseries guest: its hypercalls and RTAS calls again, on a machine in this process."""

from __future__ import annotations

from collections.abc import Sequence

from deploy.check_report import CheckOptions, CheckReport
from deploy.sparse_ram import sparse_ram
from vfio_model.errors import ConfigError
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.trace_events import PutTceIndirect, TraceEvent
from vfio_model.guest_drivers.trace_options import infer_options
from vfio_model.guest_drivers.trace_replay import Replayer
from vfio_model.iommu.spapr import regs
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.ram import RAMBlock
from vfio_model.ranges import Hva, align_up

DEFAULT_RAM = 1 << 30
RAM_STEP = 1 << 28
RAM_LIMIT = 1 << 42
MAX_VIO_DEVICES = 256
_HVA = Hva(0x7F00_0000_0000)


def replay(events: Sequence[tuple[int, TraceEvent]], options: CheckOptions, report: CheckReport) -> None:
    """Replay ``events`` (with their line numbers) and put what became of them into ``report``."""
    inferred, notes = infer_options((event for _, event in events), options.dma)
    report.notes += notes
    ram_size = _ram_size(events, options, report)
    default = options.dma.over(regs.DmaOptions())
    machine = PseriesMachine(
        [RAMBlock("ram", sparse_ram(ram_size), page_size=1 << 16, hva=_HVA)],
        PseriesOptions(phbs=max(options.phbs, 1), dma=default, per_phb=inferred),
    )
    replayer = Replayer(
        DirectCpu(machine),
        options=lambda index: inferred.get(index, default),
        provide=lambda liobn: _provide(machine, liobn),
    )
    for line, event in events:
        replayer.feed(line, event)
    report.take_over(replayer.finish())


def _ram_size(events: Sequence[tuple[int, TraceEvent]], options: CheckOptions, report: CheckReport) -> int:
    """RAM that holds every TCE list of the log."""
    size = options.ram_size or DEFAULT_RAM
    lists = [event.tce_list for _, event in events if isinstance(event, PutTceIndirect)]
    needed = max((last + regs.INDIRECT_LIST_ALIGN for last in lists if last < RAM_LIMIT), default=0)
    if needed > size:
        size = align_up(needed, RAM_STEP)
        report.notes.append(f"ram_size={size:#x}, from the log: a TCE list lies at {needed - 4096:#x}")
    return size


def _provide(machine: PseriesMachine, liobn: int) -> bool:
    """Give ``machine`` the PHB or VIO table that the log speaks of."""
    if liobn in machine.tables:
        return True
    try:
        if regs.is_pci_liobn(liobn):
            machine.add_phb(regs.liobn_phb(liobn))
        elif sum(not regs.is_pci_liobn(known) for known in machine.tables) < MAX_VIO_DEVICES:
            machine.add_vio_table(liobn)
    except ConfigError:
        return False
    return liobn in machine.tables
