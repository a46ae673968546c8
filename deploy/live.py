"""The live :class:`deploy.system.System`: a CPU over guestd's control socket, and the processes that the launcher
started.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from deploy import assemble, events, explain
from deploy.events import Log
from deploy.explain import DeviceInfo, Explanation
from deploy.firmware import DrivenGuest
from deploy.launcher import Launcher
from deploy.link import Link
from deploy.migration import Mover
from deploy.scenario import Scenario
from deploy.scenario_machine import Pseries
from deploy.scenario_steps import At, Migrate, Wait
from protocols.control import messages as control
from protocols.transport.eventfile import LATEST_NS, EventFile
from vfio_model.errors import ConfigError, RemoteProtocolError, VfioModelError

A = TypeVar("A")
_LOOK_SECONDS = 0.02
_MAX_POSTED = 64
_SMALL_STORE = 4096
"""A larger store to memory is not posted: a message has a limit."""


class ControlCpu:
    """A guest's CPU on guestd's control socket: every call is one command and its answer.

    Stores are posted, as on PCI: they travel in one message with the next command that has an answer, in order, and
    an error of theirs comes up there. Before something else than the guest is touched, :meth:`flush` carries them
    out. Numbers of the scenario's own types become plain ones here: the wire knows no others.
    """

    def __init__(self, link: Link, *, big_endian: bool = True) -> None:
        self._link, self.big_endian = link, big_endian
        self._posted: list[control.Command] = []

    def _ask(self, command: control.Command, kind: type[A]) -> A:
        self._posted.append(command)
        answer = self.flush()
        if not isinstance(answer, kind):
            raise RemoteProtocolError(f"guestd: {type(answer).__name__} in answer to {type(command).__name__}")
        return answer

    def move(self, link: Link) -> None:
        """Go on at the other end of ``link``."""
        assert not self._posted, "flushed"
        self._link = link

    def flush(self) -> control.Answer | None:
        """Carry out the stores that are still posted; the answer to the last command of all."""
        commands, self._posted = self._posted, []
        if len(commands) > 1:
            return self._link.ask_many(commands)[-1]
        return self._link.ask(commands[0]) if commands else None

    def _post(self, command: control.Command) -> None:
        self._posted.append(command)
        if len(self._posted) >= _MAX_POSTED:
            self.flush()

    def hcall(self, nr: int, *args: int) -> tuple[int, list[int]]:
        """Hypercall ``nr``: the signed return code and the output registers."""
        done = self._ask(control.Hcall(int(nr), [int(arg) for arg in args]), control.HcallDone)
        return done.ret, done.outs

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        """RTAS call: the return cells, the status first."""
        return self._ask(control.Rtas(int(token), [int(arg) for arg in args], nret), control.RtasDone).rets

    def read_memory(self, gpa: int, size: int) -> bytes:
        """``size`` bytes of memory. :raise VfioModelError: when nothing is there."""
        done = self._ask(control.ReadMemory(int(gpa), size), control.Bytes)
        if done.result:
            raise VfioModelError(f"the guest has no memory of {size} bytes at {gpa:#x}")
        return done.data

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store ``data``."""
        self._post(control.WriteMemory(int(gpa), data))
        if len(data) > _SMALL_STORE:
            self.flush()

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        return self._ask(control.MmioRead(gpa, size), control.Value).value

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        self._post(control.MmioWrite(gpa, size, int(value)))

    def port_read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        return self._ask(control.PortRead(port, size), control.Value).value

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        self._post(control.PortWrite(port, size, int(value)))

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        """(page address, permission bits, address mask) of a bus address."""
        done = self._ask(control.Translate(int(liobn), int(ioba)), control.Translation)
        return done.translated, done.perm, done.mask

    def clock_step(self, ns: int = 0) -> int:
        """Advance virtual time; the new time in ns."""
        return self._ask(control.ClockStep(ns), control.Value).value


