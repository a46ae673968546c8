"""What the container's process does about devices: starts them, watches servers that were offered, deals with stuck
ones."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from hostd.descriptor import OwnedFd, is_seqpacket, pid_of_pidfd
from hostd.device_processes import DeviceProcesses
from hostd.events import Effect, Event, Late, OfferServer, SendDevice, ServerDied, StartDevice, StopDevice
from hostd.log import log
from hostd.shared_areas import SharedAreas
from protocols.port.device import Setup
from protocols.transport.kernel import Pidfd
from protocols.transport.loop import Loop, deadline_scale
from protocols.transport.unix import close_fds
from vfio_model.errors import PeerLost, RemoteProtocolError
from vfio_model.host.host import Host
from vfio_model.trace import Trace

OnStuck = Literal["kill", "warn", "stop-guest"]
"""What happens to a device that stays in one DMA section (or owes an answer) past the deadline. ``stop-guest`` stops
the client's process (SIGSTOP), so that both sides can be looked at."""


class DeviceShell:
    """Carries out the effects that concern devices; what happens to them is told to ``emit``."""

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        host: Host,
        areas: SharedAreas,
        emit: Callable[[Event], None],
        on_stuck: OnStuck,
        trace: Trace,
    ) -> None:
        self._loop, self._host, self._areas, self._emit = loop, host, areas, emit
        self._on_stuck, self._trace = on_stuck, trace
        self._processes = DeviceProcesses(loop, directory, emit, deadline_scale())
        self._offers: dict[str, Pidfd] = {}
        self.late = 0
        """How often a device was late."""

    def do(self, effect: Effect) -> None:
        """Carry out ``effect``; one that is not about devices is a bug of ours."""
        match effect:
            case StartDevice():
                self._start(effect)
            case SendDevice():
                self._processes.send(effect.key, effect.message, effect.fds)
            case StopDevice():
                self._processes.stop(effect.key)
            case OfferServer():
                self._watch(effect)
            case Late():
                self._deal_with(effect)
            case _:
                raise AssertionError(f"{type(effect).__name__} is not about devices")

    def _start(self, effect: StartDevice) -> None:
        device = self._host.groups[effect.group].devices[effect.name]
        container = device.group.container
        assert container is not None and container.driver is not None, "a device is opened in a domain"
        areas = (self._areas.fd(device.pe.words), self._areas.fd(container.driver.domain_words))
        server = None
        if effect.attached is not None:
            self._drop(effect.name)
            control, pidfd = effect.attached
            assert isinstance(control, OwnedFd) and isinstance(pidfd, OwnedFd), "descriptors of this process"
            server = (control, pidfd)
        props = {key: value for key, value in device.spec.props.items() if isinstance(value, bool | int | float | str)}
        model = device.spec.model or "none"
        setup = Setup(effect.name, model, requester_id(effect.name), props, list(effect.segments))
        self._processes.start(effect.key, setup, areas, effect.fds, server)

    # -- servers that were offered -----------------------------------------------------------------------------------

    def _watch(self, effect: OfferServer) -> None:
        assert isinstance(effect.pidfd, OwnedFd), "descriptors of this process"
        name, watch = effect.name, Pidfd(effect.pidfd.release())
        self._offers[name] = watch
        self._loop.register(watch, lambda: self._died(name))

    def _died(self, name: str) -> None:
        self._drop(name)
        self._emit(ServerDied(name))

    def _drop(self, name: str) -> None:
        watch = self._offers.pop(name, None)
        if watch is not None:
            self._loop.unregister(watch)
            watch.close()

    # -- devices that do not leave a section -------------------------------------------------------------------------

    def _deal_with(self, effect: Late) -> None:
        """A process that its user has stopped or traces is left alone: it may be under a debugger."""
        process = self._processes.get(effect.key)
        if process is None:
            return
        self.late += 1
        state = process_state(process.pid)
        action = "warn" if state in ("T", "t") else self._on_stuck
        who = f"device {effect.name} (pid {process.pid}, state {state or '?'})"
        log("hostd", f"{effect.request} waits for {who}: {effect.seconds:.1f} s {effect.meanwhile}: {action}")
        self._trace("hostd_on_stuck", name=effect.name, pid=process.pid, action=action, request=effect.request)
        if action == "kill":
            self._processes.kill(effect.key)
        elif action == "stop-guest":
            stop_process(effect.client)

    def close(self) -> None:
        """End every device. Harmless twice."""
        for name in list(self._offers):
            self._drop(name)
        self._processes.close()


def check_server(numbers: list[int]) -> None:
    """What comes with AttachDevice is a SEQPACKET socket and the pidfd of another process than this.

    :raise RemoteProtocolError: when it is not; ``numbers`` are closed then.
    """
    pid = pid_of_pidfd(numbers[1])
    if not is_seqpacket(numbers[0]) or pid is None or pid == os.getpid():
        close_fds(numbers)
        raise RemoteProtocolError("AttachDevice without a control socket and the pidfd of a device server")


def requester_id(name: str) -> int:
    """bus << 8 | devfn of a PCI address, 0 for another name."""
    bus, _, rest = name.rpartition(":")
    slot, _, function = rest.partition(".")
    try:
        return (int(bus.rpartition(":")[2], 16) << 8 | int(slot, 16) << 3 | int(function)) & 0xFFFF
    except ValueError:
        return 0


def process_state(pid: int) -> str:
    """The kernel's state letter of ``pid``; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def stop_process(pid: int) -> None:
    """SIGSTOP, if it still runs."""
    try:
        process = Pidfd.open(pid)
    except PeerLost:
        return
    process.send_signal(signal.SIGSTOP)
    process.close()
