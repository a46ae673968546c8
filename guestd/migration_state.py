"""What both ends of a migration have in common: statuses, the devices' entries, how it ends.

::

    source                                         destination (INMIGRATE)
    header, blocks, RAM passes, what devices
    with PRE_COPY say while they run  ───────────► stores RAM, keeps the rest
    stops; last pass, sections, end  ────────────► loads
                                  ◄─── "loaded" ── or "failed: why", and ends
    "go": it is the other's now  ────────────────► runs

Until it has sent "go" the source can go on, and does whenever anything fails; the destination runs when it has "go" and
not before. So the machine never runs twice. If the destination dies after "go" it is lost, as with QEMU.

Source of names: QEMU's ``qapi/migration.json``; ``globalstate`` is its ``migration/global_state.c``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Final, Protocol

from guestd.guest import Guest
from guestd.operations import Operations, RunState
from vfio_model.errors import VMStateError
from vfio_model.machine.migration import Entry
from vfio_model.vfio.migration import DATA_CHUNK, DEVICE_STATE, MAX_EARLY, load, migrating, save
from vfio_model.vfio.pci import VFIOPCIDevice
from vfio_model.vmstate.fields import Field, State, Type, VMStateDescription

LOADED: Final = b"loaded\n"
FAILED: Final = b"failed: "
GO: Final = b"go\n"
MAX_ANSWER: Final = 4096
"""Bytes of what the destination says."""


class Status(StrEnum):
    """``MigrationStatus``, those that there are."""

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


UNDER_WAY: Final = frozenset((Status.SETUP, Status.ACTIVE, Status.DEVICE))


class Settings(Protocol):
    """What was set for migrations."""

    @property
    def capabilities(self) -> dict[str, bool]:
        """By name."""

    @property
    def parameters(self) -> dict[str, int]:
        """By name."""


class Progress:
    """A status that is told to whoever wants events."""

    def __init__(self, operations: Operations, settings: Settings) -> None:
        self._operations, self._settings = operations, settings
        self.status = Status.NONE

    def to(self, status: Status) -> None:
        """Change the status; MIGRATION is told when the capability ``events`` is on."""
        self.status = status
        self.event("MIGRATION", {"status": str(status)})

    def event(self, name: str, data: dict[str, object]) -> None:
        """An event for those who asked for the kind."""
        if self._settings.capabilities["events"]:
            self._operations.emit(name, data)

    @property
    def under_way(self) -> bool:
        """Whether it has begun and not ended."""
        return self.status in UNDER_WAY


def functions(guest: Guest) -> Iterator[tuple[int, VFIOPCIDevice]]:
    """The devices of other processes, each with the instance that its sections have."""
    for instance, function in guest.board.functions():
        if isinstance(function, VFIOPCIDevice):
            yield instance, function


GLOBAL_STATE: Final = VMStateDescription("globalstate", 1, (Field("size"), Field("runstate", Type.U8, array="size")))
"""What the machine did before it stopped to migrate: a run state's name."""


def run_state(take: Callable[[str], None], state: str = RunState.RUNNING) -> Entry:
    """The section of it; ``take`` is told what an incoming one says. Without one the machine ran."""

    def loaded(found: State) -> None:
        take(bytes(found["runstate"]).decode(errors="replace"))

    name = state.encode()
    return Entry(GLOBAL_STATE, 0, lambda: {"size": len(name), "runstate": name}, loaded, optional=True)


def outgoing(guest: Guest, early: Mapping[int, int] | None = None) -> list[Entry]:
    """The states of devices in other processes, which are stopped when they are asked. ``early``: how many bytes were
    read before, by instance.

    :raise VMStateError: one cannot be migrated.
    """
    return [_outgoing(instance, device, (early or {}).get(instance)) for instance, device in functions(guest)]


def _outgoing(instance: int, device: VFIOPCIDevice, early: int | None) -> Entry:
    connection = migrating(device)
    return Entry(DEVICE_STATE, instance, lambda: save(connection, early), lambda _: None)


def incoming(guest: Guest) -> list[Entry]:
    """The same, as they are loaded: the guest's clock, which they follow, has come before them.

    :raise VMStateError: one cannot be migrated.
    """
    return [_incoming(guest, instance, device) for instance, device in functions(guest)]


def _incoming(guest: Guest, instance: int, device: VFIOPCIDevice) -> Entry:
    migrating(device)
    before = bytearray()

    def early(data: bytes) -> None:
        if len(before) + len(data) > MAX_EARLY + DATA_CHUNK:
            raise VMStateError(f"more than {MAX_EARLY} bytes before the machine stands", where=device.name)
        before.extend(data)

    def loaded(state: State) -> None:
        guest.clock.advance_to(guest.clock.virtual.now_ns)
        load(migrating(device), state, before)
        before.clear()

    return Entry(DEVICE_STATE, instance, lambda: {"length": 0, "data": b"", "early": 0}, loaded, early=early)
