"""A pseries machine for tests: 64 MiB of RAM, a trace, and followers of its TCE tables that remember."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.acceleration import accelerated
from vfio_model.iommu.spapr import regs
from vfio_model.iommu.spapr.regs import DmaOptions, HCall
from vfio_model.iommu.spapr.tce import SpaprTceTable
from vfio_model.machine.pseries import PseriesMachine, PseriesOptions
from vfio_model.memory.iommu_region import IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.ram import RAMBlock
from vfio_model.memory.types import IOMMUNotifierFlag
from vfio_model.ranges import Hva
from vfio_model.trace import ListTrace

RAM_SIZE = 64 << 20
LIOBN = regs.pci_liobn(0, 0)
LIOBN64 = regs.pci_liobn(0, 1)
PE = [0, regs.BUID_BASE >> 32, regs.BUID_BASE & 0xFFFFFFFF]
LIST = 0x10000


def pseries(*, dma: DmaOptions | None = None, phbs: int = 1, multi_tce: bool = True) -> PseriesMachine:
    """A machine whose :attr:`trace` is a :class:`ListTrace`."""
    ram = RAMBlock("ram", bytearray(RAM_SIZE), page_size=1 << 16, hva=Hva(0x7F00_0000_0000))
    options = PseriesOptions(phbs=phbs, dma=dma or DmaOptions(), multi_tce=multi_tce)
    return accelerated(PseriesMachine([ram], options, trace=ListTrace()), [ram])


def put_list(machine: PseriesMachine, tces: list[int], gpa: int = LIST) -> None:
    """Store a TCE list as a guest does: big-endian."""
    machine.write_memory(gpa, b"".join(tce.to_bytes(8, "big") for tce in tces))


def tce(machine: PseriesMachine, ioba: int, liobn: int = LIOBN) -> int | None:
    """The TCE as the guest reads it; None on an error."""
    ret, outs = machine.hcall(HCall.H_GET_TCE, liobn, ioba)
    return outs[0] if ret == 0 else None


@dataclass
class Follower:
    """Shadows a table as VFIO does; ``fail`` (errors, one per flush) makes it refuse."""

    table: SpaprTceTable
    by_run: bool = True
    shadow: dict[int, tuple[int, int]] = field(default_factory=dict)
    """iova (relative to the region) -> (translated, perm)."""
    calls: int = 0
    flushes: int = 0
    fail: list[OSError | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        region = self.table.iommu
        assert region is not None
        self.notifier = IOMMUNotifier(
            self._one,
            IOMMUNotifierFlag.IOTLB_EVENTS,
            0,
            region.size - 1,
            fn_run=self._run if self.by_run else None,
            flush=self._flush,
        )
        region.register_notifier(self.notifier)

    def _one(self, notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        self.calls += 1
        self._apply(entry)

    def _run(self, notifier: IOMMUNotifier, run: IOMMUTLBRun) -> None:
        self.calls += 1
        for event in run.events():
            self._apply(event.entry)

    def _apply(self, entry: IOMMUTLBEntry) -> None:
        if entry.perm:
            self.shadow[entry.iova] = entry.translated_addr, int(entry.perm)
        else:
            self.shadow.pop(entry.iova, None)

    def _flush(self) -> OSError | None:
        self.flushes += 1
        return self.fail.pop(0) if self.fail else None

    def expected(self) -> dict[int, tuple[int, int]]:
        """What the shadow must be."""
        shift = self.table.page_shift
        return {
            i << shift: (value & -(1 << shift), value & 3) for i, value in enumerate(self.table.entries) if value & 3
        }
