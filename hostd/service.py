"""The container service: what hostd does, without any I/O.

:meth:`ContainerService.handle` takes one event and returns effects, in the order in which they must be carried out. The
host itself (groups, containers, tables, accounting) is :class:`vfio_model.host.host.Host`; around it is what a kernel
does: open files and who holds them (:mod:`hostd.files`), ioctls that wait (:mod:`hostd.ioctls`), devices that come
and go, and the end of a client.

Rules that must not be broken:

- A Return is sent when the ioctl is *over*: after the revoke, after the device serves. Until then the operation is
  pending; those of the same container wait behind it, those of others do not.
- DeviceFd is sent before the Return that carries its token.
- EOF of a connection is ``release()``: devices end, the group leaves its container, tables go, memory is unpinned.
  Whatever a client does, its locked memory is back at its start value in the end.
- A client's mistake is an errno, or costs it its connection; it never raises out of :meth:`ContainerService.handle`.
- A revoke is pending state; nothing here blocks. Long work is done a slice at a time, others are served in between.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hostd.clients import Clients
from hostd.device_table import DeviceState
from hostd.events import (
    Closed,
    Connected,
    DeviceDied,
    DeviceFailed,
    DeviceQuiet,
    DeviceReady,
    Effect,
    Event,
    FileMessage,
    Late,
    NextSlice,
    PortMessage,
    ServerDied,
    Tick,
)
from hostd.files import FileService, stop_device
from hostd.ioctls import IoctlService
from hostd.jobs import DmaWait, Job, QuiesceWait, Steps
from hostd.kvm import HcallService
from hostd.state import ServiceState
from protocols.port.messages import Ioctl
from vfio_model.host.host import Buffers, Host
from vfio_model.host.topology import HostTopology
from vfio_model.memory.revoke import Fence

DEADLINE_SECONDS = 5.0
"""How long a device may stay in one DMA section before it is late. Below 1 or 2 s a busy machine makes healthy devices
late."""


def random_handle() -> int:
    """64 bits that nobody can guess."""
    return secrets.randbits(64)


@dataclass(frozen=True, slots=True)
class ServiceOptions:
    """``skip_wait`` is the fault injection that leaves out the wait of a revoke: tests prove with it that they would
    notice."""

    deadline: float = DEADLINE_SECONDS
    skip_wait: bool = False
    max_connections: int = 1024
    max_segments: int = 1024
    """Of all clients together: each costs descriptors."""
    table_buffers: Buffers | None = None
    """The memory of TCE tables that a client writes as well; None: as all other."""
    new_handle: Callable[[], int] = random_handle


class ContainerService:
    """See the module's head. ``buffers`` gives the memory of tables and PE blocks. Without a ``fence`` a revoke asks
    each device instead of looking at its lanes."""

    def __init__(
        self, topology: HostTopology, buffers: Buffers, fence: Fence | None, options: ServiceOptions = ServiceOptions()
    ) -> None:
        self._options = options
        clients = Clients(options.new_handle)
        host = Host(
            topology,
            buffers=buffers,
            on_device_open=lambda group, device: clients.handle(),
            handles=_handles(clients),
            table_buffers=options.table_buffers,
        )
        self.state = ServiceState(host, fence, clients, options.skip_wait)
        self._files = FileService(self.state, options.max_connections, options.max_segments)
        self._ioctls = IoctlService(self.state)
        self._hcalls = HcallService(self.state)

    def handle(self, event: Event) -> list[Effect]:
        """What ``event`` leads to, in order."""
        state = self.state
        state.cause = 0
        if isinstance(event, PortMessage):
            message = event.message
            if isinstance(message, Ioctl):
                self._ioctls.submit(event.peer, message)
            else:
                self._hcalls.submit(event.peer, message)
        elif isinstance(event, Tick):
            state.jobs.poll()
            self._look_for_late(event.now)
        else:
            self._dispatch(event)
            state.jobs.poll()
        effects, state.effects = state.effects, []
        return effects

    def _dispatch(self, event: Event) -> None:
        if isinstance(event, FileMessage):
            self._files.message(event.connection, event.message, event.fds)
        elif isinstance(event, Connected):
            self._files.connected(event.connection, event.pid)
        elif isinstance(event, Closed):
            self._files.closed(event.connection)
        elif isinstance(event, DeviceReady):
            self._device_ready(event)
        elif isinstance(event, DeviceFailed):
            self._device_failed(event)
        elif isinstance(event, DeviceQuiet):
            self._device_quiet(event)
        elif isinstance(event, DeviceDied):
            self._device_died(event)
        elif isinstance(event, ServerDied):
            self._files.server_died(event.name)
        elif isinstance(event, NextSlice):
            self.state.jobs.turn()

    # -- devices -----------------------------------------------------------------------------------------------------

    def _device_ready(self, event: DeviceReady) -> None:
        device = self.state.devices.get(event.key)
        if device is None or device.state is not DeviceState.STARTING:
            event.stream.close()
            event.pidfd.close()
            return
        device.stream, device.pidfd, device.pid = event.stream, event.pidfd, event.pid
        device.lanes = event.lanes
        device.state = DeviceState.RUNNING
        if event.dirty is not None:
            self.state.host.set_dirty_map(device.token, event.dirty)
        self.state.note("hostd_device_ready", name=device.name, key=device.key, pid=device.pid)

    def _device_failed(self, event: DeviceFailed) -> None:
        device = self.state.devices.get(event.key)
        if device is None:
            return
        device.error = event.reason
        self.state.note("hostd_device_failed", name=device.name, key=device.key, reason=event.reason)
        stop_device(self.state, device.key, event.reason)

    def _device_quiet(self, event: DeviceQuiet) -> None:
        for job in self.state.jobs.pending():
            if isinstance(job.wait, QuiesceWait):
                job.wait.answered(event.key, event.seq)

    def _device_died(self, event: DeviceDied) -> None:
        """The process is gone: its lanes pass, and the device is closed as if its file had been."""
        state = self.state
        device = state.devices.remove(event.key)
        if device is None:
            return
        expected = device.state is DeviceState.STOPPING
        device.state = DeviceState.STOPPING
        device.error = device.error or f"{device.name} ended {event.how}".rstrip()
        device.drop_descriptors()
        state.note(
            "hostd_device_died", name=device.name, key=device.key, pid=device.pid, how=event.how, expected=expected
        )
        state.jobs.submit(("device", device.key), Job(f"close of {device.name}", self._close_steps(device.token)))

    def _close_steps(self, token: int) -> Steps:
        yield from self.state.settle(self.state.host.device_closed(token), None)

    # -- what is pending ---------------------------------------------------------------------------------------------

    @property
    def revoking(self) -> bool:
        """Whether a Tick could end something, or find it late: an operation waits for DMA sections."""
        jobs = self.state.jobs
        return not jobs.empty and any(isinstance(job.wait, DmaWait) for job in jobs.pending())

    @property
    def working(self) -> bool:
        """Whether long work is under way: :class:`NextSlice` goes on with it."""
        return self.state.jobs.working

    def _look_for_late(self, now: float) -> None:
        """Name the devices that are inside one section, or owe an answer, past the deadline. The lane is read again
        before anybody is called late: it was perhaps this process that was off the processor."""
        for job in self.state.jobs.pending():
            if not isinstance(job.wait, DmaWait):
                continue
            if job.since is None or job.waited is not job.wait:
                job.since, job.waited = now, job.wait
                job.late.clear()
            if now - job.since >= self._options.deadline:
                for name in job.wait.late:
                    self._late(job, name, now - job.since, job.wait.meanwhile)

    def _late(self, job: Job, name: str, seconds: float, meanwhile: str) -> None:
        device = self.state.devices.named(name)
        if device is None or name in job.late:
            return
        job.late.add(name)
        self.state.note("vfio_revoke_late", name=name, request=job.label, seconds=round(seconds, 3))
        self.state.emit(Late(device.key, name, job.label, seconds, job.client, meanwhile))

    def status(self, now: float) -> dict[str, object]:
        """What a person wants to know, as JSON: mms with their locked memory, files, devices, what is pending and
        why."""
        state = self.state
        return {
            "mms": [
                {
                    "name": client.name,
                    "pid": client.pid,
                    "locked_vm": client.mm.locked_vm,
                    "memlock": client.mm.memlock,
                    "leaving": client.leaving,
                }
                for client in state.clients.mms.values()
            ],
            "files": [
                {"path": file.path, "pid": file.client.pid, "closing": file.closing}
                for file in state.clients.files.values()
            ],
            "devices": [
                {"name": device.name, "pid": device.pid, "state": device.state.value} for device in state.devices
            ],
            "offered": sorted(state.offers),
            "pending": [_describe(job, now) for job in state.jobs.pending()],
            "queued": state.jobs.behind(),
            "revokes": state.revokes,
        }

    @property
    def locked_vm(self) -> int:
        """Locked pages of all clients."""
        return sum(client.mm.locked_vm for client in self.state.clients.mms.values())

    def close_descriptors(self) -> None:
        """At the end of the process: close what the service still owns."""
        for offer in self.state.offers.values():
            offer.close()
        for device in self.state.devices:
            device.drop_descriptors()
        for client in self.state.clients.mms.values():
            client.close_memory()


def _describe(job: Job, now: float) -> dict[str, object]:
    what = "" if job.wait is None else job.wait.what
    if isinstance(job.wait, DmaWait):
        inside = job.wait.late
        what = f"{what} of {', '.join(inside)}" if inside else what
    seconds = 0.0 if job.since is None else now - job.since
    return {"request": job.label, "waits_for": what, "seconds": round(seconds, 3), "late": sorted(job.late)}


def _handles(clients: Clients) -> Iterator[int]:
    while True:
        yield clients.handle()
