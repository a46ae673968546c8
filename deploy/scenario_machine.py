"""The guest of a scenario: its machine and the devices in it, as a file writes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from deploy.quantity import Size
from vfio_model.errors import ConfigError
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.pci.bridges import BRIDGES
from vfio_model.ranges import is_aligned

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
Prop = int | str | bool
PAGE_SIZES = tuple(Size(1 << shift) for shift in (12, 16, 21, 24))

ROOT_BUS = "pcie.0"
Attach = Literal["assigned", "remote", "emulated"]


class Phb(Struct, forbid_unknown_fields=True, kw_only=True):
    """One host bridge. What is left out is as the machine says for all of them."""

    index: Annotated[int, Meta(ge=0, le=30)]
    id: Name | None = None
    ddw: bool | None = None
    pgsz: list[Size] | None = None
    dma_win_addr: Size | None = None
    dma_win_size: Size | None = None
    dma64_win_addr: Size | None = None

    @property
    def bus(self) -> str:
        """What a device's ``bus`` calls it."""
        return f"{self.id or ('pci' if self.index == 0 else f'phb{self.index}')}.0"


class Vio(Struct, forbid_unknown_fields=True, kw_only=True):
    """One VIO device: the window that comes with it. ``reg``: its unit address, which is its LIOBN."""

    kind: Literal["llan", "vscsi", "tpm", "vty"]
    reg: Size | None = None


class Pseries(Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="pseries"):
    """A pseries guest, with QEMU's property names and defaults. ``ddw`` to ``dma64_win_addr`` hold for every PHB that
    does not say otherwise.
    """

    ram: Size = Size(1 << 30)
    page_size: Size = Size(1 << 16)
    """The page size that backs guest RAM, as declared to the host; 16M is what hugetlbfs would give."""
    ddw: bool = True
    pgsz: list[Size] = msgspec.field(default_factory=lambda: list(PAGE_SIZES))
    """Page sizes that the guest's PHB offers for dynamic windows."""
    dma_win_addr: Size = Size(0)
    dma_win_size: Size = Size(1 << 30)
    dma64_win_addr: Size = Size(1 << 59)
    multitce: bool = True
    """Whether H_STUFF_TCE and H_PUT_TCE_INDIRECT are there."""
    kvm: bool = False
    """In-kernel acceleration: TCE tables live with the host, which answers their hypercalls itself."""
    phbs: list[Phb] = []
    """The host bridges; none given: one, with index 0."""
    vio: list[Vio] = []
    quirks: list[str] = []
    """Differences from QEMU to give up; ``qemu``: all that can be."""

    @property
    def bridges(self) -> list[Phb]:
        """The host bridges that there are."""
        return self.phbs or [Phb(index=0)]

    def place(self, device: Device) -> str:
        """Where ``device`` is: no other may be there.

        :raise ValueError: there is no such bus.
        """
        index = self.phb_on(device.bus).index
        return f"{device.addr} of PHB {index}" if index else device.addr

    def phb_on(self, bus: str) -> Phb:
        """The bridge whose bus is called so; the first for an empty name.

        :raise ValueError: when there is none.
        """
        for phb in self.bridges:
            if bus in ("", phb.bus):
                return phb
        raise ValueError(f"there is no bus {bus}, only {', '.join(phb.bus for phb in self.bridges)}")

    def end_of_default_window(self, phb: Phb) -> int:
        """The first bus address behind the default window of ``phb``."""
        start = self.dma_win_addr if phb.dma_win_addr is None else phb.dma_win_addr
        return start + (self.dma_win_size if phb.dma_win_size is None else phb.dma_win_size)

    def __post_init__(self) -> None:
        for what in ("index", "bus"):
            if len({getattr(phb, what) for phb in self.bridges}) < len(self.bridges):
                raise ValueError(f"phbs: two have the same {what}")
        _check_sizes(self.ram, self.page_size, self.pgsz)


def _check_sizes(ram: Size, page_size: Size, pgsz: Iterable[Size] = ()) -> None:
    for name, size in (("page_size", page_size), *(("pgsz", size) for size in pgsz)):
        if size < 4096 or size & (size - 1):
            raise ValueError(f"{name} must be a power of two of at least 4K, not {int(size)}")
    if not ram or not is_aligned(ram, page_size):
        raise ValueError(f"ram must be a positive multiple of page_size ({int(page_size)}), not {int(ram)}")


