"""The guest IOMMUs that :mod:`tests.conformance.test_viommu` runs over, each driven by its guest's own means.

To add one: subclass :class:`GuestIommu` and name it in :data:`GUEST_IOMMUS`.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.guest_drivers.vtd_rig import EDU
from tests.guest_drivers.vtd_rig import RAM_SIZE as VTD_RAM_SIZE
from tests.guest_drivers.vtd_rig import Rig as VtdRig
from tests.machine.boards import RAM_SIZE, pseries
from vfio_model.devices.edu.device import EduDevice
from vfio_model.guest_drivers.cpu import DirectCpu
from vfio_model.guest_drivers.pseries_ddw import TceWindow
from vfio_model.guest_drivers.vtd_tables import Stage
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.machine.migration import load_device_state, save_device_state
from vfio_model.machine.pseries import PseriesMachine
from vfio_model.memory.address_space import AddressSpace
from vfio_model.memory.iommu_region import IOMMUMemoryRegion, IOMMUNotifier, IOMMUTLBEntry, IOMMUTLBRun
from vfio_model.memory.listener import MemoryListener, MemoryRegionSection
from vfio_model.memory.types import IOMMUAccessFlags, IOMMUNotifierFlag

PAGE = 4096
POOL = 32 << 20
"""Guest RAM from here on holds what is mapped; what the guest's driver needs lies below."""
POOL_PAGES = 64
FIRST = 1 << 20
"""The first bus address that tests use."""
IOVA_PAGES = 48
CHUNK = 1 << 20
RO, WO, RW = int(IOMMUAccessFlags.RO), int(IOMMUAccessFlags.WO), int(IOMMUAccessFlags.RW)


class GuestIommu(ABC):
    """A guest machine with one device behind its IOMMU, which translates."""

    space: AddressSpace
    """The device's."""
    system: AddressSpace

    @abstractmethod
    def map(self, iova: int, gpa: int, perm: int) -> None:
        """The guest maps a page (of 4 KiB), or changes what was mapped, and tells the IOMMU all that it must."""

    @abstractmethod
    def unmap(self, iova: int) -> None:
        """The guest takes a page away, and its call returned."""

    @abstractmethod
    def reset(self) -> None:
        """The machine is reset; nothing was mapped since."""

    @abstractmethod
    def again(self) -> GuestIommu:
        """Another machine of the kind, with this one's state and memory: it migrated."""

    def faults(self) -> int | None:
        """Faults recorded since the last call; None where the IOMMU does not record any."""
        return None

    def bypass(self, on: bool) -> None:
        """Let the device past the IOMMU, or not any more."""
        raise NotImplementedError

    @property
    def region(self) -> IOMMUMemoryRegion:
        """What translates bus addresses of tests."""
        found = self.space.view.lookup(FIRST)
        assert found is not None and isinstance(found.region, IOMMUMemoryRegion), "the device is behind its IOMMU"
        assert found.start == found.offset, "bus addresses are the region's"
        return found.region


class Spapr(GuestIommu):
    """A PHB's default window, by hypercalls."""

    def __init__(self, machine: PseriesMachine | None = None) -> None:
        self.machine = machine or pseries()
        self.machine.phb().bus.plug(EduDevice, 0x10)
        self.space, self.system = self.machine.phb().address_space, self.machine.system
        self._window = TceWindow.default(DirectCpu(self.machine), list_gpa=0x10000)

    def map(self, iova: int, gpa: int, perm: int) -> None:
        """H_PUT_TCE."""
        self._window.map(iova, gpa, PAGE, perm)

    def unmap(self, iova: int) -> None:
        """H_STUFF_TCE."""
        self._window.unmap(iova, PAGE)

    def reset(self) -> None:
        """Of the machine."""
        self.machine.reset()

    def again(self) -> Spapr:
        """By the sections of a migration; memory is a copy."""
        other = Spapr()
        for gpa in range(0, RAM_SIZE, CHUNK):
            other.machine.write_memory(gpa, self.machine.read_memory(gpa, CHUNK))
        load_device_state(other.machine, save_device_state(self.machine))
        return other


@dataclass
class VtdMode:
    """One way to use a VT-d unit."""

    options: VtdOptions
    queued: bool = True
    stage: Stage = Stage.SECOND


_CM = VtdOptions(caching_mode=True)
VTD_MODES = {
    "vtd-registers": VtdMode(_CM, queued=False),
    "vtd-queue": VtdMode(_CM),
    "vtd-39-bit": VtdMode(VtdOptions(caching_mode=True, aw_bits=39)),
    "vtd-qemu": VtdMode(VtdOptions(caching_mode=True, quirks=frozenset({"qemu"}))),
    "vtd-scalable": VtdMode(VtdOptions(caching_mode=True, scalable_mode=True)),
    "vtd-first-stage": VtdMode(VtdOptions(caching_mode=True, scalable_mode=True, fsts=True), stage=Stage.FIRST),
}


