"""What guestd is told: its machine, its devices, and itself as a client of the host. A JSON file, checked by schema.

The machine and the devices have the shape of a scenario's. Sizes are bytes. Nothing in it is code: device models
of this process are found by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from guestd.machine_config import ANONYMOUS as ANONYMOUS
from guestd.machine_config import MachineConfig, PseriesConfig, Size
from vfio_model.errors import ConfigError
from vfio_model.vfio.kinds import ContainerChoice

UNLIMITED = (1 << 64) - 1


class DeviceConfig(Struct, kw_only=True, forbid_unknown_fields=True):
    """One function. ``host`` and ``group`` (a number or a path) for an assigned one, ``socket`` for a remote one."""

    id: str
    model: str = ""
    attach: Literal["assigned", "remote", "emulated"] = "emulated"
    addr: str
    bus: str = ""
    """The name of its bus; empty: the machine's first."""
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

    machine: MachineConfig = msgspec.field(default_factory=PseriesConfig)
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
        """The host's page size in bytes; where nobody says, what is usual for the machine."""
        return self.host_page_size or self.machine.host_page_size or self.machine.usual_host_page

    def __post_init__(self) -> None:
        for device in self.devices:
            self.machine.check_bus(device.bus)
        unknown = sorted(set(self.uplinks) - set(self.netdevs))
        if unknown:
            raise ValueError(f"uplinks: there is no netdev {unknown[0]}")
        ids = [device.id for device in self.devices]
        for name in ids:
            if ids.count(name) > 1:
                raise ValueError(f"two devices have the id {name}")


def load(path: Path) -> GuestConfig:
    """A machine without a type is a pseries.

    :raise ConfigError: when the file cannot be read, or the schema refuses it.
    """
    try:
        document = msgspec.json.decode(path.read_bytes())
        if isinstance(document, dict) and isinstance(document.get("machine"), dict):
            document["machine"].setdefault("type", "pseries")
        return msgspec.convert(document, GuestConfig)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise ConfigError(str(error), where=str(path)) from error