class Bridge(Struct, forbid_unknown_fields=True, kw_only=True):
    """A bridge of a q35. Its bus is called by its ``id``."""

    driver: Literal[
        "pcie-root-port",
        "ioh3420",
        "x3130-upstream",
        "xio3130-downstream",
        "pcie-pci-bridge",
        "i82801b11-bridge",
        "pci-bridge",
        "pxb-pcie",
    ]
    id: Name
    bus: str = ROOT_BUS
    """The bus that it is on."""
    addr: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{1,2}(\.[0-7])?$")]
    props: dict[str, Prop] = {}
    """QEMU's properties of it."""

    def __post_init__(self) -> None:
        known = sorted({*BRIDGES[self.driver].PROPS} - {"id"})
        for name in self.props:
            if name not in known:
                raise ValueError(f"props: {self.driver} has no property {name}; known: {', '.join(known) or 'none'}")


class Q35(Struct, forbid_unknown_fields=True, kw_only=True, tag_field="type", tag="q35"):
    """A PC with PCI Express."""

    ram: Size = Size(1 << 30)
    page_size: Size = Size(1 << 12)
    """The page size that backs guest RAM, as declared to the host."""
    iommu: dict[str, Prop | list[str]] | None = None
    """Properties of ``intel-iommu`` that differ from QEMU's defaults; None: no IOMMU."""
    default_bus_bypass_iommu: bool = False
    """Whether functions behind ``pcie.0`` reach memory past the IOMMU."""
    bridges: list[Bridge] = []

    def place(self, device: Device) -> str:
        """Where ``device`` is: no other may be there.

        :raise ValueError: there is no such bus.
        """
        self.check_bus(device.bus)
        return device.addr if device.bus in ("", ROOT_BUS) else f"{device.addr} of bus {device.bus}"

    def check_bus(self, bus: str) -> None:
        """:raise ValueError: no bus is called so."""
        names = [ROOT_BUS, *(bridge.id for bridge in self.bridges)]
        if bus not in ("", *names):
            raise ValueError(f"there is no bus {bus}, only {', '.join(names)}")

    def __post_init__(self) -> None:
        _check_sizes(self.ram, self.page_size)
        known = [ROOT_BUS]
        for bridge in self.bridges:
            if bridge.bus not in known:
                raise ValueError(f"bridges: {bridge.id}: there is no bus {bridge.bus} before it")
            if bridge.id in known:
                raise ValueError(f"bridges: two have the id {bridge.id}")
            known.append(bridge.id)
        if self.iommu is not None:
            _check_iommu(self.iommu)


def _check_iommu(given: Mapping[str, Prop | list[str]]) -> None:
    own = dataclasses.fields(VtdOptions)
    kinds = {field.name.replace("_", "-"): type(field.default) for field in own if field.name != "dma_drain"}
    options: dict[str, object] = {}
    for name, value in given.items():
        if name == "version" or (name in ("eim", "intremap") and value == "auto"):
            continue
        if name not in kinds:
            raise ValueError(f"iommu: there is no property {name}; known: {', '.join(sorted(kinds))}")
        if name == "quirks":
            value = [value] if isinstance(value, str) else value
        elif type(value) is not kinds[name]:
            raise ValueError(f"iommu: {name} expects {kinds[name].__name__}, got {type(value).__name__}")
        options[name.replace("-", "_")] = value
    try:
        VtdOptions(**options)  # type: ignore[arg-type]  # checked above
    except ConfigError as error:
        raise ValueError(f"iommu: {error.what}" + (f"; {error.hint}" if error.hint else "")) from error


Machine = Pseries | Q35
"""By ``type``, which is pseries where a file does not say."""


class Device(Struct, forbid_unknown_fields=True, kw_only=True):
    """One PCI device. ``group`` is the IOMMU group of an assigned one."""

    id: Name
    model: Name
    attach: Attach = "emulated"
    addr: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{1,2}(\.[0-7])?$")]
    """Slot and function on the PHB's bus, as QEMU writes them: ``02.0``."""
    bus: str = ""
    """The bus, as QEMU names it (``pci.0``, ``pcie.0``, the id of a bridge); empty: the machine's first."""
    group: Annotated[int, Meta(ge=0, le=65535)] | None = None
    dma: Literal["shared", "mapped", "message"] = "shared"
    """How a remote device reaches memory: all of it mapped, with cached translations; what the guest's IOMMU maps, as
    any vfio-user server gets it; or by a message for every access.
    """
    props: dict[str, Prop] = {}

    def __post_init__(self) -> None:
        if self.dma != "shared" and self.attach != "remote":
            raise ValueError(f"dma: {self.dma} is for remote devices; an assigned one walks the host's table itself")
