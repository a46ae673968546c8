"""What a machine of guestd is told, by its type: pseries or q35. Sizes are bytes, property names are QEMU's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

import msgspec
from msgspec import Meta, Struct

from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import quirks, regs
from vfio_model.iommu.spapr.regs import DEFAULT_WINDOW_SIZE, DMA64_WINDOW_ADDR, DmaOptions
from vfio_model.iommu.vtd.options import VtdOptions
from vfio_model.ranges import U32_MAX, is_aligned

Size = Annotated[int, Meta(ge=0)]
ANONYMOUS: Final = "device["
"""How the names of devices begin that were given none: no id may hold a bracket."""
ROOT_BUS: Final = "pcie.0"
"""Of a q35."""
OnOffAuto = bool | Literal["auto"]


class PhbConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """One PHB. What is None is as the machine says for all of them.

    Its bus is named ``id`` with ``.0`` behind it; without an id that is ``pci.0`` for index 0, else ``phb<index>.0``;
    unless ``bus_name`` says otherwise.
    """

    index: Annotated[int, Meta(ge=0, lt=regs.MAX_PHBS)]
    id: str | None = None
    bus_name: str | None = None
    ddw: bool | None = None
    pgsz: list[Size] | Size | None = None
    dma_win_addr: Size | None = None
    dma_win_size: Size | None = None
    dma64_win_addr: Size | None = None

    @property
    def bus(self) -> str:
        """What a device's ``bus`` calls it."""
        return self.bus_name or f"{self.id or ('pci' if self.index == 0 else f'phb{self.index}')}.0"


class VioConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """One VIO device, as far as its DMA goes: a window of its own. ``reg`` is its unit address; None: the next free."""

    kind: Literal["llan", "vscsi", "tpm", "vty"]
    reg: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None


class PseriesConfig(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="pseries"):
    """A pseries machine. ``ddw`` to ``dma64_win_addr`` hold for every PHB that does not say otherwise."""

    ram: Size = 1 << 30
    page_size: Size = 1 << 16
    """Backing page size of guest RAM, as declared to the host."""
    ddw: bool = True
    pgsz: list[Size] | Size = msgspec.field(default_factory=lambda: [1 << 12, 1 << 16, 1 << 21, 1 << 24])
    """IOMMU page sizes: a list, or a bitmap."""
    dma_win_addr: Size = 0
    dma_win_size: Size = DEFAULT_WINDOW_SIZE
    dma64_win_addr: Size = DMA64_WINDOW_ADDR
    multitce: bool = True
    """Whether the hypercalls for many TCEs are there."""
    phbs: list[PhbConfig] = []
    """None given: one, with index 0."""
    vio: list[VioConfig] = []
    quirks: list[str] = []
    """Differences from QEMU to give up, by name, or ``qemu`` for all that can be."""
    memlock: Size | None = None
    host_page_size: Size | None = None
    usual_host_page: ClassVar[int] = 1 << 16
    """The page size of the hosts of such a machine."""
    kvm: bool = False
    """In-kernel acceleration: TCE tables live with the host, which answers their hypercalls itself."""

    def dma_options(self, phb: PhbConfig) -> DmaOptions:
        """The properties of ``phb``."""
        own = {
            name: value
            for name in ("ddw", "dma_win_addr", "dma_win_size", "dma64_win_addr")
            if (value := getattr(phb, name)) is not None
        }
        shared = {name: getattr(self, name) for name in ("ddw", "dma_win_addr", "dma_win_size", "dma64_win_addr")}
        pgsz = _bitmap(self.pgsz if phb.pgsz is None else phb.pgsz)
        return DmaOptions(**{**shared, **own}, pgsz=pgsz, quirks=quirks.selected(self.quirks))

    def phb_on(self, bus: str) -> int:
        """The index of the PHB whose bus is called so; of the first one for an empty name.

        :raise ConfigError: when there is none.
        """
        for phb in self.phbs:
            if bus in ("", phb.bus):
                return phb.index
        raise ConfigError(f"Bus '{bus}' not found", hint=f"there is {', '.join(phb.bus for phb in self.phbs)}")

    def check_bus(self, bus: str) -> None:
        """:raise ConfigError: no bus is called so."""
        self.phb_on(bus)

    def __post_init__(self) -> None:
        quirks.selected(self.quirks)
        self.phbs = self.phbs or [PhbConfig(index=0)]
        buses = [phb.bus for phb in self.phbs]
        if len({phb.index for phb in self.phbs}) < len(buses) or len(set(buses)) < len(buses):
            raise ValueError("phbs: each has an index and an id of its own")
        for phb in self.phbs:
            _check_windows(self.dma_options(phb))
        _check_ram(self.ram, self.page_size)


def _bitmap(pgsz: list[int] | int) -> int:
    return pgsz if isinstance(pgsz, int) else sum(set(pgsz))


