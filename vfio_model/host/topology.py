"""What the modelled host consists of, as a person describes it: platform, page size, IOMMU groups and their devices.

Defaults are those of a POWER8 host: 64 KiB pages, a 32-bit DMA window of 2 GiB at bus address 0 with 4 KiB IOMMU pages,
two windows, 64-bit window at 1 << 59, IOMMU pages of 4K, 64K, 2M and 16M, five table levels. The host's page size is a
value of the model and has nothing to do with the machine that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from vfio_model.errors import ConfigError
from vfio_model.host.hpa import Placement
from vfio_model.host.platform import MAX_LEVELS, PlatformName
from vfio_model.ranges import U64_MAX
from vfio_model.uapi.containers import CONTAINER_KINDS, ContainerKind
from vfio_model.uapi.kvm import KvmCap

GroupIommu = Literal["powernv", "pseries", "emulated", "none"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
DEFAULT_PGSIZES = 4 * KIB | 64 * KIB | 2 * MIB | 16 * MIB
DMA64_START = 1 << 59
MAX_WINDOWS = 2


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A host device: its PCI address as VFIO names it, the model behind it and the model's properties."""

    name: str
    model: str = ""
    props: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GroupSpec:
    """An IOMMU group (a PE on POWER) and what its DMA windows can do. Sizes in bytes; ``pgsizes`` is a bitmap of sizes.

    ``iommu`` is the platform whose tables the group has (empty: the host's), ``emulated`` for a group without hardware
    behind it, or ``none`` for a group without a table group.
    """

    id: int
    devices: tuple[DeviceSpec, ...] = ()
    iommu: GroupIommu | Literal[""] = ""
    viable: bool = True
    ddw: bool = True
    dma32_start: int = 0
    dma32_size: int = 2 * GIB
    """Of the 32-bit window; 0 where there is none."""
    dma64_start: int = DMA64_START
    pgsizes: int = DEFAULT_PGSIZES
    max_windows: int = MAX_WINDOWS
    levels: int = MAX_LEVELS
    create_window: bool = True
    """Whether the platform can create windows; without it VFIO_IOMMU_SPAPR_TCE_CREATE is EPERM."""
    unset_window: bool = True
    """Whether the platform can take a window away; without it VFIO_IOMMU_SPAPR_TCE_REMOVE is EPERM."""


@dataclass(frozen=True, slots=True)
class HostTopology:
    """The whole host. ``domain_bytes`` is the table memory of one container (sparse); checked by :meth:`validate`."""

    groups: tuple[GroupSpec, ...] = ()
    platform: PlatformName = "powernv"
    host_page_size: int = 64 * KIB
    hpa: Placement = "contiguous"
    domain_bytes: int = 256 * MIB
    kvm_lacks: tuple[str, ...] = ()
    """Names of capabilities that this host's KVM has not got (``KVM_CAP_SPAPR_TCE_VFIO``); without KVM_CAP_USER_MEMORY
    it has no KVM at all."""
    containers: tuple[ContainerKind, ...] = ("spapr-v2", "spapr-v1")
    """The kinds of container that VFIO_CHECK_EXTENSION and VFIO_SET_IOMMU know."""
    iova_ranges: tuple[tuple[int, int], ...] = ((0, U64_MAX),)
    """Bus addresses that a type 1 container can map: first and last byte of each range, in order and apart. A host with
    48 bits and a hole for message interrupts has two; the default leaves every address to the guest."""

    def validate(self) -> HostTopology:
        """Itself, once everything in it makes sense. :raise ConfigError: naming the group and the field."""
        _choice("platform", self.platform, get_args(PlatformName), "host")
        _choice("hpa", self.hpa, get_args(Placement), "host")
        if not _power_of_two(self.host_page_size) or not 4 * KIB <= self.host_page_size <= 64 * KIB:
            raise ConfigError(f"host_page_size {self.host_page_size}", where="host", hint="a power of two, 4K to 64K")
        if self.domain_bytes % self.host_page_size or self.domain_bytes < 2 * self.host_page_size:
            raise ConfigError(f"domain_bytes {self.domain_bytes}", where="host", hint="at least two whole pages")
        if not self.containers:
            raise ConfigError("containers is empty", where="host", hint="one or more of " + ", ".join(CONTAINER_KINDS))
        for kind in self.containers:
            _choice("containers", kind, CONTAINER_KINDS, "host")
        _check_iova_ranges(self.iova_ranges, self.host_page_size)
        for name in self.kvm_lacks:
            _choice("kvm_lacks", name, tuple(KvmCap.__members__), "host")
        numbers = [group.id for group in self.groups]
        names = [device.name for group in self.groups for device in group.devices]
        _unique("group", [str(number) for number in numbers])
        _unique("device", names)
        for group in self.groups:
            _check_group(group)
        return self


def _check_iova_ranges(ranges: tuple[tuple[int, int], ...], page: int) -> None:
    behind = 0
    for first, last in ranges:
        if not behind <= first < last <= U64_MAX or first % page or (last + 1) % page:
            raise ConfigError(f"iova_ranges: {first:#x}..{last:#x}", where="host", hint="whole pages, in order, apart")
        behind = last + 2
    if not ranges or ranges[-1][1] < 1 << 32:
        raise ConfigError("iova_ranges ends below 4 GiB", where="host", hint="a table needs three levels at least")


def _check_group(group: GroupSpec) -> None:
    where = f"group {group.id}"
    if group.iommu:
        _choice("iommu", group.iommu, get_args(GroupIommu), where)
    if group.id < 0:
        raise ConfigError("id is negative", where=where)
    if len(group.devices) > 64:
        raise ConfigError(f"{len(group.devices)} devices", where=where, hint="at most 64 in one group")
    if group.pgsizes <= 0 or group.pgsizes & 0xFFF or group.pgsizes >> 64 or not group.pgsizes & 4 * KIB:
        raise ConfigError(f"pgsizes {group.pgsizes:#x}", where=where, hint="a bitmap of page sizes with 4K among them")
    size = group.dma32_size
    if size and (not _power_of_two(size) or not 4 * KIB <= size <= 2 * GIB):
        raise ConfigError(f"dma32_size {size:#x}", where=where, hint="0 or a power of two, 4K to 2G")
    if group.dma32_start < 0 or group.dma32_start % (size or 4 * KIB) or group.dma32_start + group.dma32_size > 4 * GIB:
        raise ConfigError(f"dma32_start {group.dma32_start:#x}", where=where, hint="a multiple of dma32_size below 4G")
    if group.dma64_start < 1 << 55 or group.dma64_start >= 1 << 64 or group.dma64_start & (1 << 55) - 1:
        raise ConfigError(f"dma64_start {group.dma64_start:#x}", where=where, hint="a multiple of 1 << 55, not 0")
    if not 1 <= group.max_windows <= MAX_WINDOWS:
        raise ConfigError(f"max_windows {group.max_windows}", where=where, hint="1 or 2")
    if not 1 <= group.levels <= MAX_LEVELS:
        raise ConfigError(f"levels {group.levels}", where=where, hint=f"1 to {MAX_LEVELS}")


def _choice(what: str, value: str, allowed: tuple[str, ...], where: str) -> None:
    if value not in allowed:
        raise ConfigError(f"{what} {value!r}", where=where, hint="one of " + ", ".join(allowed))


def _unique(what: str, values: list[str]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"{what} {value} appears more than once", where="host")


def _power_of_two(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0
