"""The processes behind open devices: start them (or take over one that was attached), set them up, watch them, end
them.

Every process that begins here ends with exactly one DeviceDied, after its pidfd said so and it was reaped. What the
process was given (lanes, pidfd) is kept until the service has dealt with that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from hostd.descriptor import OwnedFd, pid_of_pidfd
from hostd.device_server import SpawnedDevice, SpawnOptions, spawn_device
from hostd.events import Descriptor, DeviceDied, DeviceFailed, DeviceQuiet, DeviceReady, Event
from protocols.port import device as port
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import PeerLanes, Pidfd
from protocols.transport.loop import Loop, LoopTimer
from protocols.transport.shm import create_memory
from protocols.transport.unix import SeqpacketConnection
from vfio_model.errors import ConfigError, PeerLost, RemoteProtocolError
from vfio_model.host.layout import DIRTY_BYTES
from vfio_model.memory.lane import LANES_SIZE, init_lanes

START_SECONDS = 10.0
"""How long a device server may take from its start to Ready (scaled as every deadline)."""
QUIT_SECONDS = 0.5
"""How long a device server may take to end when it is asked, before it is killed."""


class DeviceProcess:
    """One device process, from StartDevice to DeviceDied."""

    def __init__(self, key: int, name: str, control: socket.socket, pidfd: Pidfd, child: SpawnedDevice | None) -> None:
        self.key, self.name, self.pidfd, self.child = key, name, pidfd, child
        self.channel: FdChannel[port.ToHost, port.ToDevice] = FdChannel(
            SeqpacketConnection(control, f"device {name}"), port.TO_HOST, port.TO_DEVICE, port.fd_count
        )
        self.lanes = create_memory(f"lanes.{name}", LANES_SIZE)
        init_lanes(self.lanes.words)
        self.dirty = create_memory(f"dirty.{name}", DIRTY_BYTES)
        self.lane_set = PeerLanes(name, self.lanes.words, pidfd)
        self.stream: OwnedFd | None = None
        self.timer: LoopTimer | None = None
        self.settled = False
        """Ready or Failed was reported."""

    @property
    def pid(self) -> int:
        """0 when a server that was attached did not say."""
        return self.pidfd.pid

    def how(self) -> str:
        """How the dead process ended, as far as its parent can tell."""
        if self.child is None:
            return ""
        self.child.process.join()
        code = self.child.process.exitcode
        if code is None:
            return ""
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"

    def close(self) -> None:
        """Give everything back; the process is dead."""
        if self.timer is not None:
            self.timer.cancel()
        if self.stream is not None:
            self.stream.close()
        self.channel.close()
        self.lane_set.close()
        self.lanes.close()
        with contextlib.suppress(BufferError):  # the host collects from it at this moment: it goes with that view
            self.dirty.close()
        if self.child is not None:
            self.child.close()
        self.pidfd.close()


class DeviceProcesses:
    """All of them, on ``loop``; what happens to them is told to ``emit``."""

    def __init__(self, loop: Loop, directory: Path, emit: Callable[[Event], None], scale: float) -> None:
        self._loop, self._directory, self._emit, self._scale = loop, directory, emit, scale
        self._by_key: dict[int, DeviceProcess] = {}

    def get(self, key: int) -> DeviceProcess | None:
        """The process of device ``key``, or None when it has ended."""
        return self._by_key.get(key)

    def start(
        self,
        key: int,
        setup: port.Setup,
        areas: tuple[int, int],
        segments: tuple[Descriptor, ...],
        attached: tuple[OwnedFd, OwnedFd] | None,
    ) -> None:
        """Start (or take over) and set up. ``areas`` are the memfds of PE block and domain, which stay the caller's;
        ``segments`` and ``attached`` are taken over."""
        try:
            process = self._begin(key, setup, attached)
        except (ConfigError, PeerLost, OSError) as error:
            for fd in segments:
                fd.close()
            self._soon(DeviceFailed(key, str(error)))
            self._soon(DeviceDied(key, "before it began"))
            return
        self._by_key[key] = process
        self._loop.register(process.channel, lambda: self._readable(process))
        self._loop.register(process.pidfd, lambda: self._died(process))
        process.timer = self._loop.call_later(int(START_SECONDS * self._scale * 1e9), lambda: self._slow(process))
        self._set_up(process, setup, areas, segments)

    def _begin(self, key: int, setup: port.Setup, attached: tuple[OwnedFd, OwnedFd] | None) -> DeviceProcess:
        if attached is not None:
            control, pidfd = attached
            pid = pid_of_pidfd(pidfd.fd) or 0
            return DeviceProcess(
                key, setup.name, socket.socket(fileno=control.release()), Pidfd(pidfd.release(), pid), None
            )
        child = spawn_device(setup.model, SpawnOptions(setup.name, self._directory))
        own = Pidfd.open(child.pidfd.pid)
        return DeviceProcess(key, setup.name, socket.socket(fileno=child.control.detach()), own, child)

    def _set_up(
        self, process: DeviceProcess, setup: port.Setup, areas: tuple[int, int], segments: tuple[Descriptor, ...]
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        process.stream = OwnedFd(ours.detach())
        me = Pidfd.open(os.getpid())
        try:
            numbers = [fd.fd for fd in segments if isinstance(fd, OwnedFd)]
            process.channel.send(setup, [theirs.fileno(), process.lanes.fd, process.dirty.fd, *areas, me.fd, *numbers])
        except PeerLost:
            pass  # its pidfd says so
        finally:
            theirs.close()
            me.close()
            for fd in segments:
                fd.close()

    def _soon(self, event: Event) -> None:
        self._loop.call_soon(lambda: self._emit(event))

    # -- what the processes do ---------------------------------------------------------------------------------------

    def _readable(self, process: DeviceProcess) -> None:
        try:
            while process.channel.fileno() >= 0 and (received := process.channel.receive()) is not None:
                self._message(process, received[0])
        except PeerLost:
            self._loop.unregister(process.channel)
            self._end_soon(process)
        except RemoteProtocolError as error:
            self._loop.unregister(process.channel)
            self._failed(process, str(error))
            self.kill(process.key)

    def _message(self, process: DeviceProcess, message: port.ToHost) -> None:
        if isinstance(message, port.Ready) and not process.settled and process.stream is not None:
            process.settled = True
            self._cancel_timer(process)
            stream, process.stream = process.stream, None
            pidfd = OwnedFd(os.dup(process.pidfd.fd))
            self._emit(DeviceReady(process.key, stream, pidfd, process.pid, process.lane_set, process.dirty.view))
        elif isinstance(message, port.Quiet):
            self._emit(DeviceQuiet(process.key, message.seq))
        elif isinstance(message, port.Failed):
            self._failed(process, message.reason)

    def _failed(self, process: DeviceProcess, reason: str) -> None:
        process.settled = True
        self._emit(DeviceFailed(process.key, reason))

    def _slow(self, process: DeviceProcess) -> None:
        self._failed(process, f"{process.name} did not start within {START_SECONDS * self._scale:g} s")
        self.kill(process.key)

    def _cancel_timer(self, process: DeviceProcess) -> None:
        if process.timer is not None:
            process.timer.cancel()
            process.timer = None

    def _died(self, process: DeviceProcess) -> None:
        if self._by_key.pop(process.key, None) is None:
            return
        self._loop.unregister(process.channel)
        self._loop.unregister(process.pidfd)
        self._emit(DeviceDied(process.key, process.how()))
        process.close()

    # -- what is done to them ----------------------------------------------------------------------------------------

    def send(self, key: int, message: port.ToDevice, fds: tuple[Descriptor, ...]) -> None:
        """Send a message; ``fds`` are closed. A process that is gone misses it; one that does not read is killed,
        for it would go on with half of what it was told."""
        process = self._by_key.get(key)
        try:
            if process is not None:
                process.channel.send(message, [fd.fd for fd in fds if isinstance(fd, OwnedFd)])
        except PeerLost:
            self.kill(key)
        finally:
            for fd in fds:
                fd.close()

    def stop(self, key: int) -> None:
        """Ask the process to end, and kill it soon after."""
        process = self._by_key.get(key)
        if process is None:
            return
        self.send(key, port.Quit(), ())
        self._end_soon(process)

    def _end_soon(self, process: DeviceProcess) -> None:
        """It is about to end by itself; if it does not, it is killed."""
        self._cancel_timer(process)
        process.timer = self._loop.call_later(int(QUIT_SECONDS * self._scale * 1e9), lambda: self.kill(process.key))

    def kill(self, key: int) -> None:
        """Kill the process."""
        process = self._by_key.get(key)
        if process is not None:
            process.pidfd.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kill all of them and wait for our own children."""
        for process in list(self._by_key.values()):
            process.pidfd.send_signal(signal.SIGKILL)
            self._loop.unregister(process.channel)
            self._loop.unregister(process.pidfd)
            process.close()
        self._by_key.clear()
