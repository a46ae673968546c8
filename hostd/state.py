"""What the parts of the host's service share, and the one way in which an operation waits for DMA to end."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TypeVar, cast

from hostd.clients import Clients
from hostd.device_table import DeviceTable
from hostd.events import Descriptor, Effect, Note
from hostd.jobs import JobQueue, RevokeWait, Wait
from vfio_model.host.host import Host
from vfio_model.host.pending import Pending
from vfio_model.memory.revoke import Fence, Revoke

T = TypeVar("T")


@dataclass(eq=False)
class Offer:
    """A device server that somebody started and that nobody has opened yet."""

    name: str
    connection: int
    control: Descriptor
    pidfd: Descriptor

    def close(self) -> None:
        """It will not be used: its control socket closes, which ends it."""
        self.control.close()
        self.pidfd.close()


@dataclass(eq=False)
class ServiceState:
    """``fence`` and the lanes of devices are ports to the machine; ``skip_wait`` is the fault injection of the
    revoke test."""

    host: Host
    fence: Fence
    clients: Clients
    skip_wait: bool = False
    devices: DeviceTable = field(default_factory=DeviceTable)
    jobs: JobQueue = field(default_factory=JobQueue)
    offers: dict[str, Offer] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    revokes: int = 0
    """Revocations that were begun."""
    cause: int = 0
    """Cause id of the operation that is being begun."""

    def emit(self, effect: Effect) -> None:
        """Add to what the present event leads to."""
        self.effects.append(effect)

    def note(self, event: str, **fields: object) -> None:
        """A trace event."""
        self.effects.append(Note(event, fields, self.cause))

    def settle(self, result: T | Pending[T]) -> Generator[Wait, None, T]:
        """The end of a host operation: at once, or after the revocation that it asks for.

        :raise OSError: what the operation's end raises.
        """
        if not isinstance(result, Pending):
            return result
        yield from self.wait_for(result.lane_devices)
        return cast(Pending[T], result).finish()

    def wait_for(self, lane_devices: tuple[str, ...]) -> Generator[Wait, None, None]:
        """Until no DMA section of these devices that began before now is still open."""
        revoke = self.begin_revoke(lane_devices)
        if not revoke.start():
            yield RevokeWait(revoke)

    def begin_revoke(self, lane_devices: tuple[str, ...]) -> Revoke:
        """A revocation over the lanes of these devices, not started yet."""
        self.revokes += 1
        return Revoke(self.fence, self.devices.lanes(lane_devices), skip_wait=self.skip_wait)
