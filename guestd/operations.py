"""What whoever operates the machine may do to it, once for every socket that asks: the control socket, QMP, qtest.

Run states and events bear QEMU's names (``qapi/run-state.json``). An event is told to every subscriber at the moment
it happens; the end of an unplugged device is told at the next turn of the loop, after the answer to whoever asked.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final, Protocol

from guestd.config import ANONYMOUS, DeviceConfig
from guestd.guest import Guest
from protocols.transport.loop import Loop
from vfio_model.errors import ConfigError, InternalGuestError, VfioModelError
from vfio_model.trace import Trace


class RunState(StrEnum):
    """QEMU's ``RunState``, those that there are."""

    RUNNING = "running"
    PRELAUNCH = "prelaunch"
    PAUSED = "paused"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    INTERNAL_ERROR = "internal-error"
    SHUTDOWN = "shutdown"


ELSEWHERE: Final = frozenset((RunState.INMIGRATE, RunState.FINISH_MIGRATE, RunState.POSTMIGRATE))
"""The machine is still to come, or has left."""


class Subscriber(Protocol):
    """Hears of events."""

    def __call__(self, name: str, data: dict[str, object], wall_ns: int) -> None:
        """``wall_ns``: nanoseconds since the epoch."""


def device_path(name: str) -> str:
    """The QOM path of the guest's device ``name``."""
    return f"/machine/peripheral{'-anon' if name.startswith(ANONYMOUS) else ''}/{name}"


class Operations:
    """On ``guest``, which runs from the start."""

    def __init__(self, guest: Guest, loop: Loop, trace: Trace, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        self.guest, self.loop, self._trace, self._wall_ns = guest, loop, trace, wall_ns
        self.state = RunState.RUNNING
        self.error: InternalGuestError | None = None
        """Why the guest cannot go on; from then on it only answers questions."""
        self.subscribers: list[Subscriber] = []
        self.autostart = True
        """Whether a machine that comes from elsewhere runs when it is here."""
        self.migrating: Callable[[], bool] = lambda: False
        """Whether the machine is on its way elsewhere: its devices stay as they are then."""
        self.fatal: VfioModelError | None = None
        """Why the process ends with an error, once its loop has ended."""
        guest.board.on_guest_reset(lambda: loop.call_soon(self._reset_by_guest))

    def emit(self, name: str, data: dict[str, object] | None = None) -> None:
        """Tell every subscriber, in the order in which they came."""
        self._trace("monitor_event", name=name)
        now = self._wall_ns()
        for subscriber in list(self.subscribers):
            subscriber(name, data or {}, now)

    # -- running -------------------------------------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether virtual time passes."""
        return self.state is RunState.RUNNING

    def stop(self, state: RunState = RunState.PAUSED) -> None:
        """Freeze virtual time; devices of other processes rest, as far as they can. Harmless when it is frozen."""
        if self.state is RunState.INMIGRATE:
            self.autostart = False
        if self.running:
            self.guest.clock.freeze()
            if state is RunState.PAUSED:
                self.guest.states.rest()
            self.state = state
            self.emit("STOP")

    def cont(self) -> None:
        """Let virtual time pass. Harmless when it does; a machine that is still to come runs when it is here.

        :raise InternalGuestError: the guest cannot go on. :raise ConfigError: it is about to leave.
        """
        self.check()
        self._check_here()
        if self.state is RunState.INMIGRATE:
            self.autostart = True
        elif not self.running:
            self.guest.states.run()
            self.state = RunState.RUNNING
            self.emit("RESUME")
            self.guest.clock.thaw()

    def reset(self, reason: str = "host-qmp-system-reset") -> None:
        """Reset the machine; it stays stopped if it was.

        :raise InternalGuestError: the guest cannot go on. :raise ConfigError: it is about to leave.
        """
        self.check()
        self._check_here()
        self.guest.reset()
        self.emit("RESET", {"guest": False, "reason": reason})

    def _reset_by_guest(self) -> None:
        """After what the guest did at this moment."""
        if self.error is None and self.state not in ELSEWHERE:
            self.guest.reset()
            self.emit("RESET", {"guest": True, "reason": "guest-reset"})

    def powerdown(self) -> None:
        """Ask the guest to shut down. This machine has no operating system that would: who listens hears of it."""
        self.emit("POWERDOWN")

    def quit(self, reason: str = "host-qmp-quit", *, linger_ns: int = 0) -> None:
        """End the process after the present turn of the loop, or ``linger_ns`` later."""
        if self.state is not RunState.SHUTDOWN:
            self.state = RunState.SHUTDOWN
            self.emit("SHUTDOWN", {"guest": False, "reason": reason})
        if linger_ns:
            self.loop.call_later(linger_ns, self.loop.stop)
        else:
            self.loop.call_soon(self.loop.stop)

    def fail(self, error: InternalGuestError) -> None:
        """The guest cannot go on because of ``error``: it stops, the process lives."""
        if self.error is None:
            self.error = error
            self._trace("internal_error", reason=str(error))
            self.guest.clock.freeze()
            self.state = RunState.INTERNAL_ERROR
            self.emit("STOP")
            self.loop.call_soon(self.guest.states.rest)

    def check(self) -> None:
        """:raise InternalGuestError: when the guest cannot go on."""
        if self.error is not None:
            raise self.error

    def _check_here(self) -> None:
        """:raise ConfigError: what is sent of the machine at this moment must not change."""
        if self.state is RunState.FINISH_MIGRATE:
            raise ConfigError("Migration is not finalized yet")

    # -- devices -------------------------------------------------------------------------------------------------

    def add_device(self, config: DeviceConfig) -> None:
        """:raise ConfigError: see :meth:`~guestd.guest.Guest.add_device`. :raise InternalGuestError: as above."""
        self.check()
        if self.migrating():
            raise ConfigError("device_add not allowed while migrating")
        self.guest.add_device(config)
        _, device = self.guest.devices[config.id]
        device.hotplugged = True

    def remove_device(self, name: str) -> None:
        """Unplug ``name``; DEVICE_DELETED follows.

        :raise ConfigError: when there is no such device, or it may not go. :raise InternalGuestError: as above.
        """
        self.check()
        if self.migrating():
            raise ConfigError("device_del not allowed while migrating")
        if name in self.guest.devices:
            self.guest.board.check_unplug(self.guest.devices[name][0])
        self.guest.remove_device(name)
        named: dict[str, object] = {} if name.startswith(ANONYMOUS) else {"device": name}
        self.loop.call_soon(lambda: self.emit("DEVICE_DELETED", {**named, "path": device_path(name)}))

    def find_device(self, id_or_path: str) -> str:
        """The name of the device with that id or QOM path.

        :raise ConfigError: when there is none.
        """
        for name in self.guest.devices:
            if id_or_path == device_path(name) or (id_or_path == name and not name.startswith(ANONYMOUS)):
                return name
        raise ConfigError(f"no device {id_or_path}")
