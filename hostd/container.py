"""``hostd container``: the process of the host.

A shell around :class:`hostd.service.ContainerService`: sockets, timers, pidfds and child processes become events;
effects are carried out in order. It never blocks: what takes long is pending in the service, and while DMA is waited
for a timer looks again every :data:`LOOK_NS`, after one spin of at most :data:`SPIN_NS`.

Nothing that a client, a device or an operator sends may raise out of a callback here: a malformed message costs its
sender the connection and nobody else anything.
"""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from hostd.control import ControlServer
from hostd.descriptor import OwnedFd
from hostd.device_shell import DeviceShell, OnStuck, check_server
from hostd.events import (
    Closed,
    Connected,
    Descriptor,
    Disconnect,
    DomainsChanged,
    Effect,
    Event,
    FileMessage,
    NextSlice,
    Note,
    PortMessage,
    SendFile,
    SendReturn,
    SendTable,
    Tick,
)
from hostd.host_explain import explain
from hostd.log import log
from hostd.service import DEADLINE_SECONDS, ContainerService, ServiceOptions
from hostd.shared_areas import SharedAreas
from protocols.port import files, messages
from protocols.transport.channel import FdChannel, RouterChannel
from protocols.transport.kernel import probe
from protocols.transport.loop import Loop, LoopTimer, deadline_scale
from protocols.transport.runtime import RoleLock
from protocols.transport.unix_listener import SeqpacketListener
from protocols.transport.zmq import RouterServer, Sent
from vfio_model.errors import ConfigError, PeerLost, RemoteProtocolError
from vfio_model.host.topology import HostTopology
from vfio_model.trace import Trace
from vfio_model.uapi.hvcall import hcall_name

LOOK_NS = 75_000
"""Between two looks at lanes that are waited for."""
MAX_DESCRIPTORS = 65536
SPIN_NS = 20_000
"""How long a revoke may spin before it leaves the rest to the timer."""

Channel = FdChannel[files.Request, files.Response]
Port = RouterChannel[messages.Request, messages.Response]


@dataclass(frozen=True, slots=True)
class ContainerOptions:
    """``on_stuck`` says what happens to a device that stays in one DMA section past ``deadline`` seconds (scaled by
    VFIO_MODEL_DEADLINE_SCALE). ``skip_revoke_wait`` and ``no_membarrier`` are fault injections."""

    on_stuck: OnStuck = "kill"
    deadline: float = DEADLINE_SECONDS
    skip_revoke_wait: bool = False
    no_membarrier: bool = False
    """Go on as on a kernel without it."""


