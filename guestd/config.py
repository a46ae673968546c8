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
from vfio_model.iommu.spapr.regs import DEFAULT_WINDOW_SIZE
from vfio_model.ranges import is_aligned

Size = Annotated[int, Meta(ge=0)]
UNLIMITED = (1 << 64) - 1


class MachineConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """A pseries machine with one PHB."""

    type: Literal["pseries"] = "pseries"
    ram: Size = 1 << 30
    page_size: Size = 1 << 16
    """Backing page size of guest RAM, as declared to the host."""
    ddw: bool = True
    pgsz: list[Size] | Size = msgspec.field(default_factory=lambda: [1 << 12, 1 << 16, 1 << 21, 1 << 24])
    """IOMMU page sizes: a list, or a bitmap."""
    dma_win_size: Size = DEFAULT_WINDOW_SIZE
    memlock: Size | None = None
    host_page_size: Size | None = None

    @property
    def pgsz_mask(self) -> int:
        """The page sizes as a bitmap."""
        return self.pgsz if isinstance(self.pgsz, int) else sum(set(self.pgsz))

    def __post_init__(self) -> None:
        if self.page_size < 4096 or self.page_size & (self.page_size - 1):
            raise ValueError(f"page_size must be a power of two of at least 4096, not {self.page_size}")
        if not self.ram or not is_aligned(self.ram, self.page_size):
            raise ValueError(f"ram must be a positive multiple of page_size, not {self.ram}")


class DeviceConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """One function. ``host`` and ``group`` (a number or a path) for an assigned one, ``socket`` for a remote one."""

    id: str
    model: str = ""
    attach: Literal["assigned", "remote", "emulated"] = "emulated"
    addr: str
    props: dict[str, int | str | bool] = {}
    host: str = ""
    group: int | str | None = None
    socket: str = ""
    dma: Literal["shared", "message"] = "shared"
    """Whether a remote device gets guest RAM mapped, or sends a message for every access."""

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


class GuestConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    machine: MachineConfig = msgspec.field(default_factory=MachineConfig)
    devices: list[DeviceConfig] = []
    memlock: Size | Literal["unlimited"] | None = None
    """RLIMIT_MEMLOCK of this client in bytes."""
    host_page_size: Size | None = None
    notifier: Literal["process", "inline"] = "process"
    port: str = ""
    """Where ioctls go; empty: ``hostd.zmq`` in the runtime directory."""
    name: str = "guest"
    monitors: list[MonitorConfig] = []

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
