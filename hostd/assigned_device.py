"""The process of an assigned device: from its control socket alone to a device that does DMA through the host's tables.

One event loop, one thread, one lane. hostd speaks on the control socket (:mod:`protocols.port.device`), the client
on the vfio-user stream that came with Setup. The process lives for one open: it ends when either of them ends, when
hostd dies, or when the device class raises, which is then in its log and costs nobody else anything.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from hostd.assigned_memory import AssignedMemory, setup_fds
from hostd.device_migration import DeviceMigration
from hostd.device_regions import DeviceRegions
from hostd.device_session import DeviceSession, NoMemory
from hostd.device_surroundings import ProcessSurroundings
from protocols.port import device as port
from protocols.transport.channel import FdChannel
from protocols.transport.kernel import probe
from protocols.transport.loop import Loop
from protocols.transport.unix import SeqpacketConnection, StreamConnection, close_fds
from protocols.transport.vfio_user import MAX_MSG_FDS, VfioUserEndpoint
from protocols.vfio_user.messages import Capabilities, Extensions, Role
from vfio_model.errors import ConfigError, PeerLost, RemoteProtocolError
from vfio_model.pci.device import PCIDevice
from vfio_model.trace import Trace

ControlChannel = FdChannel[port.ToDevice, port.ToHost]
Factory = Callable[[ProcessSurroundings, dict[str, object]], PCIDevice]
"""Makes the device from its surroundings and the properties of Setup."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A debugging aid: in each DMA section, between translation and copy, ring ``reached`` and wait for ``go``
    (eventfds).

    A section with a gate breaks the rule that nothing waits inside one; it exists to prove what the rule is for.
    """

    reached: int
    go: int

    def __call__(self) -> None:
        os.eventfd_write(self.reached, 1)
        os.eventfd_read(self.go)


class AssignedDevice:
    """See the module's head."""

    def __init__(self, control: SeqpacketConnection, make: Factory, trace: Trace, gate: Gate | None = None) -> None:
        self._control: ControlChannel = FdChannel(control, port.TO_DEVICE, port.TO_HOST, port.fd_count)
        self._make, self._trace, self._gate = make, trace, gate
        self._loop = Loop()
        self._around = ProcessSurroundings(trace, self._loop)
        self._around.awake = lambda: self._migration is None or self._migration.runs
        self._memory: AssignedMemory | None = None
        self._device: PCIDevice | None = None
        self._session: DeviceSession | None = None
        self._migration: DeviceMigration | None = None
        self._done = False
        self._loop.register(self._control, self._control_readable, served=True)

    def run(self) -> None:
        """Serve until it is over. An exception of the device class passes through."""
        while not self._done:
            self._around.go_on()
            self._loop.run_once(0.0 if self._has_work else None)
            if self._has_work and not self._done:  # what was served may have stopped it
                self._around.run_idle()
        if self._device is not None:
            self._device.reset_enter()
            self._device.unrealize()
            self._around.close()

    @property
    def _has_work(self) -> bool:
        return bool(self._around.idle_work) and self._around.awake()

    def on_idle(self, callback: Callable[[], None]) -> None:
        """Call before every blocking wait (the trace is flushed there)."""
        self._loop.on_idle(callback)

    def _stop(self, reason: str) -> None:
        if not self._done:
            self._trace("device_process_end", reason=reason)
        self._done = True

    # -- hostd -------------------------------------------------------------------------------------------------------

    def _control_readable(self) -> None:
        try:
            while not self._done and (received := self._control.receive()) is not None:
                self._message(*received)
        except (PeerLost, RemoteProtocolError) as error:
            self._stop(str(error))

    def _message(self, message: port.ToDevice, fds: list[int]) -> None:
        if isinstance(message, port.Setup):
            self._setup(message, fds)
        elif isinstance(message, port.AddSegment) and self._memory is not None:
            self._memory.add(message.segment, fds[0])
        elif isinstance(message, port.RemoveSegment) and self._memory is not None:
            self._memory.remove(message.id)
        elif isinstance(message, port.Quiesce):
            self._control.send(port.Quiet(message.seq))
        elif isinstance(message, port.GiveBack):
            self._give_back(message)
        else:
            close_fds(fds)
            self._stop("quit" if isinstance(message, port.Quit) else f"{type(message).__name__} before Setup")

    def _give_back(self, message: port.GiveBack) -> None:
        if self._device is not None:
            self._device.dma.mappings.invalidate(message.iova, message.last)
        self._control.send(port.GaveBack(message.seq))

    def _setup(self, setup: port.Setup, fds: list[int]) -> None:
        if self._memory is not None:
            close_fds(fds)
            raise RemoteProtocolError("a second Setup")
        fence = probe()
        if fence is not None:
            fence.register()
        stream, rest = setup_fds(fds, len(setup.segments))
        try:
            connection = StreamConnection(socket.socket(fileno=stream), setup.name)
            self._memory = AssignedMemory(setup, rest)
            self._device = self._make(self._around, dict(setup.props))
        except (ConfigError, RemoteProtocolError) as error:
            self._control.send(port.Failed(str(error)[:4000]))
            self._stop(str(error))
            return
        self._loop.register(self._memory.host, lambda: self._stop("hostd is gone"), served=True)
        device = self._device
        device.realize()
        self._migration = DeviceMigration(device, self._trace, logs=True)
        self._migration.attach_dma(self._memory.implementation(self._gate, self._control_readable))
        endpoint = VfioUserEndpoint(
            connection,
            Role.SERVER,
            Capabilities(max_msg_fds=MAX_MSG_FDS, write_multiple=True, extensions=Extensions(clock=True)),
        )
        regions = DeviceRegions(device, self._around)
        self._session = DeviceSession(
            endpoint,
            regions,
            self._around,
            self._loop,
            NoMemory(),
            lambda reason: self._stop(f"client: {reason}"),
            migration=self._migration,
        )
        self._trace("device_process_ready", name=setup.name, model=setup.model)
        self._control.send(port.Ready())
