"""The scenario schema: what ``vfio-model run`` reads.

A scenario is a machine and its devices (:mod:`deploy.scenario_machine`), a host, faults to inject, and steps
(:mod:`deploy.scenario_steps`). Unknown fields and wrong types are errors that name file, line and field. Sizes and
addresses may be written ``64K``, ``1GiB`` or 0x… (see :mod:`deploy.quantity`).

``machine`` and ``devices`` go to guestd in the same shape, as JSON; ``host`` becomes hostd's topology. Nothing in
this file starts anything: :mod:`deploy.launcher` and :mod:`deploy.runner` do.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from deploy.quantity import UNLIMITED, Limit, Seconds, Size
from deploy.scenario_machine import PAGE_SIZES, Q35, Device, Machine, Name, Pseries
from deploy.scenario_steps import (
    DOMAINS,
    PSERIES_STEPS,
    Q35_STEPS,
    Domain,
    MapPages,
    Migrate,
    Replay,
    Role,
    Step,
    UnmapPages,
)
from protocols.interpose import Rule, errno_number
from vfio_model.errors import ConfigError
from vfio_model.uapi.containers import DRIVERS
from vfio_model.vfio.kinds import CONTAINER_KINDS, PREFERENCE, ContainerChoice, ContainerKind

_VTD_PAGES = (1 << 12, 1 << 21, 1 << 30)


class Host(Struct, forbid_unknown_fields=True, kw_only=True):
    """The modelled host: what its kernel and IOMMU can do."""

    page_size: Size = Size(1 << 16)
    memlock: Limit = UNLIMITED
    """RLIMIT_MEMLOCK of the guest's process, in bytes."""
    hpa: Literal["contiguous", "scatter"] = "contiguous"
    pgsizes: list[Size] = msgspec.field(default_factory=lambda: list(PAGE_SIZES))
    """IOMMU page sizes that the host's windows may have."""
    max_windows: Annotated[int, Meta(ge=1, le=2)] = 2
    default_window: Size = Size(1 << 31)
    """Size of the host's 32-bit window in bytes."""
    containers: Annotated[list[ContainerKind], Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["spapr-v2", "spapr-v1"]
    )
    """The kinds of VFIO container that it has."""
    on_stuck: Literal["kill", "warn", "stop-guest"] = "kill"
    """What becomes of a device that does not leave its DMA section by the deadline of a revoke."""


class Fault(Rule, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One fault that the interposer injects into the messages between guestd and hostd; see :mod:`protocols.interpose`.

    One that is not ``armed`` waits for an ``arm`` step.
    """

    iova: Size | None = None
    seconds: Seconds = Seconds(0.1)

    def __post_init__(self) -> None:
        try:
            errno_number(self.errno)
        except ConfigError as error:
            raise ValueError(str(error)) from error


class StartFails(Struct, forbid_unknown_fields=True, kw_only=True):
    """The run is expected to end at start: ``role`` refuses, and says something with ``message`` in it."""

    role: Role
    message: str
    only: list[ContainerKind] = msgspec.field(default_factory=lambda: list(CONTAINER_KINDS))
    """With these kinds of container; with another the run starts."""


class Scenario(Struct, forbid_unknown_fields=True, kw_only=True):
    """The whole file."""

    name: Name
    description: str = ""
    machine: Machine = msgspec.field(default_factory=Pseries)
    host: Host = msgspec.field(default_factory=Host)
    devices: list[Device] = []
    container: ContainerChoice = "auto"
    """The kind of container that guestd asks for: ``auto`` is the first that the host has, in QEMU's order."""
    notifier: Literal["process", "inline"] = "process"
    restart: Literal["never", "on-failure"] = "never"
    interpose: list[Fault] = []
    timeout: Seconds = Seconds(120)
    start_fails: StartFails | None = None
    steps: list[Step] = []

    def __post_init__(self) -> None:
        self._refuse_doubles("id", [device.id for device in self.devices])
        self._refuse_doubles("addr", [self._place(index, device) for index, device in enumerate(self.devices)])
        known = {device.id for device in self.devices}
        assigned = any(device.attach == "assigned" for device in self.devices)
        if assigned and isinstance(self.machine, Q35) and DRIVERS[self.kind] != "type1":
            raise ValueError(f"host: a q35's assigned devices need a type 1 container, not {self.kind}")
        if self.restart != "never" and any(isinstance(step.migrate, Migrate) for step in self.steps):
            raise ValueError("restart: a guest that has moved cannot be started afresh; not with a migrate step")
        for index, step in enumerate(self.steps):
            name, action = step.action
            if name in PSERIES_STEPS and not isinstance(self.machine, Pseries):
                raise ValueError(f"steps[{index}].{name}: only a pseries machine has that")
            if name in Q35_STEPS and not isinstance(self.machine, Q35):
                raise ValueError(f"steps[{index}].{name}: only a q35 machine has that")
            if isinstance(action, MapPages | UnmapPages):
                self._check_pages(f"steps[{index}].{name}", action)
            wanted = [probe.device for probe in action.probes] if isinstance(action, Replay) else []
            wanted.append(getattr(action, "device", None) or "")
            if isinstance(action, Domain) and action.to not in DOMAINS:
                wanted.append(action.to)
            for device in filter(None, wanted):
                if device not in known:
                    raise ValueError(f"steps[{index}].{name}: no device has the id {device}")

    def _place(self, index: int, device: Device) -> str:
        try:
            return self.machine.place(device)
        except ValueError as error:
            raise ValueError(f"devices[{index}].bus: {error}") from error

    def _check_pages(self, where: str, action: MapPages | UnmapPages) -> None:
        if isinstance(self.machine, Pseries) == bool(action.device):
            why = "a device is for a q35: here they share windows" if action.device else "a q35 needs a device"
            raise ValueError(f"{where}: {why}")
        if action.device and action.page_size not in _VTD_PAGES:
            raise ValueError(f"{where}: VT-d has pages of 4K, 2M and 1G")
        if action.device and (action.iova | getattr(action, "gpa", 0)) % action.page_size:
            raise ValueError(f"{where}: addresses are multiples of the page size")

    @classmethod
    def prepare(cls, document: object) -> None:
        """What a file leaves out: the type of the machine, and of a PC's host what is not as a pseries' is."""
        if not isinstance(document, dict):
            return
        machine = document.get("machine")
        if isinstance(machine, dict) and machine.setdefault("type", "pseries") == "q35":
            host = document.setdefault("host", {})
            if isinstance(host, dict):
                host.setdefault("page_size", 4096)
                host.setdefault("containers", ["type1v2", "type1"])

    @property
    def pseries(self) -> Pseries:
        """The machine, for steps of :data:`PSERIES_STEPS`."""
        assert isinstance(self.machine, Pseries), "looked at with the steps"
        return self.machine

    @property
    def kind(self) -> ContainerKind:
        """The kind of container that the assigned devices are in."""
        if self.container != "auto":
            return self.container
        return next(kind for kind in PREFERENCE if kind in self.host.containers)

    def use_container(self, kind: ContainerKind) -> None:
        """Both sides have containers of ``kind``, whatever the file says.

        Type 1 maps no less than a page of the host's, and a pseries guest maps 4 KiB: such a host gets 4 KiB pages.
        """
        self.container, self.host.containers = kind, [kind]
        if DRIVERS[kind] == "type1":
            self.host.page_size = Size(4096)

    @staticmethod
    def _refuse_doubles(what: str, values: list[str]) -> None:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"devices: two have the {what} {value}")
