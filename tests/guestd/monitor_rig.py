"""A guest, its monitors, and what was told, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from guestd.config import DeviceConfig, GuestConfig
from guestd.machine_config import MachineConfig, PseriesConfig
from guestd.operations import Operations
from guestd.qmp import Monitors
from guestd.qmp_commands import MonitorCommands
from protocols.monitor.messages import CommandFailed
from protocols.transport.loop import Loop
from tests.acceleration import kvm
from tests.guestd.accelerated_guest import HostedGuest
from vfio_model.trace import ListTrace

EDU = DeviceConfig(id="e0", model="edu", addr="02.0")


class Machine:
    """A guest, its commands and the events that were told."""

    def __init__(
        self,
        directory: Path,
        loop: Loop,
        machine: MachineConfig | None = None,
        devices: Sequence[DeviceConfig] = (EDU,),
    ) -> None:
        self.loop = loop
        config = GuestConfig(machine=machine or PseriesConfig(ram=1 << 24), devices=list(devices))
        if isinstance(config.machine, PseriesConfig):
            config.machine.kvm = kvm()
        self.guest = HostedGuest(config, directory, loop, ListTrace())
        self.guest.start()
        self.operations = Operations(self.guest, loop, ListTrace(), wall_ns=lambda: 5_000_001_999)
        self.commands = MonitorCommands(self.operations, "1")
        self.monitors = Monitors(self.commands, loop)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.operations.subscribers.append(lambda name, data, _: self.events.append((name, data)))

    def ask(self, name: str, **arguments: object) -> Any:
        return self.commands.ask(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def refusal(self, name: str, **arguments: object) -> tuple[str, str]:
        with pytest.raises(CommandFailed) as caught:
            self.ask(name, **arguments)
        return caught.value.error_class, caught.value.reason

    def human(self, line: str) -> str:
        return str(self.ask("human-monitor-command", command_line=line)).replace("\r\n", "\n")

    def told(self) -> list[str]:
        """The names of the events so far, those of the next turn too."""
        self.loop.run_once(0)
        return [name for name, _ in self.events]

    def config(self, offset: int, size: int, value: int) -> None:
        self.guest.machine.phb().bus.config_write(0x10, offset, size, value)