def _check_windows(options: DmaOptions) -> None:
    page = 1 << regs.TCE_PAGE_SHIFT
    last = options.dma_win_addr + options.dma_win_size - 1
    if (options.dma_win_addr | options.dma64_win_addr) % page or options.dma_win_size < page:
        raise ValueError(f"dma_win_addr, dma64_win_addr must be multiples of {page}, dma_win_size not less")
    if options.dma_win_size // page > U32_MAX or max(last, options.dma64_win_addr) >= 1 << 64:
        raise ValueError("dma_win_size: the window holds fewer than 2**32 pages and ends within 64 bits")


def _check_ram(ram: int, page_size: int) -> None:
    if page_size < 4096 or page_size & (page_size - 1):
        raise ValueError(f"page_size must be a power of two of at least 4096, not {page_size}")
    if not ram or not is_aligned(ram, page_size):
        raise ValueError(f"ram must be a positive multiple of page_size, not {ram}")


class IntelIommuConfig(Struct, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """``intel-iommu``, with the properties and defaults that it has on QEMU 11.1."""

    id: str = ""
    aw_bits: Annotated[int, Meta(ge=0, le=255)] = 48
    caching_mode: bool = False
    device_iotlb: bool = False
    dma_translation: bool = True
    eim: OnOffAuto = "auto"
    fs1gp: bool = True
    fsts: bool = False
    intremap: OnOffAuto = "auto"
    pasid_bits: Annotated[int, Meta(ge=0, le=255)] = 0
    scalable_mode: bool = False
    snoop_control: bool = False
    stale_tm: bool = False
    svm: bool = False
    version: Annotated[int, Meta(ge=0, le=U32_MAX)] = 0
    nested: bool = False
    """Nested translation of a guest's own tables; QEMU has none."""
    invalidation: Literal["sync", "async"] = "sync"
    """When a wait descriptor completes: as it is fetched, before the store to the tail returns, as QEMU does; or later,
    while the guest goes on, as hardware does. In either case no device uses any more what was invalidated."""
    quirks: list[str] = []
    """What QEMU does otherwise than the specification and this unit is to do, too, by name, or ``qemu`` for all."""

    def options(self) -> VtdOptions:
        """Those of the unit. ``auto`` is as on QEMU without a kernel's interrupt controller.

        :raise ConfigError: there is no such unit.
        """
        same = {name: getattr(self, name) for name in _SAME_OPTIONS}
        eim, intremap = self.eim is True, self.intremap is not False
        return VtdOptions(**same, eim=eim, intremap=intremap, quirks=frozenset(self.quirks))


_SAME_OPTIONS: Final = (
    *("aw_bits", "caching_mode", "device_iotlb", "dma_translation", "fs1gp", "fsts", "pasid_bits", "scalable_mode"),
    *("snoop_control", "stale_tm", "svm", "nested", "invalidation"),
)


class BridgeConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """A bridge. Its bus is called by its ``id``, unless ``bus_name`` says otherwise. ``props``: QEMU's properties of
    it.
    """

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
    id: str
    bus: str = ROOT_BUS
    addr: str
    multifunction: bool = False
    bus_name: str | None = None
    props: dict[str, int | str | bool] = {}

    @property
    def bus_below(self) -> str:
        """What a device's ``bus`` calls its secondary bus."""
        return self.bus_name or self.id

    @property
    def named_id(self) -> str:
        """Its id; empty when it was given none."""
        return "" if self.id.startswith(ANONYMOUS) else self.id


class Q35Config(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="q35"):
    """A PC with PCI Express. ``bridges``: each behind the one that its bus is of."""

    ram: Size = 1 << 30
    page_size: Size = 1 << 12
    """Backing page size of guest RAM, as declared to the host."""
    iommu: IntelIommuConfig | None = None
    default_bus_bypass_iommu: bool = False
    """Whether functions behind ``pcie.0`` reach memory past the IOMMU."""
    bridges_gate_dma: bool = False
    """Whether DMA from behind a bridge stops there while the bridge is no bus master."""
    bridges: list[BridgeConfig] = []
    memlock: Size | None = None
    host_page_size: Size | None = None
    usual_host_page: ClassVar[int] = 1 << 12
    """The page size of the hosts of such a machine."""

    def check_bus(self, bus: str) -> None:
        """:raise ConfigError: no bus is called so."""
        names = [ROOT_BUS, *(bridge.bus_below for bridge in self.bridges)]
        if bus not in ("", *names):
            raise ConfigError(f"Bus '{bus}' not found", hint=f"there is {', '.join(names)}")

    def __post_init__(self) -> None:
        _check_ram(self.ram, self.page_size)
        known = [ROOT_BUS]
        for bridge in self.bridges:
            if bridge.bus not in known:
                raise ValueError(f"bridges: {bridge.id}: Bus '{bridge.bus}' not found")
            if bridge.bus_below in known:
                raise ValueError(f"bridges: two have the bus {bridge.bus_below}")
            known.append(bridge.bus_below)
        if self.iommu is not None:
            try:
                self.iommu.options()
            except ConfigError as error:
                raise ValueError(f"iommu: {error.what}" + (f"; {error.hint}" if error.hint else "")) from error


MachineConfig = PseriesConfig | Q35Config
"""By ``type``."""
