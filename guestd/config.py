"""What guestd is told: its machine, its devices, and itself as a client of the host. A JSON file, checked by schema.

The machine and the devices have the shape of a scenario's. Sizes are bytes. Nothing in it is code: device models
of this process are found by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from vfio_model.errors import ConfigError
from vfio_model.iommu.spapr import quirks, regs
from vfio_model.iommu.spapr.regs import DEFAULT_WINDOW_SIZE, DMA64_WINDOW_ADDR, DmaOptions
from vfio_model.ranges import U32_MAX, is_aligned
from vfio_model.vfio.kinds import ContainerChoice

Size = Annotated[int, Meta(ge=0)]
UNLIMITED = (1 << 64) - 1


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


class MachineConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """A pseries machine. ``ddw`` to ``dma64_win_addr`` hold for every PHB that does not say otherwise."""

    type: Literal["pseries"] = "pseries"
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
    kvm: bool = False
    """In-kernel acceleration: TCE tables live with the host, which answers their hypercalls itself."""

    @property
    def pgsz_mask(self) -> int:
        """The page sizes as a bitmap."""
        return _bitmap(self.pgsz)

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

    def __post_init__(self) -> None:
        quirks.selected(self.quirks)
        self.phbs = self.phbs or [PhbConfig(index=0)]
        buses = [phb.bus for phb in self.phbs]
        if len({phb.index for phb in self.phbs}) < len(buses) or len(set(buses)) < len(buses):
            raise ValueError("phbs: each has an index and an id of its own")
        for phb in self.phbs:
            _check_windows(self.dma_options(phb))
        if self.page_size < 4096 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two of at least 4096, not {self.page_size}")
        if not self.ram or not is_aligned(self.ram, self.page_size):
            raise ValueError(f"ram must be a positive multiple of page_size, not {self.ram}")


def _bitmap(pgsz: list[int] | int) -> int:
    return pgsz if isinstance(pgsz, int) else sum(set(pgsz))


def _check_windows(options: DmaOptions) -> None:
    page = 1 << regs.TCE_PAGE_SHIFT
    last = options.dma_win_addr + options.dma_win_size - 1
    if (options.dma_win_addr | options.dma64_win_addr) % page or options.dma_win_size < page:
        raise ValueError(f"dma_win_addr, dma64_win_addr must be multiples of {page}, dma_win_size not less")
    if options.dma_win_size // page > U32_MAX or max(last, options.dma64_win_addr) >= 1 << 64:
        raise ValueError("dma_win_size: the window holds fewer than 2**32 pages and ends within 64 bits")


class DeviceConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """One function. ``host`` and ``group`` (a number or a path) for an assigned one, ``socket`` for a remote one."""

    id: str
    model: str = ""
    attach: Literal["assigned", "remote", "emulated"] = "emulated"
    addr: str
    bus: str = ""
    """The bus of which PHB; empty: the first."""
    props: dict[str, int | str | bool] = {}
    host: str = ""
    group: int | str | None = None
    socket: str = ""
    multifunction: bool = False
    """Whether its header says that the slot has more functions."""
    dirty_tracking: bool = True
    """Whether an assigned device is asked which pages it wrote while the machine migrates, if it knows; else its
    container is asked, if that knows, and else everything that it may write counts as written."""
    dma: Literal["shared", "mapped", "message"] = "shared"
    """How a remote device reaches guest RAM. ``shared``: one that can ask for translations has all of it mapped, any
    other as ``mapped``: what the IOMMU lets it reach. ``message``: it sends a message for every access."""
    reconnect_ms: Annotated[int, Meta(ge=0, le=3_600_000)] = 5000
    """The longest pause between attempts to reach a remote device that was lost; 0: it stays lost."""

    @property
    def group_path(self) -> str:
        """``/dev/vfio/<group>``."""
        return self.group if isinstance(self.group, str) else f"/dev/vfio/{self.group}"

    def __post_init__(self) -> None:
        if self.attach == "assigned" and (self.group is None or not self.host):
            raise ValueError(f"{self.id}: an assigned device needs group and host")
        if self.attach == "remote" and not self.socket:
            raise ValueError(f"{self.id}: a remote device needs a socket")
        if self.attach == "emulated" and not self.model:
            raise ValueError(f"{self.id}: an emulated device needs a model")


class MonitorConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """A monitor on the AF_UNIX stream socket ``path``: guestd connects to it, or listens there when ``server``.

    ``control`` speaks QMP; ``readline`` is the line of a person, HMP.
    """

    path: str
    server: bool = False
    mode: Literal["control", "readline"] = "control"


class QtestConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """qtest on the AF_UNIX stream socket ``path``: guestd connects to it, or listens there when ``server``.

    With it, time only passes by steps. ``log``: a file for what is received and sent; ``none``; empty for stderr.
    """

    path: str
    server: bool = False
    log: str = "none"


class GuestConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    machine: MachineConfig = msgspec.field(default_factory=MachineConfig)
    devices: list[DeviceConfig] = []
    drives: dict[str, str] = {}
    """Disks by name, for the ``drive`` of a device: ``mem:SIZE``, ``file:PATH[,ro]``."""
    netdevs: dict[str, str] = {}
    """Networks by name, for the ``netdev`` of a device: ``hub:NAME``, ``udp:HOST:PORT@HOST:PORT``, ``unix:PATH@PATH``,
    ``fd:N``; the local end comes first."""
    uplinks: dict[str, str] = {}
    """Which of the networks are plugged into which hub, and not into a device."""
    memlock: Size | Literal["unlimited"] | None = None
    """RLIMIT_MEMLOCK of this client in bytes."""
    host_page_size: Size | None = None
    container: ContainerChoice = "auto"
    """The kind of VFIO container for assigned devices; ``auto``: the first that the host has, in QEMU's order."""
    notifier: Literal["process", "inline"] = "process"
    host_dir: str = ""
    """The runtime directory of the host, when it is not this guest's own: a host may have several guests."""
    port: str = ""
    """Where ioctls go; empty: ``hostd.zmq`` in the host's runtime directory."""
    name: str = "guest"
    monitors: list[MonitorConfig] = []
    qtest: QtestConfig | None = None
    uuid: str = "00000000-0000-0000-0000-000000000000"
    paused: bool = False
    """Whether the machine waits for ``cont`` before its time passes."""
    incoming: str = ""
    """Where a machine that migrates comes from: ``unix:PATH``, ``tcp:HOST:PORT``, ``fd:NUMBER``, ``defer``; empty: it
    starts here.
    """

    @property
    def memlock_bytes(self) -> int:
        """The limit; all ones for none."""
        limit = self.memlock if self.memlock is not None else self.machine.memlock
        return UNLIMITED if limit is None or limit == "unlimited" else min(int(limit), UNLIMITED)

    @property
    def host_page(self) -> int:
        """The host's page size in bytes; 64 KiB where nobody says."""
        return self.host_page_size or self.machine.host_page_size or 1 << 16

    def __post_init__(self) -> None:
        for device in self.devices:
            self.machine.phb_on(device.bus)
        unknown = sorted(set(self.uplinks) - set(self.netdevs))
        if unknown:
            raise ValueError(f"uplinks: there is no netdev {unknown[0]}")
        ids = [device.id for device in self.devices]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"two devices have the id {name}")


def load(path: Path) -> GuestConfig:
    """:raise ConfigError: when the file cannot be read, or the schema refuses it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=GuestConfig)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(str(error), where=str(path)) from error
