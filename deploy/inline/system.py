"""A run's :class:`~deploy.system.System` in one process."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec

from deploy import assemble
from deploy.events import Log
from deploy.explain import DeviceInfo, Explanation, Stage, choose_device, compare
from deploy.firmware import DrivenGuest
from deploy.inline.guest import InlineGuest
from deploy.inline.host import InlineHost, lossless
from deploy.inline.log import InlineLog
from deploy.scenario import Scenario
from deploy.scenario_steps import At, Migrate, Wait
from guestd.config import GuestConfig
from guestd.control import MAX_TIME_NS
from guestd.explain import explain as explain_stage1
from guestd.machines.board import Paravirtual
from protocols.interpose import Interposer, Rule, decode_rules
from protocols.transport.loop import Loop
from vfio_model.errors import ConfigError, VfioModelError

P = ParamSpec("P")
R = TypeVar("R")
WITHOUT = "run it without --inline"


class StartRefused(VfioModelError):
    """``role`` would have refused to start."""

    def __init__(self, role: str, error: Exception) -> None:
        self.role = role
        super().__init__(f"{role}: {error}")


def check(scenario: Scenario) -> None:
    """:raise ConfigError: when ``scenario`` has a step, device or rule that needs processes; it names it."""
    for index, step in enumerate(scenario.steps):
        name, action = step.action
        if isinstance(action, At) or (isinstance(action, Wait) and action.until == "gone"):
            raise ConfigError(
                "with --inline there are no processes, which could get signals or end",
                where=f"steps[{index}].{name}",
                hint=WITHOUT,
            )
        if isinstance(action, Migrate):
            raise ConfigError(
                "with --inline there is one process; a machine moves from one to another",
                where=f"steps[{index}].{name}",
                hint=WITHOUT,
            )
    for index, device in enumerate(scenario.devices):
        if device.dma == "mapped":
            raise ConfigError(
                "with --inline nobody gets maps of the guest's memory",
                where=f"devices[{index}].dma",
                hint=WITHOUT,
            )
    lossless(scenario.interpose)


class InlineCpu:
    """The guest's processor. After each command comes what a loop does between two: interrupts, and idle work.

    ``before`` is called ahead of each command, and may raise.
    """

    def __init__(self, guest: InlineGuest, log: InlineLog, loop: Loop, before: Callable[[], None]) -> None:
        self._guest, self._log, self._loop, self._before = guest, log, loop, before
        self._machine = guest.machine
        self.big_endian = self._machine.big_endian
        self._causes = itertools.count((os.getpid() << 32) + 1)
        self.commands = 0

    def _do(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self._before()
        self.commands += 1
        self._log.set_cause(next(self._causes))
        try:
            result = call(*args, **kwargs)
            for unit in self._guest.units:
                unit.around.run_idle()
            self._loop.run_once()
            return result
        except (OverflowError, MemoryError) as error:
            raise VfioModelError(f"{type(error).__name__}: {error}") from error
        finally:
            self._log.set_cause(0)

    @property
    def _calls(self) -> Paravirtual:
        calls = self._guest.board.calls
        if calls is None:
            raise VfioModelError("this machine has neither hypercalls nor RTAS")
        return calls

    def hcall(self, nr: int, *args: int) -> tuple[int, list[int]]:
        """Hypercall ``nr``: the signed return code and the output registers."""
        return self._do(self._calls.hcall, int(nr), *map(int, args))

    def rtas(self, token: int, args: Sequence[int], nret: int) -> list[int]:
        """RTAS call: the return cells, the status first."""
        return self._do(self._calls.rtas, int(token), [int(arg) for arg in args], nret)

    def read_memory(self, gpa: int, size: int) -> bytes:
        """``size`` bytes of memory. :raise VfioModelError: when nothing is there."""
        data = bytearray(size)
        if self._do(self._machine.system.read, int(gpa), data):
            raise VfioModelError(f"the guest has no memory of {size} bytes at {gpa:#x}")
        return bytes(data)

    def write_memory(self, gpa: int, data: bytes) -> None:
        """Store ``data``. :raise VfioModelError: when nothing is there."""
        if result := self._do(self._machine.write_memory, int(gpa), data):
            raise VfioModelError(f"{result!r} at {gpa:#x}")

    def mmio_read(self, gpa: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes."""
        return self._do(self._machine.mmio_read, gpa, size)

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes."""
        self._do(self._machine.mmio_write, gpa, size, value & (1 << size * 8) - 1)

    def port_read(self, port: int, size: int) -> int:
        """IN of 1, 2 or 4 bytes."""
        return self._do(self._guest.board.port_read, port, size)

    def port_write(self, port: int, size: int, value: int) -> None:
        """OUT of 1, 2 or 4 bytes."""
        self._do(self._guest.board.port_write, port, size, value & (1 << size * 8) - 1)

    def translate(self, liobn: int, ioba: int) -> tuple[int, int, int]:
        """(page address, permission bits, address mask) of a bus address."""
        return self._do(self._calls.translate, int(liobn), int(ioba))

    def clock_step(self, ns: int = 0) -> int:
        """Advance virtual time, also that of the devices beside the machine; the new time in ns."""
        if ns > MAX_TIME_NS - self._guest.clock.now_ns:
            raise VfioModelError(f"{ns} ns from {self._guest.clock.now_ns} is beyond the end of virtual time")
        return self._do(self._guest.step_clock, ns)


class InlineSystem(DrivenGuest):
    """See the module's head. ``before`` is called ahead of each command of the CPU, and may raise.

    :raise ConfigError: as :func:`check`. :raise StartRefused: when a part cannot be built.
    """

    cpu: InlineCpu

    def __init__(self, scenario: Scenario, before: Callable[[], None] = lambda: None) -> None:
        check(scenario)
        super().__init__(scenario)
        self._scenario = scenario
        self._log = InlineLog()
        self.trace = self._log.trace("operator")
        self._loop = Loop()
        self._host: InlineHost | None = None
        self._guest: InlineGuest | None = None
        try:
            self.host, self.guest = self._start()
        except VfioModelError:
            self.close()
            raise
        self.cpu = InlineCpu(self.guest, self._log, self._loop, before)

    def _start(self) -> tuple[InlineHost, InlineGuest]:
        scenario, memlock = self._scenario, int(self._scenario.host.memlock)
        try:
            host = self._host = InlineHost(
                assemble.topology(scenario), memlock, scenario.name, self._log, self._loop.call_soon
            )
        except ConfigError as error:
            raise StartRefused("hostd", error) from error
        if scenario.interpose:
            host.port.interposer = Interposer(self._rules())
        try:
            config = msgspec.convert(assemble.guest_config(scenario, Path()), GuestConfig)
            guest = self._guest = InlineGuest(config, host, self._log, self._loop)
            guest.start()
        except (ConfigError, msgspec.ValidationError, OSError) as error:
            raise StartRefused("guestd", error) from error
        return host, guest

    def devices(self) -> list[DeviceInfo]:
        """The guest's devices."""
        return [msgspec.convert(self.guest.device_status(name), DeviceInfo) for name in self.guest.devices]

    def migrate(self, wanted: Migrate) -> tuple[bool, str]:
        """:func:`check` has refused it."""
        raise AssertionError("a scenario that migrates is not run in one process")

    def status(self, role: str) -> dict[str, object]:
        """What the role's daemon would say of itself. :raise ConfigError: when the scenario has no such role."""
        interposer = self.host.port.interposer
        if role == "guestd":
            about = {"role": role, "pid": os.getpid(), "state": "running", "commands": self.cpu.commands}
            return {**about, "reason": "", **self.guest.status()}
        if role == "hostd":
            return self.host.status()
        if role == "interposer" and interposer is not None:
            return {"rules": interposer.counters()}
        raise ConfigError(f"with --inline there is no {role} to ask", hint=WITHOUT)

    def explain(self, device: str, iova: int) -> Explanation:
        """Both stages of a translation."""
        chosen = choose_device(self.devices(), device)
        stage1 = msgspec.convert(explain_stage1(self.guest, chosen.address, int(iova)), Stage)
        stage2 = None
        if chosen.attach == "assigned":
            stage2 = msgspec.convert(self.host.explain(chosen.host, int(iova)), Stage)
        return compare(Explanation(chosen.id, iova, stage1, stage2))

    def signal(self, target: At, number: signal.Signals) -> str:
        """:raise ConfigError: always; :func:`check` has said so before the run."""
        raise ConfigError(f"{number.name}: with --inline there are no processes", hint=WITHOUT)

    def wait(self, wait: Wait) -> bool:
        """Every role answers here, and none ends."""
        return wait.until == "ready"

    def _rules(self, *, arm: bool = False) -> list[Rule]:
        return decode_rules(msgspec.json.encode(assemble.rules(self._scenario, arm=arm)))

    def arm(self) -> None:
        """Let every rule of the scenario act; all begin to count anew. :raise ConfigError: when it has none."""
        if self.host.port.interposer is None:
            raise ConfigError("the scenario has no interpose rules to arm")
        self.host.port.interposer.rules = self._rules(arm=True)

    def log(self) -> Log:
        """Every role's events so far, merged."""
        return self._log.merged()

    def close(self) -> None:
        """Unplug and release everything. Harmless twice."""
        if self._guest is not None:
            self._guest.close()
        if self._host is not None:
            self._host.close()
            self._host = None
        self._loop.close()
