"""The devices that are open, as the host's service knows them.

Life of an entry::

    starting ──Ready──► running ──release──► stopping ──DeviceDied──► (gone)
        └──────────────Failed, release──────────┘

DeviceDied may come in every state.

A process serves one open and is never used again. Until it is dead the device cannot be opened anew: the old process
maps the same PE block and could use what is meant for the new one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from hostd.events import Descriptor
from vfio_model.memory.revoke import LaneSet


class DeviceState(Enum):
    """See the module's head."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"


@dataclass(eq=False)
class OpenDevice:
    """One open of host device ``name``: ``group`` is the group file's handle, ``mm`` the client's, ``token``
    what the host calls this open."""

    key: int
    name: str
    group: int
    mm: int
    token: int
    state: DeviceState = DeviceState.STARTING
    error: str = ""
    pid: int = 0
    lanes: LaneSet | None = None
    stream: Descriptor | None = None
    pidfd: Descriptor | None = None
    segments: set[str] = field(default_factory=set)

    @property
    def alive(self) -> bool:
        """False when its process has ended, whether or not that was noticed already."""
        return self.lanes is None or self.lanes.alive()

    def drop_descriptors(self) -> None:
        """Close what was not handed to the client."""
        for fd in (self.stream, self.pidfd):
            if fd is not None:
                fd.close()
        self.stream = self.pidfd = None


class DeviceTable:
    """Open devices by key; keys are never used again."""

    def __init__(self) -> None:
        self._keys = itertools.count(1)
        self._by_key: dict[int, OpenDevice] = {}

    def open(self, name: str, group: int, mm: int, token: int) -> OpenDevice:
        """A new entry, starting."""
        device = OpenDevice(next(self._keys), name, group, mm, token)
        self._by_key[device.key] = device
        return device

    def get(self, key: int) -> OpenDevice | None:
        """The entry of ``key``, or None when it is gone."""
        return self._by_key.get(key)

    def remove(self, key: int) -> OpenDevice | None:
        """Forget ``key``: its process is dead."""
        return self._by_key.pop(key, None)

    def named(self, name: str) -> OpenDevice | None:
        """The entry of host device ``name``, in whatever state."""
        return next((device for device in self if device.name == name), None)

    def of_group(self, group: int) -> list[OpenDevice]:
        """Entries that were opened through group handle ``group``."""
        return [device for device in self if device.group == group]

    def of_mm(self, mm: int) -> list[OpenDevice]:
        """Entries of the client ``mm``."""
        return [device for device in self if device.mm == mm]

    def lanes(self, names: tuple[str, ...]) -> list[LaneSet]:
        """The lanes of those of ``names`` that have a process."""
        return [device.lanes for device in self if device.name in names and device.lanes is not None]

    def __iter__(self) -> Iterator[OpenDevice]:
        return iter(list(self._by_key.values()))

    def __len__(self) -> int:
        return len(self._by_key)
