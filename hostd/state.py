"""What the parts of the host's service share, and the one way in which an operation waits for DMA to end."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import TypeVar, cast

from hostd.clients import Client, Clients
from hostd.device_table import DeviceTable
from hostd.events import Descriptor, Effect, Note, SendDevice
from hostd.jobs import DmaWait, JobQueue, QuiesceWait, RevokeWait, Turn, Wait
from protocols.port.device import Quiesce
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
    """``fence`` (None: the machine has none, each device is asked instead) and the lanes of devices are ports to the
    machine; ``skip_wait`` is the fault injection of the revoke test."""

    host: Host
    fence: Fence | None
    clients: Clients
    skip_wait: bool = False
    devices: DeviceTable = field(default_factory=DeviceTable)
    jobs: JobQueue = field(default_factory=JobQueue)
    offers: dict[str, Offer] = field(default_factory=dict)
    effects: list[Effect] = field(default_factory=list)
    revokes: int = 0
    """Revocations that were begun."""
    quiesce_seqs: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    cause: int = 0
    """Cause id of the operation that is being begun."""

    def emit(self, effect: Effect) -> None:
        """Add to what the present event leads to."""
        self.effects.append(effect)

    def note(self, event: str, **fields: object) -> None:
        """A trace event."""
        self.effects.append(Note(event, fields, self.cause))

    def settle(self, result: T | Pending[T], client: Client | None) -> Generator[Wait, None, T]:
        """The end of a host operation: at once, or as :meth:`carry_out` says.

        :raise OSError: what the operation's end raises.
        """
        if not isinstance(result, Pending):
            return result
        return (yield from self.carry_out(cast(Pending[T], result), client))

    def carry_out(
        self, pending: Pending[T], client: Client | None, wanted: Callable[[], bool] = lambda: True
    ) -> Generator[Wait, None, T]:
        """The work of a host operation, then the revocation that it asks for, and its end. Others are served between
        the slices of what is done for ``client``; without one it is done in one go. When it is not ``wanted`` any more,
        no further struct of a batch is begun.

        :raise OSError: what the operation's end raises.
        """
        while client is not None and pending.long:
            yield Turn(client)
            if not wanted():
                pending.stop()
            pending.step()
        wait = self.begin_revoke(pending.lane_devices)
        if wait is not None:
            yield wait
        return pending.finish()

    def begin_revoke(self, lane_devices: tuple[str, ...]) -> DmaWait | None:
        """Begin a revocation over these devices; the new entries are stored.

        :return: what is left to wait for; None: it is over.
        """
        self.revokes += 1
        if self.fence is None:
            return self._begin_quiesce(lane_devices)
        revoke = Revoke(self.fence, self.devices.lanes(lane_devices), skip_wait=self.skip_wait)
        return None if revoke.start() else RevokeWait(revoke)

    def _begin_quiesce(self, lane_devices: tuple[str, ...]) -> QuiesceWait | None:
        """Ask each device that has a process, and perhaps DMA under way: those that are being stopped too. One that
        starts has no client yet, and no DMA."""
        asked = {
            device.key: device.lanes
            for device in self.devices
            if device.name in lane_devices and device.lanes is not None
        }
        seq = next(self.quiesce_seqs)
        for key in asked:
            self.emit(SendDevice(key, Quiesce(seq)))
        wait = QuiesceWait(seq, asked)
        return None if self.skip_wait or wait.over() else wait