class ContainerServer:
    """Serves ``directory`` on ``loop`` until :meth:`close`."""

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        topology: HostTopology,
        trace: Trace,
        options: ContainerOptions = ContainerOptions(),
        lock: RoleLock | None = None,
    ) -> None:
        fence = None if options.no_membarrier else probe()
        if fence is None:
            log("hostd", "no membarrier(2) with global expedited barriers: a revoke asks each device, by message")
        scale, descriptors = deadline_scale(), raise_descriptor_limit()
        self._loop, self._trace, self._options = loop, trace, options
        self._areas = SharedAreas()
        self.service = ContainerService(
            topology,
            self._areas.buffers,
            fence,
            ServiceOptions(
                deadline=options.deadline * scale,
                skip_wait=options.skip_revoke_wait,
                max_connections=descriptors // 4,
                max_segments=descriptors // 4,
                table_buffers=self._areas.shared,
            ),
        )
        self._pes = [
            device.pe.words for group in self.service.state.host.groups.values() for device in group.devices.values()
        ]
        self._devices = DeviceShell(
            loop, directory, self.service.state.host, self._areas, self.handle, options.on_stuck, trace
        )
        self._channels: dict[int, Channel] = {}
        self._numbers = itertools.count(1)
        self._timer: LoopTimer | None = None
        self._sweep = False
        self._events: deque[Event] = deque()
        self._busy = self._slice_due = self._ended = False
        self.counters = {"ioctls": 0, "hcalls": 0, "refused": 0}
        self._open_sockets(directory, lock)

    def _open_sockets(self, directory: Path, lock: RoleLock | None) -> None:
        self._listener = SeqpacketListener(directory / "hostd.sock")
        try:
            server = RouterServer(directory / "hostd.zmq", lock=lock)
            self._port: Port = RouterChannel(server, messages.REQUESTS, messages.RESPONSES, messages.Refused)
            self.control = ControlServer(self._loop, directory, "hostd", lock, self._status, self._explain)
        except ConfigError:
            self._listener.close()
            raise
        self._loop.register(self._listener, self._accept)
        self._loop.register(self._port, self._port_readable)

    # -- events and effects ------------------------------------------------------------------------------------------

    def handle(self, event: Event) -> None:
        """Give ``event`` to the service and do what it wants. An event that comes out of an effect waits its turn."""
        self._events.append(event)
        if not self._busy:
            self._drain()
            self._after()

    def _drain(self) -> None:
        self._busy = True
        try:
            while self._events:
                for effect in self.service.handle(self._events.popleft()):
                    self._do(effect)
        finally:
            self._busy = False
        if self.service.working and not self._slice_due:
            self._slice_due = True
            self._loop.call_soon(self._slice)

    def _slice(self) -> None:
        """At the next turn of the loop: long work goes on, after whoever has sent something was served."""
        self._slice_due = False
        if not self._ended:
            self.handle(NextSlice())

    def _do(self, effect: Effect) -> None:
        match effect:
            case SendReturn():
                self._send_return(effect)
            case SendFile():
                self._send_file(effect)
            case SendTable():
                fd = OwnedFd(os.dup(self._areas.fd(effect.words)))
                self._send_file(SendFile(effect.connection, effect.message, (fd,)))
            case Note():
                self._trace.cause = effect.cause
                self._trace(effect.event, **effect.fields)
            case Disconnect():
                self._disconnect(effect.connection, effect.reason)
            case DomainsChanged():
                self._sweep = True
            case _:
                self._devices.do(effect)

    def _after(self) -> None:
        """Spin for a moment on a revoke that is nearly over, then let the timer look."""
        if not self.service.revoking:
            if self._sweep and not len(self.service.state.jobs):
                self._sweep = False
                self._sweep_domains()
            return
        if self._timer is None:
            until = time.monotonic_ns() + SPIN_NS
            while self.service.revoking and time.monotonic_ns() < until:
                self._tick()
            if self.service.revoking:
                self._timer = self._loop.call_later(LOOK_NS, self._look)

    def _look(self) -> None:
        self._timer = None
        self._tick()
        if self.service.revoking:
            self._timer = self._loop.call_later(LOOK_NS, self._look)
        else:
            self._after()

    def _tick(self) -> None:
        self._events.append(Tick(time.monotonic()))
        self._drain()

    def _sweep_domains(self) -> None:
        """Unmap the table memory of containers that are gone."""
        host = self.service.state.host
        groups = host.groups.values()
        drivers = [group.container.driver for group in groups if group.container is not None]
        self._areas.keep(
            [*self._pes, *host.kvm_words, *(driver.domain_words for driver in drivers if driver is not None)]
        )

    # -- the port ----------------------------------------------------------------------------------------------------

    def _port_readable(self) -> None:
        """One message: the loop asks the socket again before it waits."""
        received = self._port.receive()
        if received is None:
            return
        peer, message = received
        if isinstance(message, messages.Ping):
            self._port.send(peer, messages.Pong(message.seq))
            return
        is_ioctl = isinstance(message, messages.Ioctl)
        self.counters["ioctls" if is_ioctl else "hcalls"] += 1
        if self._trace.enabled:
            self._trace.cause = message.cause
            if isinstance(message, messages.Ioctl):
                name = self.service.state.host.ioctl_name(message.handle, message.cmd)
                self._trace("port_recv", seq=message.seq, ioctl=name, count=message.count)
            else:
                self._trace("port_recv", seq=message.seq, hcall=hcall_name(message.nr), count=1)
        self.handle(PortMessage(peer, message))

    def _send_return(self, effect: SendReturn) -> None:
        """A peer that does not read its answers is refused; one that is gone misses them."""
        if self._port.send(effect.peer, effect.message) is Sent.AGAIN:
            self.counters["refused"] += 1
            self._port.refuse(effect.peer, "answers are not read")

    # -- open files --------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        connection = self._listener.accept()
        if connection is None:
            return
        number, pid = next(self._numbers), connection.peer().pid
        connection.name = f"process {pid}"
        channel: Channel = FdChannel(connection, files.REQUESTS, files.RESPONSES, files.fd_count)
        self._channels[number] = channel
        self._loop.register(channel, lambda: self._file_readable(number))
        self.handle(Connected(number, pid))

    def _file_readable(self, number: int) -> None:
        channel = self._channels.get(number)
        if channel is None:
            return
        try:
            received = channel.receive()
            if received is not None:
                message, numbers = received
                if isinstance(message, files.AttachDevice):
                    check_server(numbers)
                self.handle(FileMessage(number, message, tuple(OwnedFd(fd) for fd in numbers)))
        except PeerLost:
            self._closed(number)
        except RemoteProtocolError as error:
            self.counters["refused"] += 1
            self._trace("hostd_peer_refused", peer=channel.name, reason=str(error))
            self._disconnect(number, "")
            self._closed(number)

    def _closed(self, number: int) -> None:
        """Nothing more is read. Our end is closed when the service has released the file: close(2) returns then."""
        channel = self._channels.get(number)
        if channel is not None:
            self._loop.unregister(channel)
        self.handle(Closed(number))

    def _disconnect(self, number: int, reason: str) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            if reason:
                self._trace("hostd_disconnect", peer=channel.name, reason=reason)
            self._loop.unregister(channel)
            channel.close()

    def _send_file(self, effect: SendFile) -> None:
        channel = self._channels.get(effect.connection)
        try:
            if channel is not None:
                channel.send(effect.message, _numbers(effect.fds))
        except PeerLost:
            self._loop.call_soon(lambda: self._closed(effect.connection))
        finally:
            for fd in effect.fds:
                fd.close()

    # -- the operator ------------------------------------------------------------------------------------------------

    def _status(self) -> dict[str, object]:
        status = self.service.status(time.monotonic())
        return {
            **status,
            "locked_vm": self.service.locked_vm,
            "counters": {**self.counters, "late": self._devices.late},
            "connections": len(self._channels),
            "areas": len(self._areas),
        }

    def _explain(self, name: str, iova: int) -> dict[str, object]:
        return explain(self.service.state.host, name, iova)

    def close(self) -> None:
        """End every device, close every socket, remove the socket files. Harmless twice."""
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
        for number in list(self._channels):
            self._disconnect(number, "")
        self._devices.close()
        self.service.close_descriptors()
        for source in (self._listener, self._port):
            self._loop.unregister(source)
            source.close()
        self.control.close()
        self._areas.close()


def raise_descriptor_limit() -> int:
    """Allow as many descriptors as the system lets us have; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, MAX_DESCRIPTORS) if hard != resource.RLIM_INFINITY else MAX_DESCRIPTORS
    if wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(soft, wanted)


def _numbers(fds: tuple[Descriptor, ...]) -> list[int]:
    return [fd.fd for fd in fds if isinstance(fd, OwnedFd)]