class LiveSystem(DrivenGuest):
    """A run's processes. ``trace`` is the operator's own log, which is merged with theirs;
    ``on_wait`` is called now and then while an answer is awaited, and may raise.
    """

    cpu: ControlCpu

    def __init__(self, scenario: Scenario, launcher: Launcher, on_wait: Callable[[], None]) -> None:
        super().__init__(scenario)
        self._scenario, self._launcher, self._on_wait = scenario, launcher, on_wait
        self._events = EventFile(launcher.directory / "operator.events")
        self.trace = self._events.trace
        self._links: dict[str, Link] = {}
        self._mover = Mover(scenario, launcher, self._watch)
        self.cpu = ControlCpu(self._link("guestd"), big_endian=isinstance(scenario.machine, Pseries))

    def _link(self, role: str) -> Link:
        if role not in self._links:
            self._links[role] = Link(self._launcher.directory, role, watch=self._watch, trace=self.trace)
        return self._links[role]

    def _watch(self) -> None:
        self._launcher.check()
        self._on_wait()

    def devices(self) -> list[DeviceInfo]:
        """The guest's devices."""
        return explain.devices(self._link("guestd"))

    def migrate(self, wanted: Migrate) -> tuple[bool, str]:
        """Whether the guest has moved to another guestd, and how it ended in words."""
        self.cpu.flush()
        moved = self._mover.move(wanted, self._link("guestd"))
        if moved.link is not None:
            self._links["guestd"].close()
            self._links["guestd"] = moved.link
            self.cpu.move(moved.link)
        return moved.link is not None, moved.text

    def status(self, role: str) -> dict[str, object]:
        """What a daemon says of itself."""
        self.cpu.flush()
        return self._link(role).status()

    def explain(self, device: str, iova: int) -> Explanation:
        """Both stages of a translation."""
        self.cpu.flush()
        chosen = explain.choose_device(self.devices(), device)
        return explain.explain(self._link("guestd"), self._link("hostd"), chosen, iova)

    def signal(self, target: At, number: signal.Signals) -> str:
        """Send a signal to a daemon, or to the process of a device (which hostd knows, or which is a server of
        ours).
        """
        self.cpu.flush()
        role = target.role or target.device or ""
        daemon = self._launcher.daemons.get(self._mover.role(role))
        if daemon is not None:
            daemon.expected_end = daemon.expected_end or number == signal.SIGKILL
            daemon.signal(number)
            return f"{role} (pid {daemon.pid})"
        pid = self._device_pid(role)
        os.kill(pid, number)
        return f"the process of {role} (pid {pid})"

    def _device_pid(self, device: str) -> int:
        names = {config.id: name for config, _, name in assemble.assigned(self._scenario, self._mover.copy)}
        for pid, name in device_pids(self._link("hostd")).items():
            if name == names.get(device):
                return pid
        raise ConfigError(f"{device} has no process of its own, or it has ended")

    def wait(self, wait: Wait) -> bool:
        """Whether ``wait.role`` has ended, or answers, in time."""
        daemon = self._launcher.daemons.get(self._mover.role(wait.role))
        if daemon is None:
            raise ConfigError(f"this scenario runs no {wait.role}")
        if wait.until == "gone":
            return daemon.wait(wait.seconds)
        deadline = time.monotonic() + wait.seconds
        link = self._mover.link(wait.role)
        try:
            while time.monotonic() < deadline:
                self._launcher.check()
                if link.ping(_LOOK_SECONDS):
                    return True
            return False
        finally:
            link.close()

    def arm(self) -> None:
        """Give the interposer every rule of the scenario."""
        self.cpu.flush()
        rules = assemble.rules(self._scenario, arm=True)
        self._link("interposer").ask(control.Interpose(msgspec.json.encode(rules)))

    def log(self) -> Log:
        """Every process's events so far, merged. A process may keep its last ones for :data:`LATEST_NS`."""
        self._events.flush()
        time.sleep(4 * LATEST_NS / 1e9)
        return events.read(self._launcher.directory)

    def close(self) -> None:
        """Give the sockets and the log back."""
        for link in self._links.values():
            link.close()
        self._events.close()


class _DeviceProcess(msgspec.Struct):
    name: str
    pid: int = 0


def device_pids(hostd: Link) -> dict[int, str]:
    """The device processes that hostd runs: the host's name of each device, by pid.

    :raise RemoteProtocolError: when hostd's status does not say it.
    """
    try:
        listed = msgspec.convert(hostd.status().get("devices"), list[_DeviceProcess])
    except msgspec.ValidationError as error:
        raise RemoteProtocolError(f"hostd: status: devices: {error}") from error
    return {process.pid: process.name for process in listed if process.pid > 0}


def connect(directory: Path, role: str) -> Link:
    """The launcher's :data:`deploy.launcher.Connect`."""
    return Link(directory, role)