class Vtd(GuestIommu):
    """A q35 machine with VT-d in caching mode; edu in a domain of its own, by what Linux's driver does."""

    def __init__(self, mode: VtdMode) -> None:
        self._mode = mode
        self.rig = VtdRig(mode.options, queued=mode.queued, scalable=mode.options.scalable_mode)
        self.machine, self._driver = self.rig.machine, self.rig.vtd
        self.space, self.system = self.machine.root_bus.iommu_address_space(EDU), self.machine.system
        self._domain = self._driver.domain(mode.stage)
        self._driver.attach(self._domain, EDU)

    def map(self, iova: int, gpa: int, perm: int) -> None:
        """An entry, and an invalidation: of what was there, or, in caching mode, of what was not."""
        table = self._domain.table
        self.machine.mmio_write(table.slot(iova), 8, table.leaf(gpa, perm))
        self._driver.flush(self._domain, iova, PAGE)

    def unmap(self, iova: int) -> None:
        """The same."""
        self._driver.unmap(self._domain, iova, PAGE)

    def faults(self) -> int:
        """What is in the records; they are cleared."""
        return len(self._driver.faults())

    def bypass(self, on: bool) -> None:
        """Pass-through."""
        if on:
            self._driver.detach(self._domain, EDU)
            self._driver.attach_pass_through(EDU)
        else:
            self._driver.detach_pass_through(EDU)
            self._driver.attach(self._domain, EDU)

    def reset(self) -> None:
        """Of the machine."""
        self.machine.reset()

    def again(self) -> Vtd:
        """By the sections of a migration; memory, and what the driver knows, is a copy."""
        other = Vtd(self._mode)
        for gpa in range(0, VTD_RAM_SIZE, CHUNK):
            other.machine.write_memory(gpa, self.machine.read_memory(gpa, CHUNK))
        load_device_state(other.machine, save_device_state(self.machine))
        known = {id(self.machine): other.machine}
        other._driver, other._domain = copy.deepcopy((self._driver, self._domain), known)
        return other


FIRST_STAGE = frozenset({"vtd-first-stage"})
"""Whose guest says nothing of a new mapping: nobody can shadow it. All that is mapped can be read."""


def _vtd(mode: VtdMode) -> Callable[[], GuestIommu]:
    return lambda: Vtd(mode)


GUEST_IOMMUS: dict[str, Callable[[], GuestIommu]] = {
    "spapr": Spapr,
    **{name: _vtd(mode) for name, mode in VTD_MODES.items()},
}


@dataclass
class Shadow:
    """What a user of VFIO keeps of a device's mappings: it follows every IOMMU section, maps and unmaps, and looks."""

    one: GuestIommu
    flags: IOMMUNotifierFlag = IOMMUNotifierFlag.IOTLB_EVENTS
    pages: dict[int, tuple[int, int]] = field(default_factory=dict)
    """iova -> (gpa, perm)."""
    heard: list[tuple[str, int]] = field(default_factory=list)
    """What came, in order: (map, unmap or flush, iova)."""
    mistakes: list[str] = field(default_factory=list)
    strict: bool = False
    """Whether an address that changes must be unmapped first: a host answers EEXIST."""
    fail: list[OSError] = field(default_factory=list)
    """What the next flushes answer."""
    flushed: int = 0
    unflushed: int = 0
    """Events since the last flush."""

    def __post_init__(self) -> None:
        self._listener = _Sections(self)
        self.one.space.register_listener(self._listener)

    def close(self) -> None:
        """Follow no more."""
        self.one.space.unregister_listener(self._listener)

    def take(self, _notifier: IOMMUNotifier, entry: IOMMUTLBEntry) -> None:
        """One event: exact for who shadows."""
        self.unflushed += 1
        perm = int(entry.perm) & RW
        if not perm:
            self.heard.append(("unmap", entry.iova))
            for iova in [iova for iova in self.pages if entry.iova <= iova <= entry.last]:
                del self.pages[iova]
            return
        self.heard.append(("map", entry.iova))
        for offset in range(0, entry.addr_mask + 1, PAGE):
            iova = entry.iova + offset
            old, new = self.pages.get(iova), (entry.translated_addr + offset, perm)
            if old is not None and old[0] != new[0] and self.strict:
                self.mistakes.append(f"{iova:#x} was {old} when {new} came")
            self.pages[iova] = new

    def take_run(self, notifier: IOMMUNotifier, run: IOMMUTLBRun) -> None:
        """Many at once."""
        for event in run.events():
            self.take(notifier, event.entry)

    def flush(self) -> OSError | None:
        """The guest's call is about to return."""
        self.flushed, self.unflushed = self.flushed + 1, 0
        return self.fail.pop(0) if self.fail else None


class _Sections(MemoryListener):
    """Registers a notifier for each IOMMU section, and takes it back."""

    priority = 10

    def __init__(self, shadow: Shadow) -> None:
        self._shadow = shadow
        self._notifiers: dict[tuple[int, int], IOMMUNotifier] = {}

    def region_add(self, section: MemoryRegionSection) -> None:
        """Replayed to at once, as VFIO does."""
        if not isinstance(section.mr, IOMMUMemoryRegion):
            return
        shadow, first = self._shadow, section.offset_within_region
        notifier = IOMMUNotifier(
            shadow.take, shadow.flags, first, first + section.size - 1, fn_run=shadow.take_run, flush=shadow.flush
        )
        section.mr.register_notifier(notifier)
        self._notifiers[section.range.start, section.range.last] = notifier
        if IOMMUNotifierFlag.MAP in shadow.flags:
            section.mr.replay(notifier)
            shadow.flush()

    def region_del(self, section: MemoryRegionSection) -> None:
        """Nothing is mapped there any more."""
        if isinstance(section.mr, IOMMUMemoryRegion):
            section.mr.unregister_notifier(self._notifiers.pop((section.range.start, section.range.last)))
            self._shadow.pages.clear()
